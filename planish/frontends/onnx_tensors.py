"""Weights of a model file: kept out of protobuf, opened safely where they are external, and put into the IR.

While a message is checked, a detached tensor is an external reference whose location is a token that no file
can foresee; :meth:`Tensors.attach` then puts the tensor behind the token into the IR.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from itertools import chain

import numpy as np
import onnx
import onnx_ir as ir

from planish.ir.errors import InputError, UnsafeModelError
from planish.ir.external import ConfinedFile, MappedTensor, open_confined, tensor_bytes, tensor_from_buffer

DETACH_BYTES = 1024  #: inline raw data above this size leaves the message
MAX_ELEMENTS = 1 << 48  #: largest number of elements of one tensor
MAX_SPARSE_BYTES = 1 << 26  #: largest dense size in bytes of a sparse tensor that stores little itself
MAX_SPARSE_RATIO = 1000  #: largest growth of a sparse tensor that is made dense
_OPEN_FILES = 64  # external files kept open and mapped; the tensors of further files are read into memory


class Tensors:
    """Tensors detached from a message, by token."""

    def __init__(self) -> None:
        self._items: list[ir.TensorProtocol] = []
        self._files: dict[str, ConfinedFile] = {}
        self._token = f"{secrets.token_hex(16)}#"

    def detach(self, proto: onnx.TensorProto, tensor: ir.TensorProtocol) -> None:
        """Makes `proto` a reference to `tensor`."""
        proto.ClearField("raw_data")
        proto.ClearField("external_data")
        proto.data_location = onnx.TensorProto.EXTERNAL
        proto.external_data.add(key="location", value=f"{self._token}{len(self._items)}")
        self._items.append(tensor)

    def file(self, base_dir: str, location: str) -> ConfinedFile:
        if location not in self._files:
            self._files[location] = open_confined(base_dir, location)
        return self._files[location]

    def mapped(self) -> bool:
        return len(self._files) <= _OPEN_FILES

    def release(self, location: str) -> None:
        self._files.pop(location).close()

    def holds(self, proto: onnx.TensorProto) -> bool:
        """Whether a tensor of the message is one of the references made here."""
        return proto.data_location == onnx.TensorProto.EXTERNAL and any(
            e.key == "location" and e.value.startswith(self._token) for e in proto.external_data
        )

    def attach(self, model: ir.Model) -> None:
        """Replaces the references of the IR model by their tensors."""
        for holder, tensor in external_tensors(model):
            item = self._items[int(str(tensor.location).removeprefix(self._token))]
            item.name, item.doc_string = tensor.name, tensor.doc_string
            item.metadata_props.update(tensor.metadata_props)
            _put(holder, tensor, item)


def dims_of(proto: onnx.TensorProto) -> tuple[int, ...]:
    """The shape of a tensor in a message.

    Raises:
        InputError: a negative dimension, more elements than :data:`MAX_ELEMENTS`, or an unknown dtype.
    """
    dims = tuple(proto.dims)
    name = proto.name or "without a name"
    if len(dims) > 64 or any(d < 0 for d in dims):
        raise InputError(f"tensor '{name}' has the shape {list(dims[:64])}; at most 64 sizes of at least 0.")
    total = 1
    for size in dims:
        total *= size
    # Checked on the product without zeros too: [huge, 0] must not pass as small.
    if total > MAX_ELEMENTS or any(d > MAX_ELEMENTS for d in dims):
        raise InputError(f"tensor '{name}' has the shape {list(dims)}: more than {MAX_ELEMENTS} elements.")
    try:
        known = ir.DataType(proto.data_type) != ir.DataType.UNDEFINED
    except ValueError:
        known = False
    if not known:
        raise InputError(f"tensor '{name}' has the unknown dtype number {proto.data_type}.")
    return dims


def detach_weights(proto: onnx.ModelProto, tensors: Tensors, *, ours: bool = False) -> onnx.ModelProto:
    """Copies a message without the large raw data of its initializers (in place if it is `ours`)."""
    copy = proto if ours else _copy_without_initializers(proto)
    for index, tensor in enumerate(proto.graph.initializer):
        mine = copy.graph.initializer[index] if ours else copy.graph.initializer.add()
        detachable = tensor.HasField("raw_data") and not tensor.external_data and not tensor.data_location
        if not ours:
            for descriptor, value in tensor.ListFields():
                if descriptor.name != "raw_data":
                    _set(mine, descriptor.name, value)
        data = tensor.raw_data if detachable else b""
        if len(data) > DETACH_BYTES and fits(tensor, len(data)):
            dtype = ir.DataType(tensor.data_type)
            array = np.frombuffer(data, np.uint8)
            tensors.detach(mine, tensor_from_buffer(array, dtype, tuple(tensor.dims), tensor.name))
        elif not ours and tensor.HasField("raw_data"):
            mine.raw_data = tensor.raw_data
    return copy


def open_tensors(proto: onnx.ModelProto, tensors: Tensors, base_dir: str | None) -> None:
    """Opens the external data of every tensor of the message and detaches it."""
    for tensor in all_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and not tensors.holds(tensor):
            tensors.detach(tensor, _open(tensor, tensors, base_dir))


def bind_external_tensors(model: ir.Model, base_dir: str | None) -> None:
    """Replaces onnx_ir's external tensors, which open files by path when first used, by checked ones, in place."""
    tensors = Tensors()
    for holder, tensor in list(external_tensors(model)):
        proto = onnx.TensorProto(name=tensor.name or "", data_type=tensor.dtype.value, dims=tensor.shape.numpy())
        for key in ("location", "offset", "length"):
            if (value := getattr(tensor, key)) is not None:
                proto.external_data.add(key=key, value=str(value))
        bound = _open(proto, tensors, base_dir if base_dir is not None else str(tensor.base_dir) or None)
        _put(holder, tensor, bound)


