"""For every fusion pass at least one near miss, with its reason; and all passes at once, as the pipeline runs them."""

from __future__ import annotations

import pkgutil
from typing import Any

import numpy as np
import pytest

import planish.passes.fusion as fusion
from planish.passes import registry
from planish.passes.defaults import default_pipeline
from planish.passes.explain import NearMiss, explain, explain_pipeline
from planish.passes.pipeline import parse_pipeline
from planish.passes.testing import canonical_text, program_of

HEAD = '<ir_version: 10, opset_import: ["" : 23]>'
FLOATS = "float half = {0.5}, float one = {1}, float two = {2}, float root = {1.4142135}, float eps = {0.00001}"


def graph(body: str, inputs: str = "float[B, S, 8] x", output: str = "float[B, S, 8] y", consts: str = FLOATS) -> str:
    return f"{HEAD} g ({inputs}) => ({output}) <{consts}> {{ {body} }}"


LAYER_NORM = """m = ReduceMean<keepdims = 1>(x, axes)  d = Sub(x, m)  q = Mul(d, d)
    v = ReduceMean<keepdims = 1>(q, axes)  a = Add(v, e)  r = Sqrt(a)  y = Div(d, r)"""
RMS = """q = Mul(x, x)  v = ReduceMean<keepdims = 1>(q, axes)  a = Add(v, eps)  r = Sqrt(a)  n = Div(x, r)
    y = Mul(n, scale)"""
AXES, SCALE = ", int64[1] axes = {-1}", ", float[8] scale = {1,2,3,4,5,6,7,8}"
HEADS = "float[B, 2, S, 4] x, float[B, 2, S, 4] z, float[B, 1, S, 4] cos, float[B, 1, S, 4] sin"
ROTARY = """f = Slice(z, zero, middle, last)  b = Slice(z, middle, end, last)  n = Neg(b)  t = Concat<axis = -1>(n, f)
    p = Mul(x, cos)  r = Mul(t, sin)  y = Add(p, r)"""
BOUNDS = "int64[1] zero = {0}, int64[1] middle = {2}, int64[1] end = {4}, int64[1] last = {-1}"
MATRIX = "float[2, 3] w = {1, 2, 3, 4, 5, 6}"
KERNEL = "float[2, 1, 1, 1] w = {1, 2}, float[2] s = {1, 1}, float[2] o = {0, 0}"

