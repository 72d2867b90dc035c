from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.infer import infer_shapes
from planish.ir.ops.block_sparse_attention import layout_mask
from planish.ir.ops.window_attention import window_mask
from planish.ir.program import Program
from planish.passes.defaults import RECOGNIZE, default_pipeline
from planish.passes.sparsity.mask_tiles import tiled
from planish.passes.testing import apply_pass, check_declines, check_numerics, program_of

KERNELS = "ort-cpu:kernels"
PASS = "fuse-block-sparse"
CLEANED = f"{PASS},eliminate-dead-code"
HEADS = "q_num_heads = 2, kv_num_heads = 2, scale = 0.5"
LOWEST = "-3.4028234663852886e38"
#: Positions as torch's exporter writes them; `rows` are those of queries, `columns` of keys.
POSITIONS = """
    length = Shape<start = 1, end = 2>(q) one = Constant<value_int = 1>() zero = Constant<value_int = 0>()
    n = Squeeze(length) count = Range(zero, n, one)
    ax_q = Constant<value_ints = [0, 1, 3]>() ax_k = Constant<value_ints = [0, 1, 2]>()
    rows = Unsqueeze(count, ax_q) columns = Unsqueeze(count, ax_k) causal = LessOrEqual(columns, rows)
    three = Constant<value_int = 3>() two = Constant<value_int = 2>()
"""
FILLED = "nought = Constant<value_float = 0.0>() low = Constant<value_float = {low}>() m = Where(allowed, nought, low)"
#: A bool `allowed` by the positions, and the window that it is.
WINDOWS: dict[str, tuple[str, dict[str, int]]] = {
    "mistral": (
        "first = Sub(rows, three) near = Greater(columns, first) allowed = And(near, causal)",
        {"left": 2, "is_causal": 1},
    ),
    "shifted keys": (
        "last = Add(columns, three) near = Greater(last, rows) allowed = And(causal, near)",
        {"left": 2, "is_causal": 1},
    ),
    "distance": ("d = Sub(rows, columns) a = Abs(d) allowed = LessOrEqual(a, three)", {"left": 3, "right": 3}),
    "difference": (
        "d = Sub(columns, rows) behind = Neg(three) near = Less(behind, d) allowed = And(near, causal)",
        {"left": 2, "is_causal": 1},
    ),
    "two sides": (
        "d = Sub(rows, columns) a = Less(d, three) b = Sub(columns, rows) c = GreaterOrEqual(two, b) "
        "allowed = And(a, c)",
        {"left": 2, "right": 2},
    ),
    "later keys": ("after = Add(rows, two) allowed = LessOrEqual(columns, after)", {"right": 2}),
    "sinks": (
        "first = Sub(rows, three) near = Greater(columns, first) sink = Less(columns, two) "
        "some = Or(near, sink) allowed = And(some, causal)",
        {"left": 2, "global_keys": 2, "is_causal": 1},
    ),
    "longformer": (
        "d = Sub(rows, columns) a = Abs(d) near = LessOrEqual(a, two) g = Less(columns, three) h = Less(rows, two) "
        "gh = Or(h, g) allowed = Or(gh, near)",
        {"left": 2, "right": 2, "global_keys": 3, "global_queries": 2},
    ),
    "two windows": (
        "first = Sub(rows, three) near = Greater(columns, first) second = Sub(rows, two) "
        "nearer = GreaterOrEqual(columns, second) both = And(near, nearer) allowed = And(both, causal)",
        {"left": 2, "is_causal": 1},
    ),
}  # fmt: skip


def model(
    setup: str, mask: str = "m", more: str = "", values: str = "", shape: str = "B, S, 8", heads: str = HEADS
) -> Program:
    values = values or (" <int64[S] count>" if "count" in setup else "")
    text = f"""
    <ir_version: 10, opset_import: ["" : 23]>
    f (float[{shape}] q, float[{shape}] k, float[{shape}] v{more}) => (float[{shape}] y){values}
    {{ {setup} y = Attention<{heads}>(q, k, v, {mask}) }}
    """
    program = program_of(text, KERNELS)
    infer_shapes(program.main)
    apply_pass("fold-constants", program)
    return program


