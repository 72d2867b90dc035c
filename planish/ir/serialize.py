"""From the IR to ONNX protobuf and files, without copying weights and without touching the given model.

onnx_ir's own serializer puts every weight into the message (two copies of a large model, and protobuf ends at
2 GiB) and renames tensors on the way. Here weights above a threshold stay outside: the message refers to them by
name, and a runtime injects them (ONNX Runtime: ``SessionOptions.add_external_initializers``) or a file gets them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir import serde

from planish.ir.errors import PlanishError
from planish.ir.graphs import is_op

#: Location of a weight that is nowhere on disk. ONNX Runtime takes it for injected initializers, and no file has it.
MARKER = "planish:weights"
#: Metadata key of a value whose type onnx_ir has no class for (map, opaque): its TypeProto in hex.
TYPE_KEY = "planish.type_proto"
_QUANTIZATION = "quant_parameter_tensor_names"
_FUNCTION_VALUE_INFO = 10  # first ir_version with value_info in functions
_MULTI_DEVICE = 11  # first ir_version with device configurations
PROTO_LIMIT = (1 << 31) - 1  #: protobuf's limit on one message, in bytes


def restore_type(proto: onnx.ValueInfoProto, value: ir.Value) -> None:
    """Writes the type of `value` that onnx_ir has no class for (a map, an opaque type), if it has one."""
    if kept := value.metadata_props.get(TYPE_KEY):
        proto.type.ParseFromString(bytes.fromhex(kept))


def to_proto_without_weights(
    model: ir.Model, threshold: int = 1024
) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """Serializes a model with the weights above `threshold` bytes left out.

    Returns the message and the tensors left out, by initializer name. In the message these are initializers of the
    main graph whose data is external at :data:`MARKER`; :func:`point_at` makes them refer to a file instead. Large
    initializers of subgraphs and large `Constant` nodes move to the main graph in the message (runtimes inject
    initializers only there), renamed if their name is taken. Large tensors in function bodies stay inline. Large
    initializers that nothing uses are left out of both.
    The model is not changed and no weight is read.
    """
    return _Serializer(model, threshold).run()


def point_at(proto: onnx.ModelProto, location: str, layout: Mapping[str, tuple[int, int]]) -> None:
    """Makes the weights left out of `proto` refer to (offset, length) in bytes of the file `location`, in place."""
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.name in layout:
            offset, length = layout[tensor.name]
            _set_external(tensor, location, offset, length)


def inline(proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol]) -> None:
    """Puts the weights back into `proto`, in place.

    Raises:
        PlanishError: the message would pass protobuf's limit of 2 GiB.
    """
    total = proto.ByteSize() + sum(t.nbytes for t in weights.values())
    if total > PROTO_LIMIT:
        raise PlanishError(f"the model is {total} bytes, more than one ONNX file can hold (2 GiB); use a weights file.")
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.name in weights:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = weights[tensor.name].tobytes()


def _set_external(proto: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    proto.ClearField("external_data")
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = proto.external_data.add()
        entry.key, entry.value = key, text


def _metadata(target: Any, source: Mapping[str, str] | None) -> None:
    for key in sorted(source or ()):
        target.add(key=key, value=source[key])  # type: ignore[index]


class _Serializer:
    """One serialization: holds the message, the weights left out, and the names of values that moved."""

    def __init__(self, model: ir.Model, threshold: int) -> None:
        self.model = model
        self.threshold = threshold
        self.proto = onnx.ModelProto()
        self.weights: dict[str, ir.TensorProtocol] = {}
        self.renamed: dict[ir.Value, str] = {}
        self.taken: set[str] | None = None
        self.hoisted: list[tuple[str, ir.TensorProtocol]] = []
        self.with_devices = model.ir_version >= _MULTI_DEVICE

    def run(self) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
        model, proto = self.model, self.proto
        proto.ir_version = model.ir_version
        for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
            if value := getattr(model, field):
                setattr(proto, field, value)
        for domain, version in model.graph.opset_imports.items():
            proto.opset_import.add(domain=domain, version=version)
        _metadata(proto.metadata_props, model.metadata_props)
        if self.with_devices:
            for configuration in model.device_configurations:
                proto.configuration.append(serde.serialize_model_configuration(configuration))
        self.graph(proto.graph, model.graph, depth=0)
        for name, tensor in self.hoisted:
            self.external(proto.graph.initializer.add(), name, tensor)
        for function in model.functions.values():
            self.function(proto.functions.add(), function)
        return proto, self.weights

    def graph(self, proto: onnx.GraphProto, graph: ir.Graph, depth: int) -> None:
        proto.name = graph.name or ("graph" if depth == 0 else "subgraph")
        if graph.doc_string:
            proto.doc_string = graph.doc_string
        outputs = set(graph.outputs)
        inputs = set(graph.inputs)
        for value in graph.inputs:
            self.value(proto.input.add(), value)
            if value.name not in graph.initializers:
                self.annotation(proto, value)
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            if self.is_large(tensor) and not value.uses() and value not in outputs and value not in inputs:
                # ONNX Runtime removes what nothing uses, and then fails to find it when it is injected.
                continue
            if depth > 0 and self.is_large(tensor) and value not in outputs and value not in inputs:
                self.hoist(value, tensor)
                continue
            self.annotation(proto, value)
            if value not in inputs:
                self.info(proto, value)
            self.tensor(proto.initializer.add(), tensor, value.name or "", allow_external=depth == 0)
        for node in graph:
            movable = depth == 0 or (depth > 0 and node.outputs[0] not in outputs)
            if movable and self.is_large_constant(node):
                self.hoist(node.outputs[0], node.attributes["value"].value)
                if depth == 0:
                    self.annotation(proto, node.outputs[0])
                continue
            self.node(proto.node.add(), node, depth)
            for value in node.outputs:
                if value not in outputs:
                    self.annotation(proto, value)
                    self.info(proto, value)
        for value in graph.outputs:
            self.value(proto.output.add(), value)
            if value not in inputs and value.producer() is not None:
                self.annotation(proto, value)
        _metadata(proto.metadata_props, graph.metadata_props)

    def function(self, proto: onnx.FunctionProto, function: ir.Function) -> None:
        for field in ("domain", "name", "overload", "doc_string"):
            if value := getattr(function, field):
                setattr(proto, field, value)
        for domain, version in function.opset_imports.items():
            proto.opset_import.add(domain=domain, version=version)
        _metadata(proto.metadata_props, function.metadata_props)
        with_info = self.model.ir_version >= _FUNCTION_VALUE_INFO
        proto.input.extend(self.name(v) for v in function.inputs)
        for attribute in function.attributes.values():
            if attribute.value is not None:
                self.attribute(proto.attribute_proto.add(), attribute, depth=-1)
            else:
                proto.attribute.append(attribute.name)
        proto.output.extend(self.name(v) for v in function.outputs)
        if with_info:
            for value in function.inputs:
                self.info(proto, value)
        for node in function:
            self.node(proto.node.add(), node, depth=-1)
            if with_info:
                for value in node.outputs:
                    self.info(proto, value)

    def node(self, proto: onnx.NodeProto, node: ir.Node, depth: int) -> None:
        proto.op_type = node.op_type
        for field in ("domain", "name", "overload", "doc_string"):
            if value := getattr(node, field):
                setattr(proto, field, value)
        _metadata(proto.metadata_props, node.metadata_props)
        proto.input.extend("" if v is None else self.name(v) for v in node.inputs)
        names = [self.name(v) for v in node.outputs]
        while names and not names[-1]:
            names.pop()
        proto.output.extend(names)
        for attribute in node.attributes.values():
            self.attribute(proto.attribute.add(), attribute, depth)
        if self.with_devices:
            for configuration in node.device_configurations:
                proto.device_configurations.append(serde.serialize_node_device_configuration(configuration))

    def attribute(self, proto: onnx.AttributeProto, attribute: ir.Attr, depth: int) -> None:
        if attribute.is_ref():
            serde.serialize_reference_attribute_into(proto, attribute)
            return
        kind = attribute.type
        if kind not in (
            ir.AttributeType.GRAPH,
            ir.AttributeType.GRAPHS,
            ir.AttributeType.TENSOR,
            ir.AttributeType.TENSORS,
        ):
            serde.serialize_attribute_into(proto, attribute)
            return
        proto.name = attribute.name
        proto.type = kind.value  # type: ignore[assignment]
        if attribute.doc_string:
            proto.doc_string = attribute.doc_string
        # Function bodies (depth -1) can not see the main graph, so nothing in them may move there.
        inner = depth + 1 if depth >= 0 else -1
        if kind == ir.AttributeType.GRAPH:
            self.graph(proto.g, attribute.value, inner)
        elif kind == ir.AttributeType.GRAPHS:
            for graph in attribute.value:
                self.graph(proto.graphs.add(), graph, inner)
        elif kind == ir.AttributeType.TENSOR:
            self.tensor(proto.t, attribute.value, attribute.value.name or "", allow_external=False)
        else:
            for tensor in attribute.value:
                self.tensor(proto.tensors.add(), tensor, tensor.name or "", allow_external=False)

    def tensor(self, proto: onnx.TensorProto, tensor: ir.TensorProtocol, name: str, *, allow_external: bool) -> None:
        if allow_external and self.is_large(tensor):
            self.external(proto, name, tensor)
            return
        if tensor.dtype == ir.DataType.STRING:
            proto.string_data.extend(_strings(tensor))
        elif tensor.nbytes > PROTO_LIMIT:
            raise PlanishError(f"tensor '{name}' is {tensor.nbytes} bytes inside a function; one message holds 2 GiB.")
        else:
            proto.raw_data = tensor.tobytes()
        self.header(proto, name, tensor)

    def external(self, proto: onnx.TensorProto, name: str, tensor: ir.TensorProtocol) -> None:
        self.header(proto, name, tensor)
        _set_external(proto, MARKER, 0, tensor.nbytes)
        self.weights[name] = tensor

    def header(self, proto: onnx.TensorProto, name: str, tensor: ir.TensorProtocol) -> None:
        if name:
            proto.name = name
        proto.data_type = tensor.dtype.value
        proto.dims.extend(tensor.shape.numpy())
        if tensor.doc_string:
            proto.doc_string = tensor.doc_string
        _metadata(proto.metadata_props, tensor.metadata_props)

    def info(self, proto: onnx.GraphProto | onnx.FunctionProto, value: ir.Value) -> None:
        if value.name and (value.type is not None or value.shape is not None or value.metadata_props):
            self.value(proto.value_info.add(), value)

    def value(self, proto: onnx.ValueInfoProto, value: ir.Value) -> None:
        serde.serialize_value_into(proto, value, name=self.name(value))
        restore_type(proto, value)

    def annotation(self, proto: onnx.GraphProto, value: ir.Value) -> None:
        if names := value.meta.get(_QUANTIZATION):
            entry = proto.quantization_annotation.add()
            entry.tensor_name = self.name(value)
            _metadata(entry.quant_parameter_tensor_names, names)

    def name(self, value: ir.Value) -> str:
        return self.renamed.get(value) or value.name or ""

    def is_large(self, tensor: ir.TensorProtocol) -> bool:
        return tensor.dtype != ir.DataType.STRING and tensor.nbytes > self.threshold

    def is_large_constant(self, node: ir.Node) -> bool:
        if not is_op(node, "Constant") or "value" not in node.attributes:
            return False
        attribute = node.attributes["value"]
        return not attribute.is_ref() and self.is_large(attribute.value)

    def hoist(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        name = value.name or "weight"
        if value.graph is not self.model.graph:
            if self.taken is None:
                self.taken = set(_all_names(self.model))
            # A sibling subgraph may use the same name, and so may the main graph (which a subgraph may not shadow).
            number = 0
            candidate = f"{name}.hoisted"
            while candidate in self.taken:
                number += 1
                candidate = f"{name}.hoisted_{number}"
            self.taken.add(candidate)
            self.renamed[value] = name = candidate
        self.hoisted.append((name, tensor))


def _all_names(model: ir.Model) -> Iterable[str]:
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            yield value.name or ""
        for node in graph:
            yield from (v.name or "" for v in node.outputs)


def _strings(tensor: ir.TensorProtocol) -> list[bytes]:
    if isinstance(tensor, ir.StringTensor):
        return list(tensor.string_data())
    return [item if isinstance(item, bytes) else str(item).encode() for item in tensor.numpy().ravel().tolist()]
