"""Near misses: the nearest partial match, what was expected and what was found."""

from __future__ import annotations

import math
from typing import Any

import pytest

from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.explain import NearMiss, explain
from planish.passes.rewrite import Match, RewritePass
from planish.passes.testing import canonical_text, program_of


class Gelu(RewritePass):
    name = "test-gelu"
    min_opset = 20

    def pattern(self, op: Any, x: Any) -> Any:
        return 0.5 * (x * (op.Erf(x / math.sqrt(2)) + 1.0))

    def check(self, match: Match) -> None:
        if match.dtype("x") is not None and match.rank("x") == 1:
            raise Decline("x is a vector")

    def rewrite(self, op: Any, x: Any) -> Any:
        return op.Gelu(x)


def near(body: str, consts: str = "", shape: str = "2,3", opset: int = 20) -> list[NearMiss]:
    declared = "float s = {1.4142135}, float one = {1.0}, float half = {0.5}" + consts
    header = f'<ir_version: 10, opset_import: ["" : {opset}]> g (float[{shape}] x) => (float[{shape}] y)'
    program = program_of(f"{header} <{declared}> {{ {body} }}")
    before = canonical_text(program)
    misses = explain(program, Gelu())
    assert canonical_text(program) == before, "explain changed the program"
    return misses


GOOD = "a = Div(x, s) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half)"


@pytest.mark.parametrize(
    ("old", "new", "matched", "reason"),
    [
        (
            "Erf(a)",
            "Tanh(a)",
            3,
            "operands of Add 'Add_0': expected Erf, the constant 1.0; found Tanh 'b', constant 'one'",
        ),
        ("Div(x, s)", "Div(x, two)", 5, "value 'two' is 2.0; expected 1.4142135623730951"),
        (
            "Add(b, one)",
            "Add(b, x)",
            3,
            "operands of Add 'Add_0': expected Erf, the constant 1.0; found Erf 'b', input 'x'",
        ),
        ("Mul(x, c)", "Mul(c, c)", 5, "x is value 'c', found value 'x'"),
        ("Div(x, s)", "Div(x, row)", 5, "value 'row' has shape [3]; expected the number 1.4142135623730951"),
    ],
)
def test_the_nearest_partial_match(old: str, new: str, matched: int, reason: str) -> None:
    misses = near(GOOD.replace(old, new), consts=", float two = {2.0}, float[3] row = {1,2,3}")
    best = next(m for m in misses if m.node == "Mul_1")
    assert best.pattern_nodes == 5 and not best.declined
    assert reason in best.reason
    assert len(best.matched_nodes) == matched


def test_what_fires_is_no_near_miss() -> None:
    # The inner Mul could start a match too, and goes away with the one that fires.
    assert near(GOOD) == []


def test_a_decline_is_the_nearest() -> None:
    first = near(GOOD, shape="3")[0]
    assert first.declined and first.reason == "x is a vector" and len(first.matched_nodes) == 5
    assert str(first) == "test-gelu at Mul_1: matched all nodes; x is a vector"
    first = near(GOOD, opset=18)[0]
    assert first.declined and "needs opset 20" in first.reason


def test_a_pass_without_rules_shows_its_declines() -> None:
    class Plain(ExactPass):
        name = "test-plain"

        def apply(self, program: Program, ctx: PassContext) -> PassResult:
            return PassResult(False, 0, [Declined("plain", "n", "too large")])

    program = program_of('<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Neg(x) }')
    assert explain(program, Plain()) == [NearMiss("plain", "n", ("n",), "too large", 1, "n", True)]
