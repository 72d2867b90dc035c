"""The inter-operator IR: what verifies, what is refused and with which words, text, domains, statistics."""

from __future__ import annotations

import numpy as np
import pytest

from planish.ir.errors import InputError
from planish.ir.relational.builder import Builder, dst, src
from planish.ir.relational.domains import (
    DOMAINS,
    DST_PAIR,
    EDGE,
    EDGE_TYPE,
    NODE,
    NODE_TYPE,
    NONE,
    SRC_PAIR,
    Domain,
    compose,
    ends,
    node_of,
)
from planish.ir.relational.inter import Location, Op, Operand, Program, Variable
from planish.ir.relational.models import hgt, rgat, rgcn
from planish.ir.relational.ops import SPECS, infer
from planish.ir.relational.statistics import Statistics
from planish.ir.relational.text import parse_program
from planish.ir.relational.verify import needs_canonical_types, verify
from tests.ir.relational.graphs import graphs

X = Variable("x", NODE, (3,))
W = Variable("W", EDGE_TYPE, (3, 2))


def made(*ops: Op, outputs: tuple[str, ...] = ("y",)) -> Program:
    return Program("p", (X,), (W,), ops, outputs)


def y(kind: str, *operands: Operand, domain: Domain = EDGE, shape: tuple[int, ...] = (3,), **more: object) -> Op:
    return Op(kind, Variable("y", domain, shape), operands, location=Location("net.py", 7), **more)  # type: ignore[arg-type]


