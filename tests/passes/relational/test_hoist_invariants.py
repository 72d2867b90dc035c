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
