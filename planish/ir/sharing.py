"""One store of weights for the entries of a program: what two entries both hold is one tensor under one name."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.program import Program


def unify_weights(program: Program) -> int:
    """Makes initializers of several entries that have the same content one tensor under one name, in place.

    Weights that lie at the same place in memory are the same; others are compared byte by byte where dtype, shape
    and a sample of their bytes are equal. Initializers of one name and different contents get names of their own.

    Returns:
        the number of initializers that changed.
    """
    owners: dict[tuple[Any, ...], list[ir.Value]] = {}
    taken: dict[str, ir.TensorProtocol] = {}
    names = {value.name for model in program.entries.values() for value in _values(model.graph)}
    changed = 0
    for model in program.entries.values():
        graph = model.graph
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or value.is_graph_input() or tensor.dtype == ir.DataType.STRING:
                continue
            owner = _owner(owners, value, tensor)
            name = value.name or ""
            if owner is not None and owner.graph is not graph:
                changed += tensor is not owner.const_value or name != owner.name
                value.const_value = owner.const_value
                wanted = owner.name or ""
            else:
                owners.setdefault(_key(tensor), []).append(value)
                wanted = name
            wanted = _free(wanted, value, taken, names)
            if wanted != name:
                del graph.initializers[name]
                value.name = wanted
                graph.initializers[wanted] = value
                names.add(wanted)
            assert value.const_value is not None
            taken[wanted] = value.const_value
    return changed


def _free(wanted: str, value: ir.Value, taken: dict[str, ir.TensorProtocol], names: set[str | None]) -> str:
    """`wanted` unless another tensor, or another value of this graph, has that name."""
    graph = value.graph
    assert graph is not None
    held = taken.get(wanted)
    if wanted == value.name and (held is None or held is value.const_value):
        return wanted
    if held is value.const_value and wanted not in graph.initializers and not _in_graph(graph, wanted):
        return wanted
    return next(name for i in itertools.count(1) if (name := f"{wanted}.{i}") not in names)


def _in_graph(graph: ir.Graph, name: str) -> bool:
    return any(value.name == name for value in _values(graph))


def _owner(
    owners: dict[tuple[Any, ...], list[ir.Value]], value: ir.Value, tensor: ir.TensorProtocol
) -> ir.Value | None:
    """The one of the same content: that of the same name before others, since new norms are all alike."""
    known = owners.get(_key(tensor), ())
    return next((v for v in sorted(known, key=lambda v: v.name != value.name) if _equal(v.const_value, tensor)), None)


def _key(tensor: ir.TensorProtocol) -> tuple[Any, ...]:
    shape = tuple(int(d) for d in tensor.shape.numpy())
    array = tensor.numpy().reshape(-1) if tensor.size < 4096 else tensor.numpy().ravel(order="K")[:64]
    return tensor.dtype, shape, array[:64].tobytes()


def _equal(one: ir.TensorProtocol | None, other: ir.TensorProtocol) -> bool:
    if one is other:
        return True
    assert one is not None
    a, b = one.numpy(), other.numpy()
    if _place(a) == _place(b):
        return True
    return np.array_equal(_raw(a), _raw(b))


def _place(array: np.ndarray) -> tuple[Any, ...]:
    return array.__array_interface__["data"][0], array.strides, array.dtype, array.shape


def _raw(array: np.ndarray) -> np.ndarray:
    """The bytes of an array: NaN equals NaN, and 0.0 is not -0.0."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _values(graph: ir.Graph) -> list[ir.Value]:
    found = [value for node in graph.all_nodes() for value in node.outputs]
    for part in (graph, *graph.subgraphs()):
        found += [*part.inputs, *part.initializers.values()]
    return found
