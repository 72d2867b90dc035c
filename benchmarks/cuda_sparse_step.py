"""One step over a cache on ort-cuda: planish::BlockSparseStep, and ONNX Runtime's GroupQueryAttention, which is dense.

    python benchmarks/cuda_sparse_step.py

32 heads of 128 in float16, S2 with blocks of 64 (16 local, stride 8), batch 1, caches in place and full. Microseconds
of all kernels of a call by torch's profiler, mean of 20; the step is compared with float64 before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from planish.ir.block_sparsity import S2, Layout
from planish.ir.block_sparsity.pattern import Heads
from planish.ir.ops import import_functions
from planish.ir.printer import parse_model
from planish.runtime import ort_cuda
from planish.runtime.cuda import ort_library

HEADS, SIZE = 32, 128
_TYPES = {torch.float16: np.float16, torch.int32: np.int32}


def model_of(kv: int, capacity: int, sparse: bool) -> ir.Model:
    cache = f"float16[1, {kv}, {capacity}, {SIZE}]"
    new = f"float16[1, 1, {HEADS * SIZE}] q, float16[1, 1, {kv * SIZE}] k, float16[1, 1, {kv * SIZE}] v"
    given = f"{new}, {cache} pk, {cache} pv, int32[1] held"
    made = f"float16[1, 1, {HEADS * SIZE}] y, {cache} nk, {cache} nv"
    attributes = f"kv_num_heads = {kv}, scale = {SIZE**-0.5}"
    more, names, call = (
        "int32[1] total",
        "total",
        f"com.microsoft.GroupQueryAttention <num_heads = {HEADS}, {attributes}>",
    )
    if sparse:
        more, names = f"int32[L, R] ip, int32[E] ix, int32[{HEADS}] hl", "ip, ix, hl"
        call = f"planish.BlockSparseStep <q_num_heads = {HEADS}, block_size = 64, {attributes}>"
    model = parse_model(
        f"""<ir_version: 10, opset_import: ["" : 23, "planish" : 1, "com.microsoft" : 1]>
        g ({given}, {more}) => ({made}) {{ y, nk, nv = {call} (q, k, v, pk, pv, held, {names}) }}"""
    )
    import_functions(model)
    return model


def binding(model: ir.Model, inputs: dict[str, torch.Tensor], y: torch.Tensor) -> tuple[ort.InferenceSession, Any]:
    """A session whose new caches are the old ones, and its inputs and outputs."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    library = ort_library.library_for([model])
    if library is not None:
        settings.register_custom_ops_library(str(library.path))
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), settings, ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    bound = session.io_binding()
    for name, x in inputs.items():
        bound.bind_input(name, x.device.type, 0, _TYPES[x.dtype], x.shape, x.data_ptr())
    for name, x in (("y", y), ("nk", inputs["pk"]), ("nv", inputs["pv"])):
        bound.bind_output(name, "cuda", 0, np.float16, x.shape, x.data_ptr())
    return session, bound


def microseconds(session: ort.InferenceSession, bound: Any) -> float:
    for _ in range(5):
        session.run_with_iobinding(bound)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(20):
            session.run_with_iobinding(bound)
        torch.cuda.synchronize()
    return sum(e.device_time_total for e in found.key_averages() if not e.key.startswith("cuda")) / 20


def error(inputs: dict[str, torch.Tensor], y: torch.Tensor, layout: Layout) -> float:
    """Relative, L2, over eight heads."""
    capacity, kv = inputs["pk"].shape[2], inputs["pk"].shape[1]
    wrong = right = 0.0
    for head in range(0, HEADS, 4):
        start, end = layout.indptr[layout.head_layout[head], -2:]
        seen = torch.zeros(capacity // 64, dtype=torch.bool, device="cuda")
        seen[torch.tensor(layout.indices[start:end], device="cuda").long()] = True
        k, v = (inputs[name][0, head * kv // HEADS].double() for name in ("pk", "pv"))
        scores = (k @ inputs["q"].view(HEADS, SIZE)[head].double()) * SIZE**-0.5
        want = torch.softmax(scores.masked_fill(~seen.repeat_interleave(64), -torch.inf), 0) @ v
        wrong += float((y.view(HEADS, SIZE)[head].double() - want).square().sum())
        right += float(want.square().sum())
    return (wrong / right) ** 0.5


def main() -> None:
    ort_cuda.load_libraries()
    print("| cache | key heads | GroupQueryAttention | BlockSparseStep | | error |\n|" + "---|" * 6)
    for capacity in (32768, 131072):
        for kv in (32, 8):
            layout = S2(block=64, local=16, stride=8).layout(capacity, Heads(HEADS, kv))
            shapes = {"q": (1, 1, HEADS * SIZE), "k": (1, 1, kv * SIZE), "v": (1, 1, kv * SIZE)}
            shapes |= dict.fromkeys(("pk", "pv"), (1, kv, capacity, SIZE))
            inputs = {name: torch.randn(s, device="cuda", dtype=torch.float16) for name, s in shapes.items()}
            inputs["held"] = torch.tensor([capacity - 1], dtype=torch.int32, device="cuda")
            tables = zip(("ip", "ix", "hl"), (layout.indptr, layout.indices, layout.head_layout), strict=True)
            lists = {name: torch.tensor(array, dtype=torch.int32, device="cuda") for name, array in tables}
            y = torch.full_like(inputs["q"], torch.nan)
            step = microseconds(*binding(model_of(kv, capacity, True), inputs | lists, y))
            off = error(inputs, y, layout)
            total = {"total": torch.tensor([capacity], dtype=torch.int32)}
            dense = microseconds(*binding(model_of(kv, capacity, False), inputs | total, y))
            print(f"| {capacity} | {kv} | {dense:.1f} | {step:.1f} | {dense / step:.2f} | {off:.1e} |", flush=True)


if __name__ == "__main__":
    main()
