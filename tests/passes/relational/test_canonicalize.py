"""One form for what can be written in several ways."""

from __future__ import annotations

from tests.passes.relational.checks import check, check_declines


def test_copies_constants_and_neutral_elements() -> None:
    check(
        "canonicalize",
        """
        program p(x: node(3)) {
          c: edge(3) = copy(x@src)
          zero: none() = constant(shape=(), value=0.0)
          two: none() = constant(shape=(), value=2.0)
          three: none() = constant(shape=(), value=3.0)
          six: none() = mul(two, three)
          one: none() = sub(three, two)
          a: edge(3) = add(c, zero)
          b: edge(3) = mul(one, a)
          d: edge(3) = mul(b, six)
          e: edge(3) = div(d, two)
          f: edge(3) = neg(e)
          g: edge(3) = neg(f)
          y: node(3) = sum(g, over=edge, by=dst)
          return y
        }
        """,
        """
        program p(x: node(3)) {
          constant: none() = constant(shape=(), value=3.0)
          e: edge(3) = mul(x@src, constant)
          y: node(3) = sum(e, over=edge, by=dst)
          return y
        }
        """,
        edits=13,
    )


def test_concatenated_values_are_multiplied_apart() -> None:
    check(
        "canonicalize",
        """
        program p(x: node(3), W: edge_type(6, 2) weight, v: edge_type(6) weight) {
          both: edge(6) = concat(x@src, x@dst, axis=0)
          z: edge(2) = linear(both, W)
          d: edge() = dot(v, both)
          m: edge(2) = mul(z, d)
          y: node(2) = sum(m, over=edge, by=dst)
          return y
        }
        """,
        """
        program p(x: node(3), W: edge_type(6, 2) weight, v: edge_type(6) weight) {
          slice: edge_type(3, 2) = slice(W, axis=0, start=0, stop=3)
          linear: edge(2) = linear(x@src, slice)
          slice_1: edge_type(3, 2) = slice(W, axis=0, start=3, stop=6)
          linear_1: edge(2) = linear(x@dst, slice_1)
          z: edge(2) = add(linear, linear_1)
          slice_2: edge_type(3) = slice(v, axis=0, start=0, stop=3)
          dot: edge() = dot(x@src, slice_2)
          slice_3: edge_type(3) = slice(v, axis=0, start=3, stop=6)
          dot_1: edge() = dot(x@dst, slice_3)
          d: edge() = add(dot, dot_1)
          m: edge(2) = mul(z, d)
          y: node(2) = sum(m, over=edge, by=dst)
          return y
        }
        """,
        edits=10,
    )


def test_means_inner_products_views_and_broadcasting() -> None:
    check(
        "canonicalize",
        """
        program p(x: node(2, 3), w: edge_type(2, 3) weight) {
          m: node(2, 3) = mean(x@src, over=edge, by=dst)
          r: node(6) = reshape(m, shape=(6,))
          s: node(3, 2) = reshape(r, shape=(3, 2))
          p: edge(2, 3) = mul(x@src, w)
          d: edge(2) = fsum(p, axes=(1,))
          e: node(1, 3, 2) = reshape(s, shape=(1, 3, 2))
          f: node(3, 2) = fsum(e, axes=(0,))
          t: node(2) = sum(d, over=edge, by=dst)
          wide: node(3, 2) = expand(t, shape=(3, 2))
          y: node(3, 2) = mul(wide, f)
          return y
        }
        """,
        """
        program p(x: node(2, 3), w: edge_type(2, 3) weight) {
          sum: node(2, 3) = sum(x@src, over=edge, by=dst)
          count: node() = count(over=edge, by=dst)
          constant: none() = constant(shape=(), value=1.0)
          max: node() = max(count, constant)
          m: node(2, 3) = div(sum, max)
          d: edge(2) = dot(x@src, w)
          f: node(3, 2) = reshape(m, shape=(3, 2))
          t: node(2) = sum(d, over=edge, by=dst)
          y: node(3, 2) = mul(t, f)
          return y
        }
        """,
        edits=9,
    )


def test_a_slice_of_concatenated_values_is_one_of_them() -> None:
    check(
        "canonicalize",
        """
        program p(x: node(3), z: node(2)) {
          both: node(5) = concat(x, z, axis=0)
          one: node(2) = slice(both, axis=0, start=3, stop=5)
          all: node(2) = slice(one, axis=0, start=0, stop=2)
          y: node(2) = tanh(all)
          return y
        }
        """,
        """
        program p(x: node(3), z: node(2)) {
          y: node(2) = tanh(z)
          return y
        }
        """,
        edits=4,
    )


def test_a_neutral_element_that_widens_stays() -> None:
    check_declines(
        "canonicalize",
        """
        program p(x: node()) {
          one: none(3) = constant(shape=(3,), value=1.0)
          y: node(3) = mul(x, one)
          return y
        }
        """,
    )


def test_a_copy_of_an_argument_that_is_an_output_stays() -> None:
    check_declines("canonicalize", "program p(x: node(3)) {\n  y: node(3) = copy(x)\n  return y\n}")


def test_concatenation_beside_a_value_of_edges_is_left_alone() -> None:
    """Apart, it would have to be cut for each edge."""
    check_declines(
        "canonicalize",
        """
        program p(x: node(3), u: edge(6)) {
          both: edge(6) = concat(x@src, x@dst, axis=0)
          d: edge() = dot(both, u)
          y: node() = sum(d, over=edge, by=dst)
          return y
        }
        """,
    )
