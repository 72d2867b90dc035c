"""The driver at its edges: termination, subgraphs, several outputs, and rules with mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.errors import PlanishError
from planish.ir.program import Program
from planish.ir.verify import verify
from planish.passes.base import Decline, PassContext
from planish.passes.rewrite import Match, RewritePass, Rule
from planish.passes.testing import (
    apply_pass,
    check_declines,
    check_numerics,
    program_of,
    run_reference,
)
from tests.passes.rules import NegNeg, of, text

# --- termination --------------------------------------------------------------------------------------------------


def test_a_rule_that_matches_its_own_output_is_named() -> None:
    class Forever(RewritePass):
        name = "test-forever"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Neg(x)

        def rewrite(self, op: Any, x: Any) -> Any:
            return op.Neg(x)

    with pytest.raises(PlanishError, match=r"'test-forever' fired 103 times.*its output matches its own pattern"):
        Forever().apply(of("y = Neg(x)"), PassContext())


def test_two_rules_that_undo_each_other_are_named() -> None:
    class PingPong(RewritePass):
        name = "test-ping-pong"

        def rules(self) -> list[Rule]:
            return [
                Rule("ping", lambda op, x: op.Relu(x), lambda op, x: op.Abs(x)),
                Rule("pong", lambda op, x: op.Abs(x), lambda op, x: op.Relu(x)),
            ]

    with pytest.raises(PlanishError, match=r"pass 'test-ping-pong': rule 'p.ng' fired.*it and p.ng undo each other"):
        PingPong().apply(of("y = Relu(x)"), PassContext())


def test_a_rule_that_grows_the_graph_without_end_is_stopped() -> None:
    class Grow(RewritePass):
        name = "test-grow"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Relu(x)

        def rewrite(self, op: Any, x: Any) -> Any:
            return op.Relu(op.Relu(x))

    with pytest.raises(PlanishError, match="test-grow"):
        Grow().apply(of("y = Relu(x)"), PassContext())


# --- subgraphs and functions ---------------------------------------------------------------------------------------

IF = """<ir_version: 10, opset_import: ["" : 20]> g (bool c, float[2] x) => (float[2] z) {
  r = Relu(x)
  z = If(c) <then_branch = t () => (float[2] p) { a = Neg(r) p = Neg(a) },
             else_branch = e () => (float[2] q) { b = Relu(x) k = Neg(b) l = Neg(k) q = Exp(l) }>
}"""


def test_subgraphs_are_rewritten() -> None:
    program = check_numerics(NegNeg(), IF, {"c": np.array(True), "x": np.float32([1, -2])})
    inner = {n.op_type for g in program.main.graph.subgraphs() for n in g}
    assert inner == {"Identity", "Relu", "Exp"}
    check_numerics(NegNeg(), IF, {"c": np.array(False), "x": np.float32([1, -2])})


def test_constants_of_a_subgraph_are_in_the_weight_store() -> None:
    class Scale(RewritePass):
        name = "test-scale"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Exp(x)

        def rewrite(self, op: Any, x: Any) -> Any:
            return op.Mul(op.Exp2(x, _domain="my") if False else op.Abs(x), 3.0)

    program = program_of(IF)
    apply_pass(Scale(), program)
    assert len(program.weights) == 1
    run_reference(program, {"c": np.array(False), "x": np.float32([1, -2])})


def test_bodies_of_functions_are_left_alone() -> None:
    source = """<ir_version: 10, opset_import: ["" : 20, "my" : 1]> g (float[2] x) => (float[2] y) { y = my.F(x) }
    <domain: "my", opset_import: ["" : 20]> F (x) => (y) { a = Neg(x) y = Neg(a) }"""
    program = program_of(source)
    assert not apply_pass(NegNeg(), program).modified


# --- several outputs -----------------------------------------------------------------------------------------------


class Both(RewritePass):
    """Replaces a sum and its Relu by one node with two outputs, as SkipLayerNormalization has them."""

    name = "test-both"

    def pattern(self, op: Any, x: Any, y: Any) -> Any:
        total = op.Add(x, y)
        return op.Relu(op.Neg(total)), total

    def rewrite(self, op: Any, x: Any, y: Any) -> Any:
        total = op.Sum(x, y)
        return op.Abs(total), total


def test_several_outputs_with_consumers_in_between() -> None:
    # Exp consumes the sum and stands before Relu; it has to move behind the replacement.
    two = "float[2,3] x, float[2,3] v) => (float[2,3] y, float[2,3] z"
    program = of("s = Add(x, v) e = Exp(s) z = Tanh(e) n = Neg(s) y = Relu(n)", signature=two)
    assert apply_pass(Both(), program).fired == 1
    verify(program, full=True)
    assert sorted(n.op_type for n in program.nodes()) == ["Abs", "Exp", "Sum", "Tanh"]


def test_several_outputs_all_of_the_graph() -> None:
    two = "float[2,3] x, float[2,3] v) => (float[2,3] y, float[2,3] s"
    program = of("s = Add(x, v) n = Neg(s) y = Relu(n)", signature=two)
    assert apply_pass(Both(), program).fired == 1
    assert [v.name for v in program.main.graph.outputs] == ["y", "s"]


def test_a_replacement_that_would_need_its_own_result_declines() -> None:
    class Merge(RewritePass):
        """Two products with one left operand become one; impossible when one needs the other."""

        name = "test-merge"

        def pattern(self, op: Any, x: Any, a: Any, b: Any) -> Any:
            return op.MatMul(x, a), op.MatMul(x, b)

        def rewrite(self, op: Any, x: Any, a: Any, b: Any) -> Any:
            both = op.MatMul(x, op.Concat(a, b, axis=1))
            return op.Split(both, num_outputs=2, axis=1, _outputs=2)

    signature = "float[3,3] x, float[3,3] v) => (float[3,3] y"
    cycle = text("a = MatMul(x, v) r = Relu(a) b = MatMul(x, r) y = Add(a, b)", signature=signature)
    check_declines(Merge(), cycle, "would make a cycle")
    apart = text("a = MatMul(x, v) r = Relu(a) w = Neg(v) b = MatMul(x, w) y = Add(r, b)", signature=signature)
    program = check_numerics(Merge(), apart)
    assert sum(n.op_type == "MatMul" for n in program.nodes()) == 1


def test_three_products_become_one() -> None:
    class Qkv(RewritePass):
        name = "test-qkv"

        def pattern(self, op: Any, x: Any, q: Any, k: Any, v: Any) -> Any:
            return op.MatMul(x, q), op.MatMul(x, k), op.MatMul(x, v)

        def check(self, match: Match) -> None:
            if not all(match.is_constant(n) for n in "qkv"):
                raise Decline("a weight is not constant")

        def rewrite(self, op: Any, x: Any, match: Match) -> Any:
            weights = [match.constant(n) for n in "qkv"]
            sizes = [w.shape[1] for w in weights if w is not None]
            return op.Split(op.MatMul(x, np.concatenate(weights, axis=1)), np.array(sizes), axis=-1, _outputs=3)

    consts = "float[3,2] q = {1,2,3,4,5,6}, float[3,2] k = {6,5,4,3,2,1}, float[3,2] v = {1,0,1,0,1,0}"
    body = "a = MatMul(x, q) t = Transpose(a) b = MatMul(x, k) c = MatMul(x, v) m = MatMul(t, b) y = MatMul(c, m)"
    program = check_numerics(Qkv(), text(body, signature="float[5,3] x) => (float[5,2] y", consts=consts))
    assert sum(n.op_type == "MatMul" for n in program.nodes()) == 3


# --- what the builder refuses ----------------------------------------------------------------------------------------


def built(rewrite: Any, body: str = "y = Relu(x)", **kwargs: Any) -> Program:
    class Built(RewritePass):
        name = "test-built"

        def rules(self) -> list[Rule]:
            return [Rule("built", lambda op, x: op.Relu(x), rewrite)]

    program = of(body, **kwargs)
    Built().apply(program, PassContext())
    return program


@pytest.mark.parametrize(
    ("rewrite", "problem"),
    [
        (lambda op, x: op.LeakyRelu(x, alpa=1.0), "no attribute 'alpa'. Did you mean 'alpha'"),
        (lambda op, x: op.Leaky(x), "no ONNX operator"),
        (lambda op, x: (x, x), "returned 2 values"),
        (lambda op, x: None, "NoneType"),
        (lambda op, x: op.Abs(object()), "class object"),
        (lambda op, q: op.Abs(q), "wants 'q', which its pattern does not bind"),
        (lambda op, x, match: op.Abs(match.output), "which it replaces"),
        (lambda op, x: op.initializer(np.zeros((2, 3), np.int64)), "its replacement is INT64"),
    ],
)
def test_mistakes_of_a_rule_name_it(rewrite: Any, problem: str) -> None:
    with pytest.raises(PlanishError, match=r"rule 'built'") as error:
        built(rewrite)
    assert problem in str(error.value)


def test_numbers_take_the_dtype_that_the_schema_wants() -> None:
    program = built(
        lambda op, x: op.Add(op.Gather(x, [0, 1], axis=0), 2), signature="float16[2,3] x) => (float16[2,3] y"
    )
    kinds = {t.dtype for t in program.weights.values()}
    assert kinds == {ir.DataType.INT64, ir.DataType.FLOAT16}
    program = built(lambda op, x: op.Reshape(x, [2, 3]))
    assert [t.dtype for t in program.weights.values()] == [ir.DataType.INT64]


def test_a_new_domain_is_imported() -> None:
    program = built(lambda op, x: op.SwiGLU(x, x, _domain="planish"))
    assert program.main.graph.opset_imports["planish"] == 1


def test_the_match_knows_its_surroundings() -> None:
    seen: dict[str, Any] = {}

    class Look(RewritePass):
        name = "test-look"

        def pattern(self, op: Any, x: Any, w: Any, k: Any) -> Any:
            return op.Softmax(op.Div(x, w, _outputs=["inner"]), axis=k)

        def check(self, match: Match) -> None:
            seen.update(
                scalar=match.scalar("w"), shape=match.shape("x"), rank=match.rank("inner"), axis=match.attr("k"),
                dtype=match.dtype("x"), target=str(match.target), opset=match.opset, root=match.root.op_type,
                nodes=[n.op_type for n in match.nodes], none=match.constant("x"),
            )  # fmt: skip
            with pytest.raises(PlanishError, match="no variable 'inne'. Did you mean 'inner'"):
                match["inne"]
            raise Decline("seen")

        def rewrite(self, op: Any) -> Any:
            raise AssertionError

    source = text("i = Div(x, w) y = Softmax(i)", signature="float[n,3] x) => (float[n,3] y", consts="float w = {2.0}")
    check_declines(Look(), source, "seen", count=1)
    assert seen == {
        "scalar": 2.0, "shape": ("n", 3), "rank": 2, "axis": -1, "dtype": ir.DataType.FLOAT, "target": "ort-cpu",
        "opset": 20, "root": "Softmax", "nodes": ["Softmax", "Div"], "none": None,
    }  # fmt: skip
