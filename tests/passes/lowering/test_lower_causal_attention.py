from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.analyses.cost import cost
from planish.ir.analyses.liveness import liveness
from planish.ir.hashing import structural_hash
from planish.ir.printer import op_counts, parse_model, print_model
from planish.ir.program import Program
from planish.passes.defaults import default_pipeline
from planish.passes.lowering.causal_buckets import least_length
from planish.passes.testing import (
    apply_pass,
    check_declines,
    check_rewrite,
    program_of,
    run_reference,
)

PASS = "lower-causal-attention"
TWO = PASS + "{from_length=1,buckets=2}"
HEADS = "q_num_heads = 2, kv_num_heads = 1"
CAUSAL = f"y = Attention<{HEADS}, is_causal = 1>(q, k, v)"
LENGTHS = [1, 2, 15, 16, 17, 191, 192, 193, 194, 256, 300, 511, 1023, 1024, 1025]

# Masks as exporters make them, of token counts `n` and a padding mask (B, S).
POSITIONS = """s = Shape<start = 1, end = 2>(q) n = Squeeze(s) r = Range(zero, n, one)
 row = Unsqueeze(r, ax1) le = LessOrEqual(r, row)"""
PADDED = POSITIONS + " pad = Unsqueeze(padding, ax12) both = And(le, pad)"
CONSTANTS = """int64 zero = {0}, int64 one = {1}, int64[1] ax1 = {1}, int64[2] ax12 = {1, 2}, float fz = {0},
 float low = {-3.3e38}"""
TYPES = "int64 n, int64[S] r, int64[S, 1] row, bool[S, S] le, bool[B, 1, 1, S] pad, bool[B, 1, S, S] both"
MASKS = {
    "bool": POSITIONS + " m = Identity(le)",
    "float": POSITIONS + " m = Where(le, fz, low)",
    "bool, padded": PADDED + " m = Identity(both)",
    "float, padded": PADDED + " m = Where(both, fz, low)",
}


def model(
    body: str = CAUSAL,
    *,
    length: str = "S",
    keys: str = "",
    widths: tuple[int, int, int] = (8, 4, 4),
    dtype: str = "float",
    types: str = "",
    extra: str = "",
) -> str:
    q, k, v = widths
    return f"""
    <ir_version: 10, opset_import: ["" : 23]>
    f ({dtype}[B, {length}, {q}] q, {dtype}[B, {keys or length}, {k}] k, {dtype}[B, {keys or length}, {v}] v{extra})
    => ({dtype}[B, {length}, {2 * v}] y) <{CONSTANTS}{", " + types if types else ""}> {{ {body} }}
    """


def masked(kind: str, *, twice: bool = False) -> str:
    mask = "bool" if kind.startswith("bool") else "float"
    shape = "B, 1, S, S" if "padded" in kind else "S, S"
    calls = f"y = Attention<{HEADS}>(q, k, v, m)"
    if twice:
        calls = f"x = Attention<{HEADS}>(q, k, v, m) y = Attention<{HEADS}>(x, k, v, m)"
    names = [t for t in TYPES.split(", int") if t]
    used = TYPES if "padded" in kind else "int" + ", int".join(names).removeprefix("int").split(", bool[B")[0]
    return model(
        f"{MASKS[kind]} {calls}",
        types=f"{used}, {mask}[{shape}] m",
        extra=", bool[B, S] padding" if "padded" in kind else "",
    )


