"""Keys under which two nodes are equal if and only if they compute the same from the same values."""

from __future__ import annotations

import onnx_ir as ir

from planish.ir.hashing import tensor_digest

_COMMUTATIVE = frozenset(("Add", "Mul", "And", "Or", "Xor", "Equal", "BitwiseAnd", "BitwiseOr", "BitwiseXor"))


def node_key(node: ir.Node, numbers: dict[ir.Value, int] | None = None) -> object:
    """A hashable key of operator, attributes, inputs, and which outputs exist.

    Args:
        numbers: values defined inside a subgraph that is being compared, by order of definition; all other
            values are compared by identity.
    """
    inputs: list[object] = [_operand(v, numbers) for v in node.inputs]
    while inputs and inputs[-1] is None:  # trailing inputs that are left out
        inputs.pop()
    if node.op_type in _COMMUTATIVE and not node.domain and len(inputs) == 2:
        inputs.sort(key=repr)
    attributes = tuple((n, _attribute(node.attributes[n], numbers)) for n in sorted(node.attributes))
    return (node.domain, node.op_type, node.overload, tuple(inputs), attributes, len(node.outputs))


def _operand(value: ir.Value | None, numbers: dict[ir.Value, int] | None) -> object:
    if value is None:
        return None
    return ("inner", numbers[value]) if numbers and value in numbers else id(value)


def _attribute(attribute: ir.Attr, numbers: dict[ir.Value, int] | None) -> object:
    kind = attribute.type
    if attribute.ref_attr_name:
        return (kind, "reference", attribute.ref_attr_name)
    if kind == ir.AttributeType.GRAPH:
        return (kind, _graph_key(attribute.value, numbers))
    if kind == ir.AttributeType.GRAPHS:
        return (kind, tuple(_graph_key(g, numbers) for g in attribute.value))
    if kind == ir.AttributeType.TENSOR:
        return (kind, tensor_digest(attribute.value))
    if kind == ir.AttributeType.TENSORS:
        return (kind, tuple(tensor_digest(t) for t in attribute.value))
    value = attribute.value
    if isinstance(value, int | str | bytes):
        return (kind, value)
    # repr tells 0.0 from -0.0, which compare equal.
    return (kind, repr(value) if isinstance(value, float) else repr(list(value)) if _is_list(kind) else id(attribute))


def _is_list(kind: ir.AttributeType) -> bool:
    return kind in (ir.AttributeType.FLOATS, ir.AttributeType.INTS, ir.AttributeType.STRINGS)


def _graph_key(graph: ir.Graph, outer: dict[ir.Value, int] | None) -> object:
    numbers = dict(outer or {})
    for value in graph.inputs:
        numbers[value] = len(numbers)
    defaults = []
    for value in graph.initializers.values():
        numbers[value] = len(numbers)
        defaults.append(tensor_digest(value.const_value) if value.const_value is not None else None)
    nodes = []
    for node in graph:
        nodes.append(node_key(node, numbers))
        for value in node.outputs:
            numbers[value] = len(numbers)
    interface = tuple((str(v.type), str(v.shape)) for v in graph.inputs)
    outputs = tuple(_operand(v, numbers) for v in graph.outputs)
    return (interface, tuple(defaults), tuple(nodes), outputs)
