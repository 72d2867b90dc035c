"""Values of edges that are values of nodes or types."""

from __future__ import annotations

from dataclasses import replace

from tests.passes.relational.checks import ROWS, check, check_declines

BEFORE = """
    program p(x: node(3), W: edge_type(3, 3) weight, V: node_type(3, 3) weight, U: none(3, 3) weight) {
      a: edge(3) = linear(x@src, U)
      b: edge(3) = linear(x@dst, V@dst)
      d: edge(3) = tanh(b)
      e: edge(3, 3) = linear(W, U)
      f: node(3, 3) = linear(V, U)
      g: edge(3) = linear(x@src, e)
      h: edge(3) = mul(a, d)
      i: edge(3) = add(h, g)
      k: node(3) = sum(i, over=edge, by=dst)
      y: node(3) = linear(k, f)
      return y
    }
    """


def test_products_move_to_nodes_and_types() -> None:
    check(
        "hoist",
        BEFORE,
        """
        program p(x: node(3), W: edge_type(3, 3) weight, V: node_type(3, 3) weight, U: none(3, 3) weight) {
          a: node(3) = linear(x, U)
          b: node(3) = linear(x, V)
          d: node(3) = tanh(b)
          e: edge_type(3, 3) = linear(W, U)
          f: node_type(3, 3) = linear(V, U)
          g: edge(3) = linear(x@src, e)
          h: edge(3) = mul(a@src, d@dst)
          i: edge(3) = add(h, g)
          k: node(3) = sum(i, over=edge, by=dst)
          y: node(3) = linear(k, f)
          return y
        }
        """,
        edits=6,
    )


def test_more_nodes_than_edges() -> None:
    check_declines(
        "hoist",
        """
        program p(x: node(3)) {
          a: edge(3) = tanh(x@src)
          y: node(3) = sum(a, over=edge, by=dst)
          return y
        }
        """,
        "1000 nodes are not fewer than 40 rows of edge",
        rows=replace(ROWS, edges=40),
    )


def test_node_types_of_edge_types_need_a_canonical_graph() -> None:
    text = """
        program p(W: edge_type(3, 3) weight, V: node_type(3, 3) weight) {
          e: edge(3, 3) = linear(W, V@src)
          y: node(3, 3) = sum(e, over=edge, by=dst)
          return y
        }
        """
    check("hoist", text, text.replace("e: edge(3, 3)", "e: edge_type(3, 3)"), edits=1)
    check_declines("hoist", text, rows=replace(ROWS, canonical=False))


def test_outputs_keep_their_rows() -> None:
    check_declines("hoist", "program p(x: node(3)) {\n  y: edge(3) = tanh(x@src)\n  return y\n}")


def test_factors_of_a_sum_are_applied_to_it() -> None:
    """A node without edges is 0, not 0 / 0."""
    check(
        "hoist",
        """
        program p(x: node(3), s: edge(), t: edge_type()) {
          c: node() = count(over=edge, by=dst)
          m: edge(3) = mul(x@src, s)
          d: edge(3) = div(m, c@dst)
          h: node(3) = sum(d, over=edge, by=dst)
          e: edge(3) = mul(t, m)
          p: dst_pair(3) = mean(e, over=edge)
          y: node(3) = sum(p, over=dst_pair, by=dst)
          return h, y
        }
        """,
        """
        program p(x: node(3), s: edge(), t: edge_type()) {
          c: node() = count(over=edge, by=dst)
          m: edge(3) = mul(x@src, s)
          constant: none() = constant(shape=(), value=1.0)
          max: node() = max(c, constant)
          sum: node(3) = sum(m, over=edge, by=dst)
          h: node(3) = div(sum, max)
          mean: dst_pair(3) = mean(m, over=edge)
          p: dst_pair(3) = mul(mean, t)
          y: node(3) = sum(p, over=dst_pair, by=dst)
          return h, y
        }
        """,
        edits=6,
    )


def test_factors_that_vary_within_the_sum_stay() -> None:
    check_declines(
        "hoist",
        """
        program p(x: node(3), u: edge(3)) {
          a: edge(3) = mul(u, x@src)
          h: node(3) = sum(a, over=edge, by=dst)
          b: edge(3) = mul(u, x@dst)
          y: node(3) = sum(b, over=edge, by=dst)
          z: node(3) = sum(b, over=edge, by=src)
          return h, y, z
        }
        """,
    )


def test_a_factor_of_nodes_without_edges_may_be_infinite() -> None:
    """1 / degree, given as data: 0 times infinity is not the 0 of an empty sum. The same for 1 / x at a node."""
    check_declines(
        "hoist",
        """
        program p(x: node(3), norm: node()) {
          m: edge(3) = mul(x@src, norm@dst)
          r: edge(3) = recip(x@src)
          y: node(3) = sum(m, over=edge, by=dst)
          z: node(3) = sum(r, over=edge, by=dst)
          return y, z
        }
        """,
    )
