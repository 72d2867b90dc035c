"""Raises a model to the opset of the IR core where that provably keeps the meaning.

Passes want one opset, and users have files of opset 9 to 22. The C++ version converter of the onnx package knows
neither functions nor metadata and is wrong on some operators, so this goes the other way round: an operator is let
through only if every later version of it merely widens types or adds attributes whose default is the old behaviour
(:data:`_STABLE`), or if one of the adapters below rewrites it. Anything else stops the raise below the version
where that operator changes: a model is then left at an older opset, never guessed at. Operators whose newer version
has no CPU kernel in ONNX Runtime (`RandomNormal`, `RoiAlign`, … at 22) stop it likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs

from planish.frontends.onnx_checks import run_checker
from planish.ir.errors import InputError
from planish.ir.serialize import to_proto_without_weights

TARGET = 23  #: opset of the IR core
_STEPS = (23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13)

#: First version from which all versions to 23 keep the meaning → operators.
_STABLE_FROM = {
    1: "Identity Transpose Shape Size Softplus Softsign LRN Conv ConvTranspose GlobalAveragePool GlobalMaxPool Gather "
    "DepthToSpace SpaceToDepth Constant If Loop ArgMax ArgMin Flatten MatMul MaxPool Not LpNormalization",
    4: "Concat",
    5: "Reshape",
    6: "Abs Ceil Exp Floor Neg Reciprocal Sqrt Tanh Sigmoid Log Elu Selu HardSigmoid LeakyRelu InstanceNormalization "
    "Relu Tile Max Min Sum Mean Cast",
    7: "Add Sub Mul Div Equal Greater Less And Or Xor Pow Sin Cos Tan Asin Acos Atan Gemm PRelu RNN GRU LSTM "
    "AveragePool",
    8: "Expand",
    9: "Erf IsNaN Sign NonZero Where EyeLike ConstantOfShape Scan MaxUnpool Sinh Cosh Asinh Acosh Atanh Shrink "
    "MeanVarianceNormalization TfIdfVectorizer StringNormalizer",
    10: "IsInf ThresholdedRelu Mod ReverseSequence Slice QLinearMatMul QLinearConv MatMulInteger ConvInteger "
    "NonMaxSuppression",
    11: "CumSum GatherElements ScatterElements ScatterND GatherND Round Det Range Unique Clip Pad OneHot Compress "
    "BitShift DynamicQuantizeLinear TopK LpPool SequenceAt SequenceConstruct SequenceEmpty "
    "SequenceErase SequenceInsert SequenceLength SplitToSequence ConcatFromSequence",
    12: "Celu Einsum GreaterOrEqual LessOrEqual Dropout NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    13: "Softmax LogSoftmax Hardmax Squeeze Unsqueeze ReduceSum QuantizeLinear DequantizeLinear Resize",
    14: "HardSwish Trilu BatchNormalization",
    15: "CastLike Optional OptionalGetElement OptionalHasElement",
    17: "LayerNormalization BlackmanWindow HammingWindow HannWindow MelWeightMatrix STFT SequenceMap",
    18: "Mish Split ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSumSquare BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Col2Im CenterCropPad",
    19: "DeformConv",
}
_STABLE = {name: version for version, names in _STABLE_FROM.items() for name in names.split()}
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")


class _Blocked(Exception):
    """The operator can not be raised; the text says why."""


def raise_opset(model: ir.Model, target: int = TARGET) -> tuple[ir.Model, str]:
    """Returns the model at the highest opset up to `target` that keeps its meaning, and a note on what was done.

    The given model is not changed; it is returned itself when nothing is to be done.
    """
    versions = {m.opset_imports[""] for m in (model.graph, *model.functions.values()) if "" in m.opset_imports}
    if not versions:
        return model, "imports no operators of ai.onnx"
    current = min(versions)
    if current >= target:
        return model, f"opset {current} as it was"
    why = ""
    infos: dict[str, ir.Value] | None = None
    for step in (s for s in _STEPS if max(versions) <= s <= target and s > current):
        raised = model.clone()
        try:
            infos = _infer(model) if infos is None and _needs_types(model) else infos
            _raise(raised, step, infos or {})
            _check(raised)
        except _Blocked as blocked:
            why = str(blocked)
            continue
        return raised, f"raised from opset {current} to {step}" + (f"; {why}" if why else "")
    return model, f"kept at opset {current}; {why}" if why else f"kept at opset {current}"


def _raise(model: ir.Model, target: int, infos: Mapping[str, ir.Value]) -> None:
    for body in (model.graph, *(f.graph for f in model.functions.values())):
        old = body.opset_imports.get("")
        if old is None:
            continue
        taken = {v.name for g in (body, *body.subgraphs()) for v in (*g.inputs, *g.initializers.values())}
        taken |= {v.name for n in body.all_nodes() for v in n.outputs}
        known = infos if body is model.graph else {}
        for node in list(body.all_nodes()):
            key = (node.domain, node.op_type, node.overload)
            if node.domain == "" and key not in model.functions:
                _raise_node(_Site(node, old, target, known, taken))
        body.opset_imports[""] = target
    for function in model.functions.values():
        if "" in function.opset_imports:
            function.opset_imports[""] = target


def _raise_node(site: _Site) -> None:
    node = site.node
    try:
        before = defs.get_schema(node.op_type, site.old).since_version
        after = defs.get_schema(node.op_type, site.target).since_version
    except defs.SchemaError:
        raise site.blocked("is not in both opsets") from None
    if before == after:
        return
    adapter = _ADAPTERS.get(node.op_type)
    if adapter is not None:
        adapter(site, before)
    elif before < _STABLE.get(node.op_type, 1 << 30):
        raise site.blocked(f"changes at opset {after}")
    if node.op_type == "AveragePool" and before < 19 <= after:
        # ONNX Runtime's kernel from 19 on is another one (rounding, ceil_mode) and not its fast one.
        raise site.blocked("has another kernel from opset 19 on")
    if node.op_type == "ConvTranspose" and "output_shape" in node.attributes and before < 11:
        raise site.blocked("with output_shape changes at opset 11")


class _Site:
    """One node to be raised, and what adapters do to it."""

    def __init__(self, node: ir.Node, old: int, target: int, infos: Mapping[str, ir.Value], taken: set[str]) -> None:
        self.node, self.old, self.target, self.infos, self.taken = node, old, target, infos, taken

    def blocked(self, reason: str) -> _Blocked:
        return _Blocked(f"{self.node.op_type} (node '{self.node.name}') {reason}")

    def take(self, name: str) -> object:
        """Removes an attribute and returns its value, None if it is not there."""
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return None
        if attribute.is_ref():
            raise self.blocked(f"takes '{name}' from its function")
        del self.node.attributes[name]
        return attribute.value

    def number(self, name: str, default: int) -> int:
        attribute = self.node.attributes.get(name)
        if attribute is not None and attribute.is_ref():
            raise self.blocked(f"takes '{name}' from its function")
        return default if attribute is None else attribute.as_int()

    def value_of(self, index: int) -> ir.Value:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            raise self.blocked("misses an input")
        known = self.infos.get(value.name or "")
        return known if known is not None and (value.shape is None or value.dtype is None) else value

    def dtype(self) -> np.dtype:  # type: ignore[type-arg]
        dtype = self.value_of(0).dtype
        if dtype is None:
            raise self.blocked("has an input of unknown dtype")
        return np.dtype(dtype.numpy())

    def give(self, index: int, array: np.ndarray) -> None:
        """Makes a constant the input at `index`."""
        node = self.node
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        constant = ir.node("Constant", [], {"value": ir.tensor(array)}, name=f"{node.name}.input{index}")
        graph = node.graph
        assert graph is not None
        graph.insert_before(node, constant)
        value = constant.outputs[0]
        value.name = f"{node.outputs[0].name}.input{index}"
        while value.name in self.taken:
            value.name += "_"
        self.taken.add(value.name)
        value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
        node.replace_input_with(index, value)


def _list_to_input(*names: str) -> Callable[[_Site, int], None]:
    """An adapter for operators whose attributes `names` became the inputs 1, 2, …"""

    def adapt(site: _Site, before: int) -> None:
        for index, name in enumerate(names, 1):
            values = site.take(name)
            if values is not None and len(values):  # type: ignore[arg-type]
                site.give(index, np.array(values, np.int64))

    return adapt


def _until(version: int, adapter: Callable[[_Site, int], None]) -> Callable[[_Site, int], None]:
    """`adapter` for versions below `version`, which keeps its meaning from then on."""

    def adapt(site: _Site, before: int) -> None:
        after = defs.get_schema(site.node.op_type, site.target).since_version
        if before < version <= after:
            adapter(site, before)

    return adapt


def _softmax(site: _Site, before: int) -> None:
    # Up to opset 12 the input is seen as a matrix cut at `axis`; that is the same only for the last axis.
    axis = site.number("axis", 1)
    shape = site.value_of(0).shape
    if axis != -1 and (shape is None or axis % max(len(shape), 1) != len(shape) - 1):
        raise site.blocked("over an axis that is not known to be the last changes at opset 13")
    site.node.attributes["axis"] = ir.AttrInt64("axis", -1)


def _clip(site: _Site, before: int) -> None:
    if before < 6:
        raise site.blocked("changes at opset 6")
    dtype = site.dtype()
    for index, name in enumerate(("min", "max"), 1):
        bound = site.take(name)
        if bound is not None:
            site.give(index, np.array(bound, dtype))


def _pad(site: _Site, before: int) -> None:
    if before < 2:
        raise site.blocked("changes at opset 2")
    dtype, value = site.dtype(), site.take("value")
    _list_to_input("pads")(site, before)
    if value:
        site.give(2, np.array(value, dtype))


def _slice(site: _Site, before: int) -> None:
    _list_to_input("starts", "ends", "axes")(site, before)


def _top_k(site: _Site, before: int) -> None:
    if before < 10:
        site.give(1, np.array([site.take("k")], np.int64))


def _dropout(site: _Site, before: int) -> None:
    if before < 7:
        raise site.blocked("changes at opset 7")
    if len(site.node.outputs) > 1 and (site.node.outputs[1].uses() or site.node.outputs[1].is_graph_output()):
        raise site.blocked("with a mask changes at opset 12")
    site.take("ratio")  # not used in inference, which is what these versions always do


def _batch_normalization(site: _Site, before: int) -> None:
    if before < 7 or site.take("spatial") == 0 or any(v.name for v in site.node.outputs[1:]):
        raise site.blocked("in this form changes at opset 14")


def _split(site: _Site, before: int) -> None:
    if before < 2:
        raise site.blocked("changes at opset 2")
    if before < 13 <= site.target:
        _list_to_input("split")(site, before)
    if site.target >= 18 and (len(site.node.inputs) < 2 or site.node.inputs[1] is None):
        site.node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(site.node.outputs))


def _per_tensor(site: _Site, before: int) -> None:
    # Opset 13 gave scales an axis, which means nothing for a scalar scale.
    shape = site.value_of(1).shape
    if shape is None or len(shape):
        raise site.blocked("with a scale that is not known to be a scalar changes at opset 13")


_ADAPTERS: dict[str, Callable[[_Site, int], None]] = {
    **{f"Reduce{kind}": _until(18, _list_to_input("axes")) for kind in _REDUCTIONS},
    "ReduceSum": _until(13, _list_to_input("axes")),
    "Squeeze": _until(13, _list_to_input("axes")),
    "Unsqueeze": _until(13, _list_to_input("axes")),
    **{name: _until(13, _softmax) for name in ("Softmax", "LogSoftmax", "Hardmax")},
    "Clip": _until(11, _clip),
    "Pad": _until(11, _pad),
    "Slice": _until(10, _slice),
    "TopK": _until(10, _top_k),
    "Dropout": _until(12, _dropout),
    "BatchNormalization": _until(14, _batch_normalization),
    "Split": _split,
    "QuantizeLinear": _until(13, _per_tensor),
    "DequantizeLinear": _until(13, _per_tensor),
}
_TYPED = frozenset({"Softmax", "LogSoftmax", "Hardmax", "Clip", "Pad"})


def _needs_types(model: ir.Model) -> bool:
    firsts = [n.inputs[0] for n in model.graph.all_nodes() if n.op_type in _TYPED and n.inputs]
    return any(v is not None and (v.shape is None or v.dtype is None) for v in firsts)


def _infer(model: ir.Model) -> dict[str, ir.Value]:
    """Types and shapes of the main graph's values by ONNX shape inference; empty where it fails."""
    proto, _ = to_proto_without_weights(model)
    for tensor in list(proto.graph.initializer):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            # Shape inference opens external files; an input of the same type and shape serves it as well.
            if all(i.name != tensor.name for i in proto.graph.input):
                proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
            proto.graph.initializer.remove(tensor)
    try:
        graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
        return {i.name: ir.from_proto(i) for i in (*graph.value_info, *graph.input, *graph.output)}
    except Exception:  # inference is a help here; without it the raise stops earlier
        return {}


def _check(model: ir.Model) -> None:
    """The ONNX checker on the raised model; what it refuses stops the raise."""
    model.ir_version = max(model.ir_version, min_ir_version(model))
    try:
        run_checker(to_proto_without_weights(model)[0])
    except InputError as error:
        raise _Blocked(str(error)) from None


def min_ir_version(model: ir.Model) -> int:
    """The ir_version that the model's opset needs, and at least 10 (types of values in functions)."""
    opset = onnx.helper.make_opsetid("", model.graph.opset_imports.get("", 1))
    return max(10, onnx.helper.find_min_ir_version_for([opset], ignore_unknown=True))
