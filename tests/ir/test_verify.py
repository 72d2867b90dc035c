"""The verifier: each rule broken on purpose is named with its node and value; valid programs of every kind pass."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from planish.ir.errors import VerifyError
from planish.ir.names import ensure_names
from planish.ir.ops import import_functions
from planish.ir.printer import parse_model
from planish.ir.program import Program
from planish.ir.verify import verify, verify_model

TEXT = """
<ir_version: 10, opset_import: ["" : 23, "planish" : 1, "com.microsoft" : 1]>
g (float[B, 4] x) => (float[B, 4] y) <float[4] w = {1, 2, 3, 4}, float[4] v = {1, 1, 1, 1}>
{
  [scale] a = Mul (x, w)
  [gate] b = planish.SwiGLU (a, x)
  [skip] c = com.microsoft.BiasGelu (b, v)
  [last] y = Softmax <axis = -1> (c)
}
"""

BRANCH = """
<ir_version: 10, opset_import: ["" : 23]>
g (bool flag, float[4] x) => (float[4] y)
{
  [outside] a = Relu (x)
  [choose] y = If (flag) <
    then_branch = yes () => (float[4] p) { [in_yes] p = Neg (a) },
    else_branch = no () => (float[4] q) { [in_no] q = Abs (x) }
  >
}
"""


def node_of(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph.all_nodes() if n.name == name)


def test_valid_programs_pass() -> None:
    for text in (TEXT, BRANCH):
        model = parse_model(text)
        verify_model(model, full=False)
        verify_model(model, full=True)


def test_dialect_nodes_pass_with_their_functions() -> None:
    model = parse_model(TEXT)
    assert import_functions(model) == ["SwiGLU"]
    verify_model(model, full=True)


def unlist_initializer(model: ir.Model) -> None:
    model.graph.initializers.pop("w")


def reorder(model: ir.Model) -> None:
    node = node_of(model, "scale")
    model.graph.remove(node)
    model.graph.append(node)


def remove_producer(model: ir.Model) -> None:
    model.graph.remove(node_of(model, "scale"))


def foreign_value(model: ir.Model) -> None:
    node_of(model, "last").replace_input_with(0, ir.Value(name="nowhere"))


def rename_node(model: ir.Model) -> None:
    node_of(model, "gate").name = "scale"


def unname_node(model: ir.Model) -> None:
    node_of(model, "gate").name = ""


def rename_value(model: ir.Model) -> None:
    node_of(model, "gate").outputs[0].name = "a"


def unname_value(model: ir.Model) -> None:
    node_of(model, "gate").outputs[0].name = None


def drop_import(model: ir.Model) -> None:
    del model.graph.opset_imports["com.microsoft"]


def old_opset(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 23
    node_of(model, "last").op_type = "Swish"


def unknown_op(model: ir.Model) -> None:
    node_of(model, "last").op_type = "Sofmax"


def unknown_dialect_op(model: ir.Model) -> None:
    node_of(model, "gate").op_type = "SwiGLUU"


def unknown_attribute(model: ir.Model) -> None:
    node_of(model, "last").attributes["axes"] = ir.AttrInt64("axes", 1)


def wrong_attribute_type(model: ir.Model) -> None:
    node_of(model, "last").attributes["axis"] = ir.AttrFloat32("axis", 1.0)


def dialect_attribute(model: ir.Model) -> None:
    node_of(model, "gate").attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)


def reference_outside_function(model: ir.Model) -> None:
    node_of(model, "last").attributes["axis"] = ir.RefAttr("axis", "k", ir.AttributeType.INT)


def missing_input(model: ir.Model) -> None:
    node_of(model, "scale").replace_input_with(1, None)


def too_many_inputs(model: ir.Model) -> None:
    node = node_of(model, "last")
    node.resize_inputs(2)
    node.replace_input_with(1, model.graph.inputs[0])


def wrong_weight_type(model: ir.Model) -> None:
    model.graph.initializers["w"].dtype = ir.DataType.FLOAT16


def wrong_weight_shape(model: ir.Model) -> None:
    model.graph.initializers["w"].shape = ir.Shape([5])


def untyped_output(model: ir.Model) -> None:
    model.graph.outputs[0].type = None


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (unlist_initializer, "node 'scale' (Mul): value 'w' holds a constant that no graph lists as an initializer"),
        (reorder, "node 'gate' (planish::SwiGLU): value 'a' is used before node 'scale' makes it"),
        (remove_producer, "node 'gate' (planish::SwiGLU): value 'a' is made by node 'scale', which is in no graph"),
        (foreign_value, "node 'last' (Softmax): value 'nowhere' is produced nowhere"),
        (rename_node, "node 'scale' (planish::SwiGLU): another node of the same graph has this name"),
        (unname_node, "a SwiGLU node has no name (outputs ['b'])"),
        (rename_value, "node 'gate' (planish::SwiGLU): value 'a' has the name of another value"),
        (unname_value, "node 'gate' (planish::SwiGLU): a value that is used has no name"),
        (drop_import, "node 'skip' (com.microsoft::BiasGelu): no opset import for its domain 'com.microsoft'"),
        (old_opset, "node 'last' (Swish): the operator exists only in later opsets (opset 23"),
        (unknown_op, "node 'last' (Sofmax): the operator is neither an ONNX operator nor a function of the model"),
        (unknown_dialect_op, "node 'gate' (planish::SwiGLUU): the dialect has no such operator"),
        (unknown_attribute, "node 'last' (Softmax): attribute 'axes' is unknown; known: axis"),
        (wrong_attribute_type, "node 'last' (Softmax): attribute 'axis' is FLOAT; it must be INT"),
        (dialect_attribute, "node 'gate' (planish::SwiGLU): attribute 'alpha' is unknown; known: none"),
        (reference_outside_function, "attribute 'axis' refers to 'k', which no function around it has"),
        (missing_input, "node 'scale' (Mul): input 1 is left out but required"),
        (too_many_inputs, "node 'last' (Softmax): 2 inputs; allowed 1"),
        (wrong_weight_type, "initializer 'w' is declared FLOAT16 and holds FLOAT"),
        (wrong_weight_shape, "initializer 'w' is declared"),
        (untyped_output, "'y' is an input or output of the graph and has no type"),
    ],
)
def test_each_rule_is_named(corrupt: Callable[[ir.Model], None], message: str) -> None:
    model = parse_model(TEXT)
    corrupt(model)
    with pytest.raises(VerifyError) as caught:
        verify_model(model, full=False)
    assert message in str(caught.value)
    assert str(caught.value).startswith("entry 'main': ")
    assert "\n" not in str(caught.value)


def test_full_part_sees_wrong_types_and_shapes() -> None:
    text = TEXT.replace("com.microsoft.BiasGelu", "Add")
    model = parse_model(text)
    node_of(model, "skip").outputs[0].shape = ir.Shape([7, 7])
    verify_model(model, full=False)
    with pytest.raises(VerifyError, match="skip"):
        verify_model(model, full=True)

    model = parse_model(text)
    node_of(model, "last").op_type = "Not"
    del node_of(model, "last").attributes["axis"]
    verify_model(model, full=False)
    with pytest.raises(VerifyError, match="last"):
        verify_model(model, full=True)


def test_full_part_sees_dialect_operands_that_do_not_fit() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
    g (float[2, 4] a, float[1, 4] b) => (float[2, 4] y) { [glu] y = planish.SwiGLU (a, b) }
    """
    with pytest.raises(VerifyError, match="axis 0: gate has size 2 and up has size 1; SwiGLU does not broadcast"):
        verify_model(parse_model(text), full=True)
    with pytest.raises(VerifyError, match="input 'up' is double and others are float"):
        verify_model(parse_model(text.replace("float[1, 4] b", "double[2, 4] b")), full=True)
    with pytest.raises(VerifyError, match="output 'y' is declared"):
        verify_model(parse_model(text.replace("[1, 4] b", "[2, 4] b").replace("[2, 4] y", "[2, 5] y")), full=True)


