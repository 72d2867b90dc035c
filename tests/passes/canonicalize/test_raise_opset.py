"""raise-opset: what each old operator becomes, what stops it and with which reason, functions and subgraphs."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

import planish
from planish.frontends.onnx import load_onnx
from planish.ir.errors import InputError
from planish.ir.hashing import structural_hash
from planish.ir.program import Program
from planish.ir.provenance import FROM_KEY, PASS_KEY
from planish.ir.serialize import inline, to_proto_without_weights
from planish.passes import gates
from planish.passes.base import PassResult
from planish.passes.canonicalize import opset_adapters
from planish.passes.canonicalize.opset_adapters import Site
from planish.passes.canonicalize.raise_opset import RaiseOpset
from planish.passes.defaults import default_pipeline
from planish.passes.pipeline import parse_pipeline
from planish.passes.testing import (
    apply_pass,
    check_declines,
    check_numerics,
    check_rewrite,
    check_untouched,
    program_of,
)

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 8)).astype(np.float32)
IMAGE = RNG.standard_normal((1, 2, 6, 6)).astype(np.float32)
STATS = [np.ones(2, np.float32), np.zeros(2, np.float32), np.zeros(2, np.float32), np.ones(2, np.float32)]
RAISED: dict[str, tuple[str, int, list[np.ndarray], list[np.ndarray], int, dict[str, object]]] = {
    "ReduceMean axes": ("ReduceMean", 11, [X], [], 1, {"axes": [-1], "keepdims": 0}),
    "ReduceMean all": ("ReduceMean", 13, [X], [], 1, {}),
    "ReduceSum axes": ("ReduceSum", 11, [X], [], 1, {"axes": [0]}),
    "ReduceL2": ("ReduceL2", 13, [X], [], 1, {"axes": [1]}),
    "ReduceMax": ("ReduceMax", 12, [X], [], 1, {"axes": [0, 1]}),
    "Squeeze": ("Squeeze", 11, [X[:1]], [], 1, {"axes": [0]}),
    "Squeeze all": ("Squeeze", 9, [X[:1]], [], 1, {}),
    "Unsqueeze": ("Unsqueeze", 11, [X], [], 1, {"axes": [0, -1]}),
    "Softmax last": ("Softmax", 11, [X], [], 1, {"axis": 1}),
    "Softmax default": ("Softmax", 9, [X], [], 1, {}),
    "LogSoftmax -1": ("LogSoftmax", 11, [X], [], 1, {"axis": -1}),
    "Clip": ("Clip", 6, [X], [], 1, {"min": -0.5, "max": 0.25}),
    "Clip max": ("Clip", 10, [X], [], 1, {"max": 0.25}),
    "Pad": ("Pad", 10, [X], [], 1, {"pads": [0, 1, 2, 0], "value": 3.0}),
    "Pad edge": ("Pad", 2, [X], [], 1, {"pads": [0, 1, 2, 0], "mode": "edge"}),
    "Slice": ("Slice", 9, [X], [], 1, {"starts": [1, -3], "ends": [100, -1], "axes": [0, 1]}),
    "Slice no axes": ("Slice", 1, [X], [], 1, {"starts": [1], "ends": [2]}),
    "TopK": ("TopK", 9, [X], [], 2, {"k": 3, "axis": -1}),
    "Split": ("Split", 11, [X], [], 2, {"axis": 1, "split": [3, 5]}),
    "Split even": ("Split", 11, [X], [], 4, {"axis": 1}),
    "Split 13 even": ("Split", 13, [X], [], 4, {"axis": 1}),
    "Split 13": ("Split", 13, [X], [np.array([2, 6])], 2, {"axis": 1}),
    "Dropout": ("Dropout", 10, [X], [], 1, {"ratio": 0.9}),
    "BatchNormalization": ("BatchNormalization", 9, [IMAGE], STATS, 1, {}),
    "BatchNormalization 7": ("BatchNormalization", 7, [IMAGE], STATS, 1, {"spatial": 1}),
    "QuantizeLinear": ("QuantizeLinear", 10, [X], [np.float32(0.1), np.uint8(128)], 1, {}),
    "MaxPool": ("MaxPool", 8, [IMAGE], [], 1, {"kernel_shape": [2, 2]}),
    "Reshape": ("Reshape", 5, [X], [np.array([0, 2, -1])], 1, {}),
    "Cast": ("Cast", 9, [X], [], 1, {"to": 7}),
    "Resize 13": ("Resize", 13, [IMAGE], [np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)], 1, {}),
}


def one_node(
    op: str,
    opset: int,
    inputs: list[np.ndarray],
    constants: list[np.ndarray] | None = None,
    outputs: int = 1,
    **attrs: object,
) -> onnx.ModelProto:
    """A model of one node; `inputs` give dtypes and shapes of x0, x1, …, `constants` follow as initializers."""
    names = [f"x{i}" for i in range(len(inputs))]
    kinds = [helper.np_dtype_to_tensor_dtype(a.dtype) for a in inputs]
    infos = [helper.make_tensor_value_info(n, k, a.shape) for n, k, a in zip(names, kinds, inputs, strict=True)]
    tensors = [onnx.numpy_helper.from_array(a, f"c{i}") for i, a in enumerate(constants or [])]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names + [t.name for t in tensors], results, name="n", **attrs)
    graph = helper.make_graph([node], "g", infos, [helper.make_empty_tensor_value_info(r) for r in results], tensors)
    inferred = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    )
    return inferred


def run(proto: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feed)


def raised(proto: onnx.ModelProto) -> tuple[Program, PassResult]:
    """The program after the pass; what it computes is asserted to be what the file computes."""
    program = load_onnx(proto)
    assert program.provenance["opset"] == str(proto.opset_import[0].version)
    result = apply_pass("raise-opset", program)
    whole, weights = to_proto_without_weights(program.main)
    inline(whole, weights)
    feed = {i.name: make(i) for i in proto.graph.input}
    for got, expected in zip(run(whole, feed), run(proto, feed), strict=True):
        np.testing.assert_array_equal(got, expected)
    return program, result


def make(info: onnx.ValueInfoProto) -> np.ndarray:
    dims = [d.dim_value or 3 for d in info.type.tensor_type.shape.dim] or [3, 8]
    return np.random.default_rng(1).standard_normal(dims).astype(np.float32)


@pytest.mark.parametrize("name", RAISED)
def test_raised_operators_give_the_same(name: str) -> None:
    op, opset, inputs, constants, outputs, attributes = RAISED[name]
    program, result = raised(one_node(op, opset, inputs, [np.asarray(c) for c in constants], outputs, **attributes))
    assert program.main.opset_imports[""] == 23 and result.modified and result.fired == 1 and not result.declined


KEPT: dict[str, tuple[str, int, list[np.ndarray], list[np.ndarray], int, dict[str, object], int, str]] = {
    "Softmax middle": ("Softmax", 11, [IMAGE], [], 1, {"axis": 1}, 11, "not known to be the last"),
    "Upsample": ("Upsample", 9, [IMAGE], [np.array([1, 1, 2, 2], np.float32)], 1, {}, 9, "changes at opset 10"),
    "RandomNormalLike": ("RandomNormalLike", 13, [X], [], 1, {"seed": 1.0}, 21, "changes at opset 22"),
    "Dropout mask": ("Dropout", 10, [X], [], 2, {"ratio": 0.9}, 10, "with a mask"),
    "AveragePool ceil": (
        "AveragePool",
        11,
        [IMAGE],
        [],
        1,
        {"kernel_shape": [4, 4], "ceil_mode": 1},
        18,
        "another kernel",
    ),
    "Resize 10": ("Resize", 10, [IMAGE], [np.array([1, 1, 2, 2], np.float32)], 1, {}, 10, "changes at opset"),
}


@pytest.mark.parametrize("name", KEPT)
def test_operators_that_would_change_stop_the_raise(name: str) -> None:
    op, opset, inputs, constants, outputs, attributes, reached, why = KEPT[name]
    program, result = raised(one_node(op, opset, inputs, constants, outputs, **attributes))
    assert program.main.opset_imports[""] == reached
    assert result.modified == (reached > opset)
    [declined] = result.declined
    assert declined.rule == "raise-opset" and declined.node == "n"
    assert why in declined.reason and declined.reason.startswith(op) and str(reached) in declined.reason


def test_ranks_are_inferred_where_the_file_gives_none() -> None:
    proto = one_node("Softmax", 11, [X], axis=1)
    first = helper.make_node("Relu", ["x0"], ["r"], name="first")
    proto.graph.node[0].input[0] = "r"
    proto.graph.node.insert(0, first)
    del proto.graph.value_info[:]
    assert raised(proto)[0].main.opset_imports[""] == 23
    proto.graph.input[0].type.tensor_type.shape.dim.add(dim_value=1)
    proto.graph.output[0].type.tensor_type.shape.dim.add(dim_value=1)
    program = load_onnx(proto)
    assert [d.node for d in apply_pass("raise-opset", program).declined] == ["n"]
    assert program.main.opset_imports[""] == 11


COMPUTED = """<ir_version: 8, opset_import: ["" : 11]>
g (float[a, b, c] x, float[m] other) => (y) <int64 i0 = {0}, int64[1] two = {2}, int64[1] rest = {-1}> {
    shape = Shape (other)
    size = Gather (shape, i0)
    first = Unsqueeze <axes = [0]> (size)
    target = Concat <axis = 0> (two, first, first, rest)
    wide = Reshape (x, target)
    turned = Transpose <perm = [0, 2, 1, 3]> (wide)
    y = Softmax <axis = 3> (turned)
}"""


def test_the_rank_of_a_computed_reshape_is_the_number_of_its_sizes() -> None:
    proto = onnx.parser.parse_model(COMPUTED.replace("=> (y)", "=> (float[p, q, r, s] y)"))
    program = load_onnx(proto)
    for node in program.nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    result = apply_pass("raise-opset", program)
    assert program.main.opset_imports[""] == 23 and result.fired == 2 and not result.declined
    three = load_onnx(onnx.parser.parse_model(COMPUTED.replace("=> (y)", "=> (float[p, q, r, s] y)").replace(
        "Softmax <axis = 3>", "Softmax <axis = 2>"
    )))  # fmt: skip
    result = apply_pass("raise-opset", three)
    assert three.main.opset_imports[""] == 11 and "not known to be the last" in result.declined[0].reason


NESTED = """<ir_version: 10, opset_import: ["" : 12, "local" : 1]>
main (float[n, 8] x, bool c) => (float[n, 1, 8] y) {
    h = local.scale (x)
    y = If (c) <
        then_branch = then () => (float[n, 1, 8] t) { t = Unsqueeze <axes = [1]> (h) },
        else_branch = other () => (float[n, 1, 8] e) { m = Softmax <axis = 1> (x) e = Unsqueeze <axes = [1]> (m) }
    >
}
<domain: "local", opset_import: ["" : 12]>
scale (a) => (r) { s = ReduceSum <axes = [-1], keepdims = 1> (a) r = Div (a, s) }
"""
NESTED_AFTER = """<ir_version: 10, opset_import: ["" : 23, "local" : 1]>
main (float[n, 8] x, bool c) => (float[n, 1, 8] y) {
    h = local.scale (x)
    y = If (c) <
        then_branch = then () => (float[n, 1, 8] t) {
            a1 = Constant <value = int64[1] {1}> () t = Unsqueeze (h, a1) },
        else_branch = other () => (float[n, 1, 8] e) {
            m = Softmax <axis = -1> (x) a2 = Constant <value = int64[1] {1}> () e = Unsqueeze (m, a2) }
    >
}
<domain: "local", opset_import: ["" : 23]>
scale (a) => (r) {
    ["ReduceSum_0.input1"] "s.input1" = Constant <value = int64[1] {-1}> ()
    s = ReduceSum <keepdims = 1> (a, "s.input1")
    r = Div (a, s)
}
"""


def test_subgraphs_and_functions_are_raised_too() -> None:
    check_rewrite("raise-opset", NESTED, NESTED_AFTER, edits=4)
    for side in (True, False):
        check_numerics("raise-opset", NESTED, {"x": X, "c": np.array(side)})


def test_what_is_in_a_function_says_so_when_it_stops_the_raise() -> None:
    text = NESTED.replace("<axes = [-1], keepdims = 1>", "<axes: ints = @axes>").replace(
        "scale (a)", "scale <axes> (a)"
    )
    text = text.replace("local.scale (x)", "local.scale <axes = [1]> (x)")
    check_declines("raise-opset", text, "takes its attribute 'axes' from the function around it", count=1)


def test_every_node_that_stops_the_raise_is_named_once() -> None:
    text = """<ir_version: 8, opset_import: ["" : 11]>
    g (float[a, b, c] x) => (float[a, b, c] y, float[a, b, c] z) {
        [one] y = Softmax <axis = 1> (x) [two] z = LogSoftmax <axis = 0> (x)
    }"""
    program = program_of(text)
    before = structural_hash(program)
    result = apply_pass("raise-opset", program)
    assert [d.node for d in result.declined] == ["one", "two"] and not result.modified
    assert all(d.reason.endswith("the model stays at opset 11") for d in result.declined)
    assert structural_hash(program) == before


def test_the_import_alone_counts_as_one() -> None:
    text = '<ir_version: 10, opset_import: ["" : {0}]> g (float[n] x) => (float[n] y) {{ y = Relu (x) }}'
    check_rewrite("raise-opset", text.format(14), text.format(23), edits=1)
    check_rewrite("raise-opset{target=18}", text.format(14), text.format(18), edits=1)
    check_untouched("raise-opset{target=18}", text.format(20))
    check_untouched("raise-opset", text.format(24))


def test_models_without_standard_operators_are_left_alone() -> None:
    check_untouched(
        "raise-opset",
        """<ir_version: 10, opset_import: ["" : 13, "com.microsoft" : 1]>
        g (float[n, 4] x) => (float[n, 4] y) { y = com.microsoft.Gelu (x) }""",
    )
    check_untouched("raise-opset", '<ir_version: 10, opset_import: ["" : 13]> g (float[n] x) => (float[n] x) { }')


def test_adapted_nodes_say_where_they_are_from() -> None:
    program = program_of("""<ir_version: 10, opset_import: ["" : 11]>
    g (float[n, 4] x) => (float[n, 4] y) { [a] h = Relu (x) [b] s = ReduceSum <axes = [1]> (h) [c] y = Add (s, h) }""")
    apply_pass("raise-opset", program)
    made = {n.op_type: n.metadata_props.get(FROM_KEY) for n in program.nodes() if PASS_KEY in n.metadata_props}
    assert made == {"Constant": "b", "ReduceSum": "b"}


def test_entries_keep_sharing_their_weights() -> None:
    text = """<ir_version: 10, opset_import: ["" : 11]>
    g (float[n, 4] x) => (float[n, 4] y) <float[4] w = {1, 2, 3, 4}> { y = Mul (x, w) }"""
    one, two = program_of(text), program_of(text)
    two.main.graph.initializers["w"].const_value = one.main.graph.initializers["w"].const_value
    program = Program({"a": one.main, "b": two.main})
    result = apply_pass("raise-opset", program)
    assert result.fired == 2 and list(program.weights) == ["w"]
    assert {m.opset_imports[""] for m in program.entries.values()} == {23}


def test_targets_that_are_not_known_are_refused() -> None:
    for target in (12, 24):
        with pytest.raises(InputError, match=f"from 13 to 23, not to {target}"):
            RaiseOpset(target)
    assert default_pipeline("ort-cpu").startswith("raise-opset,")
    assert str(parse_pipeline("raise-opset{target=20}")[0]) == "raise-opset{target=20}"


SCALED = """<ir_version: 6, opset_import: ["" : 11]>
g (float[n, 8] x) => (float[n, 8] y) <float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
    s = ReduceSum <axes = [1], keepdims = 1> (x)
    h = Mul (x, w)
    y = Div (h, s)
}"""


def test_a_wrong_conversion_is_rolled_back_against_the_file_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(site: Site, before: int) -> None:
        site.take("axes")  # and so it sums everything

    monkeypatch.setitem(opset_adapters._ADAPTERS, "ReduceSum", wrong)
    proto, feed = onnx.parser.parse_model(SCALED), {"x": np.abs(X) + 1}
    exe = planish.optimize(proto, example_inputs=feed)
    np.testing.assert_allclose(exe.run(feed)["y"], run(proto, feed)[0], rtol=1e-6)
    entry = next(e for e in exe.report.ledger.entries if e.name == "raise-opset")
    assert not entry.kept and "rolled back: error" in entry.verdict
    monkeypatch.undo()
    monkeypatch.setattr(gates, "_slower", lambda ratio: False)  # what three nodes cost is noise, and not asked here
    exe = planish.optimize(proto, example_inputs=feed)
    entry = next(e for e in exe.report.ledger.entries if e.name == "raise-opset")
    assert (entry.kept, entry.fired) == (True, 1)
    np.testing.assert_allclose(exe.run(feed)["y"], run(proto, feed)[0], rtol=1e-6)
