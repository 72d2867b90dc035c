"""skip-layers on written-down stacks: what is left, what is gone, what is declined, and what is an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.errors import InputError
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.layers.skip_layers import SkipLayers
from planish.passes.manager import PassError
from planish.passes.pipeline import format_pipeline, parse_pipeline
from planish.passes.testing import (
    apply_pass,
    canonical_text,
    check_declines,
    check_rewrite,
    program_of,
    run_reference,
)
from tests.layer_stacks import stack, weight

FORMS = ["pre", "post", "parallel"]


def shaped(text: str) -> Program:
    from planish.ir.infer import infer_shapes

    program = program_of(text)
    infer_shapes(program.main)
    return program


def skipped(text: str | Program, **options: Any) -> Program:
    program = shaped(text) if isinstance(text, str) else text
    assert apply_pass(SkipLayers(**options), program).modified
    return program


def input_error(text: str, **options: Any) -> str:
    with pytest.raises(PassError) as caught:
        apply_pass(SkipLayers(**options), shaped(text))
    assert isinstance(caught.value.__cause__, InputError)
    return str(caught.value.__cause__)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", [(1,), (0,), (3,), (1, 2), (0, 1, 3)])
@pytest.mark.parametrize("head", [True, False])
def test_what_is_left_is_the_stack_without_these_layers(form: str, layers: tuple[int, ...], head: bool) -> None:
    program = skipped(stack(4, form, head=head), layers=layers)
    kept = [i for i in range(4) if i not in layers]
    assert canonical_text(program) == canonical_text(shaped(stack(kept, form, head=head)))


def test_before_and_after() -> None:
    head = '<ir_version: 10, opset_import: ["" : 20]> g (float[b, 2] x) => (float[b, 2] y) '
    weights = "<" + ", ".join(f"float[2,2] w{i} = {{{i}.0, 1.0, 2.0, 3.0}}" for i in range(4)) + "> "
    layers = [
        f"m{i} = MatMul({f'h{i - 1}' if i else 'x'}, w{i})  h{i} = Add({f'h{i - 1}' if i else 'x'}, m{i})"
        for i in range(4)
    ]
    before = head + weights + "{ " + "  ".join(layers) + "  y = Neg(h3) }"
    after = head + weights + f"{{ {layers[0]}  m3 = MatMul(h0, w3)  h3 = Add(h0, m3)  y = Neg(h3) }}"
    program = program_of(before)
    result = apply_pass(SkipLayers(speedup=2), program)
    assert result.fired == 2
    assert canonical_text(program) == canonical_text(program_of(after))
    assert result.notes == ["stack 1: 2 of 4 layers removed (1, 2), 2.00x nominal"]


def test_ratio_one_changes_nothing() -> None:
    check_rewrite(SkipLayers(speedup=1), stack(4), stack(4), edits=0)


@pytest.mark.parametrize("part", ["attention", "ffn"])
@pytest.mark.parametrize("form", FORMS)
def test_parts(part: str, form: str) -> None:
    program = shaped(stack(4, form))
    feeds = {"ids": np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)}
    feeds["bias"] = np.ones((2, 1, 1), np.float32)
    result = apply_pass(SkipLayers(layers=[1, 2], part=part), program)
    assert result.fired == 2
    ops = [node.op_type for node in program.main.graph]
    assert ops.count("Softmax") == (2 if part == "attention" else 4)
    assert ops.count("Relu") == (4 if part == "attention" else 2)
    # The same with the weights of the branch set to zero.
    zeroed = shaped(stack(4, form))
    for i in (1, 2):
        for node in zeroed.main.graph:
            branch = f"a{i}" if part == "attention" else f"o{i}"
            if node.outputs[0].name == branch:
                zero = next(v for v in node.inputs if v is not None)
                minus = _append(node, "Sub", [zero, zero], f"zero{i}")
                node.replace_input_with(0, minus)
    expected, got = run_reference(zeroed, feeds)["y"], run_reference(program, feeds)["y"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def _append(before: Any, op: str, inputs: list[Any], name: str) -> Any:
    node = ir.node(op, inputs, name=name)
    node.outputs[0].name, node.outputs[0].type = name, inputs[0].type
    before.graph.insert_before(before, node)
    return node.outputs[0]


def test_caches_go_with_their_layers() -> None:
    program = skipped(stack(4, cache=True), layers=[0, 2])
    assert [spec.name for spec in program.inputs()] == ["ids", "bias", "past1", "past3"]
    assert [spec.name for spec in program.outputs()] == ["y", "present1", "present3"]
    assert canonical_text(program) == canonical_text(shaped(stack([1, 3], cache=True)))
    program = skipped(stack(3, cache=True), layers=[1], part="attention")
    assert [spec.name for spec in program.inputs()] == ["ids", "bias", "past0", "past2"]


def test_a_size_read_off_the_first_cache_is_read_off_another() -> None:
    text = stack(3, cache=True).replace(
        "mask = Exp(mask0)",
        "past = Shape(past0)  one = Cast<to = 1>(past)  "
        "few = ReduceSum<keepdims = 0>(one)  mask1 = Exp(mask0)  mask = Mul(mask1, few)",
    )
    program = skipped(text, layers=[0])
    assert [spec.name for spec in program.inputs()] == ["ids", "bias", "past1", "past2"]
    (shape,) = [node for node in program.main.graph if node.op_type == "Shape"]
    assert shape.inputs[0] is not None and shape.inputs[0].name == "past1"


def test_prefill_and_decode() -> None:
    def program() -> Program:
        both = Program({"prefill": shaped(stack(4, cache=True)).main, "decode": shaped(stack(4, cache=True)).main})
        for name, value in both.entry("prefill").graph.initializers.items():
            both.entry("decode").graph.initializers[name].const_value = value.const_value
        return both

    only = program()
    assert apply_pass(SkipLayers(speedup=2), only).notes == [
        "decode: stack 1: 2 of 4 layers removed (1, 2), 2.00x nominal"
    ]
    assert [s.name for s in only.inputs("decode")] == ["ids", "bias", "past0", "past3"]
    assert [s.name for s in only.outputs("decode")] == ["y", "present0", "present3"]
    # Prefill runs whole, and does not give out what nobody reads.
    assert [s.name for s in only.outputs("prefill")] == ["y", "present0", "present3"]
    assert sum(node.op_type == "Softmax" for node in only.entry("prefill").graph) == 4
    both = program()
    assert apply_pass(SkipLayers(speedup=2, entries=["prefill", "decode"]), both).fired == 4
    assert [s.name for s in both.outputs("prefill")] == ["y", "present0", "present3"]
    with pytest.raises(PassError, match="unknown entry 'decoder'. Did you mean 'decode'"):
        apply_pass(SkipLayers(speedup=2, entries=["decoder"]), program())


# --- what is declined --------------------------------------------------------------------------------------

DECLINED = {
    "tied": (stack(4, "post", tied=True), "share their weights"),
    "shared keys": (stack(4, shared=True), "no repeated layers: between 'h' and 'x3' 4 attentions lie in a row"),
    "a norm of another layer": (
        stack(4).replace("q2 = MatMul(n2, wq2)", "q2 = MatMul(n1, wq2)"),
        "more than a hidden state goes from one to the next (shared keys and values, norms across layers",
    ),
    "states": (stack(4, states=True), "the hidden state after 'layer 1' is the output 'h1' of the model"),
    "probabilities": (
        stack(4).replace(") <float", ", float[b, s, s] p1) <float", 1),
        "'layer 1' makes the output 'p1' of the model",
    ),
    "a reader outside": (
        stack(4).replace(") <float", ", float[b, s, 4] z) <float", 1).replace("last =", "z = Exp(h1)  last ="),
        "the hidden state after 'layer 1' is also read by 'Exp_1', outside of the stack",
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_declines(case: str) -> None:
    text, reason = DECLINED[case]
    check_declines(
        SkipLayers(speedup=2) if "a hidden state goes" in reason or "attentions" in reason else SkipLayers(layers=[1]),
        shaped(text),
        reason,
        count=1,
    )


def test_products_in_a_row_are_declined() -> None:
    weights = ", ".join(f"float[2,2] w{i} = {{{i}.0, 1.0, 2.0, 3.0}}" for i in range(4))
    body = "  ".join(f"m{i} = MatMul({f'r{i - 1}' if i else 'x'}, w{i})  r{i} = Relu(m{i})" for i in range(4))
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[b, 2] x) => (float[b, 2] r3) <{weights}> {{ {body} }}'
    check_declines(SkipLayers(speedup=2), text, "is not of the form hidden state + f(hidden state)", count=1)
    check_declines(SkipLayers(speedup=2, part="ffn"), text, "its layers have no feed-forward networks", count=1)


def test_importance_without_inputs_is_declined() -> None:
    check_declines(SkipLayers(speedup=2, by="importance"), shaped(stack(4)), "there is nothing to run them with")


def test_a_norm_after_the_sum_is_said() -> None:
    assert (
        "a norm or an activation follows the residual sum"
        in apply_pass(SkipLayers(layers=[1]), shaped(stack(4, "post"))).notes[0]
    )


# --- importance --------------------------------------------------------------------------------------------


def context(program: Program, feeds: list[dict[str, Any]]) -> PassContext:
    def run(candidate: Program, entry: str) -> list[dict[str, Any]]:
        return [run_reference(candidate, batch) for batch in feeds]

    return PassContext(program.target, run=run)


@pytest.mark.parametrize("idle", [(0, 3), (2, 3), (3, 4)])
@pytest.mark.parametrize("part", ["layer", "attention", "ffn"])
@pytest.mark.parametrize("form", ["pre", "parallel"])
def test_importance_finds_the_layers_that_do_nothing(part: str, form: str, idle: tuple[int, int]) -> None:
    program = shaped(stack(5, form))
    for i in idle:  # their branches are all but nothing
        for name in (f"wk{i}", f"wb{i}"):
            value = program.main.graph.initializers[name]
            value.const_value = ir.tensor(np.asarray(value.const_value.numpy()) * 1e-4, name=name)  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    feeds = [
        {"ids": rng.normal(size=(2, 3, 4)).astype(np.float32), "bias": np.ones((2, 1, 1), np.float32)} for _ in range(2)
    ]
    result = apply_pass(SkipLayers(speedup=5 / 3, by="importance", part=part), program, context(program, feeds))
    assert result.fired == 2
    assert str(idle) in result.notes[0] and "importance when chosen" in result.notes[0]


def test_padding_does_not_count() -> None:
    from planish.passes.layers.importance import PADDING, tokens

    mask = np.array([[1, 1, 0], [1, 0, 0]])
    assert (tokens({PADDING.format("attention_mask"): mask}, (2, 3)) == (mask == 1)).all()
    assert (tokens({PADDING.format("lengths"): np.array([2, 1])}, (2, 3)) == (mask == 1)).all()
    assert tokens({PADDING.format("attention_mask"): mask}, (2, 4)).all()
    assert tokens({}, (2, 3)).all()


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give speedup=, or layers=.*neither is given"),
        ({"speedup": 2, "layers": [1]}, "both is given"),
        ({"speedup": 0.5}, "speedup is 0.5; it must be at least 1"),
        ({"speedup": float("nan")}, "at least 1"),
        ({"speedup": 2, "rule": "balancd"}, "unknown rule 'balancd'. Did you mean 'balanced'"),
        ({"speedup": 2, "by": "importence"}, "Did you mean 'importance'"),
        ({"speedup": 2, "part": "fnn"}, "Did you mean 'ffn'"),
        ({"layers": [1, 1]}, "names a layer twice"),
        ({"layers": [1], "by": "importance"}, "give one"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SkipLayers(**options)


def test_options_that_do_not_fit_the_model() -> None:
    assert input_error(stack(4), layers=[4]) == "layers names layer 4; 'stack 1' has the layers 0 to 3."
    assert input_error(stack(4), layers=[-1]) == "layers names layer -1; 'stack 1' has the layers 0 to 3."
    assert input_error(stack(4), layers=[0, 1, 2, 3]) == "layers names all 4 layers of 'stack 1'; leave at least one."
    message = "4 layers of 'stack 1' allow between 1 and 2, since the first and the last are always kept."
    assert input_error(stack(4), speedup=2.5) == f"speedup is 2.5; {message}"
    assert "unknown stack 'stak 1'. Did you mean 'stack 1'" in input_error(stack(4), speedup=2, stack="stak 1")


def test_several_stacks_want_a_name() -> None:
    def products(name: str, start: str, width: int) -> tuple[list[str], str]:
        weights = [weight(f"w{name}{i}", width, width) for i in range(3)]
        nodes, h = [], start
        for i in range(3):
            nodes.append(f"m{name}{i} = MatMul({h}, w{name}{i})  {name}{i} = Add({h}, m{name}{i})")
            h = f"{name}{i}"
        return weights, "  ".join(nodes)

    (front, first), (back, second) = products("f", "x", 2), products("b", "p", 3)
    weights = ", ".join([*front, weight("wide", 2, 3), *back])
    head = '<ir_version: 10, opset_import: ["" : 20]> g (float[b, 2] x) => (float[b, 3] y)'
    text = f"{head} <{weights}> {{ {first}  p = MatMul(f2, wide)  {second}  y = Exp(b2) }}"
    message = "the model has several stacks: 'stack 1' (3 layers), 'stack 2' (3 layers); say which with stack=."
    assert input_error(text, layers=[1]) == message
    program = shaped(text)
    assert apply_pass(SkipLayers(layers=[1], stack="stack 2"), program).fired == 1
    assert not any("wb1" in graph.initializers for graph in program.graphs())
    assert apply_pass(SkipLayers(speedup=1.5), shaped(text)).fired == 2


def test_pipeline_string() -> None:
    (p,) = parse_pipeline("skip-layers{layers=[3,7],part='ffn'}")
    assert p == SkipLayers(layers=(3, 7), part="ffn")
    assert parse_pipeline(format_pipeline([p])) == [p]
    assert parse_pipeline("skip-layers{speedup=2}") == [SkipLayers(speedup=2.0)]
    with pytest.raises(InputError, match="unknown rule 'x'"):
        parse_pipeline("skip-layers{speedup=2,rule='x'}")