#: pass → (model, how many operators match at least, reason).
CASES: dict[str, list[tuple[str, int, str]]] = {
    "fold-batch-norm": [
        (
            graph(
                "c = Conv(x, w)  y = BatchNormalization(c, s, o, o, s)  z = Relu(c)",
                "float[B, 1, H, W] x",
                "float[B, 2, H, W] y, float[B, 2, H, W] z",
                KERNEL,
            ),
            2,
            "inner value 'c' is also used by Relu",
        ),
        (
            graph(
                "c = Relu(x)  y = BatchNormalization(c, s, o, o, r)",
                "float[B, 2, H, W] x, float[2] r",
                "float[B, 2, H, W] y",
                KERNEL,
            ),
            0,
            "",
        ),
    ],
    "fold-scale-shift": [
        (
            graph(
                "p = MatMul(x, w)  y = Mul(p, c)",
                "float[B, 4, 2] x",
                "float[B, 4, 3] y",
                MATRIX + ", float[4, 1] c = {1, 2, 3, 4}",
            ),
            2,
            "'c' has shape [4, 1], which is not one number for each of the 3 channels",
        )
    ],
    "fuse-attention": [
        (
            graph(
                "m = MatMul(q, k)  s = Mul(m, half)  p = Softmax<axis = 1>(s)  y = MatMul(p, v)",
                "float[B, 2, S, 8] q, float[B, 2, 8, L] k, float[B, 2, L, 8] v",
                "float[B, 2, S, 8] y",
            ),
            1,
            "is over axis 1",
        )
    ],
    "fuse-gelu": [
        (
            graph("a = Div(x, two)  b = Erf(a)  c = Add(b, one)  d = Mul(x, c)  y = Mul(d, half)"),
            5,
            "value 'two' is 2.0; expected 1.414",
        ),
        (
            graph("a = Div(x, root)  b = Erf(a)  c = Add(b, two)  d = Mul(x, c)  y = Mul(d, half)"),
            4,
            "value 'two' is 2.0; expected 1.0",
        ),
        (
            graph("a = Div(x, root)  b = Erf(a)  c = Add(b, one)  y = Sub(x, c)"),
            3,
            "'c' matches up to Add, and is read by Sub 'Sub_0'; expected Mul",
        ),
    ],
    "fuse-kv-cache": [
        (
            graph(
                "r = Concat<axis = 3>(p, k)  t = Concat<axis = 3>(p, v)  y = Attention(q, r, t)",
                "float[B, 2, S, 8] q, float[B, 2, S, 4] p, float[B, 2, S, 4] k, float[B, 2, S, 4] v",
                "float[B, 2, S, 8] y, float[B, 2, S, 8] r, float[B, 2, S, 8] t",
            ),
            3,
            "the keys are put together along axis 3, not length",
        )
    ],
    "fuse-layer-norm": [
        (
            graph(LAYER_NORM, "float[B, S, 8] x, float e", consts=FLOATS + AXES),
            7,
            "epsilon is not a positive constant",
        ),
        (
            graph(LAYER_NORM.replace("Sqrt", "Exp").replace("e)", "eps)"), consts=FLOATS + AXES),
            2,
            "'a' matches up to Add, and is read by Exp 'Exp_0'; expected Sqrt",
        ),
    ],
    "fuse-matmul-add": [
        (
            graph("p = MatMul(x, w)  y = Add(p, r)", "float[B, 2] x, float[B, 3] r", "float[B, 3] y", MATRIX),
            2,
            "a bias has (3,)",
        )
    ],
    "fuse-rms-norm": [
        (
            graph(RMS, consts=FLOATS + ", int64[1] axes = {1}" + SCALE),
            6,
            "the mean is over axes [1] of 3, which are not the last ones",
        ),
        (
            graph(RMS.replace("Mul(x, x)", "Mul(x, two)"), consts=FLOATS + AXES + SCALE),
            5,
            "x is value 'x', found value 'two'",
        ),
    ],
    "fuse-rotary-embedding": [
        (graph(ROTARY, HEADS, "float[B, 2, S, 4] y", BOUNDS), 3, "'t' is turned from 'z', not from 'x'")
    ],
    "fuse-silu": [
        (graph("n = Neg(x)  e = Exp(n)  a = Add(e, two)  y = Div(x, a)"), 3, "value 'two' is 2.0; expected 1.0"),
        (graph("n = Neg(x)  e = Exp(n)  a = Add(e, one)  y = Sub(x, a)"), 3, "is read by Sub 'Sub_0'; expected Div"),
    ],
    "fuse-swiglu": [
        (
            graph("s = Sigmoid(x)  g = Mul(x, s)  y = Mul(g, u)", "float[B, S, 8] x, float[8] u"),
            3,
            "gate and up are not proved to have one shape",
        )
    ],
    "merge-attention-heads": [
        (
            graph(
                "h = Attention(x, x, x)  y = Transpose<perm = [0, 2, 1, 3]>(h)",
                "float[B, 2, S, 8] x",
                "float[B, S, 2, 8] y",
            ),
            2,
            "the queries are not split into heads by a Transpose of axes 1 and 2",
        )
    ],
    "share-kv-heads": [
        (
            graph(
                "u = Unsqueeze(k, two)  e = Expand(u, wide)  r = Reshape(e, heads)  y = Attention(x, r, r)",
                "float[B, 4, S, 8] x, float[1, 1, L, 8] k",
                "float[B, 4, S, 8] y",
                "int64[1] two = {2}, int64[5] wide = {1, 1, 4, 1, 1}, int64[4] heads = {1, 4, -1, 8}",
            ),
            1,
            "may change where their heads are repeated",
        )
    ],
    "split-packed-heads": [
        (
            graph(
                "r = Reshape(x, apart)  t = Transpose<perm = [2, 0, 3, 1, 4]>(r)  "
                "q = Gather<axis = 0>(t, i0)  k = Gather<axis = 0>(t, i1)  v = Gather<axis = 0>(t, i2)",
                "float[B, S, N] x",
                "float[B, 4, S, 2] q, float[B, 4, S, 2] k, float[B, 4, S, 2] v",
                "int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, int64[5] apart = {0, 0, 3, 4, 2}",
            ),
            5,
            "the number or the size of the heads is unknown",
        )
    ],
    "unflatten-gemm": [
        (
            graph(
                "f = Reshape(x, rows)  p = Gemm(f, w)  y = Reshape(p, back)",
                "float[2, 5, 8] x, float[8, 3] w",
                "float[2, 5, 3] y",
                "int64[2] rows = {-1, 8}, int64[3] back = {2, 5, 3}",
            ),
            3,
            "the second matrix is no weight",
        )
    ],
    "unpack-qkv": [
        (
            graph(
                "p = MatMul(x, w)  a, b = Split<axis = 1, num_outputs = 2>(p)",
                "float[B, 4, 2] x",
                "float[B, 2, 3] a, float[B, 2, 3] b",
                MATRIX,
            ),
            2,
            "it is not split along its columns",
        )
    ],
}