def test_subgraphs_see_what_comes_before_them_only() -> None:
    model = parse_model(BRANCH)
    outside = node_of(model, "outside")
    model.graph.remove(outside)
    model.graph.append(outside)
    with pytest.raises(
        VerifyError, match="node 'in_yes' \\(Neg\\): value 'a' is made by node 'outside' of another graph"
    ):
        verify_model(model, full=False)

    model = parse_model(BRANCH)
    p = node_of(model, "in_yes").outputs[0]
    node_of(model, "in_no").replace_input_with(0, p)
    with pytest.raises(
        VerifyError, match="node 'in_no' \\(Abs\\): value 'p' is made by node 'in_yes' of another graph"
    ):
        verify_model(model, full=False)

    model = parse_model(BRANCH)
    node_of(model, "in_yes").outputs[0].name = "a"
    with pytest.raises(VerifyError, match="value 'a' has the name of another value that is visible here"):
        verify_model(model, full=False)


def test_function_bodies_are_checked() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 23, "my" : 1]>
    g (float[4] x) => (float[4] y) { [call] y = my.Twice <k = 2> (x) }
    <domain: "my", opset_import: ["" : 23]>
    Twice <k> (v) => (r) { [cast] c = Constant <value_int: int = @k> () [f] d = Cast <to = 1> (c) [m] r = Mul (v, d) }
    """
    verify_model(parse_model(text), full=True)
    with pytest.raises(VerifyError, match="attribute 'j' is unknown; known: k"):
        verify_model(parse_model(text.replace("<k = 2>", "<j = 2>")), full=False)
    with pytest.raises(VerifyError, match="attribute 'value_int' refers to 'j'"):
        verify_model(parse_model(text.replace("@k", "@j")), full=False)
    with pytest.raises(VerifyError, match="2 inputs; allowed 0 to 1"):
        verify_model(parse_model(text.replace("(x) }", "(x, x) }")), full=False)


def test_dialect_function_must_have_the_signature_of_its_operator() -> None:
    model = parse_model(TEXT)
    import_functions(model)
    function = model.functions["planish", "SwiGLU", ""]
    function.attributes["alpha"] = ir.Attr("alpha", ir.AttributeType.UNDEFINED, None)
    with pytest.raises(VerifyError, match=r"the body has the attributes \['alpha'\]; the operator has \[\]"):
        verify_model(model, full=False)


def test_entries_share_one_weight_store() -> None:
    one, two = parse_model(TEXT), parse_model(TEXT)
    with pytest.raises(VerifyError, match="initializer 'w' is not the tensor that another entry stores"):
        verify(Program({"prefill": one, "decode": two}), full=False)
    verify(Program({"prefill": one, "decode": one.clone()}), full=True)
    with pytest.raises(VerifyError, match="no entry"):
        verify(Program({}), full=False)


def test_outputs_of_unknown_rank_are_valid() -> None:
    model = parse_model(TEXT)
    model.graph.outputs[0].shape = None
    verify_model(model, full=True)


def test_unused_weights_are_valid() -> None:
    model = parse_model(TEXT)
    tensor = ir.tensor(np.zeros(3, np.float32), name="unused")
    model.graph.register_initializer(ir.Value(name="unused", const_value=tensor))
    verify_model(model, full=True)


def test_names_are_given_and_made_unique() -> None:
    node = onnx.helper.make_node
    info = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph([node("Neg", ["x"], ["t"], name="n")], "b", [], [info("t", 1, [4])])
    other = onnx.helper.make_graph([node("Abs", ["x"], ["t"], name="n")], "b", [], [info("t", 1, [4])])
    graph = onnx.helper.make_graph(
        [
            node("Relu", ["x"], ["t"]),
            node("Relu", ["t"], ["u"]),
            node("If", ["c"], ["y"], name="n", then_branch=body, else_branch=other),
            node("Add", ["y", "u"], ["z"], name="n"),
        ],
        "g",
        [info("c", 9, []), info("x", 1, [4])],
        [info("z", 1, [4])],
    )
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]))
    with pytest.raises(VerifyError):
        verify_model(model, full=False)
    assert ensure_names(model) > 0
    verify_model(model, full=True)
    assert [v.name for v in (*model.graph.inputs, *model.graph.outputs)] == ["c", "x", "z"]
    assert ensure_names(model) == 0


def test_cheap_part_is_fast() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", 4]))
    last, nodes = x, []
    for index in range(10_000):
        node = ir.node("Add" if index % 2 else "Mul", [last, x], name=f"n{index}", outputs=[ir.Value(name=f"v{index}")])
        last = node.outputs[0]
        nodes.append(node)
    last.type = x.type
    model = ir.Model(ir.Graph([x], [last], nodes=nodes, opset_imports={"": 23}, name="g"), ir_version=10)
    verify_model(model, full=False)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        verify_model(model, full=False)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.15
