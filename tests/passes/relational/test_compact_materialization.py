"""Rows by pair instead of by edge: legality by what a value depends on, worth by the ratio."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planish.ir.relational.domains import DST_PAIR, SRC_PAIR
from planish.ir.relational.interpret import interpret, interpret_all
from planish.ir.relational.models import rgat
from planish.ir.relational.statistics import Statistics
from planish.passes.relational.pipeline import run_passes
from tests.ir.relational.graphs import random_graph, random_values
from tests.passes.relational.checks import ROWS, check, check_declines

BEFORE = """
    program p(x: node(3), u: edge(3), W: edge_type(3, 3) weight, V: node_type(3, 3) weight) {
      z: edge(3) = linear(x@src, W)
      t: edge(3) = tanh(z)
      q: edge(3) = linear(x@dst, W)
      r: edge(3) = linear(q, V@src)
      d: edge() = dot(t, r)
      l: edge(3) = linear(u, W)
      a: edge() = edge_softmax(d, by=dst)
      m: edge(3) = mul(a, t)
      n: edge(3) = add(m, l)
      y: node(3) = sum(n, over=edge, by=dst)
      return y
    }
    """


def test_what_depends_on_one_end_and_the_type_is_compacted() -> None:
    after = BEFORE
    for name, pair in {"z": "src", "t": "src", "q": "dst", "r": "dst"}.items():
        after = after.replace(f"{name}: edge(3)", f"{name}: {pair}_pair(3)")
    done = check("compact", BEFORE, after, edits=4)
    assert [(d.node, d.reason) for d in done.steps[0].declined] == [("l", "it varies between edges of the same pair")]


def test_the_other_end_of_a_type_needs_a_canonical_graph() -> None:
    after = BEFORE
    for name, pair in {"z": "src", "t": "src", "q": "dst"}.items():
        after = after.replace(f"{name}: edge(3)", f"{name}: {pair}_pair(3)")
    check("compact", BEFORE, after, edits=3, rows=replace(ROWS, canonical=False))


def test_a_ratio_near_one_does_not_pay() -> None:
    check_declines(
        "compact",
        """
        program p(x: node(3), W: edge_type(3, 3) weight) {
          z: edge(3) = linear(x@src, W)
          y: node(3) = sum(z, over=edge, by=dst)
          return y
        }
        """,
        "39200 (source, edge type) for 40000 edges: ratio 0.98 > 0.9",
        rows=replace(ROWS, src_pairs=39_200),
    )


def test_a_limit_of_ones_own() -> None:
    text = """
        program p(x: node(3), W: edge_type(3, 3) weight) {
          z: edge(3) = linear(x@src, W)
          y: node(3) = sum(z, over=edge, by=dst)
          return y
        }
        """
    check_declines("compact{max_ratio=0.1}", text, "ratio 0.20 > 0.1")
    check("compact{max_ratio=0.3}", text, text.replace("z: edge", "z: src_pair"), edits=1)


def test_fewer_rows_are_computed() -> None:
    """The rows of an attention layer, counted on a graph."""
    graph = random_graph(1, (9,), 3, 200)
    program = rgat(4, 4)
    compact = run_passes(program, Statistics.of(graph), "canonicalize,compact{max_ratio=1.0}").program
    values = random_values(program, graph)
    every = interpret_all(compact, graph, values)
    by_pair = [op.name for op in compact.ops if op.over in (SRC_PAIR, DST_PAIR) and op.kind == "linear"]
    assert [len(every[name]) for name in by_pair] == [graph.rows(SRC_PAIR), graph.rows(DST_PAIR)]
    assert graph.rows(SRC_PAIR) < 30
    wanted, got = interpret(program, graph, values), interpret(compact, graph, values)
    np.testing.assert_allclose(got["y"], wanted["y"], rtol=1e-10)