def window(name: str, low: str = LOWEST, more: str = "") -> Program:
    return model(
        POSITIONS + WINDOWS[name][0].replace("Neg(three)", "Constant<value_int = -3>()") + FILLED.format(low=low),
        more=more,
    )


def feed(batch: int, length: int, width: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch * 31 + length)
    return {name: rng.standard_normal((batch, length, width)).astype(np.float32) for name in "qkv"}


def sparse_node(program: Program) -> ir.Node:
    (node,) = (n for n in program.main.graph if n.domain == "planish")
    return node


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str) -> None:
    for batch, length in ((1, 1), (2, 3), (2, 17)):
        program = check_numerics(CLEANED, window(name), feed(batch, length))
        node = sparse_node(program)
        assert node.op_type == "WindowAttention"
        unlimited = {"left": -1, "right": -1, "global_keys": 0, "global_queries": 0, "is_causal": 0}
        found = {key: node.attributes.get_int(key, -9) for key in unlimited}
        assert found == unlimited | WINDOWS[name][1]
        assert not any(n.op_type in ("Where", "And") for n in program.main.graph)


PADDED = ", bool[B, 1, 1, S] pad"


@pytest.mark.parametrize("low", ["-3.3e38", LOWEST])
@pytest.mark.parametrize("name", ["mistral", "longformer"])
def test_padding_is_a_mask_of_keys(name: str, low: str) -> None:
    """On the left and on the right, so that queries see no key: equal weights on all, or zeros, as the score says."""
    setup = POSITIONS + WINDOWS[name][0].replace("allowed =", "inside =") + " allowed = And(inside, pad) "
    for side in (1, -1):
        inputs = feed(3, 13)
        inputs["pad"] = (np.arange(13)[::side] >= np.array([0, 5, 13])[:, None])[:, None, None, :]
        program = check_numerics(CLEANED, model(setup + FILLED.format(low=low), more=PADDED), inputs)
        node = sparse_node(program)
        assert node.op_type == "WindowAttentionKeyMask"
        assert node.attributes.get_float("hidden_score") == np.float32(float(low))


def test_bool_masks() -> None:
    program = check_numerics(CLEANED, model(POSITIONS + WINDOWS["mistral"][0], "allowed"), feed(2, 9))
    assert sparse_node(program).op_type == "WindowAttention"


def test_heads_of_their_own_axis() -> None:
    text = f"""
    <ir_version: 10, opset_import: ["" : 23]>
    f (float[B, 4, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v) => (float[B, 4, S, 8] y)
    <int64[S] count> {{ {POSITIONS.replace("start = 1, end = 2", "start = 2, end = 3")} {WINDOWS["mistral"][0]}
    y = Attention(q, k, v, allowed) }}
    """
    program = program_of(text, KERNELS)
    infer_shapes(program.main)
    rng = np.random.default_rng(0)
    inputs = {n: rng.standard_normal((2, h, 11, 8)).astype(np.float32) for n, h in (("q", 4), ("k", 2), ("v", 2))}
    node = sparse_node(check_numerics(CLEANED, program, inputs))
    assert (node.attributes.get_int("q_num_heads"), node.attributes.get_int("kv_num_heads")) == (4, 2)


