"""Pairs of rearrangements compose where nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest

from planish.passes.canonicalize.compose_views import ComposeViews
from tests.passes.canonicalize.canonical_support import assert_same, model_of, ops, reasons, run_pass

VIEWS = ComposeViews()
WEIGHTS = """<int64[2] m6 = {-1, 6}, int64[3] c32 = {0, 3, 2}, int64[1] a1 = {1}, int64[1] an = {-3},
 int64[1] a2 = {2}, int64[2] flat = {-1, 3}>"""
COMPOSED = [
    ("Transpose<perm=[1,2,0]>(r)", "Transpose<perm=[1,0,2]>(p)", ["Transpose"], 1),
    ("Transpose<perm=[1,2,0]>(r)", "Transpose<perm=[2,0,1]>(p)", [], 1),
    ("Transpose(r)", "Transpose(p)", [], 1),
    ("Reshape(r, c32)", "Reshape(p, flat)", ["Reshape"], 1),
    ("Flatten(r)", "Reshape(p, flat)", ["Reshape"], 1),
    ("Unsqueeze(r, a1)", "Squeeze(p, a1)", [], 1),
    ("Unsqueeze(r, a1)", "Squeeze(p, an)", [], 1),
    ("Cast<to=11>(r)", "Cast<to=1>(p)", [], 1),
    ("Cast<to=11>(r)", "Cast<to=10>(p)", ["Cast"], 1),
    ("Neg(r)", "Neg(p)", [], 1),
]
KEPT = [
    ("Cast<to=7>(r)", "Cast<to=1>(p)", "may lose something"),
    ("Cast<to=10>(r)", "Cast<to=1>(p)", "may lose something"),
    ("Cast<to=11>(r)", "Cast<to=7>(p)", "may saturate"),
    ("Unsqueeze(r, a1)", "Squeeze(p)", "axes are not known"),
    ("Reshape(r, m6)", "Reshape(p, c32)", "size 0 is copied from the first Reshape"),
    ("Reshape(r, c32)", "Reshape(p, t)", "target is not constant"),
]


@pytest.mark.parametrize(("first", "second", "expected", "fired"), COMPOSED)
def test_composed(first, second, expected, fired):
    model = model_of(f"""agraph (float[B,2,3] x, float[N] u) => (float[N] y) {WEIGHTS}
    {{ r = Abs(x)  p = {first}  q = {second}  s = Identity(q)
       c = CastLike(s, u)  m = ReduceMax<keepdims=0>(c)  y = Add(u, m) }}""")
    before = model.clone()
    assert run_pass(VIEWS, model).fired == fired + 1  # and the CastLike
    assert ops(model) == ["Abs", *expected, "Identity", "Cast", "ReduceMax", "Add"]
    rng = np.random.default_rng(0)
    assert_same(
        before,
        model,
        *({"x": rng.normal(size=(b, 2, 3)).astype(np.float32), "u": np.ones(2, np.float32)} for b in (1, 3)),
    )


@pytest.mark.parametrize(("first", "second", "reason"), KEPT)
def test_kept(first, second, reason):
    model = model_of(f"""agraph (float[B,2,3] x, int64[2] t) => (float y) {WEIGHTS}
    {{ r = Abs(x)  p = {first}  q = {second}  c = Cast<to=1>(q)  y = ReduceMax<keepdims=0>(c) }}""")
    result = run_pass(VIEWS, model)
    assert reason in reasons(result)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_order_of_elements(batch):
    model = model_of("""agraph (float[B,4,6] x) => (float[B,C,D,E] y)
    <int64[4] s = {0, 4, 2, 3}, int64[3] t = {0, 8, 3}, int64[4] u = {0, 2, 4, 3}>
    { a = Reshape(x, s)  b = Reshape(a, t)  c = Reshape(b, u)
      d = Transpose<perm=[0,2,1,3]>(c)  y = Transpose<perm=[0,3,2,1]>(d) }""")
    before = model.clone()
    assert run_pass(VIEWS, model).fired == 3
    assert ops(model) == ["Reshape", "Transpose"]
    x = np.random.default_rng(0).normal(size=(batch, 4, 6)).astype(np.float32)
    assert_same(before, model, {"x": x})


def test_a_transpose_with_other_users_stays():
    model = model_of("""agraph (float[B,2,3] x) => (float[P,Q,R] y, float[S,T,U] z)
    { p = Transpose<perm=[1,2,0]>(x)  y = Transpose<perm=[1,0,2]>(p)  z = Neg(p) }""")
    result = run_pass(VIEWS, model)
    assert result.fired == 0 and "other users" in reasons(result)


@pytest.mark.parametrize(
    ("kind", "first", "second"), [("int32", 7, 6), ("int32", 7, 1), ("bool", 1, 9), ("uint8", 6, 7)]
)
def test_casts_of_integers(kind, first, second):
    names = {1: "float", 6: "int32", 7: "int64", 9: "bool"}
    model = model_of(f"""agraph ({kind}[B] x) => ({names[second]}[B] y)
    <int64[1] m = {{-1}}> {{ r = Reshape(x, m)  a = Cast<to={first}>(r)  y = Cast<to={second}>(a) }}""")
    before = model.clone()
    assert run_pass(VIEWS, model).fired == 1
    x = np.array([0, 1, 200]).astype(kind)
    assert_same(before, model, {"x": x}, {"x": x[:0]})
