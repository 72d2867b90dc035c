"""Kernels of normalization against ONNX Runtime's, and of graphs (segment GEMM, traversal) against torch.

    python benchmarks/kernels_graph.py [--seconds S] [--only TEXT] [--json FILE]

One thread, processor time, interleaved; a ratio is the other's time over the kernel's, with the bootstrap interval of
its median. Normalization runs inside of ONNX Runtime on both sides. The graph has 8000 nodes, 29000 edges of 90 types
with zipf-like counts, and 64 features. torch is written by hand for speed: edges sorted by type beforehand, one mm for
each type into one buffer, sparse CSR where it can be. Every result is compared with torch's or ONNX Runtime's first.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planish.runtime.kernels.segment_gemm import SegmentGemm, pack, panel, tile_list
from planish.runtime.kernels.template import Template, aligned, compile_module
from planish.runtime.kernels.traversal import Aggregate, EdgeSoftmax
from planish.runtime.measure import interleave, ratio

NORM_SHAPES = ((1, 768), (128, 768), (197, 768), (512, 768), (1024, 384))
NODES, EDGES, TYPES, FEATURES, HEADS = 8000, 29000, 90, 64, 4


@dataclass(frozen=True)
class Row:
    """Two functions that do the same; or that do something alike, with their floating point operations per call."""

    name: str
    against: str
    other: Callable[[], object]
    kernel: Callable[[], object]
    flops: int = 0
    other_flops: int = 0


def norm_rows() -> Iterator[Row]:
    import onnx_ir as ir
    import onnxruntime as ort

    from planish.ir.ops import import_functions
    from planish.runtime.kernels.library import library_for

    def model(body: str, width: int, outputs: str, weights: dict[str, np.ndarray]) -> ir.Model:
        inputs = f"float[N, {width}] x, float[N, {width}] r"
        parsed = ir.from_onnx_text(
            f"""<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
            g ({inputs}, float[{width}] w, float[{width}] b) => ({outputs}) {{ {body} }}"""
        )
        for value in [item for item in parsed.graph.inputs if item.name in weights]:
            value.const_value = ir.tensor(weights[str(value.name)], name=value.name)
            parsed.graph.inputs.remove(value)
            if value.uses():
                parsed.graph.initializers.add(value)
        return parsed

    forms = (
        ("LayerNorm", "y = LayerNormalization(x, w, b)", "y = planish.LayerNorm(x, w, b)", 1),
        ("AddLayerNormalization", "z = Sum(x, r) y = LayerNormalization(z, w, b)",
         "y, z = planish.AddLayerNormalization(x, r, w, b)", 2),
        ("RMSNorm", "y = RMSNormalization(x, w)", "y = planish.RMSNorm(x, w)", 1),
        ("AddRMSNormalization", "z = Sum(x, r) y = RMSNormalization(z, w)",
         "y, z = planish.AddRMSNormalization(x, r, w)", 2),
    )  # fmt: skip
    for name, plain, fused, results in forms:
        for rows, width in NORM_SHAPES:
            rng = np.random.default_rng(0)
            arrays = {key: rng.normal(size=(rows, width)).astype("f") for key in "xr"}
            weights = {key: rng.normal(size=width).astype("f") for key in "wb"}
            outputs, runs, found = ", ".join(f"float[N, {width}] {o}" for o in "yz"[:results]), [], []
            for body in (plain, fused):
                made = model(body, width, outputs, weights)
                options = ort.SessionOptions()
                options.intra_op_num_threads = 1
                if body is fused:
                    import_functions(made)
                    library = library_for([made])
                    assert library is not None
                    options.register_custom_ops_library(str(library.path))
                data = ir.to_proto(made).SerializeToString()
                session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
                binding, given = session.io_binding(), {item.name for item in session.get_inputs()}
                for key in given:
                    binding.bind_ortvalue_input(key, ort.OrtValue.ortvalue_from_numpy(aligned(arrays[key])))
                values = [
                    ort.OrtValue.ortvalue_from_numpy(aligned(np.empty((rows, width), "f"))) for _ in "yz"[:results]
                ]
                for key, value in zip("yz", values, strict=False):
                    binding.bind_ortvalue_output(key, value)
                runs.append(lambda session=session, binding=binding: session.run_with_iobinding(binding))
                runs[-1]()
                found.append([value.numpy() for value in values])
            for a, b in zip(*found, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
            yield Row(f"{name} {rows}x{width}", "onnxruntime", *runs)


def graph_rows() -> Iterator[Row]:
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*[Ss]parse")
    rng = np.random.default_rng(0)
    weights = rng.zipf(1.5, 4 * TYPES)[:TYPES].astype(float)
    counts = rng.multinomial(EDGES, weights / weights.sum())
    pointers = np.concatenate([[0], np.cumsum(counts)])
    source, owner = rng.integers(0, NODES, EDGES), rng.integers(0, NODES, EDGES)
    order = np.argsort(owner, kind="stable")
    indptr = np.searchsorted(owner[order], np.arange(NODES + 1)).astype(np.int64)
    x = aligned(rng.standard_normal((NODES, FEATURES)).astype("f"))
    weight = aligned((rng.standard_normal((TYPES, FEATURES, FEATURES)) / 8).astype("f"))
    t_x, t_w, t_source, t_owner = (torch.from_numpy(a) for a in (x, weight, source, owner))
    product = torch.empty(EDGES, FEATURES)

    def segments() -> Any:
        rows = t_x[t_source]
        for t in range(TYPES):
            torch.mm(rows[pointers[t] : pointers[t + 1]], t_w[t], out=product[pointers[t] : pointers[t + 1]])
        return product

    flops = 2 * EDGES * FEATURES * FEATURES
    tiles = aligned(tile_list(pointers))
    for packed in (False, True):
        gemm = SegmentGemm(gather=True, packed=packed)
        given = aligned(pack(weight, panel(gemm.cpu()))) if packed else weight
        kernel = _bound(gemm, [x, given, tiles, source], (EDGES, FEATURES), segments)
        yield Row(f"segment GEMM{', packed' * packed}", "torch: index, mm per segment", segments, kernel, flops)
    a, b = torch.randn(512, 768), torch.randn(768, 768)
    yield Row(
        "segment GEMM, packed: GF/s",
        "torch: GF/s of mm 512x768x768",
        lambda: a @ b,
        kernel,
        flops,
        2 * 512 * 768 * 768,
    )

    by_row = t_owner[torch.from_numpy(order)]
    rows = source[order]
    t_rows = torch.from_numpy(rows)
    ones = torch.ones(EDGES)
    csr = torch.sparse_csr_tensor(torch.from_numpy(indptr), t_rows, ones, (NODES, NODES))
    wide, shape = aligned(x.reshape(NODES, 1, FEATURES)), (NODES, 1, FEATURES)

    def index_add() -> Any:
        return torch.zeros(NODES, FEATURES).index_add_(0, by_row, t_x[t_rows])

    summed = _bound(Aggregate(), [indptr, rows, wide], shape, index_add)
    yield Row("traversal: sum", "torch: CSR matrix times x", lambda: csr @ t_x, summed)
    yield Row("traversal: sum", "torch: index_add", index_add, summed)

    def segment_max() -> Any:
        index = by_row[:, None].expand(-1, FEATURES)
        return torch.zeros(NODES, FEATURES).scatter_reduce_(0, index, t_x[t_rows], "amax", include_self=False)

    largest = _bound(Aggregate(reduce="max"), [indptr, rows, wide], shape, segment_max)
    yield Row("traversal: max", "torch: scatter_reduce", segment_max, largest)

    logits = aligned(rng.standard_normal((EDGES, HEADS)).astype("f"))
    per_head = FEATURES // HEADS
    t_logits, t_heads = torch.from_numpy(logits), t_x.reshape(NODES, HEADS, per_head)

    def attention() -> Any:
        score = torch.nn.functional.leaky_relu(t_logits, 0.2)
        index = by_row[:, None].expand(-1, HEADS)
        most = torch.full((NODES, HEADS), -1e30).scatter_reduce_(0, index, score, "amax")
        part = torch.exp(score - most[by_row])
        part = part / torch.zeros(NODES, HEADS).index_add_(0, by_row, part)[by_row]
        return torch.zeros(NODES, HEADS, per_head).index_add_(0, by_row, part[:, :, None] * t_heads[t_rows])

    slope, split = aligned(np.array([0.2], "f")), aligned(x.reshape(NODES, HEADS, per_head))
    softmax = _bound(EdgeSoftmax(leaky=True), [indptr, rows, logits, slope, split], split.shape, attention)
    yield Row(f"traversal: edge softmax, {HEADS} heads", "torch: exp, index_add", attention, softmax)


def _bound(
    template: Template, inputs: list[np.ndarray], shape: tuple[int, ...], expected: Callable[[], Any]
) -> Callable[[], object]:
    """A call of the kernel without arguments, after a comparison of its result."""
    import tvm

    y = aligned(np.empty(shape, np.float32))
    found = compile_module([template], template.cpu())[template.symbol]
    arguments = [tvm.runtime.from_dlpack(aligned(array)) for array in inputs]
    result = tvm.runtime.from_dlpack(y)
    found(*arguments, result)
    np.testing.assert_allclose(y.ravel(), expected().numpy().ravel(), rtol=1e-4, atol=1e-4)
    return lambda: found(*arguments, result)


def measured(row: Row, seconds: float) -> dict[str, Any]:
    times = interleave({"other": row.other, "kernel": row.kernel}, seconds=seconds, clock="process")
    work = row.flops / row.other_flops if row.other_flops else 1.0
    found = ratio([work * seconds for seconds in times["other"]], times["kernel"])
    speed = row.flops / np.median(times["kernel"]) / 1e9 if row.flops else None
    return {"kernel": row.name, "against": row.against, "ratio": found.median, "low": found.low, "high": found.high,
            "runs": found.runs, "gflops": speed}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    print(f"{'kernel':50} {'against':30} {'ratio':>6} {'95 %':>14} {'GF/s':>6}")
    for rows in (norm_rows, graph_rows):
        for row in rows():
            if arguments.only.lower() not in row.name.lower():
                continue
            found = measured(row, arguments.seconds)
            results.append(found)
            speed = f"{found['gflops']:6.0f}" if found["gflops"] else ""
            interval = f"{found['low']:.2f} to {found['high']:.2f}"
            print(f"{row.name:50} {row.against:30} {found['ratio']:6.2f} {interval:>14} {speed}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
