"""planish::BlockSparseStep: its body against its definition, and that against the operator of a prompt."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.block_sparsity import S2
from planish.ir.block_sparsity.pattern import Heads
from planish.ir.infer import infer_shapes
from planish.ir.ops import InferenceError, TensorInfo, dialect_op, import_functions
from planish.ir.ops.block_sparse_attention import BLOCK_SPARSE_ATTENTION
from planish.ir.ops.block_sparse_step import BLOCK_SPARSE_STEP
from planish.ir.printer import parse_model
from planish.ir.verify import verify_model

SETTINGS = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.4, "block_size": 4}


def inputs_of(capacity: int, lengths: list[int], size: int = 6, covered: int = 40, seed: int = 0) -> list[np.ndarray]:
    """Inputs over S2's lists of so many tokens."""
    random, batch = np.random.default_rng(seed), len(lengths)
    layout = S2(block=4, local=2, stride=2).layout(covered, Heads(4, 2))
    floats = [random.standard_normal((batch, 1, n * size)).astype("f4") for n in (4, 2, 2)]
    floats += [random.standard_normal((batch, 2, capacity, size)).astype("f4") for _ in "kv"]
    return [*floats, np.array(lengths, np.int32), layout.indptr, layout.indices, layout.head_layout]


def model_of(dtype: str = "float", block: int = 4, heads: int = 4) -> ir.Model:
    kinds = ", ".join(
        [
            f"{dtype}[B, 1, 24] q", f"{dtype}[B, 1, 12] k", f"{dtype}[B, 1, 12] v", f"{dtype}[B, 2, C, 6] pk",
            f"{dtype}[B, 2, C, 6] pv", "int32[B] l", "int32[L, R] ip", "int32[E] ix", f"int32[{heads}] hl",
        ]
    )  # fmt: skip
    return parse_model(
        f"""<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g ({kinds}) => ({dtype}[B, 1, 24] y, {dtype}[B, 2, C, 6] nk, {dtype}[B, 2, C, 6] nv) {{ y, nk, nv =
        planish.BlockSparseStep <q_num_heads = {heads}, kv_num_heads = 2, scale = 0.4, block_size = {block}>
        (q, k, v, pk, pv, l, ip, ix, hl) }}"""
    )


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_the_body(dtype: str) -> None:
    model = model_of(dtype)
    infer_shapes(model)
    verify_model(model, full=True)
    import_functions(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    kind, tolerance = (np.float32, 1e-5) if dtype == "float" else (np.float16, 4e-3)
    for capacity, lengths in ((50, [0, 5, 39]), (48, [40, 47]), (1, [0])):
        arrays = inputs_of(capacity, lengths)
        arrays[:5] = [x.astype(kind) for x in arrays[:5]]
        found = session.run(None, dict(zip(names, arrays, strict=True)))
        wide = [x.astype(float) if x.dtype == kind else x for x in arrays]
        for have, want in zip(found, BLOCK_SPARSE_STEP.reference(*wide, **SETTINGS), strict=True):
            np.testing.assert_allclose(have, want, atol=tolerance)


def test_a_step_is_the_last_query_of_a_prompt() -> None:
    arrays = inputs_of(40, [39, 39])
    y, keys, values = BLOCK_SPARSE_STEP.reference(*arrays, **SETTINGS)
    k, v = (x.transpose(0, 2, 1, 3).reshape(2, 40, -1) for x in (keys, values))
    (want,) = BLOCK_SPARSE_ATTENTION.reference(arrays[0], k, v, *arrays[6:], **SETTINGS, is_causal=1)
    np.testing.assert_allclose(y, want, atol=1e-12)
    assert (keys[:, :, 39] == arrays[1].reshape(2, 2, 6)).all() and (keys[:, :, :39] == arrays[3][:, :, :39]).all()


def test_beyond_the_lists_all_is_seen() -> None:
    arrays = inputs_of(60, [45, 59])
    y, keys, values = BLOCK_SPARSE_STEP.reference(*arrays, **SETTINGS)
    for row, length in enumerate((46, 60)):
        k, v = (x[row : row + 1, :, :length].transpose(0, 2, 1, 3).reshape(1, length, -1) for x in (keys, values))
        settings = {name: value for name, value in SETTINGS.items() if name != "block_size"}
        (want,) = dialect_op("FlashAttention").reference(arrays[0][row : row + 1], k, v, **settings)
        np.testing.assert_allclose(y[row : row + 1], want, atol=1e-12)


def test_what_does_not_fit() -> None:
    infos = [TensorInfo.of(value) for value in model_of().graph.inputs]
    assert [item.dims for item in BLOCK_SPARSE_STEP.infer(infos, SETTINGS)][1:] == [("B", 2, "C", 6)] * 2
    for place, dims, match in (
        (0, ("B", 2, 24), "q: tokens"), (1, ("B", 1, 24), "k: its last axis"), (8, (3,), "head_layout"),
        (6, (4,), "indptr has rank 1"),
    ):  # fmt: skip
        wrong = [*infos[:place], TensorInfo(infos[place].dtype, dims), *infos[place + 1 :]]
        with pytest.raises(InferenceError, match=match):
            BLOCK_SPARSE_STEP.infer(wrong, SETTINGS)
    with pytest.raises(InferenceError, match="one must be a multiple of the other"):
        BLOCK_SPARSE_STEP.infer(infos, SETTINGS | {"q_num_heads": 3})
    with pytest.raises(InferenceError, match="block_size is 0"):
        BLOCK_SPARSE_STEP.infer(infos, SETTINGS | {"block_size": 0})
