"""What is read off graphs everywhere: operators, dimensions, constants, and the graphs inside of a node."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

#: Attributes of Constant that hold its value, with the dtype of those that are numbers.
_CONSTANT_DTYPES: dict[str, type | None] = {
    "value": None,
    "value_string": None,
    "value_strings": None,
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_float": np.float32,
    "value_floats": np.float32,
}


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether `node` is one of these operators of the standard domain."""
    return node is not None and not node.domain and node.op_type in op_types


def dims_of(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    """The shape of `value` as ints, names of symbols and Nones; None if the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def subgraphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that are attributes of `node`."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.value
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.value


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a value that no caller can change: an initializer that is not also an input, or a Constant.

    Unlike onnx_ir's own function it takes a sparse Constant for unknown, and leaves the names of tensors alone.
    """
    if value is None or value.is_graph_input():
        return None
    node = value.producer()
    if node is None:
        return value.const_value
    return constant_node_tensor(node) if is_op(node, "Constant") else None


def constant_node_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node; None for a sparse one, for a reference to an attribute of a function."""
    if len(node.attributes) != 1:
        return None
    name, attribute = next(iter(node.attributes.items()))
    if attribute.is_ref() or name not in _CONSTANT_DTYPES:
        return None
    if name == "value":
        return attribute.as_tensor()
    if name in ("value_string", "value_strings"):
        items = [attribute.value] if name == "value_string" else list(attribute.value)
        shape = ir.Shape([] if name == "value_string" else [len(items)])
        return ir.StringTensor([s.encode() if isinstance(s, str) else s for s in items], shape=shape)
    return ir.tensor(np.array(attribute.value, dtype=_CONSTANT_DTYPES[name]))


def constant_array(value: ir.Value | None, limit: int = 1 << 16) -> np.ndarray | None:
    """The contents of a constant of at most `limit` elements, or None."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.size > limit:
        return None
    return np.asarray(tensor.numpy())
