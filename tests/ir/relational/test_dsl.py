"""The language of relational layers: what it means, and the line that is wrong."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from planish import relational as rel
from planish.ir.errors import InputError
from planish.ir.relational.interpret import interpret
from tests.ir.relational.graphs import graphs, random_graph, random_values


def layer() -> tuple[rel.Layer, Any]:
    g = rel.Layer("layer")
    g.input("x", rel.NODE, 3)
    g.input("u", rel.EDGE, 3)
    return g, g.weight("W", rel.EDGE_TYPE, 3, 2)


def test_composition_of_loops() -> None:
    """A layer with everything, against a loop over edges."""
    g, W = layer()
    U, b = g.weight("U", rel.NODE_TYPE, 3, 2), g.weight("b", rel.NONE, 2)
    for e in g.edges():
        e.m = rel.linear(e.src.x, W[e.type]) * rel.part(e.u, 0, 2) - b
    for n in g.nodes():
        n.root = rel.linear(n.x, U[n.type])
        for e in n.incoming():
            n.h += e.m * n.root
            rel.accumulate(n, "top", e.m, "max")
        for e in n.outgoing():
            n.h += 2 * e.m
        n.y = rel.relu(n.h) + n.top
    program = g.build(n.y)
    for graph in graphs().values():
        v = random_values(program, graph)
        kinds = graph.table("node_type")
        m = np.einsum("ei,eio->eo", v["x"][graph.src], v["W"][graph.edge_type]) * v["u"][:, :2] - v["b"]
        root = np.einsum("ni,nio->no", v["x"], v["U"][kinds])
        wanted = np.zeros((graph.num_nodes, 2))
        for node in range(graph.num_nodes):
            into, out = graph.dst == node, graph.src == node
            h = (m[into] * root[node]).sum(0) + 2 * m[out].sum(0)
            wanted[node] = np.maximum(h, 0) + (m[into].max(0) if into.any() else 0)
        np.testing.assert_allclose(interpret(program, graph, v)[program.outputs[0]], wanted, atol=1e-12)


def test_pairs_types_and_counts() -> None:
    g, W = layer()
    s = g.weight("s", rel.EDGE_TYPE)
    for t in g.edge_types():
        t.square = rel.linear(W[t].apply("transpose", perm=(1, 0)), W[t])
        t.P = rel.linear(W[t], t.square) * s[t]
    for p in g.pairs("dst"):
        for e in p.edges():
            rel.accumulate(p, "h", e.src.x, "mean")
        p.z = rel.linear(p.h, p.type.P)
    for n in g.nodes():
        for e in n.incoming():
            n.y += e.dst_pair.z / rel.count(e, "dst") + rel.count(e, "src_pair") * rel.count(e, "type")
    program = g.build(n.y)
    graph = random_graph(3)
    v = random_values(program, graph)
    wanted = np.zeros((graph.num_nodes, 2))
    for d, t, source in zip(graph.dst, graph.edge_type, graph.src, strict=True):
        same = (graph.dst == d) & (graph.edge_type == t)
        square = v["W"][t].T @ v["W"][t]
        z = v["x"][graph.src[same]].mean(0) @ (v["W"][t] @ square * v["s"][t])
        pairs = ((graph.src == source) & (graph.edge_type == t)).sum() * (graph.edge_type == t).sum()
        wanted[d] += z / (graph.dst == d).sum() + pairs
    np.testing.assert_allclose(interpret(program, graph, v)[program.outputs[0]], wanted, rtol=1e-10)


def test_compgcn() -> None:
    """CompGCN (Vashishth et al. 2019, arXiv:1911.03082) with subtraction: relations have embeddings, updated too."""
    g = rel.Layer("compgcn")
    g.input("x", rel.NODE, 4)
    g.input("r", rel.EDGE_TYPE, 4)
    W, own, relation = (g.weight(name, rel.NONE, 4, 3) for name in ("W", "own", "relation"))
    loop = g.weight("loop", rel.NONE, 4)
    for n in g.nodes():
        for e in n.incoming():
            n.h += rel.linear(e.src.x - e.type.r, W)
        n.y = rel.tanh((n.h + rel.linear(n.x - loop, own)) / 2)
    for t in g.edge_types():
        t.s = rel.linear(t.r, relation)
    program = g.build(n.y, t.s)
    graph = random_graph(4)
    v = random_values(program, graph)
    h = np.zeros((graph.num_nodes, 3))
    np.add.at(h, graph.dst, (v["x"][graph.src] - v["r"][graph.edge_type]) @ v["W"])
    y, s = interpret(program, graph, v).values()
    np.testing.assert_allclose(y, np.tanh((h + (v["x"] - v["loop"]) @ v["own"]) / 2), atol=1e-12)
    np.testing.assert_allclose(s, v["r"] @ v["relation"], atol=1e-12)


def test_rows_lead_to_ends_pairs_and_types() -> None:
    g = rel.Layer("rows")
    g.input("x", rel.NODE)
    V = g.weight("V", rel.NODE_TYPE)
    for p in g.pairs("src"):
        p.z = p.node.x * V[p.node.type]
    for t in g.edge_types():
        t.k = V[t.src_type] + 2 * V[t.dst_type]
    for e in g.edges():
        e.m = e.src_pair.z * V[e.dst.type] + e.type.k
    program = g.build(e.m)
    graph = random_graph(5)
    v = random_values(program, graph)
    kinds = graph.table("node_type")
    first, second = v["V"][kinds[graph.src]], v["V"][kinds[graph.dst]]
    (got,) = interpret(program, graph, v).values()
    np.testing.assert_allclose(got, v["x"][graph.src] * first * second + first + 2 * second, atol=1e-12)


def test_names_are_those_of_attributes() -> None:
    g, W = layer()
    for e in g.edges():
        e.message = rel.linear(e.src.x, W[e.type])
        e.message = rel.tanh(e.message)
    for n in g.nodes():
        for e in n.incoming():
            n.h += e.message
    assert [op.name for op in g.build(n.h).ops] == ["message", "message_1", "h"]


def test_positions_go_with_operators() -> None:
    g, W = layer()
    for e in g.edges():
        e.m = rel.linear(e.src.x, W[e.type])
    program = g.build(e.m)
    here = inspect.getsourcelines(test_positions_go_with_operators)[1]
    assert str(program.ops[0].location) == f"{__file__}:{here + 3}"


def _mixed_domains() -> None:
    g, W = layer()
    for e in g.edges():
        e.m = rel.linear(e.src.x, W[e.type])
    for n in g.nodes():
        n.y = e.m  # wrong


def _used_without_accumulation() -> None:
    g, W = layer()
    for e in g.edges():
        e.m = rel.linear(e.src.x, W[e.type])
    for n in g.nodes():
        n.y = n.x + e.m  # wrong


def _read_in_progress() -> None:
    g, W = layer()
    for n in g.nodes():
        for e in n.incoming():
            n.h += rel.linear(e.src.x, W[e.type])
            n.z += n.h * 2  # wrong


def _read_at_a_neighbour_in_progress() -> None:
    g, _ = layer()
    for n in g.nodes():
        for e in n.incoming():
            n.h += e.src.x
            n.z += e.src.h  # wrong


def _shapes() -> None:
    g, W = layer()
    for e in g.edges():
        e.m = rel.linear(e.src.x, W[e.type])
        e.n = e.m + e.src.x  # wrong


def _dimensions() -> None:
    g, W = layer()
    for e in g.edges():
        e.m = rel.linear(rel.concat(e.src.x, e.dst.x), W[e.type])  # wrong


def _weight_without_index() -> None:
    g, W = layer()
    for e in g.edges():
        e.m = rel.linear(e.src.x, W)  # wrong


def _weight_by_node() -> None:
    g, W = layer()
    for n in g.nodes():
        n.m = rel.linear(n.x, W[n.type])  # wrong


def _weight_by_row() -> None:
    g, W = layer()
    for e in g.edges():
        e.m = rel.linear(e.src.x, W[e.src])  # wrong


def _typo() -> None:
    g, _ = layer()
    g.input("feature", rel.NODE, 3)
    for e in g.edges():
        e.m = rel.tanh(e.src.featur)  # wrong


def _set_at_other_row() -> None:
    g, _ = layer()
    for e in g.edges():
        e.dst.h = e.u  # wrong


def _set_after_the_loop() -> None:
    g, _ = layer()
    (n,) = g.nodes()
    n.y = n.x  # wrong


def _accumulated_outside() -> None:
    g, _ = layer()
    for n in g.nodes():
        n.y += n.x  # wrong


def _loops_in_loops() -> None:
    g, _ = layer()
    for _n in g.nodes():
        for _e in g.edges():  # wrong
            pass


def _branch() -> None:
    g, _ = layer()
    for n in g.nodes():
        if n.x:  # wrong
            pass


def _foreign() -> None:
    g, _ = layer()
    other, _ = layer()
    for n in g.nodes():
        for m in other.nodes():
            n.y = n.x + m.x  # wrong


def _no_value() -> None:
    g, _ = layer()
    for n in g.nodes():
        n.y = n.x + np.ones(3)  # wrong


def _softmax_of_nodes() -> None:
    g, _ = layer()
    for n in g.nodes():
        n.y = rel.edge_softmax(n.x)  # wrong


def _set_inside() -> None:
    g, _ = layer()
    for n in g.nodes():
        for _e in n.incoming():
            n.y = n.x  # wrong


def _twice() -> None:
    g, _ = layer()
    g.weight("x", rel.NONE, 3)  # wrong


def _weight_of_edges() -> None:
    g, _ = layer()
    g.weight("q", rel.EDGE, 3)  # wrong


def _unfinished_output() -> None:
    g, _ = layer()
    (n,) = g.nodes()
    g.build(n.y)  # wrong


ERRORS: dict[Callable[[], None], str] = {
    _mixed_domains: "'y' of nodes is set to a value by edges without accumulation: write `for e in n.incoming()",
    _used_without_accumulation: r"'.*' is a value by edges, and is used in a loop over nodes; accumulate it first|"
    "'.*' is a value by nodes, and is used in a loop over edges; read it at e.src or e.dst",
    _read_in_progress: r"'h' is read while it is being accumulated \(since line \d+\): it has a value after the loop",
    _read_at_a_neighbour_in_progress: "'h' is read while it is being accumulated",
    _shapes: r"'add': add: shapes \(2,\) and \(3,\) do not broadcast",
    _dimensions: r"'linear': linear: x of shape \(6,\) and a weight of shape \(3, 2\): x must be \(\*, 3\)",
    _weight_without_index: r"weight 'W' is by edge_type: index it, as in W\[e.type\]",
    _weight_by_node: r"weight 'W' is by edge_type, and is indexed by node types; write W\[e.type\]",
    _weight_by_row: "weight 'W' is by edge_type, and is indexed by nodes",
    _typo: "nodes have no 'featur' here. Did you mean 'feature'?",
    _set_at_other_row: "'h' is set at another row than that of the loop; edges only set their own",
    _set_after_the_loop: "the loop over nodes has ended; its variable can be read, but not set",
    _accumulated_outside: "'y' is accumulated outside of a loop over the edges of its node",
    _loops_in_loops: r"a loop over all edges inside of another loop; inside of nodes write n.incoming\(\)",
    _branch: "a value is known when the layer runs, not while it is written",
    _foreign: "'x' belongs to the layer 'layer', not to",
    _no_value: "ndarray is no value of a layer",
    _softmax_of_nodes: "edge_softmax is for values of edges; 'x' is one of a loop over node",
    _set_inside: "'y' of nodes is set inside of the loop over their edges; set it outside",
    _twice: "'x' is declared twice",
    _weight_of_edges: "weight 'q' is by edge; weights are by EDGE_TYPE, NODE_TYPE or NONE",
    _unfinished_output: "nodes have no 'y' here. Set it first",
}


@pytest.mark.parametrize("write", ERRORS, ids=lambda f: f.__name__.strip("_"))
def test_errors_name_the_line(write: Callable[[], None]) -> None:
    lines, first = inspect.getsourcelines(write)
    wrong = first + next(i for i, line in enumerate(lines) if "# wrong" in line)
    with pytest.raises(InputError) as caught:
        write()
    text = str(caught.value)
    assert text.startswith(f"{__file__}:{wrong}: "), text
    assert re.search(ERRORS[write], text), text
    assert "\n" not in text