def feed(
    batch: int, length: int, keys: int | None = None, *, padding: str = "", widths: tuple[int, int, int] = (8, 4, 4)
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch * 10007 + length)
    keys = length if keys is None else keys
    sizes = zip("qkv", (length, keys, keys), widths, strict=True)
    found: dict[str, np.ndarray] = {
        name: rng.standard_normal((batch, n, width)).astype(np.float32) for name, n, width in sizes
    }
    if padding:
        found["padding"] = np.ones((batch, keys), dtype=bool)
        if padding == "left":
            found["padding"][-1:, : keys // 3] = False
        if padding == "right":
            found["padding"][-1:, keys - keys // 3 :] = False
        if padding == "all":
            found["padding"][-1:] = False
    return found


def reference(feeds: dict[str, np.ndarray], heads: int = 2, *, offset: int = 0, uniform: bool = False) -> np.ndarray:
    """The attention in float64; a row without keys is zeros, or the mean of all values if `uniform`."""

    def split(name: str) -> np.ndarray:
        x = feeds[name].astype(np.float64)
        width = feeds["q"].shape[2] // heads
        x = x.reshape(*x.shape[:2], -1, width).transpose(0, 2, 1, 3)
        return np.repeat(x, heads // x.shape[1], axis=1)

    q, k, v = split("q"), split("k"), split("v")
    allowed = np.tri(q.shape[2], k.shape[2], offset, dtype=bool)[None, None]
    if "padding" in feeds:
        allowed = allowed & feeds["padding"][:, None, None, :]
    allowed = np.broadcast_to(allowed, (q.shape[0], heads, q.shape[2], k.shape[2]))
    scores = np.where(allowed, q @ k.swapaxes(2, 3) / np.sqrt(q.shape[3]), -1e300)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    if not uniform:
        weights = weights * allowed.any(axis=-1, keepdims=True)
    total = weights.sum(axis=-1, keepdims=True)
    made = (weights / np.where(total > 0, total, 1)) @ v
    return made.transpose(0, 2, 1, 3).reshape(*feeds["q"].shape[:2], -1)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def lowered(source: str, passes: str = PASS) -> tuple[Program, Program]:
    before = program_of(source)
    after = before.clone()
    result = apply_pass(passes, after)
    assert result.fired, result.declined
    return before, after


def check(pair: tuple[Program, Program], feeds: dict[str, np.ndarray], expected: np.ndarray) -> None:
    before, after = (run_reference(program, feeds)["y"] for program in pair)
    assert distance(after, before) < 1e-6
    assert distance(after, expected) < 1e-6


SPLIT = """
 q0 = Slice(q, n0, n32, ax1) k0 = Slice(k, n0, n32, ax1) v0 = Slice(v, n0, n32, ax1)
 a0 = Attention<q_num_heads = 2, kv_num_heads = 1>(q0, k0, v0, m0)
 q1 = Slice(q, n32, end, ax1) a1 = Attention<q_num_heads = 2, kv_num_heads = 1>(q1, k, v, m1)
 y = Concat<axis = 1>(a0, a1)"""


def test_a_known_length_becomes_blocks() -> None:
    after = f"""
    <ir_version: 10, opset_import: ["" : 23]>
    f (float[B, 40, 8] q, float[B, 40, 4] k, float[B, 40, 4] v) => (float[B, 40, 8] y)
    <int64[1] n0 = {{0}}, int64[1] n32 = {{32}}, int64[1] end = {{9223372036854775807}}, int64[1] ax1 = {{1}},
     int64 s0 = {{0}}, int64 s1 = {{1}}, int64 s32 = {{32}}, int64 s40 = {{40}}> {{
      qa = Range(s0, s32, s1) qb = Unsqueeze(qa, ax1) ka = Range(s0, s32, s1) kb = Unsqueeze(ka, n0)
      m0 = GreaterOrEqual(qb, kb)
      qc = Range(s32, s40, s1) qd = Unsqueeze(qc, ax1) kc = Range(s0, s40, s1) kd = Unsqueeze(kc, n0)
      m1 = GreaterOrEqual(qd, kd) {SPLIT} }}"""
    check_rewrite(TWO, model(length="40"), after, edits=1)


def test_a_symbolic_length_is_compared_at_run_time() -> None:
    program = program_of(model())
    assert apply_pass(PASS, program).fired == 1
    ops = [n.op_type for n in program.main.graph]
    assert ops == ["Shape", "GreaterOrEqual", "GreaterOrEqual", "If", "If"]
    masks, output = list(program.main.graph)[-2:]
    assert len(masks.outputs) == 8 and masks.outputs[0].dtype == ir.DataType.BOOL
    for branch in (output, output.attributes["then_branch"].value[-1]):
        assert branch.op_type == "If" and [str(d) for d in branch.outputs[0].shape or ()] == ["B", "S", "8"]
    then, whole = (output.attributes[name].value for name in ("then_branch", "else_branch"))
    assert [n.op_type for n in whole] == ["Attention"] and whole[0].attributes["is_causal"].value == 1
    blocks = [then[-1].attributes[name].value for name in ("then_branch", "else_branch")]
    assert [sum(n.op_type == "Attention" for n in graph) for graph in blocks] == [8, 4]
    assert all(n.metadata_props["planish.pass"] == PASS for n in program.nodes())
    assert not apply_pass(PASS, program).modified


@pytest.mark.parametrize("length", LENGTHS)
def test_numbers(length: int) -> None:
    pair = lowered(model())
    for batch in (1, 3) if length < 500 else (1,):
        feeds = feed(batch, length)
        check(pair, feeds, reference(feeds))


@pytest.mark.parametrize("length", [192, 193, 1023, 1024])
def test_numbers_of_known_lengths(length: int) -> None:
    source = model(length=str(length))
    feeds = feed(1, length)
    if length == 192:
        check_declines(PASS, source, "it has 192 queries, and blocks pay from 193 on", count=1)
        return
    pair = lowered(source)
    count = sum(n.op_type == "Attention" for n in pair[1].nodes())
    assert count == (8 if length >= 1024 else 4)
    check(pair, feeds, reference(feeds))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("padding", ["none", "left", "right", "all"])
def test_masks_and_rows_without_keys(kind: str, padding: str) -> None:
    pair = lowered(masked(kind))
    if "padded" not in kind:
        padding = ""
    for batch, length in ((1, 17), (1, 192), (2, 193), (3, 300), (1, 1025)):
        feeds = feed(batch, length, padding=padding)
        check(pair, feeds, reference(feeds, uniform=kind.startswith("float")))


def test_layers_share_masks_and_conditions() -> None:
    program = program_of(masked("float, padded", twice=True))
    apply_pass([PASS, "eliminate-common-subexpressions", "eliminate-dead-code"], program)
    ops = [n.op_type for n in program.main.graph]
    assert ops.count("If") == 3 and ops.count("ReduceMax") == 1 and ops.count("Shape") == 1
    assert apply_pass([PASS, "eliminate-common-subexpressions"], program).fired == 0


@pytest.mark.parametrize("past", [0, 5, 100])
def test_keys_of_a_past(past: int) -> None:
    body = f"""s = Shape<start = 1, end = 2>(q) t = Shape<start = 1, end = 2>(old) n = Squeeze(s) p = Squeeze(t)
    e = Add(p, n) own = Range(p, e, one) all = Range(zero, e, one) row = Unsqueeze(own, ax1) m = LessOrEqual(all, row)
    y = Attention<{HEADS}>(q, k, v, m)"""
    types = "int64 n, int64 p, int64 e, int64[S] own, int64[T] all, int64[S, 1] row, bool[S, T] m"
    pair = lowered(model(body, keys="T", types=types, extra=", float[B, P, 4] old"))
    for length in (7, 200, 300):
        feeds = feed(2, length, length + past)
        expected = reference(feeds, offset=past)
        check(pair, feeds | {"old": np.zeros((2, past, 4), np.float32)}, expected)


@pytest.mark.parametrize(("queries", "keys"), [(200, 300), (300, 200), (1030, 40)])
def test_queries_and_keys_of_other_lengths_count_from_the_start(queries: int, keys: int) -> None:
    feeds = feed(1, queries, keys)
    check(lowered(model(keys="T")), feeds, reference(feeds))


@pytest.mark.parametrize("length", [20, 193, 300])
def test_heads_as_an_axis(length: int) -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]>
    f (float[B, 4, S, 3] q, float[B, 2, S, 3] k, float[B, 2, S, 5] v) => (float[B, 4, S, 5] y)
    { y = Attention<is_causal = 1, scale = 0.5>(q, k, v) }"""
    pair = lowered(text)
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 4, length, 3), "k": (2, 2, length, 3), "v": (2, 2, length, 5)}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    before, after = (run_reference(program, feeds)["y"] for program in pair)
    assert distance(after, before) < 1e-6


def test_a_mask_per_head_keeps_its_heads() -> None:
    body = MASKS["float"].replace("m =", "c =") + f" m = Add(c, bias) y = Attention<{HEADS}>(q, k, v, m)"
    types = TYPES.split(", bool[B")[0] + ", float[S, S] c, float[1, 2, S, S] m"
    text = model(body, types=types, extra=", float[1, 2, S, S] bias")
    # What is added has no bound that is known.
    check_declines(PASS, text, "nothing says that its mask 'm' hides the keys after a query")
    fixed = text.replace("float[1, 2, S, S] bias", "bool[1, 2, S, S] bias").replace("Add(c, bias)", "Where(w, fz, low)")
    fixed = fixed.replace("m = Where(w", "w = And(le, bias) m = Where(w").replace(
        "float[S, S] c,", "bool[1, 2, S, S] w,"
    )
    fixed = fixed.replace("c = Where(le, fz, low)", "")
    pair = lowered(fixed)
    for kept in (1.0, 0.7):
        feeds = feed(2, 210)
        heads = np.random.default_rng(0).random((1, 2, 210, 210)) < kept
        before, after = (run_reference(program, feeds | {"bias": heads})["y"] for program in pair)
        assert distance(after, before) < 1e-6


@pytest.mark.parametrize("kind", ["bool", "float, padded"])
def test_an_empty_batch_is_refused_as_before(kind: str) -> None:
    for program in lowered(masked(kind)):
        for length in (3, 200):
            with pytest.raises(Exception, match="Batch size must be greater than 0"):
                run_reference(program, feed(0, length, padding="none" if "padded" in kind else ""))


DECLINES: dict[str, tuple[dict[str, Any], str]] = {
    "not causal": ({"body": CAUSAL.replace(", is_causal = 1", "")}, "every query sees every key"),
    "capped": ({"body": CAUSAL.replace("is_causal", "softcap = 3.0, is_causal")}, "its scores are capped"),
    "short": ({"length": "100"}, "it has 100 queries, and blocks pay from 193 on"),
    "half": ({"dtype": "float16"}, "it is not float32"),
    "double": ({"dtype": "double"}, "it is not float32"),
    "unknown mask": (
        {"body": f"y = Attention<{HEADS}>(q, k, v, m)", "extra": ", bool[S, S] m"},
        "nothing says that its mask 'm' hides the keys after a query",
    ),
    "mask of another size": (
        {"body": f"y = Attention<{HEADS}>(q, k, v, m)", "extra": ", bool[S, T] m"},
        "its mask is S by T and queries and keys are S by S",
    ),
    "causal and a mask": (
        {"body": CAUSAL.replace("v)", "v, m)"), "extra": ", bool[S, S] m"}, "it is causal and has a mask too"
    ),
    "a mask that may hide all": (
        {
            "body": MASKS["bool"].replace("LessOrEqual", "Less") + f" y = Attention<{HEADS}>(q, k, v, m)",
            "types": TYPES.split(", bool[B")[0] + ", bool[S, S] m",
        },
        "its mask 'm' may hide all keys from the first queries",
    ),
    "part of others": (
        {
            "body": f"o = Slice(q, ax1, last, ax1) y = Attention<{HEADS}, is_causal = 1>(o, k, v)",
            "types": "int64[1] last = {9000}, float[B, S, 8] o",
        },
        "its queries are a part of others",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINES)
def test_declines(name: str) -> None:
    arguments, reason = DECLINES[name]
    check_declines(PASS, model(**arguments), reason, count=1)


def test_caches_and_scores_decline() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]>
    f (float[B, 2, S, 4] q, float[B, 2, S, 4] k, float[B, 2, S, 4] v, float[B, 2, P, 4] pk, float[B, 2, P, 4] pv)
    => (float[B, 2, S, 4] y) { y = Attention<is_causal = 1>(q, k, v, , pk, pv) }"""
    check_declines(PASS, text, "it reads or writes a cache, or gives its scores", count=1)


def test_another_target_and_a_branch_decline() -> None:
    program = program_of(model())
    program.target = type(program.target)("tvm", "cpu")
    assert "target tvm-cpu has its own attention kernels" in {d.reason for d in apply_pass(PASS, program).declined}
    branch = f"""t () => (float[B, S, 8] a) {{ a = Attention<{HEADS}, is_causal = 1>(q, k, v) }}"""
    other = "e () => (float[B, S, 8] b) { b = Relu(q) }"
    text = model(f"y = If(c) <then_branch = {branch}, else_branch = {other}>", extra=", bool c")
    check_declines(PASS, text, "it is inside of a branch", count=1)


def test_options_that_make_no_sense_decline() -> None:
    check_declines(PASS + "{buckets=1}", model(), "buckets is 1; it takes 2 or more, or 0")


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 7), length=st.integers(1, 900), extra=st.integers(0, 40), symbolic=st.booleans())
def test_any_length_in_any_number_of_blocks(count: int, length: int, extra: int, symbolic: bool) -> None:
    text = model(length="S" if symbolic else str(length), keys="T" if symbolic else str(length + extra))
    program = program_of(text)
    fired = apply_pass(f"{PASS}{{from_length=1,buckets={count}}}", program).fired
    assert fired == (symbolic or length >= least_length(count))
    feeds = feed(1, length, length + extra)
    got = run_reference(program, feeds)["y"]
    assert distance(got, reference(feeds)) < 1e-6


def test_what_reads_programs_reads_branches() -> None:
    before, after = lowered(masked("float, padded", twice=True))
    apply_pass(["infer-shapes", "eliminate-common-subexpressions"], after)
    dims = {"B": 1, "S": 300}
    # The branch that costs more counts: never less than the attention as a whole.
    assert cost(after, dims=dims).flops <= 1.05 * cost(before, dims=dims).flops
    assert not set(cost(after, dims=dims).unknown) - {"If"}
    assert liveness(after, dims=dims).peak_bytes > 0
    again = program_of(parse_model(print_model(after.main)))
    assert op_counts(again)["Attention"] == op_counts(after)["Attention"] == 26
    assert structural_hash(after) == structural_hash(after.clone()) != structural_hash(before)


def test_the_default_pipeline_has_it_once() -> None:
    passes = default_pipeline("ort-cpu").split(",")
    assert passes.count(PASS) == 1
    assert "eliminate-common-subexpressions" in passes[passes.index(PASS) :]
