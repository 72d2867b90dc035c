"""Shapes in numbers: every value of a graph at given sizes of the symbolic dimensions."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from planish.ir.infer import infer_proto
from planish.ir.input_sizes import evaluate_dim, symbol_sizes
from planish.ir.input_uses import uses_of
from planish.ir.ops import DIALECT, DIALECT_DOMAIN, InferenceError, TensorInfo
from planish.ir.spec import TensorSpec
from planish.ir.stripped import stripped_proto


class Sizes:
    """The tensors of one model in numbers.

    Sizes of symbols come from `dims`; symbols of the inputs that it leaves out get the sizes that made-up inputs
    have. Values whose size can not be told (data-dependent, behind operators without inference) are `unresolved`.
    """

    def __init__(self, model: ir.Model, dims: Mapping[str, int] | None = None) -> None:
        specs = [TensorSpec.of(v) for v in model.graph.inputs if not v.is_initializer()]
        uses = {v.name or "": uses_of(v, model) for v in model.graph.inputs if not v.is_initializer()}
        #: Symbol → size.
        self.dims = symbol_sizes(specs, uses, dims)
        self._known: dict[ir.Value, TensorInfo] = {}
        #: Names of values without a size in numbers.
        self.unresolved: list[str] = []
        self._infer(model)
        for graph in model.graphs():
            for value in (*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)):
                self._resolve(value)
        for node in model.graph.all_nodes():
            if node.domain == DIALECT_DOMAIN:
                self._dialect(node)
        for graph in model.graphs():
            for node in graph:
                self.unresolved += [v.name or "" for v in node.outputs if v not in self._known and v.uses()]

    def info(self, value: ir.Value | None) -> TensorInfo | None:
        """Type and shape in numbers; None for a left-out operand and for an unresolved value."""
        return None if value is None else self._known.get(value)

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        info = self.info(value)
        return None if info is None else info.sizes

    def nbytes(self, value: ir.Value | None) -> int:
        """Size in bytes; 0 where unknown."""
        info = self.info(value)
        return 0 if info is None else info.nbytes

    def _infer(self, model: ir.Model) -> None:
        """onnx's inference once more, with numbers for the symbols: it sees through reshapes then."""
        try:
            proto = stripped_proto(model)
            self._substitute_all(proto.graph)
            proto = infer_proto(proto, strict=False)
        except Exception:  # what onnx refuses is resolved from the declared shapes alone
            return
        self._collect(model.graph, proto.graph)

    def _substitute_all(self, graph: onnx.GraphProto) -> None:
        for item in (*graph.input, *graph.value_info, *graph.output):
            self._substitute(item.type)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    self._substitute_all(attribute.g)

    def _substitute(self, proto: onnx.TypeProto) -> None:
        if not proto.HasField("tensor_type"):
            return
        for dim in proto.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                size = evaluate_dim(dim.dim_param, self.dims)
                dim.Clear()
                if size is not None:
                    dim.dim_value = size

    def _collect(self, graph: ir.Graph, proto: onnx.GraphProto) -> None:
        infos = {info.name: info.type for info in (*proto.value_info, *proto.output)}
        for node in graph:
            for value in node.outputs:
                item = infos.get(value.name or "")
                if item is None or not item.HasField("tensor_type") or not item.tensor_type.HasField("shape"):
                    continue
                dims = item.tensor_type.shape.dim
                if item.tensor_type.elem_type and all(d.HasField("dim_value") for d in dims):
                    dtype = ir.DataType(item.tensor_type.elem_type)
                    self._known[value] = TensorInfo(dtype, tuple(d.dim_value for d in dims))
        for node, other in zip(graph, proto.node, strict=False):
            bodies = {a.name: a.g for a in other.attribute if a.HasField("g")}
            for name, attribute in node.attributes.items():
                if name in bodies and attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                    self._collect(attribute.value, bodies[name])

    def _resolve(self, value: ir.Value) -> None:
        if value in self._known:
            return
        tensor = value.const_value
        if tensor is not None:
            self._known[value] = TensorInfo(tensor.dtype, tuple(tensor.shape.numpy()))
            return
        if value.shape is None or value.dtype is None:
            return
        dims = [d if isinstance(d, int) else self._size(d.value) for d in value.shape]
        if all(d is not None for d in dims):
            self._known[value] = TensorInfo(value.dtype, tuple(dims))

    def _size(self, symbol: str | None) -> int | None:
        return None if symbol is None else evaluate_dim(symbol, self.dims)

    def _dialect(self, node: ir.Node) -> None:
        op = DIALECT.get(node.op_type)
        if op is None or all(v in self._known for v in node.outputs):
            return
        inputs = [self.info(v) for v in node.inputs]
        inputs += [None] * (len(op.schema.inputs) - len(inputs))
        if any(i is None and v is not None for i, v in zip(inputs, node.inputs, strict=False)):
            return
        try:
            results = op.infer(inputs, op.attributes_of(node))
        except InferenceError:
            return
        for value, info in zip(node.outputs, results, strict=False):
            if info.dims is not None and info.dtype is not None and all(isinstance(d, int) for d in info.dims):
                self._known.setdefault(value, info)
