"""The driver: what rules do to graphs, where they decline, and what stays as it was."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.program import Program
from planish.passes.base import ApproximatePass, Decline
from planish.passes.rewrite import Match, RewriteMixin, RewritePass, Rule
from planish.passes.testing import (
    apply_pass,
    check_declines,
    check_numerics,
    check_rewrite,
    check_untouched,
)
from tests.passes.rules import NegNeg, of, text

SQRT2 = math.sqrt(2)


class Gelu(RewritePass):
    name = "test-gelu"
    min_opset = 20

    def pattern(self, op: Any, x: Any) -> Any:
        return 0.5 * (x * (op.Erf(x / SQRT2) + 1.0))

    def rewrite(self, op: Any, x: Any) -> Any:
        return op.Gelu(x)


class NoIdentity(RewritePass):
    name = "test-no-identity"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Identity(x)

    def rewrite(self, op: Any, x: Any) -> Any:
        return x


GELU = "a = Div(x, s) b = Erf(a) c = Add(one, b) d = Mul(c, x) y = Mul(d, half)"
GELU_CONSTS = "float s = {1.4142135}, float one = {1.0}, float[1] half = {0.5}"


# --- what a firing does -----------------------------------------------------------------------------------------


def test_a_rule_fires() -> None:
    check_rewrite(Gelu(), text(GELU, consts=GELU_CONSTS), text("y = Gelu(x)"), edits=1)
    check_numerics(Gelu(), text(GELU, consts=GELU_CONSTS))


def test_a_chain_is_rewritten_to_its_end() -> None:
    body = "a = Neg(x) b = Neg(a) c = Neg(b) d = Neg(c) y = Neg(d)"
    check_rewrite(NegNeg(), text(body), text("y = Neg(x)"), edits=2)


def test_names_types_and_metadata_of_the_new_nodes() -> None:
    program = of(GELU + " z = Relu(y)", signature="float[n,3] x) => (float[n,3] z", consts=GELU_CONSTS)
    nodes = {n.outputs[0].name: n for n in program.nodes()}
    nodes["y"].metadata_props.update({"pkg.torch.onnx.name_scopes": "layer.0", "only_root": "1"})
    nodes["b"].metadata_props.update({"pkg.torch.onnx.name_scopes": "layer.1", "only_erf": "2"})
    nodes["b"].metadata_props["planish.from"] = "older,oldest"
    sources = [nodes["y"].name, nodes["d"].name, nodes["c"].name]
    apply_pass(Gelu(), program)
    gelu = next(n for n in program.nodes() if n.op_type == "Gelu")
    assert gelu.outputs[0].name == "y"
    assert gelu.outputs[0].dtype == ir.DataType.FLOAT and str(gelu.outputs[0].shape) == "[n,3]"
    found = gelu.metadata_props
    assert found["pkg.torch.onnx.name_scopes"] == "layer.0"
    assert found["only_root"] == "1" and found["only_erf"] == "2"
    assert found["planish.pass"] == "test-gelu"
    assert set(found["planish.from"].split(",")) == {*sources, "older", "oldest", nodes["a"].name}


def test_at_most_eight_sources_are_named() -> None:
    class Ten(RewritePass):
        name = "test-ten"

        def pattern(self, op: Any, x: Any) -> Any:
            for _ in range(10):
                x = op.Neg(x)
            return x

        def rewrite(self, op: Any, x: Any) -> Any:
            return op.Identity(x)

    names = ["x", *"abcdefghi", "y"]
    program = of(" ".join(f"{b} = Neg({a})" for a, b in itertools.pairwise(names)))
    assert apply_pass(Ten(), program).fired == 1
    assert len(program.main.graph[0].metadata_props["planish.from"].split(",")) == 8


def test_new_constants_get_names_of_their_own() -> None:
    class Scale(RewritePass):
        name = "test-scale"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Relu(x)

        def rewrite(self, op: Any, x: Any) -> Any:
            return op.Mul(op.Abs(x), op.initializer(np.float32([1, 2, 3]), "scale"))

    program = of("a = Relu(x) y = Relu(a)", consts="float scale = {7.0}")
    apply_pass(Scale(), program)
    store = program.weights
    assert store["scale"].numpy() == 7.0
    new = [t for n, t in store.items() if n != "scale"]
    assert len(new) == 1, "equal constants are one"
    names = [v.name for n in program.nodes() for v in n.outputs]
    assert len(set(names)) == len(names)


def test_constants_are_shared_between_entries() -> None:
    class Scale(RewritePass):
        name = "test-scale"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Relu(x)

        def rewrite(self, op: Any, x: Any) -> Any:
            return op.Mul(x, np.float32([1, 2, 3]))

    one, two = of("y = Relu(x)").main, of("a = Neg(x) y = Relu(a)").main
    program = Program({"prefill": one, "decode": two})
    assert apply_pass(Scale(), program).fired == 2
    assert len(program.weights) == 1
    assert program.weight_bytes() == 12
    # A later run arrives at the same tensor.
    again = Program({"prefill": program.entries["prefill"], "decode": of("y = Relu(x)").main})
    apply_pass(Scale(), again)
    assert len(again.weights) == 1


def test_outputs_of_the_graph_keep_their_names() -> None:
    check_rewrite(
        NegNeg(),
        text("a = Relu(x) b = Neg(a) y = Neg(b)"),
        text("y = Relu(x)"),
        edits=1,
    )


def test_an_output_that_is_an_input_gets_an_identity() -> None:
    check_rewrite(NegNeg(), text("a = Neg(x) y = Neg(a)"), text("y = Identity(x)"), edits=1)
    two = "float[2,3] x) => (float[2,3] y, float[2,3] z"
    check_rewrite(
        NegNeg(),
        text("y = Relu(x) b = Neg(y) z = Neg(b)", signature=two),
        text("y = Relu(x) z = Identity(y)", signature=two),
        edits=1,
    )


def test_the_last_identity_is_kept_with_a_reason() -> None:
    check_declines(NoIdentity(), text("y = Identity(x)"), "output 'y' of the graph is 'x' itself", count=1)
    check_rewrite(NoIdentity(), text("a = Identity(x) y = Relu(a)"), text("y = Relu(x)"), edits=1)


def test_a_constant_result_and_values_of_the_rule() -> None:
    class One(RewritePass):
        name = "test-one"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Div(x, x)

        def rewrite(self, op: Any, x: Any) -> Any:
            return op.initializer(np.ones((2, 3), np.float32))

    program = check_numerics(One(), text("a = Div(x, x) y = Relu(a)"), {"x": np.ones((2, 3), np.float32)})
    assert [n.op_type for n in program.nodes()] == ["Relu"]
    program = check_numerics(One(), text("y = Div(x, x)"), {"x": np.ones((2, 3), np.float32)})
    assert [n.op_type for n in program.nodes()] == ["Identity"]


# --- where a rule declines ---------------------------------------------------------------------------------------


def test_opset_guard() -> None:
    reason = "needs opset 20, the model has 18 (raise-opset comes first)"
    check_declines(Gelu(), text(GELU, opset=18, consts=GELU_CONSTS), reason, count=1)


def test_an_operator_that_the_opset_lacks_is_never_emitted() -> None:
    class Careless(Gelu):
        name = "test-careless"
        min_opset = 1

    reason = "Gelu needs opset 20, the model has 18 (raise-opset comes first)"
    check_declines(Careless(), text(GELU, opset=18, consts=GELU_CONSTS), reason, count=1)


def test_an_inner_value_with_another_use_declines() -> None:
    two = "float[2,3] x) => (float[2,3] y, float[2,3] z"
    source = text(GELU + " z = Relu(c)", signature=two, consts=GELU_CONSTS)
    check_declines(Gelu(), source, "inner value 'c' is also used by Relu", count=1)
    source = text(GELU + " z = Relu(x)", signature="float[2,3] x) => (float[2,3] y, float[2,3] c", consts=GELU_CONSTS)
    check_declines(Gelu(), source.replace(" z = Relu(x)", ""), "inner value 'c' is an output of the graph", count=1)


def test_an_inner_value_used_in_a_subgraph_declines() -> None:
    body = """a = Neg(x) y = Neg(a)
      z = If(c) <then_branch = t () => (float[2,3] p) { p = Relu(a) },
                 else_branch = e () => (float[2,3] q) { q = Abs(x) }>"""
    source = text(body, signature="bool c, float[2,3] x) => (float[2,3] y, float[2,3] z")
    check_declines(NegNeg(), source, "inner value 'a' is also used by Relu", count=1)


def test_nodes_with_other_uses_can_be_kept() -> None:
    class Keep(NegNeg):
        name = "test-keep"
        remove_nodes = False

    two = "float[2,3] x) => (float[2,3] y, float[2,3] z"
    check_rewrite(
        Keep(),
        text("r = Relu(x) a = Neg(r) b = Neg(a) y = Abs(b) z = Exp(a)", signature=two),
        text("r = Relu(x) a = Neg(r) y = Abs(r) z = Exp(a)", signature=two),
        edits=1,
    )


def test_a_check_declines_once_per_site_with_its_first_reason() -> None:
    class Never(RewritePass):
        name = "test-never"

        def pattern(self, op: Any, x: Any, y: Any, z: Any) -> Any:
            return op.Add(op.Add(x, y), z)

        def check(self, match: Match) -> None:
            raise Decline(f"not {match['x'].name}")

        def rewrite(self, op: Any, x: Any, y: Any, z: Any) -> Any:
            return op.Sum(x, y, z)

    check_declines(Never(), text("a = Add(x, x) y = Add(a, x)"), "not x", count=1)


def test_a_check_that_accepts_only_the_other_order() -> None:
    class Weighted(RewritePass):
        name = "test-weighted"

        def pattern(self, op: Any, x: Any, w: Any) -> Any:
            return op.Mul(x, w)

        def check(self, match: Match) -> None:
            if not match.is_constant("w"):
                raise Decline("w is not constant")

        def rewrite(self, op: Any, x: Any, w: Any) -> Any:
            return op.Div(x, op.initializer(1 / w.const_value.numpy()))

    consts = "float c = {4.0}"
    check_rewrite(Weighted(), text("y = Mul(c, x)", consts=consts), text("y = Div(x, c)", consts="float c = {0.25}"))
    check_declines(Weighted(), text("y = Mul(x, x)"), "w is not constant", count=1)


def test_declines_are_those_of_the_final_graph() -> None:
    # While the outer pair is there, the inner one can not be removed; when it has gone, nothing is declined.
    two = "float[2,3] x) => (float[2,3] y, float[2,3] z"
    program = of("a = Neg(x) b = Neg(a) y = Exp(b) c = Relu(x) d = Neg(c) e = Neg(d) z = Abs(e)", signature=two)
    result = apply_pass(NegNeg(), program)
    assert result.fired == 2 and result.declined == []


def test_rules_of_one_pass_are_tried_in_order() -> None:
    class Forms(RewritePass):
        name = "test-forms"

        def rules(self) -> list[Rule]:
            return [
                Rule("with-bias", lambda op, x, w, b: op.Add(op.MatMul(x, w), b), lambda op, x, w, b: op.Gemm(x, w, b)),
                Rule("alone", lambda op, x, w: op.MatMul(x, w), lambda op, x, w: op.Gemm(x, w)),
            ]

    signature = "float[2,3] x, float[3,3] w, float[3] b) => (float[2,3] y"
    check_rewrite(
        Forms(),
        text("a = MatMul(x, w) y = Add(b, a)", signature=signature),
        text("y = Gemm(x, w, b)", signature=signature),
        edits=1,
    )
    check_rewrite(Forms(), text("y = MatMul(x, w)", signature=signature), text("y = Gemm(x, w)", signature=signature))


def test_a_rule_that_finds_nothing_declines_nothing() -> None:
    check_untouched(Gelu(), text("a = Mul(x, x) y = Mul(a, x)"))


def test_an_approximate_pass_can_be_made_of_rules() -> None:
    class Rough(RewriteMixin, ApproximatePass):
        name = "test-rough"
        gives_up = "the tail of Exp"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Exp(x)

        def rewrite(self, op: Any, x: Any) -> Any:
            return op.Add(x, 1.0)

    assert Rough().kind == "approximate"
    check_rewrite(Rough(), text("y = Exp(x)"), text("y = Add(x, c)", consts="float c = {1.0}"), edits=1)
