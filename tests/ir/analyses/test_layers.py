"""Repeated layers of written-down stacks: by structure, with what is in a layer and what is not."""

from __future__ import annotations

import time
from itertools import pairwise

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.analyses.layers import LayerAnalysis, find_layers
from planish.ir.infer import infer_shapes
from planish.ir.provenance import SCOPES_KEY
from planish.passes.testing import program_of
from tests.layer_stacks import stack

HEADER = '<ir_version: 10, opset_import: ["" : 20]> g '


def model_of(text: str) -> ir.Model:
    model = program_of(text).main
    infer_shapes(model)
    return model


def found(text: str, **options: str) -> LayerAnalysis:
    return find_layers(model_of(text), **options)  # type: ignore[arg-type]


def names(values: tuple[ir.Value, ...]) -> list[str | None]:
    return [v.name for v in values]


@pytest.mark.parametrize("form", ["pre", "post", "parallel"])
@pytest.mark.parametrize("head", [True, False])
def test_layers_start_and_end_at_the_hidden_state(form: str, head: bool) -> None:
    (only,) = found(stack(4, form, head=head)).stacks
    ends = [layer.hidden_out.name for layer in only.layers]
    assert ends == ["h0", "h1", "h2", "h3" if head else "y"]
    assert [layer.hidden_in.name for layer in only.layers] == ["h", *ends[:-1]]
    assert only.route == "structure" and only.width == 4 and not only.tied and only.uniform
    for layer in only.layers:
        assert names(layer.side_inputs) == ["mask"]
        assert [part.kind for part in layer.parts] == ["attention", "ffn"]
        assert [part.parallel for part in layer.parts] == [form == "parallel"] * 2
        assert layer.form == ("normed" if form == "post" else "residual")
        assert [node.op_type for node in layer.nodes].count("Softmax") == 1
        assert not layer.cache_inputs and not layer.cache_outputs and not layer.other_outputs
    assert {node for layer in only.layers for node in layer.nodes}.isdisjoint(
        [node for node in only.layers[0].hidden_in.graph or () if node.op_type in ("Neg", "Exp")]
    )


def test_parts_say_where_their_branch_is_added() -> None:
    layer = found(stack(2)).stacks[0].layers[1]
    attention, ffn = layer.parts
    assert (attention.stream_in.name, attention.branch.name, attention.stream_out.name) == ("h0", "a1", "x1")
    assert (ffn.stream_in.name, ffn.branch.name, ffn.stream_out.name) == ("x1", "o1", "h1")
    assert [node.op_type for node in ffn.nodes] == ["MatMul", "Relu", "MatMul"]
    assert attention.add.op_type == "Add" and attention.rest is attention.stream_in
    assert attention.parameters == 4 + 2 * 16 and ffn.parameters == 2 * 16
    assert layer.parameters == attention.parameters + ffn.parameters


def test_caches_belong_to_their_layer() -> None:
    for i, layer in enumerate(found(stack(3, cache=True)).stacks[0].layers):
        assert names(layer.cache_inputs) == [f"past{i}"]
        assert names(layer.cache_outputs) == [f"present{i}"]
        assert names(layer.side_inputs) == ["mask"]


def test_probabilities_are_no_cache() -> None:
    text = stack(3).replace(") <float", ", float[b, s, s] p1) <float", 1)
    layers = found(text).stacks[0].layers
    assert [names(layer.other_outputs) for layer in layers] == [[], ["p1"], []]
    assert not any(layer.cache_outputs for layer in layers)


def test_tied_layers_are_said_to_be() -> None:
    (only,) = found(stack(4, "post", tied=True)).stacks
    assert only.tied and len(only) == 4
    assert only.parameters == only.layers[0].parameters


def test_hidden_states_as_outputs_do_not_hide_layers() -> None:
    assert len(found(stack(3, states=True)).stacks[0]) == 3


#: What makes layers of a stack inseparable → its text.
ENTANGLED = {
    "shared keys": stack(4, shared=True),
    "a norm of another layer": stack(4).replace("q2 = MatMul(n2, wq2)", "q2 = MatMul(n1, wq2)"),
    "a norm over two states": stack(4).replace(
        "n2 = LayerNormalization<axis = -1>(h1,", "two = Add(h0, h1)  n2 = LayerNormalization<axis = -1>(two,"
    ),
    "a norm over all states": stack(4).replace(
        "last = LayerNormalization<axis = -1>(h3,",
        "all = Sum(h0, h1, h2, h3)  last = LayerNormalization<axis = -1>(all,",
    ),
}


@pytest.mark.parametrize("case", ENTANGLED)
def test_what_goes_across_layers_leaves_none(case: str) -> None:
    analysis = found(ENTANGLED[case])
    (reason,) = analysis.declined
    assert analysis.stacks == () and reason.startswith("between 'h")
    assert "attentions lie in a row, and more than a hidden state goes from one to the next" in reason


