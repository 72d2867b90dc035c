from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.infer import infer_shapes
from planish.ir.ops import import_functions
from planish.ir.ops.block_sparse_attention import BLOCK_SPARSE
from planish.ir.printer import op_counts
from planish.ir.program import Program
from planish.passes.base import Decline
from planish.passes.defaults import default_pipeline
from planish.passes.lowering.layout_forms import Run, lists_of, local_form, runs
from planish.passes.testing import apply_pass, check_declines, program_of, run_reference

PASS = "lower-block-sparse"
BLOCK, LOWEST, LOW = 4, float(np.finfo(np.float32).min), -3.3e38


def lists(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """indptr and indices of (layouts, rows, columns)."""
    rows = masks.shape[1]
    ends = np.concatenate([[0], np.cumsum(masks.sum(-1).ravel())])
    indptr = np.stack([ends[n * rows : (n + 1) * rows + 1] for n in range(len(masks))])
    return indptr.astype(np.int32), np.nonzero(masks)[2].astype(np.int32)


def s2(rows: int, shift: int, local: int, stride: int) -> np.ndarray:
    m, n = np.arange(rows)[:, None], np.arange(rows)
    return (m >= n) & ((m - n < local) | ((n + shift) % stride == 0))


def program(
    masks: np.ndarray, layout: list[int], kv_heads: int, *, causal: int = 1, length: str = "S",
    hidden: float | None = None, target: str = "ort-cpu",
) -> Program:  # fmt: skip
    heads = len(layout)
    given = f"q_num_heads = {heads}, kv_num_heads = {kv_heads}, scale = 0.3, block_size = {BLOCK}, is_causal = {causal}"
    given += f", hidden_score = {hidden!r}" if hidden else ""
    indptr, indices = lists(masks)
    arrays = {"indptr": indptr, "indices": indices, "head_layout": np.array(layout, np.int32)}
    mask = f", bool[B, 1, 1, {length}] pad" if hidden else ""
    text = f"""
    <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
    f (float[B, {length}, {heads * 8}] q, float[B, {length}, {kv_heads * 8}] k,
       float[B, {length}, {kv_heads * 8}] v{mask})
      => (float[B, {length}, {heads * 8}] y)
    <int32[{indptr.shape[0]}, {indptr.shape[1]}] indptr, int32[{len(indices)}] indices, int32[{heads}] head_layout>
    {{ y = planish.BlockSparseAttention{"KeyMask" * bool(hidden)}<{given}>
       (q, k, v{", pad" * bool(hidden)}, indptr, indices, head_layout) }}
    """
    weights = [ir.tensor(array, name=name) for name, array in arrays.items()]
    made = program_of(ir.from_onnx_text(text, initializers=weights), target)
    import_functions(made.main)
    infer_shapes(made.main)
    return made


def feed(batch: int, length: int, heads: int, kv_heads: int, side: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch * 31 + length)
    widths = {"q": heads * 8, "k": kv_heads * 8, "v": kv_heads * 8}
    found = {n: rng.standard_normal((batch, length, w)).astype(np.float32) for n, w in widths.items()}
    if side:
        hidden = np.linspace(0, length, batch).astype(int)[:, None]
        found["pad"] = (np.arange(length)[::side] >= hidden)[:, None, None, :]
    return found


def check(
    lowered: Program, masks: np.ndarray, layout: list[int], kv_heads: int, inputs: dict[str, Any], **more: Any
) -> None:
    name = "BlockSparseAttentionKeyMask" if "pad" in inputs else "BlockSparseAttention"
    heads = {"q_num_heads": len(layout), "kv_num_heads": kv_heads, "scale": 0.3, "block_size": BLOCK}
    arrays = [*inputs.values(), *lists(masks), np.array(layout, np.int32)]
    (want,) = BLOCK_SPARSE[name].reference(*arrays, **heads, **more)
    (got,) = run_reference(lowered, inputs).values()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


#: Layouts of 12 rows: S2 with two shifts, a window, sinks with a window, only the diagonal, everything.
CAUSAL = {
    "s2": np.stack([s2(12, 0, 3, 4), s2(12, 2, 3, 4)]),
    "window": s2(12, 0, 3, 10**6)[None] & (np.subtract.outer(np.arange(12), np.arange(12)) < 3),
    "sinks": (s2(12, 0, 2, 10**6) | np.tri(12, dtype=bool) & (np.arange(12) < 1))[None],
    "diagonal": np.eye(12, dtype=bool)[None],
    "all": np.tri(12, dtype=bool)[None],
    "two windows": np.stack([s2(12, 0, 4, 4), np.eye(12, dtype=bool)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_causal_layouts(name: str, kv_heads: int) -> None:
    masks = CAUSAL[name]
    layout = [0, 1, 1, 0] if len(masks) > 1 else [0] * 4
    lowered = program(masks, layout, kv_heads)
    assert apply_pass(f"{PASS},eliminate-dead-code", lowered).modified
    assert op_counts(lowered)["Scan"] == 1 and not any(n.domain == "planish" for n in lowered.nodes())
    # Past 48 positions there are no rows.
    for batch, length in ((1, 1), (2, 13), (1, 48), (1, 55)):
        check(lowered, masks, layout, kv_heads, feed(batch, length, 4, kv_heads), is_causal=1)


@pytest.mark.parametrize("hidden", [LOWEST, LOW])
@pytest.mark.parametrize("name", ["s2", "sinks"])
def test_causal_layouts_with_padding(name: str, hidden: float) -> None:
    masks = CAUSAL[name]
    layout = [0, 1, 1, 0] if len(masks) > 1 else [0] * 4
    lowered = program(masks, layout, 2, hidden=hidden)
    apply_pass(f"{PASS}{{rows=2}},eliminate-dead-code", lowered)
    for side in (1, -1):
        inputs = feed(3, 41, 4, 2, side)
        check(lowered, masks, layout, 2, inputs, is_causal=1, hidden_score=hidden)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**16), st.integers(1, 3))
def test_any_local_and_fixed_blocks(local: int, length: int, fixed: int, rows: int) -> None:
    m, n = np.arange(8)[:, None], np.arange(8)
    chosen = (fixed >> np.arange(16) & 1).astype(bool)
    masks = np.stack([(m >= n) & ((m - n < local) | c[None]) for c in (chosen[:8], chosen[8:])])
    lowered = program(masks, [0, 1], 2, length=str(7 * length + 4))
    apply_pass(f"{PASS}{{rows={rows}}}", lowered)
    check(lowered, masks, [0, 1], 2, feed(1, 7 * length + 4, 2, 2), is_causal=1)


def shard_masks(rows: int = 8, stride: int = 4) -> np.ndarray:
    return np.stack([np.broadcast_to((np.arange(rows) + g) % stride == 0, (rows, rows)) for g in range(stride)])


@pytest.mark.parametrize(("kv_heads", "operator"), [(8, "MultiHeadAttention"), (4, "Attention"), (2, "Attention")])
def test_shards(kv_heads: int, operator: str) -> None:
    """Each group of heads has a dense attention over a quarter of the keys; the last block is not full."""
    masks, layout = shard_masks(), [0, 0, 1, 1, 2, 2, 3, 3]
    for length in (32, 30):
        lowered = program(masks, layout, kv_heads, causal=0, length=str(length))
        apply_pass(f"{PASS},eliminate-dead-code", lowered)
        assert sum(n.op_type == operator for n in lowered.nodes()) == 4 and "Scan" not in op_counts(lowered)
        check(lowered, masks, layout, kv_heads, feed(2, length, 8, kv_heads), is_causal=0)


def test_groups_of_heads() -> None:
    assert runs(np.array([0, 0, 1, 1]), 4) == [Run(0, (0, 2), (0, 2)), Run(1, (2, 4), (2, 4))]
    assert runs(np.array([0, 1, 1, 1]), 2) == [
        Run(0, (0, 1), (0, 1)), Run(1, (1, 2), (0, 1)), Run(1, (2, 4), (1, 2)),
    ]  # fmt: skip


def test_forms() -> None:
    masks = CAUSAL["s2"]
    form = local_form(lists_of(*lists(masks))[1])
    assert form.local == 3 and np.flatnonzero(form.fixed).tolist() == [2, 6]
    gone = masks[0].copy()
    gone[9, 4] = False
    with pytest.raises(Decline, match="row 9 of its lists is not of 3 local blocks"):
        local_form(lists_of(*lists(gone[None]))[0])
    gone[9, 9] = False
    with pytest.raises(Decline, match="lacks the diagonal block"):
        local_form(lists_of(*lists(gone[None]))[0])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"target": "ort-cpu:kernels"}, "target 'ort-cpu:kernels' has a kernel for it"),
        ({"causal": 0}, "its rows differ, for which standard operators have no fast form"),
        ({"length": "100"}, "its lists cover 48 positions of 100"),
    ],
)
def test_declined(changed: dict[str, Any], reason: str) -> None:
    check_declines(PASS, program(CAUSAL["s2"], [0, 1], 2, **changed), reason)


def test_more_declined() -> None:
    check_declines(PASS, program(shard_masks(), [0, 1, 2, 3], 4, causal=0), "it has padding or an unknown length")
    made = program(CAUSAL["s2"], [0, 1], 2)
    made.main.graph.inputs[1].shape = ir.Shape([None, ir.SymbolicDim("T"), 16])
    check_declines(PASS, made, "its queries and keys are not known to be as many")
    made = program(CAUSAL["s2"], [0, 1], 2)
    value = made.main.graph.initializers.pop("indices")
    value.const_value = None
    made.main.graph.inputs.append(value)
    check_declines(PASS, made, "its lists are not constants")
    assert PASS in default_pipeline("ort-cpu")
