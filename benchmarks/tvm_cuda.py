"""Programs of target tvm-cuda against torch: errors and latencies.

    python benchmarks/tvm_cuda.py make FOLDER     # compiles and exports; needs nvcc and no GPU
    python benchmarks/tvm_cuda.py run FOLDER      # on a GPU, with TVM's runtime alone; writes FOLDER/results.json

Errors are relative L2 against torch in float64 on the CPU, of fresh inputs. Latencies are medians of CUDA events, with
inputs and outputs on the GPU; torch runs the same module, as it is, compiled, and compiled within a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import planish

ROUNDS = 50


class Layer(nn.Module):
    """A post-norm encoder layer, as of BERT, without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (part(x).view(batch, length, self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = self.norm1(x + self.out(seen))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Images(nn.Module):
    """A small convolutional network: strided, depthwise and pointwise convolutions, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.wide, self.deep = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point, self.head = nn.Conv2d(32, 64, 1), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        x = F.relu(self.wide(x) + x)
        return self.head(F.avg_pool2d(self.point(F.silu(self.deep(x))), 2).mean((2, 3)))


def encoder(layers: int, width: int, heads: int) -> nn.Module:
    return nn.Sequential(*(Layer(width, heads) for _ in range(layers)))


def _case(make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    return {"make": make, "shape": shape, "dtype": dtype}


CASES: dict[str, dict[str, Any]] = {
    "mlp-f32": _case(lambda: nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 33)), (5, 48), torch.float32),
    "images-f32": _case(Images, (8, 3, 65, 97), torch.float32),
    "images-f16": _case(Images, (8, 3, 64, 96), torch.float16),
    "encoder-2-f32": _case(lambda: encoder(2, 256, 4), (3, 77, 256), torch.float32),
    "encoder-2-f16": _case(lambda: encoder(2, 256, 4), (3, 77, 256), torch.float16),
    "bert-base-f16-b1-s128": _case(lambda: encoder(12, 768, 12), (1, 128, 768), torch.float16),
    "bert-base-f16-b8-s512": _case(lambda: encoder(12, 768, 12), (8, 512, 768), torch.float16),
}


def module_of(name: str) -> nn.Module:
    """The same weights on every machine."""
    torch.manual_seed(0)
    made: nn.Module = CASES[name]["make"]().eval()
    return made.to(CASES[name]["dtype"])


def make(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        x = torch.randn(CASES[name]["shape"]).to(CASES[name]["dtype"])
        exe = planish.optimize(module_of(name), "tvm-cuda", example_inputs=(x,), budget=planish.Budget(gates=False))
        exe.export(folder / name, overwrite=True)
        print(f"{name}: exported", flush=True)


def run(folder: Path, names: list[str]) -> None:
    results = []
    for name in names:
        row = {"case": name, **_compare(name, planish.load(folder / name, allow_native=True))}
        results.append(row)
        numbers = "  ".join(f"{key} {value:.3g}" for key, value in row.items() if not isinstance(value, str))
        print(f"{name:24s} {numbers}", flush=True)
    card = torch.cuda.get_device_name(0)
    (folder / "results.json").write_text(json.dumps({"card": card, "ms": results}, indent=1))
    print(card)


def _compare(name: str, exe: planish.Executable) -> dict[str, float]:
    module, x = module_of(name), torch.randn(CASES[name]["shape"]).to(CASES[name]["dtype"])
    with torch.inference_mode():
        want = module.double()(x.double())
        module, given = module.to(x.dtype).cuda(), x.cuda()
        compiled = torch.compile(module)
        return {
            "error": _error(exe(given), want),
            "error of torch": _error(module(given), want),
            "ours": median(lambda: exe(given)),
            "torch": median(lambda: module(given)),
            "compile": median(lambda: compiled(given)),
            "compile+graph": median(_graph(compiled, given)),
        }


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want).norm() / want.norm())


def _graph(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(x)
    return graph.replay


def median(function: Callable[[], Any]) -> float:
    """Milliseconds."""
    for _ in range(5):
        function()
    torch.cuda.synchronize()
    marks = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in marks)
    return float(times[len(times) // 2])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas")
    arguments = parser.parse_args()
    {"make": make, "run": run}[arguments.what](arguments.folder, arguments.cases.split(","))