def test_a_past_before_the_queries() -> None:
    """The queries are the last of the keys, as in decoding over a concatenated cache."""
    text = f"""
    <ir_version: 10, opset_import: ["" : 23]>
    f (float[B, S, 8] q, float[B, P, 8] pk, float[B, S, 8] k, float[B, P, 8] pv, float[B, S, 8] v) => (float[B, S, 8] y)
    <float[B, T, 8] ak, float[B, T, 8] av, int64[S] own, int64[T] all, int64[1, 1, S, 1] rows,
     int64[1, 1, 1, T] columns>
    {{ ak = Concat<axis = 1>(pk, k) av = Concat<axis = 1>(pv, v)
       one = Constant<value_int = 1>() zero = Constant<value_int = 0>() three = Constant<value_int = 3>()
       sv = Shape<start = 1, end = 2>(q) s = Squeeze(sv) pvec = Shape<start = 1, end = 2>(pk) p = Squeeze(pvec)
       t = Add(p, s) own = Range(p, t, one) all = Range(zero, t, one)
       ax_q = Constant<value_ints = [0, 1, 3]>() ax_k = Constant<value_ints = [0, 1, 2]>()
       rows = Unsqueeze(own, ax_q) columns = Unsqueeze(all, ax_k) causal = LessOrEqual(columns, rows)
       {WINDOWS["mistral"][0]} y = Attention<{HEADS}>(q, ak, av, allowed) }}
    """
    program = program_of(text, KERNELS)
    for node in program.main.graph:
        for value in node.outputs:
            if value.shape is not None:
                dims = [ir.SymbolicDim("P + S") if str(d) == "T" else d for d in value.shape]
                value.shape = ir.Shape(dims)
    infer_shapes(program.main)
    inputs = feed(2, 2) | {f"p{n}": x for n, x in feed(2, 9).items() if n != "q"}
    node = sparse_node(check_numerics(CLEANED, program, inputs))
    assert (node.attributes.get_int("left"), node.attributes.get_int("is_causal")) == (2, 1)


def constant(mask: np.ndarray, low: float | None = None, more: str = "", join: str = "") -> Program:
    """Attention of 20 tokens with a constant mask, float where `low` is given."""
    shape = ", ".join(map(str, mask.shape))
    array = mask if low is None else np.where(mask, np.float32(0), np.float32(low))
    numbers = ", ".join(str(int(x)) if low is None else repr(float(x)) for x in array.ravel())
    kind = "bool" if low is None else "float"
    length = mask.shape[-1]
    name = "both" if join else "m"
    return model(join, name, more, f" <{kind}[{shape}] m = {{{numbers}}}>", f"B, {length}, 8")


def band(length: int, left: int, right: int, first: int = 0) -> np.ndarray:
    return window_mask(length, length, left, right, first, first)


def test_constant_masks() -> None:
    """A band that ends inside of blocks, with global positions; of odd length."""
    mask = band(75, 5, 4, 2)
    for given_mask, low in ((mask, None), (mask[None, None], None), (mask, -3.3e38), (mask, -np.inf)):
        program = constant(given_mask, low if low is None or np.isfinite(low) else -3.4028234663852886e38)
        program = check_numerics(
            "fuse-block-sparse{block_size=16,most=0.9}," + "eliminate-dead-code", program, feed(2, 75)
        )
        node = sparse_node(program)
        assert node.op_type == "BlockSparseAttentionTiles"
        assert node.attributes.get_int("block_size") == 16