@pytest.mark.parametrize("case", ENTANGLED)
def test_what_goes_across_layers_is_named_where_scopes_are(case: str) -> None:
    model = model_of(ENTANGLED[case])
    for node in model.graph:
        number = "".join(c for c in node.outputs[0].name or "" if c.isdigit())
        node.metadata_props[SCOPES_KEY] = repr(["", f"blocks.{number}" if number else "", node.op_type])
    (reason,) = find_layers(model).declined
    assert reason.startswith("'blocks': more than a hidden state goes from layer to layer")


def test_scopes_agree_with_structure_and_give_names() -> None:
    model = model_of(stack(4, "post"))
    for node in model.graph:
        number = "".join(c for c in node.outputs[0].name or "" if c.isdigit())
        if number and node.op_type != "Neg":
            node.metadata_props[SCOPES_KEY] = repr(["", f"net.blocks.{number}.inner", node.op_type])
    (one,), (other,) = (find_layers(model, route=route).stacks for route in ("scopes", "structure"))  # type: ignore[arg-type]
    assert one.name == "net.blocks" and [layer.name for layer in one.layers][3] == "net.blocks.3"
    assert one.route == "scopes" and other.route == "structure"
    for a, b in zip(one.layers, other.layers, strict=True):
        assert (a.hidden_in, a.hidden_out, a.nodes) == (b.hidden_in, b.hidden_out, b.nodes)


def test_a_layer_that_differs_ends_the_stack() -> None:
    """Layer 2 has another width of its feed-forward network."""
    text = stack(5)
    for name, shape in (("wa2", "4,8"), ("wb2", "8,4")):
        at = text.index(f"float[4,4] {name} ")
        end = text.index("}", at)
        numbers = text[text.index("{", at) + 1 : end]
        text = f"{text[:at]}float[{shape}] {name} = {{{numbers}, {numbers}{text[end:]}"
    assert [[layer.hidden_out.name for layer in s.layers] for s in found(text).stacks] == [["h0", "h1"], ["h3", "h4"]]


@pytest.mark.parametrize("form", ["pre", "post", "parallel"])
def test_a_file_without_shapes_and_types(form: str) -> None:
    model = program_of(stack(4, form)).main
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None
    for value in model.graph.initializers.values():
        value.type = value.shape = None
    (only,) = find_layers(model).stacks
    assert len(only) == 4 and only.width is None
    assert [part.kind for part in only.layers[2].parts] == ["attention", "ffn"]


def test_layers_that_begin_with_a_cast_start_before_it() -> None:
    weights = ", ".join(f"float[2,2] w{i} = {{{i}.0, 1.0, 2.0, 3.0}}" for i in range(3))
    lines = []
    for i, h in enumerate(("x", "h0", "h1")):
        lines.append(f"c{i} = Cast<to = 1>({h})  m{i} = MatMul(c{i}, w{i})  h{i} = Add(c{i}, m{i})")
    body = "  ".join([*lines, "c3 = Cast<to = 1>(h2)", "y = Exp(c3)"])
    text = HEADER + f"(float[b, 2] x) => (float[b, 2] y) <{weights}> {{ {body} }}"
    (only,) = found(text).stacks
    assert [layer.hidden_in.name for layer in only.layers] == ["x", "h0", "h1"]
    assert [layer.hidden_out.name for layer in only.layers] == ["h0", "h1", "h2"]


def test_nothing_repeats() -> None:
    text = HEADER + "(float[2, 3] x) => (float[2, 3] y) { a = Exp(x)  b = Tanh(a)  y = Neg(b) }"
    assert found(text).declined == ("no segments between values that all data passes through repeat",)
    assert found(HEADER + "(float[2] x) => (float[2] x) { }").stacks == ()


def test_products_without_a_residual_stream_are_plain_layers() -> None:
    weights = ", ".join(f"float[2,2] w{i} = {{{i}.0, 1.0, 2.0, 3.0}}" for i in range(4))
    body = "  ".join(f"m{i} = MatMul({f'r{i - 1}' if i else 'x'}, w{i})  r{i} = Relu(m{i})" for i in range(4))
    (only,) = found(HEADER + f"(float[b, 2] x) => (float[b, 2] r3) <{weights}> {{ {body} }}").stacks
    assert [layer.hidden_out.name for layer in only.layers] == ["r0", "r1", "r2", "r3"]
    assert {layer.form for layer in only.layers} == {"plain"}


@given(st.integers(2, 6), st.sampled_from(["pre", "post", "parallel"]), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_stack_is_found_whole(count: int, form: str, cache: bool, head: bool, states: bool) -> None:
    model = model_of(stack(count, form, cache=cache, head=head, states=states))
    (only,) = find_layers(model).stacks
    assert len(only) == count
    for a, b in pairwise(only.layers):
        assert a.hidden_out is b.hidden_in
        assert not set(a.nodes) & set(b.nodes)
    assert len({len(layer.nodes) for layer in only.layers}) == 1
    assert len(only) * len(only.layers[0].nodes) + 3 + 2 * head == len(model.graph)


def test_time_grows_with_the_number_of_layers() -> None:
    def seconds(count: int) -> float:
        model = model_of(stack(count))
        started = time.process_time()
        assert len(find_layers(model).stacks[0]) == count
        return time.process_time() - started

    seconds(4)
    small, large = min(seconds(24) for _ in range(3)), seconds(96)
    assert large < 16 * small + 0.5
