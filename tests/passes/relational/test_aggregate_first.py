"""Sums before products: the same numbers, rows of the side that is summed into."""

from __future__ import annotations

from dataclasses import replace

from tests.passes.relational.checks import ROWS, check, check_declines

#: As many pairs on both sides.
EVEN = replace(ROWS, src_pairs=9_000, dst_pairs=9_000)

RGCN = """
    program p(x: node(8), W: edge_type(8, 4) weight) {
      z: edge(4) = linear(x@src, W)
      c: dst_pair() = count(over=edge)
      d: edge(4) = div(z, c)
      y: node(4) = sum(d, over=edge, by=dst)
      return y
    }
    """


def test_messages_with_a_factor_of_the_pair() -> None:
    check(
        "aggregate-first",
        RGCN,
        """
        program p(x: node(8), W: edge_type(8, 4) weight) {
          c: dst_pair() = count(over=edge)
          sum: dst_pair(8) = sum(x@src, over=edge)
          linear: dst_pair(4) = linear(sum, W)
          div: dst_pair(4) = div(linear, c)
          y: node(4) = sum(div, over=dst_pair, by=dst)
          return y
        }
        """,
        edits=5,
        rows=EVEN,
    )


def test_messages_of_heads_with_factors_of_edges() -> None:
    check(
        "aggregate-first",
        """
        program p(x: node(2, 4), a: edge(2), W: edge_type(2, 4, 4) weight) {
          z: edge(2, 4) = linear(x@src, W)
          w: edge(2, 1) = reshape(a, shape=(2, 1))
          d: edge(2, 4) = mul(w, z)
          y: node(2, 4) = sum(d, over=edge, by=dst)
          return y
        }
        """,
        """
        program p(x: node(2, 4), a: edge(2), W: edge_type(2, 4, 4) weight) {
          w: edge(2, 1) = reshape(a, shape=(2, 1))
          mul: edge(2, 4) = mul(x@src, w)
          sum: dst_pair(2, 4) = sum(mul, over=edge)
          linear: dst_pair(2, 4) = linear(sum, W)
          y: node(2, 4) = sum(linear, over=dst_pair, by=dst)
          return y
        }
        """,
        edits=5,
        rows=EVEN,
    )


LOGIT = """
    program p(x: node(8), q: node(4), W: edge_type(8, 4) weight) {
      z: edge(4) = linear(x@src, W)
      d: edge() = dot(z, q@dst)
      y: node() = sum(d, over=edge, by=dst)
      return y
    }
    """


def test_the_product_of_a_dot_goes_to_the_side_with_fewer_pairs() -> None:
    check(
        "aggregate-first",
        LOGIT,
        """
        program p(x: node(8), q: node(4), W: edge_type(8, 4) weight) {
          linear: dst_pair(8) = linear(q@dst, W, transpose=True)
          d: edge() = dot(x@src, linear)
          y: node() = sum(d, over=edge, by=dst)
          return y
        }
        """,
        edits=2,
        rows=replace(EVEN, dst_pairs=2_000),
    )
    check_declines("aggregate-first", LOGIT, "9000 pairs on the other side, 9000 on this", rows=EVEN)


def test_more_pairs_on_this_side() -> None:
    check_declines("aggregate-first", RGCN, "10000 pairs on this side, 8000 on the other")


def test_one_factor_for_several_heads_of_one_matrix_is_no_place() -> None:
    """It would have to be applied to columns of the product, which rows before it do not have."""
    check_declines(
        "aggregate-first",
        """
        program p(x: node(8), a: edge(2), W: edge_type(8, 8) weight) {
          z: edge(8) = linear(x@src, W)
          h: edge(2, 4) = reshape(z, shape=(2, 4))
          w: edge(2, 1) = reshape(a, shape=(2, 1))
          d: edge(2, 4) = mul(w, h)
          y: node(2, 4) = sum(d, over=edge, by=dst)
          return y
        }
        """,
        rows=EVEN,
    )


def test_needed_elsewhere() -> None:
    text = RGCN.replace("return y", "u: node(4) = sum(z, over=edge, by=src)\n      return y, u")
    check_declines("aggregate-first", text, rows=EVEN)