def external_tensors(model: ir.Model) -> Iterator[tuple[object, ir.ExternalTensor]]:
    """Every external tensor of a model with what holds it: a value, or (node, attribute name)."""
    bodies = [*model.graphs(), *(g for f in model.functions.values() for g in (f.graph, *f.graph.subgraphs()))]
    for graph in bodies:
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value, value.const_value
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    yield (node, name), attribute.value
                elif attribute.type == ir.AttributeType.TENSORS:
                    for tensor in attribute.value:
                        if isinstance(tensor, ir.ExternalTensor):
                            yield (node, name), tensor


def _put(holder: object, old: ir.ExternalTensor, new: ir.TensorProtocol) -> None:
    if isinstance(holder, ir.Value):
        holder.const_value = new
        return
    assert isinstance(holder, tuple)
    node, name = holder
    attribute = node.attributes[name]
    if attribute.type == ir.AttributeType.TENSOR:
        node.attributes[name] = ir.AttrTensor(name, new)
    else:
        node.attributes[name] = ir.AttrTensors(name, [new if t is old else t for t in attribute.value])


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a message: initializers and attributes, in subgraphs and functions too."""
    yield from _tensors_of_graph(proto.graph)
    for function in proto.functions:
        yield from chain.from_iterable(_tensors_of_node(n) for n in function.node)
        for attribute in function.attribute_proto:
            yield from _tensors_of_attribute(attribute)


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from _tensors_of_node(node)


def _tensors_of_node(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        yield from _tensors_of_attribute(attribute)


def _tensors_of_attribute(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    if attribute.HasField("g"):
        yield from _tensors_of_graph(attribute.g)
    for graph in attribute.graphs:
        yield from _tensors_of_graph(graph)


def _open(proto: onnx.TensorProto, tensors: Tensors, base_dir: str | None) -> ir.TensorProtocol:
    dims = dims_of(proto)
    dtype = ir.DataType(proto.data_type)
    where = f"tensor '{proto.name}'"
    if dtype == ir.DataType.STRING:
        raise InputError(f"{where} is a string tensor with external data; ONNX stores strings in the message.")
    keys: dict[str, str] = {}
    for entry in proto.external_data:
        if entry.key in keys:
            raise UnsafeModelError(f"{where} gives its external data's '{entry.key}' twice.")
        keys[entry.key] = entry.value
    if "location" not in keys:
        raise InputError(f"{where} is external but names no file (no 'location').")
    if base_dir is None:
        raise InputError(
            f"{where} has its data in the file '{keys['location'][:80]}'; give the path of the model, or base_dir, "
            "or load the data first (onnx.load_external_data_for_model)."
        )
    need = tensor_bytes(dtype, dims)
    offset = _number(where, "offset", keys.get("offset", "0"))
    length = _number(where, "length", keys["length"]) if "length" in keys else need
    if length != need:
        raise InputError(
            f"{where}: external length {length} bytes, but {dtype.name} of shape {list(dims)} is {need} bytes."
        )
    location = keys["location"]
    try:
        file = tensors.file(base_dir, location)
        file.check_range(offset, need)
    except UnsafeModelError as error:
        raise UnsafeModelError(f"{where}: {error}") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if tensors.mapped():
        return MappedTensor(file, offset, dtype, dims, proto.name)
    data = np.frombuffer(bytearray(file.read(offset, need)), np.uint8)
    tensors.release(location)
    return tensor_from_buffer(data, dtype, dims, proto.name)


def _number(where: str, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise UnsafeModelError(f"{where}: external {key} {text[:40]!r} is not a whole number of at least 0.")
    return int(text)


def fits(proto: onnx.TensorProto, size: int) -> bool:
    """Whether the dtype and shape of a tensor in a message make exactly `size` bytes."""
    try:
        dims = dims_of(proto)
    except InputError:
        return False
    dtype = ir.DataType(proto.data_type)
    return dtype != ir.DataType.STRING and tensor_bytes(dtype, dims) == size


def _copy_without_initializers(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name != "graph":
            _set(copy, descriptor.name, value)
    copy.graph.SetInParent()
    for descriptor, value in proto.graph.ListFields():
        if descriptor.name != "initializer":
            _set(copy.graph, descriptor.name, value)
    return copy


def _set(message: object, name: str, value: object) -> None:
    target = getattr(message, name)
    if hasattr(target, "extend"):
        target.extend(value)
    elif hasattr(target, "CopyFrom"):
        target.CopyFrom(value)
    else:
        setattr(message, name, value)