def misses(name: str, text: str) -> list[NearMiss]:
    program = program_of(text)
    parse_pipeline("infer-shapes")[0].apply(program, _context(program))
    before = canonical_text(program)
    found = explain(program, parse_pipeline(name)[0])
    assert canonical_text(program) == before
    return found


def _context(program: Any) -> Any:
    from planish.passes.base import PassContext

    return PassContext(program.target)


@pytest.mark.parametrize(("name", "number"), [(n, k) for n, cases in CASES.items() for k in range(len(cases))])
def test_the_reason(name: str, number: int) -> None:
    text, matched, reason = CASES[name][number]
    if name not in registry.names():
        pytest.skip(f"there is no pass {name}")
    found = misses(name, text)
    if not reason:
        assert found == []
        return
    best = [m for m in found if reason in m.reason]
    assert best, f"no near miss says {reason!r}: {[str(m) for m in found]}"
    assert len(best[0].matched_nodes) >= matched, str(best[0])


def test_every_fusion_pass_has_a_case() -> None:
    modules = {f"{fusion.__name__}.{m.name}" for m in pkgutil.iter_modules(fusion.__path__)}
    names = {n for n in registry.names() if registry.get(n).__module__ in modules}
    assert names <= set(CASES), f"write a near miss for {sorted(names - set(CASES))}, with the reason to expect"


def test_what_only_begins_alike_is_no_near_miss() -> None:
    # A sum of two products, as every gated cell has; Mul and Mul match the beginning of several patterns.
    text = graph("a = Mul(x, half)  b = Mul(a, two)  c = Mul(x, b)  y = Add(c, x)")
    for name in sorted(set(CASES) & set(registry.names())):
        assert misses(name, text) == [], name


def test_explaining_leaves_no_traces_for_the_next_pass() -> None:
    """What a rule built only to see whether it declines is no user of the values of the graph."""
    program = program_of(CASES["fuse-swiglu"][0][0])
    uses = {v.name: len(v.uses()) for n in program.main.graph for v in n.outputs}
    for name in sorted(set(CASES) & set(registry.names())):
        explain(program, parse_pipeline(name)[0])
    assert {v.name: len(v.uses()) for n in program.main.graph for v in n.outputs} == uses


def test_a_decline_after_building_leaves_no_traces() -> None:
    from planish.passes.rewrite import Decline, RewritePass
    from planish.passes.testing import apply_pass

    class Builds(RewritePass):
        name = "test-builds-then-declines"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Relu(x)

        def rewrite(self, op: Any, x: Any) -> Any:
            op.Neg(x)
            raise Decline("never")

    program = program_of(graph("a = Neg(x)  y = Relu(a)"))
    apply_pass(Builds(), program)
    assert [u.op_type for u in next(iter(program.main.graph)).outputs[0].consumers()] == ["Relu"]


def test_all_passes_see_what_the_pipeline_gives_them() -> None:
    """Two Gelus: one fuses, and lets feed-forward fire; the other misses by its constant, and so does its block."""
    rng = np.random.default_rng(0)
    from tests.passes.fusion.linear_models import model

    gelu = (
        "d{0} = Div(a{0}, {1})  e{0} = Erf(d{0})  s{0} = Add(e{0}, one)  m{0} = Mul(a{0}, s{0})  g{0} = Mul(m{0}, half)"
    )
    lines = ["a1 = MatMul(x, w)", gelu.format(1, "root"), "b1 = MatMul(g1, v)", "a2 = MatMul(b1, u)"]
    lines += [gelu.format(2, "two"), "y = MatMul(g2, t)"]
    weights = {n: rng.standard_normal((64, 64)).astype(np.float32) for n in "wvut"}
    weights |= {n: np.array(f, np.float32) for n, f in (("root", 2**0.5), ("two", 2), ("one", 1), ("half", 0.5))}
    program = program_of(model([part for line in lines for part in line.split("  ")], weights, ["B", "S", 64]))
    passes = parse_pipeline(default_pipeline("ort-cpu"))
    found = list(explain_pipeline(program, passes))
    assert [item.position for item in found] == sorted(item.position for item in found)
    assert all(item.name == str(passes[item.position]) for item in found)
    by_name = {item.name: item for item in found}
    assert by_name["fuse-gelu"].fired == 1 and by_name["lower-feed-forward"].fired == 1
    (miss,) = by_name["fuse-gelu"].near_misses
    assert "value 'two' is 2.0; expected 1.41" in miss.reason