def test_constant_masks_by_head_on_block_borders() -> None:
    """Only the diagonal in one head, the first block too in the other: no tile is needed."""
    rows = np.arange(64) // 16
    diagonal = rows[:, None] == rows
    mask = np.stack([diagonal, diagonal | (rows == 0)])[None]
    program = check_numerics(
        "fuse-block-sparse{block_size=16,most=0.9},eliminate-dead-code", constant(mask), feed(2, 64)
    )
    node = sparse_node(program)
    assert node.op_type == "BlockSparseAttention"
    assert node.inputs[5].const_value.numpy().tolist() == [0, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("low", [None, -3.3e38])
def test_constant_masks_with_padding_and_rows_without_keys(low: float | None) -> None:
    mask = band(40, 3, 3)
    mask[[0, 17]] = False
    join = "both = And(m, pad)" if low is None else ""
    program = constant(mask[None, None], low, PADDED.replace("S", "40") if join else "", join)
    inputs = feed(2, 40)
    if join:
        inputs["pad"] = (np.arange(40) >= np.array([0, 33])[:, None])[:, None, None, :]
    node = sparse_node(check_numerics("fuse-block-sparse{block_size=16,most=0.9},eliminate-dead-code", program, inputs))
    assert node.op_type == "BlockSparseAttentionTilesKeyMask"


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 2), st.sampled_from([4, 7, 16]), st.integers(0, 2**32 - 1)
)
def test_lists_and_tiles_are_the_mask(queries: int, keys: int, heads: int, block: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((heads, queries, keys)) < 0.2
    found = tiled(mask, heads, block)
    tiles = (found.entry_tile, found.tiles)
    again = layout_mask(found.indptr, found.indices, block, queries, keys, tiles=tiles)
    np.testing.assert_array_equal(again[found.head_layout], mask)
    assert found.blind == bool((~mask.any(-1)).any())


def test_a_band_has_few_tiles_however_long_it_is() -> None:
    assert len(tiled(band(1000, 100, 0)[None], 1, 16).tiles) <= 6


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ("allowed = Identity(causal)", "its mask is no window"),
        ("allowed = GreaterOrEqual(columns, given)", "is neither causal, a window nor the same for all queries"),
        ("far = Add(rows, two) a = GreaterOrEqual(columns, far) allowed = And(a, a)", "does not hold the query's own"),
        ("c = Sub(rows, three) a = LessOrEqual(columns, c) d = Less(columns, two) allowed = Or(a, d)", "own position"),
        (
            "a = Sub(rows, three) b = Greater(columns, a) c = Less(rows, two) d = Or(b, c) e = Greater(columns, a) "
            "allowed = And(d, e)",
            "hides global positions",
        ),
        (
            "b = Greater(columns, three) c = Less(rows, two) d = Or(b, c) allowed = And(d, causal)",
            "is neither causal, a window nor the same for all queries",
        ),
    ],
)
def test_computed_masks_that_stay(setup: str, reason: str) -> None:
    program = model(POSITIONS + setup + FILLED.format(low=LOWEST), more=", int64[1, 1, S, S] given")
    check_declines(PASS, program, reason)


def test_constant_masks_that_stay() -> None:
    check_declines(PASS, constant(np.tri(20, dtype=bool)), "its mask keeps 100% of the blocks of 64 keys")
    check_declines(PASS, constant(band(40, 2, 2), -1e4), "is not made of 0 and of one number that absorbs every score")
    some = model("", "m", values=" <bool[20, 20] m = {" + ", ".join("01" * 200) + "}>", shape="B, S, 8")
    assert apply_pass(PASS, some).fired == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("float[B, S, 8] q", "float[B, 1, 8] q"), "it has one query, and kernels take many at a time"),
        (("scale = 0.5", "scale = 0.5, softcap = 3.0"), "its scores are capped"),
        (("scale = 0.5", "scale = 0.5, is_causal = 1"), "it is causal and has a mask too"),
        (("(q, k, v, m)", "(q, k, v)"), "it has no mask"),
        (("float[B, S, 8]", "float16[B, S, 8]"), "it is not float32"),
        (("float[B, S, 8] v", "float[B, S, 12] v"), "its heads of keys and of values differ in size"),
        (("float[B, S, 8] q", "float[B, S, N] q"), "the number or the size of its heads is unknown"),
        (("float[B, S, 8] q", "float[B, R, 8] q"), "it is not known how many more keys than queries it has"),
    ],
)
def test_declined(change: tuple[str, str], reason: str) -> None:
    setup = POSITIONS + WINDOWS["mistral"][0] + FILLED.format(low=LOWEST)
    if "[B, R, 8]" in change[1]:
        setup = setup.replace("length =", "lq = Shape<start = 1, end = 2>(q) nq = Squeeze(lq) length =", 1)
        setup = setup.replace("(q) one", "(k) one").replace("rows = Unsq", "cq = Range(zero, nq, one) rows = Unsq")
        setup = setup.replace("Unsqueeze(count, ax_q)", "Unsqueeze(cq, ax_q)")
    text = f"""
    <ir_version: 10, opset_import: ["" : 23]>
    f (float[B, S, 8] q, float[B, S, 8] k, float[B, S, 8] v) => (float y) <int64[S] count, int64[R] cq>
    {{ {setup} y = Attention<{HEADS}>(q, k, v, m) }}
    """
    before, after = change
    if "[B, R, 8]" not in after:
        text = text.replace(", int64[R] cq", "")
    program = program_of(text.replace(before, after), KERNELS)
    program.main.graph.outputs[0].shape = None
    if "float16" in after:
        program.main.graph.outputs[0].dtype = ir.DataType.FLOAT16
    infer_shapes(program.main)
    check_declines(PASS, program, reason)


