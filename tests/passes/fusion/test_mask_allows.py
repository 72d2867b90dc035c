from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from planish.passes.fusion.index_vectors import Index, Offset, index_vector, offset_of, scalar_offset
from planish.passes.fusion.mask_allows import Causal, mask_allows
from planish.passes.testing import program_of

CONSTANTS = """<int64 zero = {0}, int64 one = {1}, int64[1] ax0 = {0}, int64[1] ax1 = {1}, int64[1] last = {-1},
 int64[2] ax01 = {0, 1}, int64[1] two = {2}, int64[1] three = {3}, float fz = {0}, float low = {-3.3e38},
 float mild = {-5000}, float fone = {1}, float e4 = {-10000}, float inf = {-inf},
 bool[4, 4] tril = {1,0,0,0, 1,1,0,0, 1,1,1,0, 1,1,1,1}, bool yes = {1}, bool no = {0}, int64[4] count = {0,1,2,3},
 int64[2] unit = {1, 1}, int64[1] ax2 = {2}>"""
# Positions as exporters count them: r (S), query (S, 1), key (1, S).
POSITIONS = """s = Shape<start = 1, end = 2>(ids) n = Squeeze(s) r = Range(zero, n, one)
 query = Unsqueeze(r, ax1) key = Unsqueeze(r, ax0)"""
TYPES = "int64 n, int64[S] r, int64[S, 1] query, int64[1, S] key"


def allows(body: str, *, types: str = "", dtype: str = "bool", shape: str = "S, S") -> Causal | None:
    """What is found about the mask `m` that `body` makes of (batch, S) token ids and a (batch, S) padding mask."""
    return mask_allows(made(body, types=types, dtype=dtype, shape=shape))


