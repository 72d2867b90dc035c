"""Gradients of weights: one outer product for each pair."""

from __future__ import annotations

from dataclasses import replace

from tests.passes.relational.checks import ROWS, check, check_declines


def test_the_factor_that_varies_is_accumulated_first() -> None:
    check(
        "outer-by-pair",
        """
        program p(x: node(3), u: edge(2)) {
          o: edge_type(3, 2) = outer(x@src, u, over=edge)
          q: edge_type(2, 3) = outer(u, x@dst, over=edge)
          r: edge_type(3, 3) = outer(x@src, x@dst, over=edge)
          return o, q, r
        }
        """,
        """
        program p(x: node(3), u: edge(2)) {
          sum: src_pair(2) = sum(u, over=edge)
          o: edge_type(3, 2) = outer(x@src, sum, over=src_pair)
          sum_1: dst_pair(2) = sum(u, over=edge)
          q: edge_type(2, 3) = outer(sum_1, x@dst, over=dst_pair)
          sum_2: src_pair(3) = sum(x@dst, over=edge)
          r: edge_type(3, 3) = outer(x@src, sum_2, over=src_pair)
          return o, q, r
        }
        """,
        edits=6,
    )


def test_heads() -> None:
    check(
        "outer-by-pair",
        """
        program p(x: node(2, 3), u: edge(2, 4)) {
          o: node_type(2, 3, 4) = outer(x@src, u, heads=True, over=edge, by=src)
          return o
        }
        """,
        """
        program p(x: node(2, 3), u: edge(2, 4)) {
          sum: src_pair(2, 4) = sum(u, over=edge)
          o: node_type(2, 3, 4) = outer(x@src, sum, heads=True, over=src_pair, by=src)
          return o
        }
        """,
        edits=2,
    )


def test_declines() -> None:
    text = """
        program p(x: node(3), u: edge(2)) {
          o: edge_type(3, 2) = outer(x@src, u, over=edge)
          return o
        }
        """
    check_declines(
        "outer-by-pair", text.replace("x@src, u", "x@src, u"), "steps for", rows=replace(ROWS, src_pairs=40_000)
    )
    both = text.replace("(3, 2) = outer(x@src, u", "(2, 2) = outer(u, u")
    check_declines("outer-by-pair", both, "both factors vary between edges of a pair, or neither does")
