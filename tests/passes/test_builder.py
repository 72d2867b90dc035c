from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from planish.passes.rewrite import RewritePass
from planish.passes.testing import apply_pass, program_of, run_reference

TEXT = """
<ir_version: 10, opset_import: ["" : 23]> f (float[n] x) => (float[n] y) { a = Neg(x) b = Tanh(a) y = Tanh(b) }"""


@dataclass(frozen=True)
class BranchOnLength(RewritePass):
    """Tanh(x) as an If whose branches capture constants, values around them, and each other's."""

    name: ClassVar[str] = "branch-on-length-test"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Tanh(x)

    def rewrite(self, op: Any, x: Any) -> Any:
        zero = op.Mul(x, np.float32(0.0))
        inner = op.graph(lambda: [op.Add(op.Sinh(x), zero)], "inner")
        same = op.graph(lambda: [x], "same")  # not made inside: it gets an Identity
        long = op.GreaterOrEqual(op.Shape(x, start=0, end=1), [2])
        very = op.GreaterOrEqual(op.Shape(x, start=0, end=1), [4])

        def outer() -> list[Any]:
            chosen = op.If(very, then_branch=inner, else_branch=same)
            chosen.type, chosen.shape = x.type, x.shape
            return [chosen]

        made = op.If(long, then_branch=op.graph(outer, "outer"), else_branch=op.graph(lambda: [zero], "none"))
        made.type = x.type
        return made


def test_a_rewrite_builds_branches() -> None:
    program = program_of(TEXT)
    result = apply_pass([BranchOnLength()], program)
    assert result.fired == 2
    nodes = list(program.nodes())
    assert len({n.name for n in nodes}) == len(nodes)
    assert all(n.name and "branch_on_length_test" in n.name for n in nodes if n.op_type != "Neg")
    assert all(n.metadata_props["planish.pass"] == BranchOnLength.name for n in nodes if n.op_type != "Neg")
    assert {n.op_type for n in nodes} >= {"If", "Sinh", "Identity"}
    for length, expected in ((1, np.zeros(1)), (3, -np.ones(3)), (5, np.sinh(np.sinh(-np.ones(5))))):
        got = run_reference(program, {"x": np.ones(length, np.float32)})["y"]
        assert np.allclose(got, expected)
