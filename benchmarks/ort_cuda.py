"""Target ort-cuda against its peers, in float16: BERT-base, ViT-B/16, and a decoder of Llama's shape reading a prompt.

    python benchmarks/ort_cuda.py [--models bert,vit8,vit64,llama] [--json FILE] [--targets TARGET ...] [--tiny]

Peers: the module of transformers, eager and by torch.compile in a CUDA graph; onnxscript's `ort_fusions` on
torch.onnx.export, in ONNX Runtime with a CUDA graph. Every output is compared with the float32 module first (relative
L2). Times are of a call until its result is there, inputs and outputs on the GPU, medians of interleaved rounds.
Models are prepared in processes of their own, side by side; weights are random, biases and scales not trivial.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

TARGET = "ort-cuda:dtype=float16"
MODELS = ("bert", "vit8", "vit64", "llama")
LABELS = {
    "bert": "BERT-base, 8 × 512 tokens",
    "vit8": "ViT-B/16, 8 images",
    "vit64": "ViT-B/16, 64 images",
    "llama": "Llama shape, 4 layers, 2048 tokens",
}


class First(torch.nn.Module):
    """A module of transformers, of one input and its first output."""

    def __init__(self, module: torch.nn.Module, **options: Any) -> None:
        super().__init__()
        self.module, self.options = module, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.module(x, **self.options)[0]
        return hidden


def build(name: str, tiny: bool) -> tuple[First, torch.Tensor]:
    """The float32 module and its input; the same each time."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
    }
    if name == "bert":
        model = First(BertModel(BertConfig(**(small if tiny else {})), add_pooling_layer=False))
        x = torch.randint(0, 30000, (8, 64 if tiny else 512))
    elif name.startswith("vit"):
        model = First(ViTModel(ViTConfig(**(small if tiny else {})), add_pooling_layer=False))
        x = torch.randn(2 if tiny else int(name[3:]), 3, 224, 224)
    else:
        shape = {"hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32, "intermediate_size": 8192}
        kv = {"num_key_value_heads": 1 if tiny else 8, "vocab_size": 1000 if tiny else 32000}
        model = First(LlamaModel(LlamaConfig(**(small if tiny else shape), **kv)), use_cache=False)
        x = torch.randint(0, kv["vocab_size"], (1, 64 if tiny else 2048))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval(), x


def halved(model: First) -> First:
    """The module in float16, but for the angles of its positions: as transformers loads it."""
    angles = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    model.half()
    for name, buffer in angles.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer)
    return model


def prepare(name: str, folder: Path, targets: list[str], tiny: bool) -> None:
    """Writes reference, artifacts and the peer's model of one row."""
    import planish

    model, x = build(name, tiny)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        reference = model.to(device)(x.to(device)).cpu()
        torch.save(reference, folder / f"{name}.reference.pt")
        model.cpu()
    for number, target in enumerate(targets):
        started = time.perf_counter()
        try:
            exe = planish.optimize(model, target, example_inputs=(x,), budget=planish.Budget(gates=False))
            exe.export(folder / f"{name}.{number}", overwrite=True)
            print(f"{name} {target}: {time.perf_counter() - started:.1f} s", _counts(exe), flush=True)
        except Exception:
            traceback.print_exc()
    started = time.perf_counter()
    try:
        _fused(halved(model), x.half() if x.is_floating_point() else x, folder / f"{name}.peer.onnx")
        print(f"{name} ort_fusions: {time.perf_counter() - started:.1f} s", flush=True)
    except Exception:
        traceback.print_exc()


def _counts(exe: Any) -> str:
    from collections import Counter

    return str(dict(Counter(node.op_type for node in exe.program.entry("main").graph).most_common(9)))


