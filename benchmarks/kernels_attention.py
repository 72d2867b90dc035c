"""Generated attention kernels against every form of attention that ONNX Runtime has.

    python benchmarks/kernels_attention.py [--seconds S] [--only TEXT] [--json FILE]

Float32, 12 heads of size 64, batch 1, one thread, processor time, all sides interleaved in one process. A ratio is the
time of ONNX Runtime's form over that of the generated kernel: above 1 the kernel is faster; its interval is a 95 %
bootstrap of the median. "flushed" runs treat denormal numbers as zero. Sparse rows are compared with dense
attention: each block of 64 queries sees that share of the blocks of 64 keys, chosen at random.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.fusion_causal import CONTRIB, FORMS, HEADS, SIZE, WIDTH, graph
from planish.runtime import flush
from planish.runtime.kernels.attention import FlashAttention
from planish.runtime.kernels.attention_sparse import BlockSparseFlashAttention
from planish.runtime.kernels.template import Template, aligned, function
from planish.runtime.measure import interleave, noise, ratio

Run = Callable[[], object]
DENSE, CAUSAL, SPARSE = (128, 197, 512, 1024, 2048), (512, 1024, 2048), (2048, 4096)
BLOCK = 64
#: Of the largest difference from float64, relative to the largest result.
TOLERANCE = 1e-5


def session(model: onnx.ModelProto, feeds: dict[str, np.ndarray], flushed: bool = False) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    if not flushed:
        return lambda: made.run(["y"], feeds)[0]

    # What session.set_denormal_as_zero does to the calling thread, for this run alone.
    def run() -> object:
        flush.begin()
        try:
            return made.run(["y"], feeds)[0]
        finally:
            flush.end()

    return run


def plain_forms(feeds: dict[str, np.ndarray]) -> dict[str, Run]:
    """Dense attention without a mask, as ONNX Runtime has it."""
    heads: dict[str, Any] = {"domain": CONTRIB, "num_heads": HEADS}
    nodes = {
        "MultiHeadAttention": onnx.helper.make_node("MultiHeadAttention", list("qkv"), ["y"], **heads),
        "Attention": onnx.helper.make_node("Attention", list("qkv"), ["y"], q_num_heads=HEADS, kv_num_heads=HEADS),
    }
    return {name: session(graph([node]), feeds) for name, node in nodes.items()}


def masked_forms(feeds: dict[str, np.ndarray]) -> dict[str, Run]:
    """Dense attention with a mask (1, 1, queries, keys) that is an input."""
    runs = {}
    for name, domain, inputs, heads in (
        ("MultiHeadAttention", CONTRIB, ["q", "k", "v", "", "", "mask"], {"num_heads": HEADS}),
        ("Attention", "", ["q", "k", "v", "mask"], {"q_num_heads": HEADS, "kv_num_heads": HEADS}),
    ):
        model = graph([onnx.helper.make_node(name, inputs, ["y"], domain=domain, **heads)])
        shape = [1, 1, *feeds["mask"].shape[2:]]
        model.graph.input.append(onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, shape))
        runs[name] = session(model, feeds)
    return runs


def causal_forms(feeds: dict[str, np.ndarray]) -> dict[str, Run]:
    length = feeds["q"].shape[1]
    models = {name: make(length) for name, make in FORMS.items()}
    return {
        f"{name}, flushed" if flushed else name: session(model, feeds, flushed)
        for name, model in models.items()
        for flushed in (False, True)
    }


def kernel(template: Template, arrays: list[np.ndarray]) -> tuple[Run, float]:
    """The kernel, and its error (see :data:`TOLERANCE`) in the first head, whose inputs are as good as any."""
    y = aligned(np.empty_like(arrays[0]))
    call = function(template)
    given = [aligned(array) for array in arrays]
    call(*given, y)
    want = template.reference(*(a[..., :SIZE] if a.ndim == 3 else a for a in one_head(arrays)))
    error = float(np.abs(y[..., :SIZE] - want).max() / np.abs(want).max())
    tensors = [*given, y]
    return lambda: call(*tensors), error


def one_head(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The arguments without all heads but the first; `head_layout` is the only vector of one number for each."""
    return [a[:1] if a.dtype == np.int32 and a.shape == (HEADS,) else a for a in arrays]