REFUSED = {
    "net.py:7: 'y' reads 'z', which is not defined.": made(y("tanh", Operand("z"))),
    "net.py:7: 'y' reads 'y', which is defined later.": made(y("tanh", Operand("y"))),
    "net.py:7: 'y': there is no operator 'tanhh'.": made(y("tanhh", src("x"))),
    "net.py:7: 'y': tanh takes 1 operands, not 2.": made(y("tanh", src("x"), src("x"))),
    "net.py:7: 'y': leaky_relu: option 'slope' is missing.": made(y("leaky_relu", src("x"))),
    "net.py:7: 'y': tanh: no option 'slope'.": made(y("tanh", src("x"), attrs=(("slope", 1.0),))),
    "net.py:7: 'y': tanh gives shape (3,), and is said to give (4,).": made(y("tanh", src("x"), shape=(4,))),
    "net.py:7: 'y': tanh over edge reads 'x' by node at end ''; it takes @src or @dst.": made(y("tanh", Operand("x"))),
    "net.py:7: 'y': tanh over node reads 'x@src' by node at end 'src'; it takes no end.": made(
        y("tanh", src("x"), domain=NODE)
    ),
    "net.py:7: 'y': tanh over dst_pair reads 'x@src' by node at end 'src'; it takes @dst.": made(
        y("tanh", src("x"), domain=DST_PAIR)
    ),
    "net.py:7: 'y': linear over node reads 'W', which is by edge_type: node has many rows of it or none; "
    "accumulate it first.": made(y("linear", Operand("x"), Operand("W"), domain=NODE, shape=(2,))),
    "net.py:7: 'y': tanh over edge has a result by node; only reductions change the domain.": made(
        y("tanh", src("x"), domain=NODE, over=EDGE)
    ),
    "net.py:7: 'y': sum over edge by '' does not lead to node; say by src or dst.": made(
        y("sum", src("x"), domain=NODE, over=EDGE)
    ),
    "net.py:7: 'y': sum over node by '' does not lead to edge.": made(y("sum", Operand("x"), over=NODE)),
    "net.py:7: 'y': tanh is no reduction and groups nothing by 'dst'.": made(y("tanh", src("x"), by="dst")),
    "net.py:7: 'y': edge_softmax loops over edges by src or dst, not over node by 'dst'.": made(
        y("edge_softmax", Operand("x"), domain=NODE, by="dst")
    ),
    "net.py:7: 'x' is defined twice in 'p'.": made(Op("tanh", X, (Operand("x"),), location=Location("net.py", 7))),
    "output 'z' of 'p' is not defined.": made(outputs=("z",)),
    "relational program 'p' has no outputs.": made(outputs=()),
    "net.py:7: 'y': join takes node[0], node[1], ... in order, one for each node type, not node.": made(
        y("join", Operand("x"), domain=NODE)
    ),
    "net.py:7: 'y': pick reads a value over nodes, not over node, and is over node[index].": made(
        y("pick", Operand("x"), domain=NODE, attrs=(("index", 0),))
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message: str) -> None:
    with pytest.raises(InputError) as caught:
        verify(REFUSED[message])
    assert str(caught.value) == message


SHAPES = [
    ("linear", [(3,), (3, 2)], {}, (2,)),
    ("linear", [(5, 3), (3, 2)], {}, (5, 2)),
    ("linear", [(4, 3), (4, 3, 2)], {}, (4, 2)),
    ("linear", [(4, 2), (4, 3, 2)], {"transpose": True}, (4, 3)),
    ("linear", [(5, 4, 3), (4, 3, 2)], {}, (5, 4, 2)),
    ("linear", [(3,), (4, 3, 2)], {}, "x must be (*, 4, 3)"),
    ("linear", [(3,), (3,)], {}, "it is (in, out) or (heads, in, out)"),
    ("linear", [(2,), (3, 2)], {}, "x must be (*, 3)"),
    ("dot", [(4, 3), (3,)], {}, (4,)),
    ("dot", [(4, 3), (4, 2)], {}, "different last sizes"),
    ("dot", [(), ()], {}, "different last sizes"),
    ("add", [(4, 1), (3,)], {}, (4, 3)),
    ("add", [(4,), (3,)], {}, "do not broadcast"),
    ("outer", [(3,), (2,)], {}, (3, 2)),
    ("outer", [(5, 4, 3), (5, 4, 2)], {"heads": True}, (4, 3, 2)),
    ("outer", [(5, 4, 3), (5, 4, 2)], {}, (3, 2)),
    ("outer", [(5, 3), (4, 2)], {}, "may differ in the last axis only"),
    ("fsum", [(4, 3)], {"axes": (0,)}, (3,)),
    ("fsum", [(4, 3)], {"axes": (2,)}, "axis 2 of a value with 2 trailing axes"),
    ("expand", [(3,)], {"shape": (2, 3)}, (2, 3)),
    ("expand", [(3,)], {"shape": (1,)}, "does not broadcast to (1,)"),
    ("reshape", [(4, 3)], {"shape": (6, 2)}, (6, 2)),
    ("reshape", [(4, 3)], {"shape": (6,)}, "(4, 3) has 12 elements and (6,) has 6"),
    ("transpose", [(4, 3)], {"perm": (1, 0)}, (3, 4)),
    ("transpose", [(4, 3)], {"perm": (0, 0)}, "perm (0, 0)"),
    ("slice", [(4, 3)], {"axis": 0, "start": 1, "stop": 3}, (2, 3)),
    ("slice", [(4, 3)], {"axis": 0, "start": 3, "stop": 3}, "3:3 of an axis of size 4"),
    ("concat", [(4, 3), (2, 3)], {"axis": 0}, (6, 3)),
    ("concat", [(4, 3), (2, 2)], {"axis": 0}, "differ beside axis 0"),
    ("concat", [(4, 3)], {"axis": 0}, "takes 2 or more operands, not 1"),
    ("join", [(3,), (3,)], {}, (3,)),
    ("join", [(3,), (2,)], {}, "features of shapes (3,) and (2,)"),
    ("constant", [], {"value": 1.0, "shape": (2,)}, (2,)),
    ("count", [], {}, ()),
]


@pytest.mark.parametrize(("kind", "shapes", "attrs", "wanted"), SHAPES)
def test_shapes(kind: str, shapes: list[tuple[int, ...]], attrs: dict[str, object], wanted: object) -> None:
    if isinstance(wanted, str):
        with pytest.raises(InputError) as caught:
            infer(kind, shapes, attrs)
        assert wanted in str(caught.value) and kind in str(caught.value)
    else:
        assert infer(kind, shapes, attrs) == wanted
    assert kind in SPECS


def test_maps_are_functions_that_compose() -> None:
    """Through a middle domain is the same as at once, on every graph."""
    for name, graph in graphs().items():
        for fine in DOMAINS:
            for middle in DOMAINS:
                for coarse in DOMAINS:
                    if name == "any types" and NODE_TYPE in (middle, coarse):
                        continue
                    for by in ends(fine, middle):
                        for end in ends(middle, coarse):
                            direct = compose(fine, middle, by, coarse, end)
                            through = graph.map(middle, coarse, end)[graph.map(fine, middle, by)]
                            np.testing.assert_array_equal(graph.map(fine, coarse, direct), through)
    assert ends(EDGE, NODE) == ("src", "dst") and ends(SRC_PAIR, NODE) == ("src",)
    assert ends(NODE, EDGE) == () and ends(node_of(1), NODE_TYPE) == ("",) and ends(EDGE_TYPE, NONE) == ("",)


def test_text_with_everything_is_read_back() -> None:
    b = Builder("all")
    parts = [b.input(f"x{k}", node_of(k), 2) for k in range(2)]
    u, v = b.input("u", EDGE), b.weight("V", NODE_TYPE, 2, 3)
    h = b.emit("linear", b.emit("join", *parts), v)
    m = b.emit("leaky_relu", b.emit("mul", src(h), u), slope=1e-3)
    a = b.emit("edge_softmax", b.emit("add", m, dst(h)), by="src")
    b.emit("constant", over=NONE, value=float("-inf"), shape=(2, 1))
    s = b.emit("sum", a, over=EDGE, domain=NODE, by="dst")
    program = b.build(b.emit("pick", s, index=1), s)
    assert parse_program(str(program)) == program
    for text, message in {
        "program p(x: node(3)) {\n  y: nod(3) = tanh(x)\n  return y\n}": "no row domain 'nod'",
        "program p(x: node(3)) {\n  y: node(3) tanh(x)\n  return y\n}": "'y: node(3) tanh(x)' is no operator",
        "program p(x: node(3)) {\n  y: node(3) = tanh(x!)\n  return y\n}": "text:2: 'x!' is no operand",
        "program p(x: node(3)) {\n  y: node(3) = a(x, s=f())\n  return y\n}": "'f()' is no literal",
        "program p(x) {\n  return x\n}": "'x' is no value",
        "net": "a relational program begins with",
    }.items():
        with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
            parse_program(text)


def test_default_loops_are_never_pairs() -> None:
    b = Builder("loops")
    x, w = b.input("x", NODE, 3), b.weight("w", EDGE_TYPE, 3)
    assert b.known[b.emit("mul", src(x), w).name].domain == EDGE
    assert b.known[b.emit("tanh", w).name].domain == EDGE_TYPE
    assert b.known[b.emit("tanh", x).name].domain == NODE
    assert b.known[b.constant(1.0).name].domain == NONE
    pair = b.emit("mul", x, w, over=SRC_PAIR)
    assert b.known[b.emit("tanh", pair).name].domain == SRC_PAIR
    with pytest.raises(InputError, match="'mul_2': no loop reads 'x' and 'w'"):
        b.emit("mul", x, w)
    with pytest.raises(InputError, match="'x' is declared twice in 'loops'"):
        b.input("x", NODE, 3)


def test_slices_and_constants_of_the_graph() -> None:
    program = rgcn(3, 2)
    assert [op.name for op in program.backward_slice("h")] == ["h", "div", "count_dst_pair", "linear"]
    assert program.graph_constants() == ("count_dst_pair",)
    assert [op.name for op in program.users()["x"]] == ["linear", "linear_1"]
    with pytest.raises(InputError, match="has no value 'q'"):
        program.variable("q")
    assert not any(map(needs_canonical_types, (program, rgat(3, 2), hgt(3, 2))))
    text = "program p(V: node_type(3) weight) {\n  y: edge_type(3) = tanh(V@src)\n  return y\n}"
    assert needs_canonical_types(parse_program(text))


def test_statistics() -> None:
    for name, graph in graphs().items():
        rows = Statistics.of(graph)
        assert all(rows.rows(domain) == graph.rows(domain) for domain in DOMAINS)
        assert rows.canonical == (name != "any types")
        assert rows.ratio(SRC_PAIR) == (graph.rows(SRC_PAIR) / graph.num_edges if graph.num_edges else 1.0)