def _fused(model: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    import onnx_ir as ir
    from onnxscript.rewriter import ort_fusions

    plain = path.with_suffix(".plain.onnx")
    torch.onnx.export(model, (x,), plain, dynamo=True, external_data=True, verbose=False)
    fused, counts = ort_fusions.optimize_for_ort(ir.load(plain))
    print({name: count for name, count in counts.items() if count})
    ir.save(fused, path, external_data=path.name + ".data")


def peer_session(path: Path, x: torch.Tensor, shape: tuple[int, ...]) -> tuple[Callable[[], Any], torch.Tensor]:
    """ONNX Runtime with a CUDA graph, its input and output on the GPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=[("CUDAExecutionProvider", {"enable_cuda_graph": "1"})])
    binding = session.io_binding()
    out = torch.empty(shape, dtype=torch.float16, device="cuda")
    for name, tensor, bind in (
        (session.get_inputs()[0].name, x, binding.bind_input),
        (session.get_outputs()[0].name, out, binding.bind_output),
    ):
        kind = {"torch.int64": np.int64, "torch.float16": np.float16}[str(tensor.dtype)]
        bind(name, "cuda", 0, kind, tuple(tensor.shape), tensor.data_ptr())

    def call() -> None:
        session.run_with_iobinding(binding)

    return call, out


def graph_of(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], Any], torch.Tensor]:
    """A CUDA graph of what torch does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def calls_of(name: str, folder: Path, targets: list[str], tiny: bool) -> dict[str, tuple[Callable[[], Any], Any]]:
    """Name → what is timed, and a function that gives its output."""
    import planish

    model, x = build(name, tiny)
    reference = torch.load(folder / f"{name}.reference.pt")
    half = halved(model).cuda()
    given = x.cuda()
    narrow = given.half() if x.is_floating_point() else given
    found: dict[str, tuple[Callable[[], Any], Any]] = {}

    def attempt(label: str, make: Callable[[], tuple[Callable[[], Any], Any]]) -> None:
        try:
            found[label] = make()
        except Exception:
            traceback.print_exc()

    def ours(number: int) -> tuple[Callable[[], Any], Any]:
        exe = planish.load(folder / f"{name}.{number}", allow_native=True)
        runner: Any = exe.runners["main"]
        print(name, targets[number], runner.notes, flush=True)
        buffers = runner.buffers({runner.inputs[0].name: given})
        return buffers.run, lambda: buffers.view(runner.outputs[0].name)

    def fusions() -> tuple[Callable[[], Any], Any]:
        call, out = peer_session(folder / f"{name}.peer.onnx", narrow, tuple(reference.shape))
        return call, lambda: out

    def compiled() -> tuple[Callable[[], Any], Any]:
        fast = torch.compile(half)
        fast(narrow)
        replay, out = graph_of(lambda: fast(narrow))
        return replay, lambda: out

    for number in range(len(targets)):
        attempt(targets[number], lambda number=number: ours(number))
    attempt("ort_fusions, graph", fusions)
    attempt("HF eager", lambda: ((lambda: half(narrow)), lambda: half(narrow)))
    attempt("HF torch.compile, graph", compiled)
    return found


def measure(name: str, folder: Path, targets: list[str], tiny: bool, rounds: int) -> dict[str, Any]:
    reference = torch.load(folder / f"{name}.reference.pt").double()
    row: dict[str, Any] = {}
    with torch.no_grad():
        calls = calls_of(name, folder, targets, tiny)
        for label, (call, output) in list(calls.items()):
            try:
                for _ in range(3):
                    call()
                torch.cuda.synchronize()
                got = output().double().cpu()
                row[label] = {"error": float((got - reference).norm() / reference.norm())}
            except Exception:
                traceback.print_exc()
                del calls[label]
        spent: dict[str, list[float]] = {label: [] for label in calls}
        for _ in range(rounds):
            for label, (call, _) in calls.items():
                torch.cuda.synchronize()
                started = time.perf_counter()
                call()
                torch.cuda.synchronize()
                spent[label].append((time.perf_counter() - started) * 1e3)
    for label, values in spent.items():
        values = sorted(values)
        row[label] |= {"ms": median(values), "quartiles": [values[len(values) // 4], values[3 * len(values) // 4]]}
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(label for row in rows.values() for label in row))
    lines = ["| ms (error) | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[c]['ms']:.3f} ({row[c]['error']:.1e})" if "ms" in row.get(c, {}) else "–" for c in columns]
        lines.append(f"| {LABELS[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--targets", nargs="+", default=[TARGET])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="small models, to try it out")
    parser.add_argument("--prepare", action="store_true", help="only write what is measured")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="ort-cuda-"))
    names = given.models.split(",")
    if given.prepare and len(names) == 1:
        prepare(names[0], folder, given.targets, given.tiny)
        return
    if given.folder is None or given.prepare:
        more = ["--folder", str(folder), "--prepare", "--targets", *given.targets, *(["--tiny"] if given.tiny else [])]
        started = [subprocess.Popen([sys.executable, __file__, "--models", name, *more]) for name in names]
        for process in started:
            process.wait()
    if given.prepare:
        return
    rows = {name: measure(name, folder, given.targets, given.tiny, given.rounds) for name in names}
    import onnxruntime

    print(torch.cuda.get_device_name(), "torch", torch.__version__, "onnxruntime", onnxruntime.__version__)
    print(table(rows))
    if given.json is not None:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "ort": onnxruntime.__version__}
        given.json.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
