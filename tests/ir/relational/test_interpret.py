"""The interpreter against loops over edges in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest

from planish.ir.errors import InputError
from planish.ir.relational.graph import Graph
from planish.ir.relational.interpret import interpret
from planish.ir.relational.models import hgt, rgat, rgcn, tanh_rgcn
from planish.ir.relational.text import parse_program
from planish.ir.relational.verify import needs_canonical_types
from tests.ir.relational.graphs import graphs, random_values

GRAPHS = graphs()


def edges_into(graph: Graph, node: int) -> list[int]:
    return [e for e in range(graph.num_edges) if graph.dst[e] == node]


def softmax(x: np.ndarray) -> np.ndarray:
    weight = np.exp(x - x.max(0))
    return weight / weight.sum(0)


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_rgcn(graph: Graph) -> None:
    program = rgcn(5, 3)
    v = random_values(program, graph)
    wanted = np.zeros((graph.num_nodes, 3))
    for node in range(graph.num_nodes):
        for e in (into := edges_into(graph, node)):
            same = sum(graph.edge_type[other] == graph.edge_type[e] for other in into)
            wanted[node] += v["x"][graph.src[e]] @ v["W"][graph.edge_type[e]] / same
        wanted[node] += v["x"][node] @ v["root"] + v["bias"]
    (got,) = interpret(program, graph, v).values()
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_rgat(graph: Graph) -> None:
    program = rgat(5, 3, heads=2)
    v = random_values(program, graph)
    wanted = np.zeros((graph.num_nodes, 2, 3))
    for node in range(graph.num_nodes):
        into = edges_into(graph, node)
        z = {e: (v["x"][graph.src[e]] @ v["W"][graph.edge_type[e]]).reshape(2, 3) for e in into}
        logits = []
        for e in into:
            own = (v["x"][node] @ v["W"][graph.edge_type[e]]).reshape(2, 3)
            both = np.concatenate([z[e], own], 1)
            logit = (both * v["att"][graph.edge_type[e]]).sum(1)
            logits.append(np.where(logit > 0, logit, 0.2 * logit))
        if into:
            for e, a in zip(into, softmax(np.array(logits)), strict=True):
                wanted[node] += a[:, None] * z[e]
    (got,) = interpret(program, graph, v).values()
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inputs", [6, 5])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_hgt(graph: Graph, inputs: int) -> None:
    program = hgt(inputs, 3, heads=2)
    v = random_values(program, graph)

    def project(name: str, node: int) -> np.ndarray:
        kind = graph.table("node_type")[node]
        return (v["x"][node] @ v[name][kind] + v["b" + name.lower()][kind]).reshape(2, 3)

    wanted = np.zeros((graph.num_nodes, 6))
    for node in range(graph.num_nodes):
        into, kind, total = edges_into(graph, node), graph.table("node_type")[node], np.zeros((2, 3))
        logits, messages = [], []
        for e in into:
            t, source, q = graph.edge_type[e], graph.src[e], project("Q", node)
            k = np.einsum("hi,hio->ho", project("K", source), v["W_att"][t])
            logits.append((k * q).sum(1) * v["mu"][t] / math.sqrt(3))
            messages.append(np.einsum("hi,hio->ho", project("V", source), v["W_msg"][t]))
        if into:
            total = (softmax(np.array(logits))[:, :, None] * np.array(messages)).sum(0)
        h = total.reshape(6)
        h = 0.5 * h * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        y = h @ v["out"][kind] + v["b_out"][kind]
        if inputs == 6:
            gate = 1 / (1 + np.exp(-v["skip"][kind]))
            y = gate * y + (1 - gate) * v["x"][node]
        wanted[node] = y
    (got,) = interpret(program, graph, v).values()
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


def test_text_is_read_back() -> None:
    for program in (rgcn(5, 3), rgat(5, 3, 2), hgt(6, 3, 2), tanh_rgcn(2, 3)):
        assert parse_program(str(program)) == program
        assert not needs_canonical_types(program)


def test_arguments_are_checked() -> None:
    graph, program = GRAPHS["typed"], tanh_rgcn(5, 3)
    values = random_values(program, graph)
    with pytest.raises(InputError, match=r"needs a value for 'W0: none\(5, 3\)'"):
        interpret(program, graph, {k: x for k, x in values.items() if k != "W0"})
    with pytest.raises(InputError, match=r"'x' has shape \(12, 4\); .* ask for \(12, 5\)"):
        interpret(program, graph, values | {"x": values["x"][:, :4]})
