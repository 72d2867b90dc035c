"""A model as a protobuf without its large weights: what onnx's checker, shape inference and printer need to see.

Serializing weights is the slow part of every call into onnx's C++ code (a second for BERT-base), and more than
2 GiB of them cannot be serialized at all. None of these calls needs them, except for the small constants that
shapes are computed from; these stay.
"""

from __future__ import annotations

from typing import Literal

import onnx
import onnx_ir as ir

from planish.ir.serialize import restore_type

#: Weights up to this size stay inline: shape inference reads shapes, axes and repeats from them.
INLINE_BYTES = 1024


def stripped_proto(
    model: ir.Model,
    *,
    inline_bytes: int = INLINE_BYTES,
    large: Literal["inputs", "declared"] = "inputs",
    value_info: bool = True,
) -> onnx.ModelProto:
    """Serializes `model` without weights over `inline_bytes`, node metadata and doc strings.

    Args:
        model: left as it is; its graph must hold named values.
        inline_bytes: initializers (and Constant nodes of the main graph) over this size are left out.
        large: ``"inputs"`` makes them graph inputs, so that the model stays valid; ``"declared"`` keeps their
            type and shape in ``value_info`` only, and keeps every Constant node.
        value_info: whether known types and shapes of inner values go along.
    """
    proto = onnx.ModelProto(ir_version=max(model.ir_version, 10))
    for domain, version in model.graph.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    _graph_into(proto.graph, model.graph, inline_bytes, large, value_info)
    for function in model.functions.values():
        ir.serde.serialize_function_into(proto.functions.add(), function, create_value_info=value_info)
    return proto


def _graph_into(proto: onnx.GraphProto, graph: ir.Graph, inline_bytes: int, large: str, value_info: bool) -> None:
    proto.name = graph.name or "graph"
    names = set()
    for value in graph.inputs:
        names.add(value.name)
        _value_into(proto.input.add(), value)
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.nbytes <= inline_bytes:
            item = proto.initializer.add()
            ir.serde.serialize_tensor_into(item, from_=tensor)
            item.name = name
        elif name not in names:
            _declare(proto.input.add() if large == "inputs" else proto.value_info.add(), name, tensor)
    for node in graph:
        if large == "inputs" and node.op_type == "Constant" and not node.domain:
            tensor = large_constant(node, inline_bytes)
            if tensor is not None:
                _declare(proto.input.add(), node.outputs[0].name or "", tensor)
                continue
        _node_into(proto.node.add(), node)
        if value_info:
            for value in node.outputs:
                if value.name and value.type is not None and not value.is_graph_output():
                    ir.serde.serialize_value_into(proto.value_info.add(), value)
    for value in graph.outputs:
        _value_into(proto.output.add(), value)


def _value_into(proto: onnx.ValueInfoProto, value: ir.Value) -> None:
    ir.serde.serialize_value_into(proto, value)
    restore_type(proto, value)


def large_constant(node: ir.Node, limit: int) -> ir.TensorProtocol | None:
    """The tensor of a Constant node if it has more than `limit` bytes and is no output of the graph."""
    attribute = node.attributes.get("value")
    if attribute is None or attribute.type != ir.AttributeType.TENSOR or attribute.is_ref():
        return None
    tensor: ir.TensorProtocol = attribute.value
    return tensor if tensor.nbytes > limit and not node.outputs[0].is_graph_output() else None


def _declare(item: onnx.ValueInfoProto, name: str, tensor: ir.TensorProtocol) -> None:
    item.name = name
    item.type.tensor_type.elem_type = int(tensor.dtype)
    item.type.tensor_type.shape.SetInParent()
    for dim in tensor.shape.numpy():
        item.type.tensor_type.shape.dim.add(dim_value=dim)


def _node_into(proto: onnx.NodeProto, node: ir.Node) -> None:
    proto.op_type = node.op_type
    proto.domain = node.domain
    proto.name = node.name or ""
    if node.overload:
        proto.overload = node.overload
    proto.input.extend(["" if v is None else v.name or "" for v in node.inputs])
    proto.output.extend([v.name or "" for v in node.outputs])
    for attribute in node.attributes.values():
        if attribute.is_ref():
            ir.serde.serialize_reference_attribute_into(proto.attribute.add(), attribute)
        else:
            ir.serde.serialize_attribute_into(proto.attribute.add(), attribute)
