"""Gradients against finite differences of the interpreter, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from planish import relational as rel
from planish.ir.errors import InputError
from planish.ir.relational.autodiff import differentiate
from planish.ir.relational.builder import Builder, dst, src
from planish.ir.relational.domains import EDGE, EDGE_TYPE, NODE, NODE_TYPE, NONE, node_of
from planish.ir.relational.graph import Graph
from planish.ir.relational.inter import Program
from planish.ir.relational.interpret import interpret
from planish.ir.relational.models import hgt, rgat, rgcn
from tests.ir.relational.graphs import graphs, random_graph, random_values

GRAPHS = graphs()
MODELS = {"rgcn": rgcn(3, 2), "rgat": rgat(3, 2, heads=2), "hgt": hgt(4, 2, heads=2)}


def gradients(program: Program, graph: Graph, values: dict[str, np.ndarray], seeds: list[np.ndarray]) -> dict:
    """Through the forward pass with what it keeps, and the backward pass."""
    both = differentiate(program)
    out = interpret(both.forward, graph, values)
    given = values | {name: out[name] for name in both.kept} | dict(zip(both.gradients, seeds, strict=True))
    found = interpret(both.backward, graph, given)
    return dict(zip(both.wrt, (found[name] for name in both.backward.outputs), strict=True))


def check(program: Program, graph: Graph, values: dict[str, np.ndarray] | None = None, samples: int = 6) -> None:
    """Compares some elements of each gradient with central differences."""
    values = random_values(program, graph) if values is None else values
    random = np.random.default_rng(1)
    seeds = [random.normal(size=y.shape) for y in interpret(program, graph, values).values()]

    def loss(changed: dict[str, np.ndarray]) -> float:
        out = interpret(program, graph, changed)
        return sum(float((seed * y).sum()) for seed, y in zip(seeds, out.values(), strict=True))

    found = gradients(program, graph, values, seeds)
    assert set(found) == set(values)
    for name, gradient in found.items():
        assert gradient.shape == values[name].shape, name
        for at in random.choice(gradient.size, min(samples, gradient.size), replace=False):
            step = np.zeros(gradient.size)
            step[at] = 1e-5
            moved = step.reshape(gradient.shape)
            up, down = (loss(values | {name: values[name] + sign * moved}) for sign in (1, -1))
            wanted = (up - down) / 2e-5
            assert abs(gradient.flat[at] - wanted) <= 1e-6 * max(1.0, abs(wanted)), (
                name,
                at,
                gradient.flat[at],
                wanted,
            )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("graph", ["typed", "any types", "many types", "isolated", "no edges", "one node", "no nodes"])
def test_models(name: str, graph: str) -> None:
    check(MODELS[name], GRAPHS[graph])


UNARY = {
    "exp": rel.exp,
    "log": lambda x: rel.log(rel.absolute(x) + 0.5),
    "sqrt": lambda x: rel.sqrt(rel.absolute(x) + 0.5),
    "relu": rel.relu,
    "leaky_relu": lambda x: rel.leaky_relu(x, 0.3),
    "tanh": rel.tanh,
    "sigmoid": rel.sigmoid,
    "gelu": rel.gelu,
    "silu": rel.silu,
    "elu": lambda x: rel.elu(x, 0.7),
    "neg": lambda x: -x,
    "step": lambda x: rel.step(x) * x,
    "recip": lambda x: x.apply("recip"),
}


@pytest.mark.parametrize("name", UNARY)
def test_elementwise(name: str) -> None:
    g = rel.Layer("unary")
    g.input("x", NODE, 3)
    for n in g.nodes():
        n.y = UNARY[name](n.x)
    check(g.build(n.y), random_graph(1))


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": rel.maximum,
    "min": rel.minimum,
    "dot": rel.dot,
}


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((3,), (2, 3)), ((2, 1, 3), (4, 3)), ((2, 3), (1, 3))])
@pytest.mark.parametrize("name", BINARY)
def test_broadcast(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Between a value of nodes and a weight by type, on edges."""
    g = rel.Layer("binary")
    g.input("x", NODE, *shapes[0])
    W = g.weight("W", EDGE_TYPE, *shapes[1])
    for n in g.nodes():
        for e in n.incoming():
            n.y += BINARY[name](e.src.x, W[e.type])
    check(g.build(n.y), random_graph(2))


