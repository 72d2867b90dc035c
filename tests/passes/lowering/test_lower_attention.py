from __future__ import annotations

import numpy as np
import pytest

from planish.ir.infer import infer_shapes
from planish.ir.ops import import_functions
from planish.ir.program import Program
from planish.passes.testing import check_declines, check_numerics, check_rewrite, program_of

KERNELS = "ort-cpu:kernels"
PASS = "lower-attention"
HEADS = "q_num_heads = 2, kv_num_heads = 2, scale = 0.5"
INPUTS = "float[B, S, 8] q, float[B, S, 8] k, float[B, S, 8] v"
#: Positions as torch's exporter writes them, and the causal comparison of them.
CAUSAL = """
    length = Shape<start = 1, end = 2>(q) one = Constant<value_int = 1>() zero = Constant<value_int = 0>()
    n = Squeeze(length) count = Range(zero, n, one)
    ax_q = Constant<value_ints = [0, 1, 3]>() ax_k = Constant<value_ints = [0, 1, 2]>()
    rows = Unsqueeze(count, ax_q) columns = Unsqueeze(count, ax_k) causal = LessOrEqual(columns, rows)
"""
#: A float mask of a bool: what is hidden has a low score; the second form is not told from zeros by Attention.
FILLED = "nought = Constant<value_float = 0.0>() low = Constant<value_float = {low}>() m = Where({of}, nought, low)"


def model(call: str, *, setup: str = "", inputs: str = INPUTS, dtype: str = "float") -> str:
    sized = "<int64[S] count>" if "count" in setup else ""
    return f"""
    <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
    f ({inputs.replace("float", dtype)}) => ({dtype}[B, S, 8] y) {sized} {{ {setup} y = {call} }}
    """


def with_kernels(*args: str, **more: str) -> Program:
    program = program_of(model(*args, **more), KERNELS)
    if "planish." in args[0]:
        import_functions(program.main)
    else:
        del program.main.graph.opset_imports["planish"]
    infer_shapes(program.main)
    return program


def feed(batch: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch * 31 + length)
    return {name: rng.standard_normal((batch, length, 8)).astype(np.float32) for name in "qkv"}


@pytest.mark.parametrize("is_causal", [0, 1])
def test_without_a_mask(is_causal: int) -> None:
    before = f"Attention<{HEADS}, is_causal = {is_causal}>(q, k, v)"
    after = f"planish.FlashAttention<{HEADS}, is_causal = {is_causal}>(q, k, v)"
    check_rewrite(PASS, with_kernels(before), with_kernels(after), edits=1)


def test_the_scale_is_by_the_size_of_a_head_if_it_is_not_given() -> None:
    before = "Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)"
    check_rewrite(PASS, with_kernels(before), with_kernels(f"planish.FlashAttention<{HEADS}, is_causal = 0>(q, k, v)"))


def test_a_causal_mask_becomes_an_attribute() -> None:
    setup = CAUSAL + FILLED.format(of="causal", low="-3.3e38")
    program = check_numerics(
        f"{PASS},eliminate-dead-code", with_kernels(f"Attention<{HEADS}>(q, k, v, m)", setup=setup), feed(2, 7)
    )
    (node,) = program.main.graph
    assert (node.op_type, node.attributes.get_int("is_causal")) == ("FlashAttention", 1)


PADDED = f"{INPUTS}, bool[B, 1, 1, S] pad"


@pytest.mark.parametrize("low", ["-3.3e38", "-3.4028234663852886e38"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 70)])
def test_padding_is_a_mask_of_keys(causal: bool, low: str, size: tuple[int, int]) -> None:
    """Rows padded on the left have queries that see no key: as the score says, equal weights or zeros."""
    both = "both = And(causal, pad)" if causal else "both = Identity(pad)"
    widen = "expanded_to = Concat<axis = 0>(batch, one_v, length, length) whole = Expand(m, expanded_to)"
    more = "batch = Shape<start = 0, end = 1>(q) one_v = Constant<value_ints = [1]>()"
    setup = CAUSAL + both + " " + FILLED.format(of="both", low=low) + more + " " + widen
    program = with_kernels(f"Attention<{HEADS}>(q, k, v, whole)", setup=setup, inputs=PADDED)
    batch, length = size
    inputs = feed(batch, length)
    hidden = np.arange(length) < np.arange(batch)[:, None] * length // max(batch - 1, 1)  # the last row has no key
    inputs["pad"] = ~hidden[:, None, None, :]
    program = check_numerics(f"{PASS},eliminate-dead-code", program, inputs)
    (node,) = (n for n in program.main.graph if n.domain == "planish")
    assert (node.op_type, node.attributes.get_int("is_causal")) == ("FlashAttentionKeyMask", int(causal))
    assert node.attributes.get_float("hidden_score") == np.float32(low)


def test_a_mask_by_query_and_key_stays() -> None:
    program = with_kernels(f"Attention<{HEADS}>(q, k, v, pad)", inputs=f"{INPUTS}, bool[B, 1, S, S] pad")
    check_declines(PASS, program, "a part of its mask, 'pad', is neither causal nor the same for all queries")


CACHE = ", float[B, 2, P, 4] pk, float[B, 2, P, 4] pv"


@pytest.mark.parametrize(
    ("call", "more", "reason"),
    [
        (f"Attention<{HEADS}, softcap = 3.0>(q, k, v)", {}, "its scores are capped"),
        (
            f"Attention<{HEADS}>(q, k, v, m)",
            {"inputs": f"{INPUTS}, float[S, S] m"},
            "float mask 'm' is not known to be",
        ),
        (f"Attention<{HEADS}>(q, k, v)", {"dtype": "float16"}, "it is not float32"),
        (f"Attention<{HEADS}>(q, k, v, , pk, pv)", {"inputs": INPUTS + CACHE}, "it reads or writes a cache"),
        (f"Attention<{HEADS}>(q, k, v)", {"inputs": INPUTS.replace("S, 8] q", "1, 8] q")}, "it has one query"),
        (
            "Attention<scale = 0.5>(q4, k4, v4)",
            {"inputs": "float[B, 2, S, 4] q4, float[B, 2, S, 4] k4, float[B, 2, S, 4] v4"},
            "its heads are an axis of their own",
        ),
    ],
)
def test_declined(call: str, more: dict[str, str], reason: str) -> None:
    source = with_kernels(call, **more)
    if "q4" in call:
        source.main.graph.outputs[0].shape = None
    check_declines(PASS, source, reason)


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        # A score that may be beaten: with a row of only hidden keys it is no mean.
        (CAUSAL + FILLED.format(of="causal", low="-10000.0"), "is not known to be made of 0 and the lowest number"),
        # A window: what is too long ago is hidden too.
        (
            CAUSAL + "w = Constant<value_int = 3>() last = Add(columns, w) near = Greater(last, rows) "
            "both = And(causal, near) " + FILLED.format(of="both", low="-3.3e38"),
            "'near', is neither causal nor the same for all queries",
        ),
        # The other triangle.
        (
            CAUSAL + "up = GreaterOrEqual(columns, rows) " + FILLED.format(of="up", low="-3.3e38"),
            "'up', is neither causal nor the same for all queries",
        ),
    ],
)
def test_masks_that_stay(setup: str, reason: str) -> None:
    check_declines(PASS, with_kernels(f"Attention<{HEADS}>(q, k, v, m)", setup=setup), reason)


def test_a_target_without_kernels() -> None:
    program = with_kernels(f"Attention<{HEADS}>(q, k, v)")
    check_declines(PASS, program_of(program.main), "target 'ort-cpu' has no generated kernels; 'ort-cpu:kernels' has")
