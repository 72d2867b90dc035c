"""The pattern language and its matcher: operand orders, constants, alternatives, several outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.errors import PlanishError
from planish.ir.printer import parse_model
from planish.passes.matcher import Matcher
from planish.passes.pattern import AttrVar, Constant, OrValue, Var, any_value, compile_pattern

SQRT2 = math.sqrt(2)


def model(body: str, inputs: str = "float[2,3] x, float[2,3] y", output: str = "z", consts: str = "") -> ir.Model:
    header = f'<ir_version: 10, opset_import: ["" : 20, "my" : 1]> g ({inputs}) => (float[2,3] {output})'
    return parse_model(f"{header} {f'<{consts}>' if consts else ''} {{ {body} }}")


def matches(pattern: Callable[..., Any], graph: ir.Model) -> list[dict[Any, Any]]:
    """All matches whose root produces the first output of the graph."""
    compiled = compile_pattern(pattern, "test")
    matcher = Matcher(compiled, graph.graph.opset_imports)
    root = graph.graph.outputs[0].producer()
    assert root is not None
    found = list(matcher.matches(root))
    if found:
        assert matcher.screen(root), "the quick test rejects a node that matches"
    return found


def names(found: dict[Any, Any]) -> dict[str, Any]:
    return {k: getattr(v, "name", v) for k, v in found.items() if isinstance(k, str)}


def test_variables_bind_inputs() -> None:
    assert names(matches(lambda op, a, b: op.Sub(a, b), model("z = Sub(x, y)"))[0]) == {"a": "x", "b": "y"}


def test_a_variable_used_twice_is_one_value() -> None:
    twice = lambda op, a: op.Sub(a, op.Relu(a))  # noqa: E731
    assert matches(twice, model("r = Relu(x) z = Sub(x, r)"))
    assert not matches(twice, model("r = Relu(y) z = Sub(x, r)"))


@pytest.mark.parametrize("op", ["Add", "Mul", "Max", "Min", "Sum", "Mean"])
def test_commutative_operators_match_in_both_orders(op: str) -> None:
    pattern = lambda p, a, b: getattr(p, op)(p.Relu(a), b)  # noqa: E731
    for body in (f"r = Relu(x) z = {op}(r, y)", f"r = Relu(x) z = {op}(y, r)"):
        assert [names(m) for m in matches(pattern, model(body))] == [{"a": "x", "b": "y"}]


@pytest.mark.parametrize("op", ["Equal", "And", "Or", "Xor"])
def test_commutative_logic(op: str) -> None:
    kind = "bool"
    graph = parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> g ({kind}[2] x, {kind}[2] y) => (bool[2] z) '
        f"{{ n = Not(x) z = {op}(y, n) }}"
    )
    assert matches(lambda p, a, b: getattr(p, op)(p.Not(a), b), graph)


@pytest.mark.parametrize("op", ["Sub", "Div", "Pow", "MatMul"])
def test_other_operators_keep_their_order(op: str) -> None:
    pattern = lambda p, a, b: getattr(p, op)(p.Relu(a), b)  # noqa: E731
    graph = parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[3,3] x, float[3,3] y) => (float[3,3] z) '
        f"{{ r = Relu(x) z = {op}(y, r) }}"
    )
    assert not matches(pattern, graph)


def test_all_orders_of_nested_sums_without_cloning_the_pattern() -> None:
    pattern = lambda op, a, b, c, d: op.Add(op.Add(op.Add(op.Relu(a), b), op.Abs(c)), op.Neg(d))  # noqa: E731
    leaves = "r = Relu(x) s = Abs(x) t = Neg(x) "
    count = 0
    for one in ("p = Add(r, y)", "p = Add(y, r)"):
        for two in ("q = Add(p, s)", "q = Add(s, p)"):
            for three in ("z = Add(q, t)", "z = Add(t, q)"):
                assert len(matches(pattern, model(f"{leaves}{one} {two} {three}"))) == 1
                count += 1
    assert count == 8


def test_a_wrong_early_choice_is_taken_back() -> None:
    # The first Relu fits either operand of the pattern; only one choice lets the Sub match too.
    pattern = lambda op, a, b: op.Sub(op.Add(op.Relu(a), op.Relu(b)), a)  # noqa: E731
    graph = model("p = Relu(x) q = Relu(y) s = Add(p, q) z = Sub(s, y)")
    assert [names(m) for m in matches(pattern, graph)] == [{"a": "y", "b": "x"}]


def test_every_order_is_offered() -> None:
    found = matches(lambda op, a, b: op.Add(a, b), model("z = Add(x, y)"))
    assert [names(m) for m in found] == [{"a": "x", "b": "y"}, {"a": "y", "b": "x"}]


def test_variadic_operators_match_in_any_order() -> None:
    pattern = lambda op, a, b, c: op.Sum(op.Relu(a), op.Abs(b), c)  # noqa: E731
    found = matches(pattern, model("r = Relu(x) s = Abs(x) z = Sum(y, s, r)"))
    assert [names(m) for m in found] == [{"a": "x", "b": "x", "c": "y"}]


@pytest.mark.parametrize(
    ("const", "matched"),
    [
        ("float c = {1.4142135}", True),
        ("float[1] c = {1.4142135}", True),
        ("float c = {1.4142}", True),  # as sloppy exporters write it: 1e-5 away
        ("float c = {1.414}", False),
        ("float[1,1] c = {1.4142135}", False),
        ("float[3] c = {1.4142135, 1.4142135, 1.4142135}", False),
    ],
)
def test_constants_of_a_pattern(const: str, matched: bool) -> None:
    found = matches(lambda op, a: a / SQRT2, model("z = Div(x, c)", consts=const))
    assert bool(found) == matched


@pytest.mark.parametrize(
    ("dtype", "found", "matched"),
    [
        (np.float16, 0.7071, True),
        (np.float16, 0.71, False),
        (np.float32, 0.7071, True),
        (np.float32, 0.7070, False),
        (np.float64, 1 / SQRT2, True),
        (np.float64, np.float64(np.float32(1 / SQRT2)), True),
        (np.float64, 0.7071, False),
    ],
)
def test_tolerance_suits_the_dtype(dtype: Any, found: float, matched: bool) -> None:
    graph = model("z = Mul(x, c)", consts="float c = {1.0}")
    graph.graph.initializers["c"].const_value = ir.tensor(np.asarray(found, dtype))
    assert bool(matches(lambda op, a: a * (1 / SQRT2), graph)) == matched


def test_zero_is_not_a_small_number() -> None:
    pattern = lambda op, a: op.Add(a, 1e-12)  # noqa: E731
    assert matches(pattern, model("z = Add(x, c)", consts="float c = {1e-12}"))
    assert not matches(pattern, model("z = Add(x, c)", consts="float c = {0.0}"))


def test_integers_are_compared_exactly() -> None:
    graph = model("z = Gather(x, i)", consts="int64 i = {1000001}")
    assert not matches(lambda op, a: op.Gather(a, 1000000), graph)
    assert matches(lambda op, a: op.Gather(a, 1000001), graph)


def test_constant_nodes_and_lists() -> None:
    graph = model(
        "s = Constant<value_ints = [3, 2]>() r = Reshape(x, s) z = Reshape(r, t)", consts="int64[2] t = {2,3}"
    )
    assert matches(lambda op, a: op.Reshape(op.Reshape(a, [3, 2]), [2, 3]), graph)
    assert not matches(lambda op, a: op.Reshape(op.Reshape(a, [3, 2]), [2, 4]), graph)
    half = model("c = Constant<value_float = 0.5>() z = Mul(c, x)")
    assert matches(lambda op, a: op.Mul(a, 0.5), half)
    assert matches(lambda op, a: op.Mul(a, op.Constant(0.5)), half)
    assert matches(lambda op, a: op.Mul(a, op.Constant(value_float=0.5)), half)


def test_an_initializer_that_a_caller_can_override_is_no_constant() -> None:
    graph = model("z = Mul(x, c)", consts="float c = {0.5}")
    assert matches(lambda op, a: op.Mul(a, 0.5), graph)
    graph.graph.inputs.append(graph.graph.initializers["c"])
    assert not matches(lambda op, a: op.Mul(a, 0.5), graph)


def test_a_vector_of_one_beside_a_scalar_gives_the_rank() -> None:
    graph = model("z = Mul(x, c)", inputs="float x, float[2,3] y", consts="float[1] c = {0.5}")
    assert not matches(lambda op, a: op.Mul(a, 0.5), graph)


def test_attributes() -> None:
    body = "s = Softmax<axis = 1>(x) z = Relu(s)"
    assert matches(lambda op, a: op.Relu(op.Softmax(a, axis=1)), model(body))
    assert not matches(lambda op, a: op.Relu(op.Softmax(a, axis=0)), model(body))
    found = matches(lambda op, a, k: op.Relu(op.Softmax(a, axis=k)), model(body))
    assert found[0]["k"].value == 1
    assert not matches(lambda op, a: op.Relu(op.Softmax(a, _allow_other_attributes=False)), model(body))


def test_an_absent_attribute_has_its_default() -> None:
    graph = model("z = Softmax(x)")
    assert matches(lambda op, a: op.Softmax(a, axis=-1), graph)
    assert not matches(lambda op, a: op.Softmax(a, axis=1), graph)
    assert matches(lambda op, a, k: op.Softmax(a, axis=k), graph)[0]["k"].value == -1


def test_float_attributes_are_compared_as_float32() -> None:
    graph = model("z = LeakyRelu<alpha = 0.1>(x)")
    assert matches(lambda op, a: op.LeakyRelu(a, alpha=0.1), graph)
    assert not matches(lambda op, a: op.LeakyRelu(a, alpha=0.11), graph)


def test_optional_attribute_and_input() -> None:
    pattern = lambda op, a, low: op.Clip(a, Var("low", optional=True), Var("high", optional=True))  # noqa: E731
    assert matches(pattern, model("z = Clip(x)"))[0]["high"] is None
    found = matches(pattern, model("z = Clip(x, l)", consts="float l = {0.0}"))[0]
    assert found["low"].name == "l" and found["high"] is None
    assert not matches(lambda op, a, low: op.Clip(a, low), model("z = Clip(x)"))
    perm = lambda op, a: op.Transpose(a, perm=AttrVar("perm", optional=True))  # noqa: E731
    assert matches(perm, model("z = Transpose(x)"))[0]["perm"] is None


def test_number_of_inputs() -> None:
    graph = model("z = Clip(x, l, h)", consts="float l = {0.0}, float h = {1.0}")
    assert not matches(lambda op, a: op.Clip(a), graph)
    assert matches(lambda op, a: op.Clip(a, _allow_other_inputs=True), graph)
    assert matches(lambda op, a: op.Clip(a, None), model("z = Clip(x)"))
    assert not matches(lambda op, a, h: op.Clip(a, None, h), graph)


def test_alternatives() -> None:
    def pattern(op: Any, a: Any, b: Any) -> Any:
        return op.Neg(OrValue([op.Add(a, b), op.Relu(a)], tag_var="form", tag_values=["sum", "relu"]))

    assert matches(pattern, model("s = Add(x, y) z = Neg(s)"))[0]["form"] == "sum"
    found = matches(pattern, model("s = Relu(x) z = Neg(s)"))[0]
    assert found["form"] == "relu" and "b" not in found
    assert not matches(pattern, model("s = Abs(x) z = Neg(s)"))


def test_alternatives_that_share_an_operator_backtrack() -> None:
    def pattern(op: Any, a: Any, b: Any) -> Any:
        return op.Sub(OrValue([op.Add(op.Relu(a), b), op.Add(op.Abs(a), b), a], name="left", tag_var="form"), a)

    found = matches(pattern, model("r = Abs(x) s = Add(y, r) z = Sub(s, x)"))
    assert [(m["form"], m["left"].name) for m in found] == [(1, "s")]
    assert matches(pattern, model("z = Sub(x, x)"))[0]["form"] == 2


def test_any_value_and_domain_and_check() -> None:
    assert matches(lambda op, a: op.Add(any_value(), op.Relu(a)), model("r = Relu(x) z = Add(r, y)"))
    assert matches(lambda op, a: op.Thing(a, _domain="my"), model("z = my.Thing(x)"))
    assert not matches(lambda op, a: op.Thing(a), model("z = my.Thing(x)"))
    named = lambda op: op.Relu(Var("a", check=lambda match, value: value.name == "y"))  # noqa: E731
    assert matches(named, model("z = Relu(y)")) and not matches(named, model("z = Relu(x)"))
    few = lambda op, a: op.Relu(a, _check=lambda match, node: len(node.inputs) == 2)  # noqa: E731
    assert not matches(few, model("z = Relu(x)"))


def test_outputs_of_one_node() -> None:
    def pattern(op: Any, a: Any, n: Any) -> Any:
        first, second = op.Split(a, n, _outputs=["first", "second"])
        return op.Sub(second, first)

    consts = "int64[2] n = {1, 1}"
    found = matches(pattern, model("p, q = Split(x, n) z = Sub(q, p)", consts=consts))
    assert names(found[0]) == {"a": "x", "n": "n", "first": "p", "second": "q"}
    assert not matches(pattern, model("p, q = Split(x, n) z = Sub(p, q)", consts=consts))


def test_several_outputs_find_each_other_through_a_shared_value() -> None:
    def pattern(op: Any, a: Any, b: Any) -> Any:
        return op.Sub(a, b), op.Relu(op.Neg(a))

    found = matches(pattern, model("n = Neg(x) other = Relu(n) more = Neg(y) z = Sub(x, y)"))
    assert len(found) == 1
    nodes = {k.op: v.name for k, v in found[0].items() if not isinstance(k, str)}
    assert set(nodes) == {"Sub", "Neg", "Relu"}
    assert not matches(pattern, model("more = Neg(y) other = Relu(more) z = Sub(x, y)"))


def test_two_roots_never_match_one_node() -> None:
    def pattern(op: Any, a: Any, v: Any, w: Any) -> Any:
        return op.Sub(a, v), op.Sub(a, w)

    assert not matches(pattern, model("z = Sub(x, y)"))
    assert len(matches(pattern, model("other = Sub(x, x) z = Sub(x, y)"))) == 1


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (lambda op, a: a, "must"),
        (lambda op, a, b: (op.Relu(a), op.Neg(b)), "shares no value"),
        (lambda op, a: op.Constant(), "one number"),
        (lambda op, a: op.Relu({}), "does not build"),
        (lambda op, a: op.Relu(a, _version=7), "does not build"),
    ],
)
def test_what_is_not_supported_is_said(pattern: Callable[..., Any], problem: str) -> None:
    with pytest.raises(PlanishError, match=r"rule 'mine'.*" + problem):
        compile_pattern(pattern, "mine")


def test_a_pattern_does_not_reach_into_a_subgraph() -> None:
    graph = parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> g (bool c, float[2] x) => (float[2] z) {
          r = Relu(x)
          z = If(c) <then_branch = t () => (float[2] a) { a = Neg(r) },
                     else_branch = e () => (float[2] b) { b = Abs(r) }>
        }"""
    )
    branch = next(iter(graph.graph.subgraphs()))
    neg = branch[0]
    inside = Matcher(compile_pattern(lambda op, v: op.Neg(op.Relu(v)), "t"), {"": 20})
    assert not list(inside.matches(neg))
    assert list(Matcher(compile_pattern(lambda op, v: op.Neg(v), "t"), {"": 20}).matches(neg))


def test_explicit_tolerance() -> None:
    graph = model("z = Mul(x, c)", consts="float c = {0.51}")
    assert matches(lambda op, a: op.Mul(a, Constant(0.5, rel_tol=0.1)), graph)
    assert not matches(lambda op, a: op.Mul(a, 0.5), graph)
