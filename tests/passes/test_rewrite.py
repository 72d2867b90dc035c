"""The driver: what rules do to graphs, where they decline, and what stays as it was."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.errors import PlanishError
from planish.ir.program import Program
from planish.ir.verify import verify
from planish.passes.base import ApproximatePass, Decline, PassContext
from planish.passes.rewrite import Match, RewriteMixin, RewritePass, Rule
from planish.passes.testing import (
    apply_pass,
    check_declines,
    check_numerics,
    check_rewrite,
    check_untouched,
    program_of,
    run_reference,
)

SQRT2 = math.sqrt(2)


class Gelu(RewritePass):
    name = "test-gelu"
    min_opset = 20

    def pattern(self, op: Any, x: Any) -> Any:
        return 0.5 * (x * (op.Erf(x / SQRT2) + 1.0))

    def rewrite(self, op: Any, x: Any) -> Any:
        return op.Gelu(x)


class NegNeg(RewritePass):
    name = "test-neg-neg"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Neg(op.Neg(x))

    def rewrite(self, op: Any, x: Any) -> Any:
        return x


class NoIdentity(RewritePass):
    name = "test-no-identity"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Identity(x)

    def rewrite(self, op: Any, x: Any) -> Any:
        return x


def text(body: str, signature: str = "float[2,3] x) => (float[2,3] y", opset: int = 20, consts: str = "") -> str:
    declared = f"<{consts}>" if consts else ""
    return f'<ir_version: 10, opset_import: ["" : {opset}, "my" : 1]> g ({signature}) {declared} {{ {body} }}'


GELU = "a = Div(x, s) b = Erf(a) c = Add(one, b) d = Mul(c, x) y = Mul(d, half)"
GELU_CONSTS = "float s = {1.4142135}, float one = {1.0}, float[1] half = {0.5}"


def of(body: str, **kwargs: Any) -> Program:
    return program_of(text(body, **kwargs))


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
    check_declines(Gelu(), text(GELU, opset=18, consts=GELU_CONSTS), "needs opset 20 or newer", count=1)


def test_an_operator_that_the_opset_lacks_is_never_emitted() -> None:
    class Careless(Gelu):
        name = "test-careless"
        min_opset = 1

    reason = "Gelu needs opset 20 or newer, and the model imports opset 18"
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