def test_targets_and_options() -> None:
    check_declines(PASS, program_of(window("mistral").main, "tvm-cpu"), "target 'tvm-cpu' has no operators for it")
    plain = program_of(constant(band(300, 9, 9)).main)
    check_declines(PASS, plain, "its mask is a constant, for which target 'ort-cpu' has no kernel")
    check_declines(PASS, program_of(window("longformer").main), "it has positions that all others see")
    check_declines("fuse-block-sparse{block_size=24}", window("mistral"), "block_size is 24")
    assert PASS in default_pipeline(KERNELS)


def exported(kind: str) -> tuple[Any, ir.Model, tuple[Any, ...]]:
    import torch
    import transformers

    common: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "attn_implementation": "sdpa"}
    if kind == "mistral":
        config = transformers.MistralConfig(**common, num_key_value_heads=2, sliding_window=6)
        module: Any = transformers.MistralModel(config)
    elif kind == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        more = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "layer_types": layers}
        module = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**common, **more))
    else:
        more = {"local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0}
        more |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
        module = transformers.ModernBertModel(transformers.ModernBertConfig(**common, **more))

    class Wrapped(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            more = {} if kind == "modernbert" else {"use_cache": False}
            return module(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state  # type: ignore

    wrapped = Wrapped().eval()
    module.eval()
    mask = torch.ones(2, 15, dtype=torch.int64)
    mask[1, :4] = 0
    inputs = (torch.randint(1, 100, (2, 15)), mask)
    shapes = ({0: "batch", 1: "seq"},) * 2
    made = torch.onnx.export(wrapped, inputs, dynamic_shapes=shapes, dynamo=True, verbose=False)
    return wrapped, made.model, inputs  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "kind",
    ["mistral", pytest.param("gemma3", marks=pytest.mark.slow), pytest.param("modernbert", marks=pytest.mark.slow)],
)
def test_exports_of_transformers(kind: str) -> None:
    """Every layer with a window has one operator for it, and the model gives what the module does."""
    import torch

    module, found, inputs = exported(kind)
    program = program_of(found, KERNELS)
    apply_pass(",".join(RECOGNIZE), program)
    feeds = {n: x.numpy() for n, x in zip(("input_ids", "attention_mask"), inputs, strict=True)}
    program = check_numerics(CLEANED, program, feeds)
    windows = [n for n in program.main.graph if n.op_type == "WindowAttentionKeyMask"]
    assert len(windows) == (2 if kind == "mistral" else 1)
    from planish.passes.testing import run_reference

    (got,) = run_reference(program, feeds).values()
    with torch.no_grad():
        want = module(*inputs).numpy()
    # Padding sees no key; the exporter and ONNX Runtime do not agree with torch on what that gives.
    real = feeds["attention_mask"].astype(bool)
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)
