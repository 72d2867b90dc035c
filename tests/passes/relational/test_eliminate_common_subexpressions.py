"""What is computed twice."""

from __future__ import annotations

from tests.passes.relational.checks import check, check_declines


def test_equal_up_to_order_and_to_ends_that_are_clear() -> None:
    check(
        "cse",
        """
        program p(x: node(3), W: edge_type(3, 3) weight) {
          a: src_pair(3) = linear(x@src, W)
          b: src_pair(3) = linear(x, W)
          c: edge(3) = add(a, b)
          d: edge(3) = mul(c, x@dst)
          e: edge(3) = mul(x@dst, c)
          f: edge(3) = sub(d, e)
          y: node(3) = sum(f, over=edge, by=dst)
          return y
        }
        """,
        """
        program p(x: node(3), W: edge_type(3, 3) weight) {
          a: src_pair(3) = linear(x@src, W)
          c: edge(3) = add(a, a)
          d: edge(3) = mul(c, x@dst)
          f: edge(3) = sub(d, d)
          y: node(3) = sum(f, over=edge, by=dst)
          return y
        }
        """,
        edits=4,
    )


def test_what_only_looks_equal() -> None:
    check_declines(
        "cse",
        """
        program p(x: node(3)) {
          a: edge(3) = sub(x@src, x@dst)
          b: edge(3) = sub(x@dst, x@src)
          c: edge(3) = leaky_relu(a, slope=0.1)
          d: edge(3) = leaky_relu(a, slope=0.2)
          e: edge(3) = mul(c, d)
          f: edge(3) = mul(e, b)
          g: edge(3) = edge_softmax(f, by=src)
          h: edge(3) = edge_softmax(f, by=dst)
          i: edge(3) = mul(g, h)
          u: node(3) = sum(i, over=edge, by=src)
          v: node(3) = sum(i, over=edge, by=dst)
          w: dst_pair(3) = sum(i, over=edge)
          return u, v, w
        }
        """,
    )


def test_two_outputs_stay_two() -> None:
    check_declines("cse", "program p(x: node(3)) {\n  y: node(3) = tanh(x)\n  z: node(3) = tanh(x)\n  return y, z\n}")
