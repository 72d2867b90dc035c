"""Requests of random sizes on target ort-cuda: padded to few sizes with a CUDA graph each, against other ways.

    python benchmarks/cuda_buckets.py [--requests N] [--json FILE] [--tiny]

BERT-base in float16 with an attention mask; each request has 1 to 8 rows of 32 to 512 tokens (both uniform), on the GPU
as torch tensors, and its result is there when it ends. Ways: the program without a graph; a graph for each exact shape,
of which the last 16 are kept; sizes padded to powers of two, and to finer ones. Each way sees the same requests, one
way after the other for each request, and each request twice: "again" is the second time, when its shapes are not new.
What buckets need once (captures) is counted apart. Results are compared with those of the program without a graph, and
of the float32 module (relative L2).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

import planish
from planish.ir.target import Target

BASE = "ort-cuda:dtype=float16"
POWERS = "batch:1..8+seq:32..512"
FINER = "batch:1/2/3/4/6/8+seq:64/96/128/160/192/224/256/288/320/352/384/416/448/480/512"
WAYS = {
    "no graph": f"{BASE},graphs=0",
    "a graph for each exact shape": f"{BASE},graphs=16",
    "buckets, powers of two": f"{BASE},buckets={POWERS}",
    "buckets, finer": f"{BASE},buckets={FINER}",
}


class Masked(torch.nn.Module):
    """The encoder of ids and a mask."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.module(input_ids=input_ids, attention_mask=attention_mask)[0]
        return hidden


def build(tiny: bool) -> Masked:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Masked(BertModel(BertConfig(**(small if tiny else {})), add_pooling_layer=False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def request(rng: np.random.Generator, batch: int, length: int) -> dict[str, torch.Tensor]:
    lengths = rng.integers(length // 2, length + 1, batch)
    lengths[rng.integers(batch)] = length
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    arrays = {"input_ids": rng.integers(0, 30000, (batch, length)), "attention_mask": mask}
    return {name: torch.from_numpy(array).cuda() for name, array in arrays.items()}


def runners(model: Masked, ways: Mapping[str, str]) -> dict[str, Any]:
    """One program, compiled each way."""
    from planish.runtime.ort_cuda import compile_ort_cuda

    rng = np.random.default_rng(1)
    example = tuple(value.cpu() for value in request(rng, 2, 64).values())
    shapes = ({0: "batch", 1: "seq"}, {0: "batch", 1: "seq"})
    off = planish.Budget(gates=False)
    exe = planish.optimize(model, WAYS["no graph"], example_inputs=example, dynamic_shapes=shapes, budget=off)
    program = exe.program
    assert program is not None
    found = {}
    for name, text in ways.items():
        found[name] = compile_ort_cuda(program.main, Target.parse(text))
        print(name, found[name].notes, flush=True)
    return found


def timed(runner: Any, feeds: Mapping[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = next(iter(runner.run(feeds).values()))
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3, result


def captured(runner: Any, rng: np.random.Generator) -> float:
    """Milliseconds to run each set of sizes once, which captures it."""
    total = 0.0
    for batch in runner.buckets.sizes["batch"]:
        for length in runner.buckets.sizes["seq"]:
            total += timed(runner, request(rng, batch, length))[0]
    return total


def measure(model: Masked, count: int, ways: Mapping[str, str]) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(0)
    made = runners(model, ways)
    rows: dict[str, dict[str, float]] = {name: {"once": 0.0} for name in made}
    timed(made["no graph"], request(rng, 8, 512))
    for name, runner in made.items():
        if hasattr(runner, "buckets"):
            rows[name]["once"] = captured(runner, rng)
            rows[name]["graphs"] = runner.buckets.count
    spent: dict[str, list[float]] = {name: [] for name in made}
    again: dict[str, list[float]] = {name: [] for name in made}
    worst = dict.fromkeys(made, 0.0)
    against = dict.fromkeys(made, 0.0)
    reference = model.cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    for number in range(count):
        feeds = request(rng, int(rng.integers(1, 9)), int(rng.integers(32, 513)))
        results = {}
        for name, runner in made.items():
            took, results[name] = timed(runner, feeds)
            spent[name].append(took)
            again[name].append(timed(runner, feeds)[0])
        plain = results["no graph"].double()
        for name, result in results.items():
            worst[name] = max(worst[name], float((result.double() - plain).norm() / plain.norm()))
        if number < 8:
            with torch.no_grad():
                want = reference(**feeds).double()
            for name, result in results.items():
                kept = feeds["attention_mask"].bool()
                error = (result.double() - want)[kept].norm() / want[kept].norm()
                against[name] = max(against[name], float(error))
    for name, values in spent.items():
        values = sorted(values)
        rows[name] |= {
            "mean": mean(values), "median": median(values), "p99": values[int(0.99 * len(values))],
            "again": mean(again[name]),
            "differs": worst[name], "error": against[name],
        }  # fmt: skip
    return rows


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    columns = ("graphs", "once", "mean", "median", "p99", "again", "differs", "error")
    lines = ["| ms | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [
            f"{row[c]:.1e}" if c in ("differs", "error") else f"{row[c]:.3g}" if c in row else "–" for c in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a small model, to try it out")
    given = parser.parse_args()
    rows = measure(build(given.tiny), given.requests, WAYS)
    import onnxruntime

    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "ort": onnxruntime.__version__}
    print(about)
    print(table(rows))
    if given.json is not None:
        given.json.write_text(json.dumps(about | {"requests": given.requests, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
