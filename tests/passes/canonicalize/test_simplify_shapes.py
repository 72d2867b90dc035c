"""Shape arithmetic: constants and names for sizes, constant targets of Reshape that are right for an empty batch."""

from __future__ import annotations

import numpy as np
import pytest

from planish.passes.canonicalize.eliminate_dead_code import EliminateDeadCode
from planish.passes.canonicalize.simplify_shapes import SimplifyShapes
from tests.passes.canonicalize.canonical_support import assert_same, model_of, ops, reasons, run_pass

SHAPES = SimplifyShapes()
SIZES = [(2, 3), (0, 3), (1, 1), (2, 0), (0, 0)]
WEIGHTS = "<int64 i0 = {0}, int64 i1 = {1}, int64[1] a0 = {0}, int64[1] a1 = {1}, int64[1] h = {4}, int64[1] d = {2}>"


def feeds(*sizes: tuple[int, int]) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(b, s, 8)).astype(np.float32)} for b, s in sizes or SIZES]


def test_heads_of_attention():
    """The target is copied sizes and numbers: no -1, which an empty batch could not answer."""
    model = model_of(f"""agraph (float[B,S,8] x) => (float[B,4,S,2] y) {WEIGHTS}
    {{ s = Shape(x)  b = Gather(s, i0)  bu = Unsqueeze(b, a0)  q = Gather(s, i1)  qu = Unsqueeze(q, a0)
       t = Concat<axis=0>(bu, qu, h, d)  r = Reshape(x, t)  y = Transpose<perm=[0,2,1,3]>(r) }}""")
    before = model.clone()
    assert run_pass(SHAPES, model).fired == 3  # two readers of sizes, one Reshape
    run_pass(EliminateDeadCode(), model)
    assert ops(model) == ["Reshape", "Transpose"]
    assert model.graph[0].inputs[1].const_value.numpy().tolist() == [0, 0, 4, 2]
    assert_same(before, model, *feeds())


@pytest.mark.parametrize(
    ("target", "shape", "expected"),
    [
        ("n, d8", "N,8", [-1, 8]),
        ("b1, s1, d8", "B,S,8", [0, 0, 8]),
        ("b1, s1, h, d", "B,S,4,2", [0, 0, 4, 2]),
        ("b1, m1, d8", "B,K,8", [0, 0, 8]),  # the -1 can only be S
        ("m1, s1, d8", "K,S,8", [0, 0, 8]),
        ("b1, s1, h, m1", "B,S,4,2", [0, 0, 4, 2]),
        ("m1, d8", "N,8", [-1, 8]),
    ],
)
@pytest.mark.parametrize("allowzero", [0, 1])
def test_targets(target, shape, expected, allowzero):
    model = model_of(f"""agraph (float[B,S,8] x) => (float[{shape}] y)
    <int64[1] h = {{4}}, int64[1] d = {{2}}, int64[1] d8 = {{8}}, int64[1] m1 = {{-1}}>
    {{ b1 = Shape<start=0,end=1>(x)  s1 = Shape<start=1,end=2>(x)  n = Mul(b1, s1)
       t = Concat<axis=0>({target})  y = Reshape<allowzero={allowzero}>(x, t) }}""")
    before = model.clone()
    assert run_pass(SHAPES, model).fired >= 1
    node = model.graph[-1]
    assert node.inputs[1].const_value.numpy().tolist() == expected
    # Without allowzero, the model itself reads a computed 0 as a copy, and fails.
    sizes = SIZES if "m1" not in target and (allowzero or -1 not in expected) else [(2, 3), (1, 1), (5, 2)]
    assert_same(before, model, *feeds(*sizes))


