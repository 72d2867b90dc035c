"""One piece of a model that was cut: a graph of its own, whose weights are inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir import serde

from planish.ir.external import stored_bytes

#: Weights of at most so many bytes stay constants if all layers that share a model have the same.
SMALL = 16 << 10
#: Rewrites a part for the device that it will run on: inputs and outputs stay what they are.
Lower = Callable[[ir.Model], ir.Model]
_INDEX = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING)


@dataclass
class Piece:
    """A part of a graph as a model.

    Attributes:
        model: its inputs are ``in_0`` …, then the weights ``weight_0`` …; its outputs ``out_0`` …. Equal
            pieces share it.
        inputs, outputs: names that these values have in the whole graph.
        weights: the tensors that this piece gives for the weights.
        slots: names of the weights' inputs.
        key: equal for pieces that differ in the values of their weights alone.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: list[ir.TensorProtocol] = field(default_factory=list)
    slots: list[str] = field(default_factory=list)
    key: bytes = b""

    def fix(self, at: int) -> None:
        """Makes a weight a constant of the model."""
        name, tensor = self.slots.pop(at), self.weights.pop(at)
        graph = self.model.graph
        value = next(v for v in graph.inputs if v.name == name)
        graph.inputs.remove(value)
        value.const_value = tensor
        graph.register_initializer(value)


def make_piece(
    model: ir.Model,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    *,
    lower: Lower | None = None,
    keep: bool = False,
) -> Piece:
    """The part of the main graph between values, which must bound it.

    Args:
        lower: chooses forms for the device, while weights are still in the model.
        keep: weights stay in the model, and values keep their names.
    """
    graph = ir.convenience.extract(model.graph, list(inputs), list(outputs))
    part = ir.Model(graph, ir_version=model.ir_version, functions=[f.clone() for f in _used(model, graph)])
    names = tuple(v.name or "" for v in inputs), tuple(v.name or "" for v in outputs)
    if keep:
        return Piece(part, *names)
    if lower is not None:
        part = lower(part)
        graph = part.graph
    slots, weights = _lift_weights(graph)
    _rename(graph, len(inputs))
    return Piece(part, *names, weights, [v.name or "" for v in slots], _key(part, len(inputs)))


def _used(model: ir.Model, graph: ir.Graph) -> list[ir.Function]:
    """Functions of the model that the part calls, those that they call included."""
    found: dict[ir.OperatorIdentifier, ir.Function] = {}
    pending = [n.op_identifier() for n in graph.all_nodes()]
    while pending:
        name = pending.pop()
        if name in model.functions and name not in found:
            found[name] = model.functions[name]
            pending += [n.op_identifier() for n in model.functions[name].all_nodes()]
    return list(found.values())


def _lift_weights(graph: ir.Graph) -> tuple[list[ir.Value], list[ir.TensorProtocol]]:
    """Makes inputs of the initializers that are weights, in order of first use: not sizes, axes and single numbers."""
    used = dict.fromkeys(v for n in graph.all_nodes() for v in n.inputs if v is not None and v.is_initializer())
    slots, tensors = [], []
    for value in used:
        tensor = value.const_value
        if tensor is None or value.graph is not graph or value.name is None or value.name not in graph.initializers:
            continue
        if tensor.dtype in _INDEX or tensor.size <= 1:
            continue
        graph.initializers.pop(value.name)
        value.const_value = None
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        graph.inputs.append(value)
        slots.append(value)
        tensors.append(tensor)
    return slots, tensors


def _rename(graph: ir.Graph, given: int) -> None:
    """Names that depend on structure alone."""
    outputs = {v: f"out_{k}" for k, v in enumerate(graph.outputs)}
    for k, value in enumerate(graph.inputs):
        value.name = f"in_{k}" if k < given else f"weight_{k - given}"
        value.metadata_props.clear()
    used = dict.fromkeys(v for n in graph.all_nodes() for v in n.inputs if v is not None and v.is_initializer())
    constants = [v for v in used if graph.initializers.get(v.name or "") is v]
    graph.initializers.clear()
    for k, value in enumerate(constants):
        value.name = f"constant_{k}"
        if value.const_value is not None:
            value.const_value = _named(value.const_value, value.name)
        graph.initializers[value.name] = value
    count = 0
    for k, node in enumerate(graph.all_nodes()):
        node.name = f"node_{k}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.name, count = outputs.get(value, f"value_{count}"), count + 1
    graph.name, graph.doc_string = "piece", None
    graph.metadata_props.clear()


def _named(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """A small tensor of its own under another name: the original belongs to the whole graph."""
    return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name) if tensor.dtype.bitwidth >= 8 else tensor


def _key(model: ir.Model, given: int) -> bytes:
    text = serde.serialize_model(model).SerializeToString(deterministic=True)
    return hashlib.sha256(text).digest()


__all__ = ["SMALL", "Piece", "make_piece", "stored_bytes"]
