"""A rule and a way to write models down, for the tests of the driver."""

from __future__ import annotations

from typing import Any

from planish.ir.program import Program
from planish.passes.rewrite import RewritePass
from planish.passes.testing import program_of


class NegNeg(RewritePass):
    name = "test-neg-neg"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Neg(op.Neg(x))

    def rewrite(self, op: Any, x: Any) -> Any:
        return x


def text(body: str, signature: str = "float[2,3] x) => (float[2,3] y", opset: int = 20, consts: str = "") -> str:
    declared = f"<{consts}>" if consts else ""
    return f'<ir_version: 10, opset_import: ["" : {opset}, "my" : 1]> g ({signature}) {declared} {{ {body} }}'


def of(body: str, **kwargs: Any) -> Program:
    return program_of(text(body, **kwargs))