def made(body: str, *, types: str = "", dtype: str = "bool", shape: str = "S, S"):  # type: ignore[no-untyped-def]
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    f (int64[B, S] ids, bool[B, S] padding, int64[P] past, float[S, S] given) => ({dtype}[{shape}] m)
    {CONSTANTS[:-1]}, {TYPES}{", " + types if types else ""}> {{ {POSITIONS} {body} }}"""
    return program_of(text).main.graph.outputs[0]


ZERO = Offset()
CASES: dict[str, tuple[str, int, bool]] = {
    "at most": ("m = LessOrEqual(key, query)", 0, True),
    "turned": ("m = GreaterOrEqual(query, key)", 0, True),
    "before": ("m = Less(key, query)", -1, False),
    "after, negated": ("after = Greater(key, query) m = Not(after)", 0, True),
    "itself": ("m = Equal(key, query)", 0, False),
    "shifted": ("moved = Add(query, one) m = LessOrEqual(key, moved)", 1, True),
    "shifted keys": ("moved = Sub(key, one) m = LessOrEqual(moved, query)", 1, True),
    "and": ("a = LessOrEqual(key, query) p = Unsqueeze(last_row, ax0) m = And(a, p)", 0, False),
    "or": ("a = LessOrEqual(key, query) b = Less(key, query) m = Or(a, b)", 0, True),
    "window": ("a = LessOrEqual(key, query) w = Sub(query, one) b = Greater(key, w) m = And(a, b)", 0, False),
    "where": ("a = LessOrEqual(key, query) m = Where(a, yes, no)", 0, True),
    "where, turned": ("a = Greater(key, query) m = Where(a, no, yes)", 0, True),
    "cast": ("a = LessOrEqual(key, query) i = Cast<to = 7>(a) m = Cast<to = 9>(i)", 0, True),
    "flag": ("a = Greater(key, query) i = Cast<to = 7>(a) m = Equal(i, zero)", 0, True),
    "gathered": ("g = Gather(r, r) q = Unsqueeze(g, ax1) m = LessOrEqual(key, q)", 0, True),
    "floats": ("q = Cast<to = 1>(query) k = Cast<to = 1>(key) m = LessOrEqual(k, q)", 0, True),
    "transposed": ("a = GreaterOrEqual(key, query) m = Transpose<perm = [1, 0]>(a)", 0, True),
}
MORE_TYPES = {
    "after, negated": "bool[S, S] after", "shifted": "int64[S, 1] moved", "shifted keys": "int64[1, S] moved",
    "and": "bool[S, S] a, bool[1, S] p, bool[S] last_row", "or": "bool[S, S] a, bool[S, S] b",
    "window": "bool[S, S] a, int64[S, 1] w, bool[S, S] b", "where": "bool[S, S] a", "where, turned": "bool[S, S] a",
    "cast": "bool[S, S] a, int64[S, S] i", "flag": "bool[S, S] a, int64[S, S] i",
    "gathered": "int64[S] g, int64[S, 1] q", "floats": "float[S, 1] q, float[1, S] k", "transposed": "bool[S, S] a",
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bool_masks(name: str) -> None:
    body, offset, first = CASES[name]
    if name == "and":
        body = "last_row = Gather<axis = 0>(padding, zero) " + body
    assert allows(body, types=MORE_TYPES.get(name, "")) == Causal(Offset(offset), first)


FLOATS: dict[str, tuple[str, int, bool]] = {
    "filled": ("a = LessOrEqual(key, query) m = Where(a, fz, low)", 0, True),
    "turned": ("a = Greater(key, query) m = Where(a, inf, fz)", 0, True),
    "raised": ("a = LessOrEqual(key, query) w = Where(a, fz, inf) m = Max(w, low)", 0, True),
    "one minus": ("a = LessOrEqual(key, query) i = Cast<to = 1>(a) x = Sub(fone, i) m = Mul(x, e4)", 0, True),
    "times": ("a = Greater(key, query) i = Cast<to = 1>(a) m = Mul(i, e4)", 0, True),
    "sum": (
        "a = LessOrEqual(key, query) w = Where(a, fz, low) b = Equal(key, query) v = Where(b, mild, fz) m = Add(w, v)",
        0, False,
    ),
    "triangle": ("e = Expand(low, both) both = Concat<axis = 0>(s, s) m = Trilu<upper = 1>(e, one)", 0, True),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_float_masks(name: str) -> None:
    body, offset, first = FLOATS[name]
    if name == "triangle":
        body = "both = Concat<axis = 0>(s, s) e = Expand(low, both) m = Trilu<upper = 1>(e, one)"
    known = {"a": "bool", "b": "bool", "w": "float", "v": "float", "i": "float", "x": "float", "e": "float"}
    types = ", ".join(f"{t}[S, S] {n}" for n, t in known.items() if f" {n} = " in f" {body}")
    assert allows(body, types=types, dtype="float") == Causal(Offset(offset), first)


NOTHING = {
    "all keys": "m = GreaterOrEqual(key, query)",
    "not equal": "a = Equal(key, query) m = Not(a)",
    "either": "a = LessOrEqual(key, query) b = Unsqueeze(last_row, ax0) m = Or(a, b)",
    "not both": "a = LessOrEqual(key, query) b = Unsqueeze(last_row, ax0) c = And(a, b) m = Not(c)",
    "scaled": "w = Mul(query, two) m = LessOrEqual(key, w)",
    "given": "m = LessOrEqual(given, given)",
    "padding": "a = Unsqueeze(last_row, ax0) m = Expand(a, both)",
}


@pytest.mark.parametrize("name", NOTHING)
def test_masks_of_which_nothing_is_known(name: str) -> None:
    body = "last_row = Gather<axis = 0>(padding, zero) both = Concat<axis = 0>(s, s) " + NOTHING[name]
    known = {"a": "bool[S, S]", "b": "bool[1, S]", "c": "bool[S, S]", "w": "int64[S, 1]"}
    types = ", ".join(f"{t} {n}" for n, t in known.items() if f" {n} = " in f" {body}")
    assert allows(body, types="bool[S] last_row, " + (types or "bool[1] unused")) is None


@pytest.mark.parametrize("fill", ["mild", "fz"])
def test_what_is_added_may_be_no_mask(fill: str) -> None:
    body = f"a = LessOrEqual(key, query) m = Where(a, fz, {fill})"
    assert allows(body, types="bool[S, S] a", dtype="float") is None


def test_a_sum_may_be_lifted_above_the_mask() -> None:
    body = "a = LessOrEqual(key, query) w = Where(a, fz, e4) m = Add(w, given)"
    assert allows(body, types="bool[S, S] a, float[S, S] w", dtype="float") is None


def test_positions_behind_a_past() -> None:
    body = """p = Shape<start = 0, end = 1>(past) l = Squeeze(p) end = Add(l, n) keys = Range(zero, end, one)
    own = Range(l, end, one) q = Unsqueeze(own, ax1) k = Unsqueeze(keys, ax0) m = LessOrEqual(k, q)"""
    types = "int64 l, int64 end, int64[T] keys, int64[S] own, int64[S, 1] q, int64[1, T] k"
    found = allows(body, types=types, shape="S, T")
    assert found == Causal(Offset(0, frozenset({("P", 1)})), True)


def test_slices_of_a_constant_triangle() -> None:
    # Rows from 1 on: query i of the slice is query i + 1 of the triangle.
    rows = "m = Slice(tril, ax1, three, ax0)"
    assert allows(rows, shape="2, 4") == Causal(Offset(1), True)
    columns = "m = Slice(tril, ax1, three, ax1)"
    assert allows(columns, shape="4, 2") == Causal(Offset(-1), False)
    unknown = "p = Cast<to = 7>(past) m = Slice(tril, p, three, ax0)"
    assert allows(unknown, types="int64[1] p", shape="R, 4") is None
    assert allows("m = Slice(tril, last, three, ax0)", shape="R, 4") is None


def test_a_mask_that_is_expanded_may_be_broadcast() -> None:
    body = "a = LessOrEqual(key, query) b = Concat<axis = 0>(ax1, ax1, s, s) m = Expand(a, b)"
    same = allows(body, types="bool[S, S] a", shape="1, 1, S, S")
    assert same == Causal(ZERO, True)
    other = allows(body.replace("s, s)", "s, past)"), types="bool[S, S] a", shape="1, 1, S, T")
    assert other is not None and [(v.name, axis) for v, axis in other.same] == [("a", -1)]
    narrow = body.replace("LessOrEqual(key, query)", "LessOrEqual(ax0, query)")
    assert allows(narrow, types="bool[S, 1] a", shape="1, 1, S, S") is None


def test_offsets() -> None:
    past = offset_of("past + 3")
    assert past == Offset(3, frozenset({("past", 1)})) and past.never_negative
    assert past.minus(past) == Offset() and not Offset().minus(past).never_negative
    assert offset_of("floor(past/2)") == Offset(0, frozenset({("floor(past/2)", 1)}))
    assert scalar_offset(None) is None and index_vector(None) is None
    assert index_vector(made("m = Equal(count, count)", shape="4").producer().inputs[0]) == Index(-1, Offset(0))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_found_holds_for_every_element(data: st.DataObject) -> None:
    """Random trees over comparisons of positions, run at two lengths."""
    lines: list[str] = []

    def tree(depth: int) -> str:
        kind = data.draw(st.sampled_from(["leaf", "leaf", "And", "Or", "Not", "Where"] if depth else ["leaf"]))
        name = f"t{len(lines)}"
        lines.append("")
        place = len(lines) - 1
        if kind == "leaf":
            op = data.draw(st.sampled_from(["Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"]))
            a, b = data.draw(st.sampled_from([("key", "query"), ("query", "key"), ("key", "ahead"), ("back", "query")]))
            line = f"{name} = {op}({a}, {b})"
        elif kind == "Not":
            line = f"{name} = Not({tree(depth - 1)})"
        else:
            count = 3 if kind == "Where" else 2
            line = f"{name} = {kind}({', '.join(tree(depth - 1) for _ in range(count))})"
        lines[place] = line
        return name

    root = tree(3)
    names = [line.split(" = ")[0] for line in lines]
    body = "ahead = Add(query, one) back = Sub(key, one) " + " ".join(reversed(lines)) + f" m = Identity({root})"
    types = "int64[S, 1] ahead, int64[1, S] back, " + ", ".join(f"bool[S, S] {n}" for n in names)
    text = f"""<ir_version: 10, opset_import: ["" : 23]> f (int64[B, S] ids) => (bool[S, S] m)
    {CONSTANTS[:-1]}, {TYPES}, {types}> {{ {POSITIONS} {body} }}"""
    program = program_of(text)
    found = mask_allows(program.main.graph.outputs[0])
    for length in (1, 5):
        # ONNX Runtime has no Where of bools on the CPU.
        mask = ReferenceEvaluator(ir.to_proto(program.main)).run(None, {"ids": np.zeros((1, length), np.int64)})[0]
        rows, columns = np.nonzero(mask)
        if found is not None:
            assert (columns - rows <= found.offset.number).all()
            assert not found.first or mask[:, 0].all()
