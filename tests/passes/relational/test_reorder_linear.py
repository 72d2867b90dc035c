"""Products of weights first, where that is fewer multiplications."""

from __future__ import annotations

from dataclasses import replace

from planish.passes.relational.pipeline import run_passes
from tests.passes.relational.checks import ROWS, check, check_declines, program

#: The attention logit of RGAT at the destination.
LOGIT = """
    program p(x: node(64), W: edge_type(64, 64) weight, a: edge_type(2, 32) weight) {
      z: edge(64) = linear(x@dst, W)
      h: edge(2, 32) = reshape(z, shape=(2, 32))
      d: edge(2) = dot(a, h)
      y: node(2) = sum(d, over=edge, by=dst)
      return y
    }
    """


def test_logits_of_attention() -> None:
    check(
        "reorder",
        LOGIT,
        """
        program p(x: node(64), W: edge_type(64, 64) weight, a: edge_type(2, 32) weight) {
          reshape: edge_type(64, 2, 32) = reshape(W, shape=(64, 2, 32))
          dot: edge_type(64, 2) = dot(reshape, a)
          reshape_1: edge_type(64, 2) = reshape(dot, shape=(64, 2))
          linear: edge(2) = linear(x@dst, reshape_1)
          d: edge(2) = reshape(linear, shape=(2,))
          y: node(2) = sum(d, over=edge, by=dst)
          return y
        }
        """,
        edits=5,
    )


def test_needed_elsewhere_there_is_nothing_to_gain() -> None:
    """That of the source: messages need x W anyway."""
    text = LOGIT.replace("return y", "m: node(2, 32) = sum(h, over=edge, by=dst)\n      return y, m")
    check_declines("reorder", text, "and 'z' is needed elsewhere")


def test_many_types_and_few_edges() -> None:
    """3 T 64 64 + R 64 2 multiplications against R 64 64 + R 64: 25 rows are worth 8 types."""
    rows = replace(ROWS, edges=50, src_pairs=50, dst_pairs=25)
    check_declines("reorder", LOGIT, "1.14e+05 multiplications for 1.04e+05", rows=replace(rows, edge_types=9))
    assert run_passes(program(LOGIT), replace(rows, edge_types=8), "reorder").steps[0].fired == 1


def test_rows_are_counted_as_compaction_leaves_them() -> None:
    rows = replace(ROWS, dst_pairs=19)
    check_declines("reorder", LOGIT, "multiplications for", rows=rows)
    for passes in ("reorder{compact=False}", "reorder{force=True}"):
        assert run_passes(program(LOGIT), rows, passes).steps[0].fired == 1


#: Keys of HGT: by the type of the node, then by that of the edge.
KEYS = """
    program p(x: node(8), K: node_type(8, 8) weight, b: node_type(8) weight, A: edge_type(1, 8, 8) weight) {
      k: node(8) = linear(x, K)
      kb: node(8) = add(k, b)
      kh: node(1, 8) = reshape(kb, shape=(1, 8))
      t: edge(1, 8) = linear(kh@src, A)
      y: node(1, 8) = sum(t, over=edge, by=dst)
      return y
    }
    """


def test_weights_by_node_type_and_by_edge_type() -> None:
    check(
        "reorder",
        KEYS,
        """
        program p(x: node(8), K: node_type(8, 8) weight, b: node_type(8) weight, A: edge_type(1, 8, 8) weight) {
          copy: edge_type(8, 8) = copy(K@src)
          reshape: edge_type(8, 1, 8) = reshape(copy, shape=(8, 1, 8))
          linear: edge_type(8, 1, 8) = linear(reshape, A)
          reshape_1: edge_type(8, 8) = reshape(linear, shape=(8, 8))
          linear_1: edge(8) = linear(x@src, reshape_1)
          copy_1: edge_type(8) = copy(b@src)
          reshape_2: edge_type(1, 8) = reshape(copy_1, shape=(1, 8))
          linear_2: edge_type(1, 8) = linear(reshape_2, A)
          reshape_3: edge_type(8) = reshape(linear_2, shape=(8,))
          add: edge(8) = add(linear_1, reshape_3)
          t: edge(1, 8) = reshape(add, shape=(1, 8))
          y: node(1, 8) = sum(t, over=edge, by=dst)
          return y
        }
        """,
        edits=11,
    )
    check_declines(
        "reorder",
        KEYS,
        "an edge type joins nodes of several types",
        rows=replace(ROWS, canonical=False),
    )


def test_several_heads_cost_more_than_they_save() -> None:
    """A matrix for each head is small; with x in front it is not."""
    text = KEYS.replace("(1, 8, 8)", "(4, 2, 2)").replace("(1, 8)", "(4, 2)")
    check_declines("reorder", text, "multiplications for")


def test_a_nonlinearity_is_no_place() -> None:
    check_declines(
        "reorder",
        LOGIT.replace("h: edge(2, 32) = reshape(z", "t: edge(64) = tanh(z)\n      h: edge(2, 32) = reshape(t"),
    )


def test_a_second_axis_of_the_vector_is_no_place() -> None:
    check_declines(
        "reorder",
        """
        program p(x: node(8), W: edge_type(8, 8) weight, a: edge_type(2, 8) weight) {
          z: edge(8) = linear(x@dst, W)
          d: edge(2) = dot(a, z)
          y: node(2) = sum(d, over=edge, by=dst)
          return y
        }
        """,
    )


def test_chains_are_reordered_pair_by_pair() -> None:
    done = check(
        "reorder,canonicalize",
        """
        program p(x: node(8), A: edge_type(8, 64) weight, B: edge_type(64, 64) weight, C: none(64, 1) weight) {
          a: edge(64) = linear(x@src, A)
          b: edge(64) = linear(a, B)
          c: edge(1) = linear(b, C)
          y: node(1) = sum(c, over=edge, by=dst)
          return y
        }
        """,
        """
        program p(x: node(8), A: edge_type(8, 64) weight, B: edge_type(64, 64) weight, C: none(64, 1) weight) {
          linear: edge_type(8, 64) = linear(A, B)
          linear_2: edge_type(8, 1) = linear(linear, C)
          linear_3: edge(1) = linear(x@src, linear_2)
          y: node(1) = sum(linear_3, over=edge, by=dst)
          return y
        }
        """,
        edits=14,
    )
    assert [step.fired for step in done.steps] == [2, 4]