@pytest.mark.parametrize(
    ("target", "shape", "reason"),
    [
        ("s1, b1, d8", "S,B,8", "2 of the 3 sizes"),
        ("b1, h, s1, d", "B,4,S,2", "one size is open next to a copied"),
    ],
)
def test_declines(target, shape, reason):
    model = model_of(f"""agraph (float[B,S,8] x) => (float[{shape}] y)
    <int64[1] h = {{4}}, int64[1] d = {{2}}, int64[1] d8 = {{8}}>
    {{ b1 = Shape<start=0,end=1>(x)  s1 = Shape<start=1,end=2>(x)
       t = Concat<axis=0>({target})  y = Reshape(x, t) }}""")
    before = model.clone()
    assert reason in reasons(run_pass(SHAPES, model))
    assert_same(before, model, *feeds((2, 3), (1, 1)))


def test_declines_an_unknown_target():
    model = model_of("agraph (float[B,8] x, int64[2] t) => (float[M,N] y) { y = Reshape(x, t) }")
    assert "not known" in reasons(run_pass(SHAPES, model))


def test_static_sizes_become_constants():
    model = model_of("""agraph (float[B,6] x, float[3,4] w) => (int64[2] y, float[B,6] z)
    <int64[1] two = {2}, int64 i1 = {1}>
    { s = Shape(w)  e = Identity(s)  y = Neg(e)  n = Shape(x)  k = Gather(n, i1)  f = Cast<to=1>(k)  z = Div(x, f) }""")
    before = model.clone()
    assert run_pass(SHAPES, model).fired == 2  # e goes with what it copies
    x = np.ones((2, 6), np.float32)
    assert_same(before, model, {"x": x, "w": np.ones((3, 4), np.float32)})


def test_equal_symbols_have_one_reader():
    model = model_of("""agraph (float[B,S] x, float[B,T] m) => (int64[1] y, int64[1] z)
    { a = Relu(x)  s = Shape<start=0,end=1>(a)  t = Shape<start=-2,end=-1>(m)  y = Neg(s)  z = Abs(t) }""")
    before = model.clone()
    assert run_pass(SHAPES, model).fired == 2
    run_pass(EliminateDeadCode(), model)
    assert ops(model) == ["Shape", "Neg", "Abs"]
    assert_same(before, model, {"x": np.ones((2, 3), np.float32), "m": np.ones((2, 5), np.float32)})


def test_the_pattern_of_expand_in_exported_models():
    """Where(Equal(shape, -1), ones, shape): a size is never negative."""
    model = model_of("""agraph (float[B,1] x, float[B,S] m) => (float[B,S] y)
    <int64[1] m1 = {-1}, int64[2] ones = {1, 1}, int64[2] minus = {-1, -1}>
    { b = Shape<start=0,end=1>(m)  s = Shape<start=1,end=2>(m)  t = Concat<axis=0>(b, s)
      e = Equal(t, minus)  w = Where(e, ones, t)  y = Expand(x, w) }""")
    before = model.clone()
    run_pass(SHAPES, model)
    assert_same(
        before, model, *({"x": np.ones((b, 1), np.float32), "m": np.ones((b, s), np.float32)} for b, s in SIZES)
    )


def test_a_name_inside_a_loop_is_another_size():
    """The body grows its state: its `N` is not the `N` of the input."""
    model = model_of("""agraph (int64 n, float[N] x) => (float[M] y, int64[1] z) <bool go = {1}, float[1] one = {1}>
    { y = Loop(n, go, x) <body = b (int64 i, bool c, float[N] s) => (bool co, float[K] so)
        { k = Shape(s)  f = Cast<to=1>(k)  so = Concat<axis=0>(s, f)  co = Identity(c) }>
      w = Shape(x)  z = Neg(w) }""")
    before = model.clone()
    run_pass(SHAPES, model)
    assert_same(before, model, *({"n": np.array(n), "x": np.ones(3, np.float32)} for n in (0, 1, 3)))


def test_outputs_stay():
    model = model_of("agraph (float[2,3] x) => (int64[2] y) { y = Shape(x) }")
    assert run_pass(SHAPES, model).fired == 0