def tensors(length: int) -> list[np.ndarray]:
    rng = np.random.default_rng(length)
    return [rng.standard_normal((1, length, WIDTH), np.float32) for _ in range(3)]


SCALE = np.array([SIZE**-0.5], np.float32)
ZERO = np.zeros(1, np.int64)


def dense_row(length: int, causal: bool) -> tuple[Template, list[np.ndarray], dict[str, Run]]:
    qkv = tensors(length)
    feeds = dict(zip("qkv", qkv, strict=True))
    if causal:
        return FlashAttention(SIZE, causal=True), [*qkv, SCALE, ZERO], causal_forms(feeds)
    return FlashAttention(SIZE), [*qkv, SCALE], plain_forms(feeds)


def masked_row(length: int, kind: str) -> tuple[Template, list[np.ndarray], dict[str, Run]]:
    qkv = tensors(length)
    shape = (1, 1, 1 if kind == "keys" else length, length)
    seen = np.random.default_rng(0).random(shape) < 0.8
    mask = np.where(seen, 0, -1e4).astype(np.float32)
    # ONNX Runtime does not broadcast the axis of queries.
    full = np.broadcast_to(mask, (1, 1, length, length)).copy()
    feeds = dict(zip(("q", "k", "v", "mask"), [*qkv, full], strict=True))
    return FlashAttention(SIZE, mask="float"), [*qkv, mask, SCALE], masked_forms(feeds)


def sparse_row(length: int, density: float) -> tuple[Template, list[np.ndarray], dict[str, Run]]:
    qkv = tensors(length)
    rng = np.random.default_rng(1)
    blocks = length // BLOCK
    each = round(blocks * density)
    chosen = [np.sort(rng.choice(blocks, each, replace=False)) for _ in range(blocks)]
    lists = [np.arange(blocks + 1, dtype=np.int32)[None] * each, np.concatenate(chosen)]
    lists = [item.astype(np.int32) for item in lists]
    arguments = [*qkv, *lists, np.zeros(HEADS, np.int32), SCALE, ZERO]
    forms = {"MultiHeadAttention": plain_forms(dict(zip("qkv", qkv, strict=True)))["MultiHeadAttention"]}
    return BlockSparseFlashAttention(SIZE, block_size=BLOCK), arguments, forms


def rows() -> dict[str, Callable[[], tuple[Template, list[np.ndarray], dict[str, Run]]]]:
    made: dict[str, Callable[[], Any]] = {}
    for length in DENSE:
        made[f"dense {length}"] = lambda length=length: dense_row(length, False)
    for length in CAUSAL:
        made[f"causal {length}"] = lambda length=length: dense_row(length, True)
    for length in (128, 512):
        made[f"mask of keys {length}"] = lambda length=length: masked_row(length, "keys")
        made[f"full mask {length}"] = lambda length=length: masked_row(length, "full")
    for length in SPARSE:
        for density in (0.25, 1.0):
            name = f"{density:.0%} of blocks, {length}"
            made[name] = lambda length=length, density=density: sparse_row(length, density)
    return made


def measure(make: Callable[[], Any], seconds: float) -> dict[str, Any]:
    template, arguments, forms = make()
    run, error = kernel(template, arguments)
    if error > TOLERANCE:
        raise SystemExit(f"{template.symbol} is wrong: error {error:.1e}")
    times = interleave({"kernel": run, **forms}, seconds=seconds, clock="process")
    found = {name: ratio(times[name], times["kernel"]) for name in forms}
    figures = {n: {"median": r.median, "low": r.low, "high": r.high, "ms": r.baseline_ms} for n, r in found.items()}
    return {
        "ms": float(np.median(times["kernel"])) * 1e3,
        "error": error,
        "noise": noise(times),
        "fastest": min(forms, key=lambda name: float(np.median(times[name]))),
        "ratios": figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    results = {}
    print("| attention | kernel is faster than the fastest form of ONNX Runtime | which is | others |")
    print("|---|---|---|---|")
    for name, make in rows().items():
        if options.only not in name:
            continue
        results[name] = found = measure(make, options.seconds)
        best = found["ratios"][found["fastest"]]
        others = ", ".join(
            f"{form} {item['median']:.2f}" for form, item in found["ratios"].items() if form != found["fastest"]
        )
        gain = f"{best['median']:.2f} [{best['low']:.2f}, {best['high']:.2f}]"
        print(f"| {name} | {gain} | {found['fastest']} | {others} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