@pytest.mark.parametrize("how", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("end", ["incoming", "outgoing", "pair"])
def test_accumulations(how: str, end: str) -> None:
    g = rel.Layer("accumulate")
    g.input("x", NODE, 3)
    g.input("w", EDGE)
    for n in g.pairs("dst") if end == "pair" else g.nodes():
        for e in {"incoming": n.incoming, "outgoing": n.outgoing, "pair": n.edges}[end]():
            rel.accumulate(n, "y", e.w * e.src.x * e.dst.x, how)
    check(g.build(n.y), random_graph(3))


def test_equal_maxima_share_evenly() -> None:
    b = Builder("ties")
    x = b.input("x", NODE, 1)
    y = b.emit("max_rows", src(x), over=EDGE, domain=NODE, by="dst")
    program = b.build(y)
    graph = Graph([[0, 1, 2, 0], [3, 3, 3, 2]], num_nodes=5)
    values = {"x": np.array([[2.0], [2.0], [1.0], [0.0], [0.0]])}
    found = gradients(program, graph, values, [np.array([[0.0], [0.0], [5.0], [8.0], [7.0]])])
    np.testing.assert_array_equal(found["x"][:, 0], [9.0, 4.0, 0.0, 0.0, 0.0])


def test_views_and_products_of_weights() -> None:
    b = Builder("views")
    x, w = b.input("x", NODE, 4), b.weight("w", EDGE_TYPE, 4, 6)
    v, c = b.weight("v", EDGE_TYPE, 2, 3, 2), b.weight("c", NONE, 2, 4)
    kinds = b.weight("k", NODE_TYPE, 4)
    product = b.emit("linear", b.emit("reshape", w, shape=(4, 2, 3)), v)
    flat = b.emit("transpose", b.emit("reshape", product, shape=(4, 4)), perm=(1, 0))
    m = b.emit("linear", src(x), flat, over=EDGE, transpose=True)
    m = b.emit("mul", m, dst(kinds), over=EDGE)
    parts = b.emit("concat", b.emit("slice", m, axis=-1, start=1, stop=3), m, axis=-1)
    parts = b.emit("slice", parts, axis=0, start=0, stop=4)
    wide = b.emit("expand", b.emit("reshape", parts, shape=(1, 4)), shape=(2, 4))
    total = b.emit("fsum", b.emit("mul", wide, c), axes=(0,))
    y = b.emit("sum", total, over=EDGE, domain=NODE, by="src")
    check(b.build(y), random_graph(4))


def test_node_types_of_different_widths() -> None:
    b = Builder("widths")
    parts = []
    for k, width in enumerate((3, 2, 5)):
        x, w = b.input(f"x{k}", node_of(k), width), b.weight(f"w{k}", NONE, width, 2)
        parts.append(b.emit("linear", x, w))
    h = b.emit("join", *parts)
    y = b.emit("sum", src(h), over=EDGE, domain=NODE, by="dst")
    last = b.emit("pick", y, index=2)
    check(b.build(b.emit("tanh", last), b.emit("pick", h, index=0)), random_graph(5, (4, 0, 6)))


def test_second_derivatives() -> None:
    """The backward pass is a program, so it has a derivative."""
    backward = differentiate(rgat(3, 2), wrt=["W", "x"]).backward
    check(backward, random_graph(6), samples=4)


def test_what_is_kept_and_what_is_zero() -> None:
    both = differentiate(MODELS["rgat"])
    assert set(both.kept) <= set(both.forward.outputs)
    # Products, softmax and reductions are kept; what is elementwise is done again.
    definitions = both.forward.definitions()
    assert {definitions[name].kind for name in both.kept} <= {"linear", "edge_softmax"}
    b = Builder("unused")
    x, w = b.input("x", NODE, 2), b.weight("w", EDGE_TYPE, 2)
    program = b.build(b.emit("tanh", x))
    graph = random_graph(7)
    found = gradients(program, graph, random_values(program, graph), [np.ones((graph.num_nodes, 2))])
    assert not found["w"].any() and found["w"].shape == (6, 2)
    with pytest.raises(InputError, match=r"gradients are for arguments of 'unused', each once \(x, w\); got 'z'"):
        differentiate(program, ["z"])
    assert w.name == "w"


def test_subgradients_at_kinks() -> None:
    """As PyTorch: relu has slope 0 at 0, leaky_relu its slope, the larger of two equal ones half of each."""
    g = rel.Layer("kinks")
    g.input("x", NODE)
    g.input("z", NODE)
    for n in g.nodes():
        n.a, n.b, n.c = rel.relu(n.x), rel.leaky_relu(n.x, 0.25), rel.maximum(n.x, n.z)
        n.d = rel.absolute(n.x)
    graph = Graph(np.zeros((2, 0), np.int64), num_nodes=3)
    values = {"x": np.array([0.0, 1.0, -1.0]), "z": np.array([0.0, 1.0, 1.0])}
    for field, wanted in {"a": [0, 1, 0], "b": [0.25, 1, 0.25], "c": [0.5, 0.5, 0], "d": [0, 1, -1]}.items():
        found = gradients(g.build(getattr(n, field)), graph, values, [np.ones(3)])
        np.testing.assert_array_equal(found["x"], wanted, field)
    np.testing.assert_array_equal(gradients(g.build(n.c), graph, values, [np.ones(3)])["z"], [0.5, 0.5, 1])


def test_softmax_of_large_logits() -> None:
    """They neither overflow nor lose their gradient."""
    g = rel.Layer("softmax")
    g.input("l", EDGE)
    g.input("u", EDGE)
    for n in g.nodes():
        for e in n.incoming():
            n.y += rel.edge_softmax(e.l) * e.u
    program, graph = g.build(n.y), Graph([[0, 1, 2, 0], [1, 1, 1, 2]])
    values = {"l": np.array([1000.0, 1000.0, -1000.0, 3e4]), "u": np.array([1.0, 3.0, 9.0, 5.0])}
    np.testing.assert_allclose(interpret(program, graph, values)["y"], [0, 2, 5])
    found = gradients(program, graph, values, [np.ones(3)])
    np.testing.assert_allclose(found["l"], [-0.5, 0.5, 0, 0], atol=1e-12)
    np.testing.assert_allclose(found["u"], [0.5, 0.5, 0, 1])
