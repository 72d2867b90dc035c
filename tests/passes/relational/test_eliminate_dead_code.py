"""What nothing needs."""

from __future__ import annotations

from tests.passes.relational.checks import check


def test_operators_without_readers_go_and_arguments_stay() -> None:
    check(
        "dce",
        """
        program p(x: node(3), u: edge(3), W: edge_type(3, 3) weight) {
          a: edge(3) = linear(u, W)
          b: edge(3) = tanh(a)
          y: node(3) = tanh(x)
          z: node(3) = tanh(y)
          return y
        }
        """,
        """
        program p(x: node(3), u: edge(3), W: edge_type(3, 3) weight) {
          y: node(3) = tanh(x)
          return y
        }
        """,
        edits=3,
    )
