"""Rewrites of a model message into forms that onnx_ir can hold, each of which keeps the meaning."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs, numpy_helper

from planish.frontends.onnx_tensors import MAX_SPARSE_BYTES, MAX_SPARSE_RATIO, dims_of
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.external import tensor_bytes
from planish.ir.serialize import TYPE_KEY

_KNOWN_DOMAINS = {"com.microsoft": 1, "ai.onnx.ml": defs.onnx_ml_opset_version(), "ai.onnx.preview.training": 1}


def normalize_proto(proto: onnx.ModelProto) -> list[str]:
    """Sparse to dense, duplicates of initializers dropped, types onnx_ir lacks kept aside; returns notes."""
    notes: list[str] = []
    if proto.training_info:
        del proto.training_info[:]
        notes.append("Training information was dropped.")
    for graph in _graphs(proto):
        _densify(graph, notes)
        _drop_duplicates(graph, notes)
        for info in (*graph.input, *graph.output, *graph.value_info):
            if not _representable(info.type):
                info.metadata_props.add(key=TYPE_KEY, value=info.type.SerializeToString().hex())
                info.ClearField("type")
        for info in (*graph.input, *graph.output, *graph.value_info):
            _clear_negative_sizes(info)
        for info in (*graph.output, *graph.value_info):
            if info.type.HasField("tensor_type") and not info.type.tensor_type.elem_type:
                info.ClearField("type")  # a shape of nothing; the type is inferred
    for function in proto.functions:
        for info in function.value_info:
            if not _representable(info.type):
                info.ClearField("type")
    _import_domains(proto, notes)
    return notes


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    todo = [proto.graph]
    nodes = [n for f in proto.functions for n in f.node]
    while todo or nodes:
        if todo:
            graph = todo.pop()
            yield graph
            nodes += graph.node
        while nodes:
            for attribute in nodes.pop().attribute:
                if attribute.HasField("g"):
                    todo.append(attribute.g)
                todo += attribute.graphs


def _densify(graph: onnx.GraphProto, notes: list[str]) -> None:
    for sparse in graph.sparse_initializer:
        graph.initializer.append(_dense(sparse, sparse.values.name))
    if graph.sparse_initializer:
        notes.append(f"{len(graph.sparse_initializer)} sparse initializers became dense.")
        del graph.sparse_initializer[:]
    for node in graph.node:
        for attribute in node.attribute:
            if not attribute.HasField("sparse_tensor") and not attribute.sparse_tensors:
                continue
            if node.op_type != "Constant" or attribute.name != "sparse_value":
                raise UnsupportedError(f"node '{node.name or node.op_type}' has a sparse tensor as an attribute.")
            dense = _dense(attribute.sparse_tensor, "")
            attribute.Clear()
            attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
            attribute.t.CopyFrom(dense)


def _dense(sparse: onnx.SparseTensorProto, name: str) -> onnx.TensorProto:
    values, indices = sparse.values, sparse.indices
    shape = dims_of(onnx.TensorProto(name=name, dims=sparse.dims, data_type=values.data_type))
    size = tensor_bytes(ir.DataType(values.data_type), shape)
    limit = max(MAX_SPARSE_BYTES, MAX_SPARSE_RATIO * values.ByteSize())
    if size > limit:
        raise UnsupportedError(f"sparse tensor '{name}' is {size} bytes when dense; limit {limit}.")
    if onnx.TensorProto.EXTERNAL in (values.data_location, indices.data_location):
        raise UnsupportedError(f"sparse tensor '{name}' has external data.")
    for tensor in (values, indices):
        dims_of(tensor)
    data, where = numpy_helper.to_array(values), numpy_helper.to_array(indices)
    if where.dtype != np.int64 or data.ndim != 1 or where.ndim not in (1, 2) or len(where) != len(data):
        raise InputError(f"sparse tensor '{name}' has malformed indices.")
    if where.ndim == 2:
        if where.shape[1] != len(shape) or ((where < 0) | (where >= np.array(shape))).any():
            raise InputError(f"sparse tensor '{name}' has indices outside its shape {list(shape)}.")
        where = np.ravel_multi_index(tuple(where.T), shape) if len(where) else where[:, 0]
    elif ((where < 0) | (where >= math.prod(shape))).any():
        raise InputError(f"sparse tensor '{name}' has indices outside its shape {list(shape)}.")
    dense = np.zeros(math.prod(shape), data.dtype)
    dense[where] = data
    return numpy_helper.from_array(dense.reshape(shape), name)


def _drop_duplicates(graph: onnx.GraphProto, notes: list[str]) -> None:
    last = {tensor.name: index for index, tensor in enumerate(graph.initializer)}
    if len(last) == len(graph.initializer):
        return
    # ONNX Runtime takes the last one of a name and warns; so do we.
    for index in reversed(range(len(graph.initializer))):
        if last[graph.initializer[index].name] != index:
            notes.append(f"Initializer '{graph.initializer[index].name}' was there twice; the last one counts.")
            del graph.initializer[index]


def _clear_negative_sizes(info: onnx.ValueInfoProto) -> None:
    """A size of -1 is how some converters write one that is unknown, and how runtimes read it."""
    if info.type.HasField("tensor_type"):
        for dim in info.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value < 0:
                dim.ClearField("dim_value")


def rename_shadowing(body: ir.Graph) -> int:
    """Renames values of subgraphs that have the name of a value around them, in place; returns how many.

    ONNX forbids such names and runtimes take the inner value; passes move nodes across scopes, so that names must
    tell values apart.
    """
    taken = {name for graph in (body, *body.subgraphs()) for name in _names(graph)}
    renamed = 0
    todo: list[tuple[ir.Graph, tuple[set[str], ...]]] = [(body, ())]
    while todo:
        graph, outer = todo.pop()
        for value in (*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)):
            if value.name and any(value.name in names for names in outer):
                stem, number = value.name, 1
                while (name := f"{stem}_{number}") in taken:
                    number += 1
                value.name = name
                taken.add(name)
                renamed += 1
        scopes = (*outer, _names(graph))
        todo += [(sub, scopes) for node in graph for sub in _subgraphs(node)]
    return renamed


def _names(graph: ir.Graph) -> set[str]:
    values = (*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs))
    return {value.name for value in values if value.name}


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.value
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from attribute.value


def _representable(kind: onnx.TypeProto) -> bool:
    """False for maps, opaque types and containers of them, which onnx_ir has no class for."""
    field = kind.WhichOneof("value")
    if field in ("map_type", "opaque_type"):
        return False
    if field in ("sequence_type", "optional_type"):
        return _representable(getattr(kind, field).elem_type)
    return True


def _import_domains(proto: onnx.ModelProto, notes: list[str]) -> None:
    have = {e.domain for e in proto.opset_import}
    used = {n.domain for g in _graphs(proto) for n in g.node}
    for domain in sorted(used - have):
        if domain in _KNOWN_DOMAINS:  # as ONNX Runtime does
            proto.opset_import.add(domain=domain, version=_KNOWN_DOMAINS[domain])
            notes.append(f"The import of domain '{domain}' was missing.")
