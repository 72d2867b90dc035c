"""Compiled programs and their gradients against the interpreter in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planish import relational as rel
from planish.ir.relational.graph import Graph
from planish.ir.relational.inter import Program
from planish.ir.relational.text import parse_program
from tests.ir.relational.graphs import graphs, random_graph, random_values
from tests.ir.relational.programs import random_program

pytest.importorskip("tvm")

GRAPHS = graphs()


def close(got: Any, wanted: np.ndarray, what: str, tolerance: float = 2e-5) -> None:
    got = np.asarray(got, np.float64)
    assert got.shape == wanted.shape, what
    scale = max(1.0, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale, err_msg=what)


def check(program: Program, compiled: Any, graph: Graph, seed: int = 0) -> None:
    values = {name: array.astype(np.float32) for name, array in random_values(program, graph, seed).items()}
    wanted = rel.interpret(program, graph, values)
    got = compiled(graph, **values)
    for output, array in zip(wanted, got if isinstance(got, tuple) else (got,), strict=True):
        close(array, wanted[output], output)


def test_values_beside_an_outer_product() -> None:
    """Found by training: rows that the kernel of a weight's gradient has at hand are stored by it."""
    program = parse_program("""
        program q(x: node(16), most: node(), a: node(8), d_y: node(8)) {
          s: node(8) = step(a)
          m: node(8) = mul(d_y, s)
          o: none(16, 8) = outer(x, m, over=node)
          d: node(8) = mul(m, most)
          y: node(8) = sum(d@src, over=edge, by=dst)
          return y, o
        }
        """)
    compiled = rel.compile(program, passes="")
    for graph in (GRAPHS["one node type"], GRAPHS["typed"], GRAPHS["no edges"]):
        check(program, compiled, graph)


@pytest.mark.parametrize("seed", range(8))
def test_random_programs(seed: int) -> None:
    program = random_program(seed, 10, canonical=True)
    compiled = rel.compile(program)
    for name, graph in GRAPHS.items():
        if name != "any types":
            check(program, compiled, graph, seed)


def test_gradients_of_a_gated_layer() -> None:
    torch = pytest.importorskip("torch")
    g = rel.Layer("gated")
    g.input("x", rel.NODE, 16)
    W = g.weight("W", rel.EDGE_TYPE, 16, 8)
    A = g.weight("A", rel.EDGE_TYPE, 32)
    root, bias = g.weight("root", rel.NODE_TYPE, 16, 8), g.weight("bias", rel.NONE, 8)
    for e in g.edges():
        e.gate = rel.sigmoid(rel.dot(rel.concat(e.src.x, e.dst.x), A[e.type]))
        e.m = e.gate * rel.linear(e.src.x, W[e.type])
    for n in g.nodes():
        for e in n.incoming():
            n.h += e.m / rel.count(e, "dst")
        n.y = rel.relu(n.h + rel.linear(n.x, root[n.type]) + bias)
    program = g.build(n.y)
    compiled = rel.compile(program)
    both = rel.differentiate(program)
    for name, graph in {**GRAPHS, "large": random_graph(9, (60, 40), 12, 900)}.items():
        values = {key: array.astype(np.float32) for key, array in random_values(program, graph).items()}
        given = {key: torch.from_numpy(array).requires_grad_() for key, array in values.items()}
        y = compiled(graph, **given)
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        (y * seed).sum().backward()
        kept = rel.interpret(both.forward, graph, values)
        close(y.detach(), kept[program.outputs[0]], f"y on {name}")
        wanted = rel.interpret(both.backward, graph, values | kept | {both.gradients[0]: seed.numpy()})
        for argument, output in zip(both.wrt, both.backward.outputs, strict=True):
            close(given[argument].grad, wanted[output], f"{argument} on {name}", 1e-4)
