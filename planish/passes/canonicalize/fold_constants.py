"""fold-constants: computes what depends on constants alone, within a bound on memory.

The size of a result is found out before it is computed, so a small model that expands to gigabytes stays small.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_tensor, is_op
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.canonicalize.editing import Editor, walk
from planish.passes.canonicalize.inlining import inline_branch
from planish.passes.canonicalize.kernels import evaluate, has_kernel
from planish.passes.registry import register

_MIN_OPSET = 9  # before, Constant knows few types, and elementwise operators broadcast by an attribute
_QUANTIZERS = ("DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear")


@register
@dataclass(frozen=True)
class FoldConstants(ExactPass):
    """Replaces nodes whose inputs are all constant by their value, and an If with a constant condition by its branch.

    Only operators that numpy computes bit for bit like the runtime are folded. Random operators, quantized
    weights (their float form is four times as large) and results over the bounds are left to the runtime.

    Attributes:
        max_bytes: how many bytes larger than the constants it frees a result may be.
        max_growth: how many bytes all results together may add to the program.
    """

    name: ClassVar[str] = "fold-constants"

    max_bytes: int = 1 << 20
    max_growth: int = 64 << 20

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        roots = {model.graph: "main" for model in program.entries.values()}
        run = _Run(Editor(program, self.name), self.max_bytes, self.max_growth, roots)
        for model in program.entries.values():
            if model.opset_imports.get("", _MIN_OPSET) >= _MIN_OPSET:
                run.graph(model.graph)
        return run.editor.result()


@dataclass
class _Folded:
    names: list[str]
    tensors: list[ir.TensorProtocol]
    operands: list[ir.TensorProtocol | None]  # kept, so that their ids in the key stay taken


@dataclass
class _Run:
    editor: Editor
    max_bytes: int
    growth_left: int
    # The main graphs of all entries count as one place: what two entries fold alike stays one shared weight.
    roots: dict[ir.Graph, str] = field(default_factory=dict)
    made: dict[tuple[object, ...], _Folded] = field(default_factory=dict)

    def graph(self, graph: ir.Graph) -> None:
        for node in walk(graph):
            self._visit(node)

    def _visit(self, node: ir.Node) -> None:
        if node.domain or not node.inputs:
            return
        try:
            if node.op_type == "If":
                self._branch(node)
            elif self._is_constant(node):
                self._fold(node)
                self.editor.fired += 1
        except Decline as decline:
            self.editor.decline(node, decline.reason)

    def _branch(self, node: ir.Node) -> None:
        tensor = constant_tensor(node.inputs[0])
        if tensor is None:
            return
        branch = "then_branch" if bool(tensor.numpy().ravel()[0]) else "else_branch"
        moved = inline_branch(node, branch, self.editor)
        self.editor.fired += 1
        for inner in moved:  # what was an output of the branch may now be folded
            self._visit(inner)

    def _is_constant(self, node: ir.Node) -> bool:
        if any(v is not None and constant_tensor(v) is None for v in node.inputs) or not any(node.inputs):
            return False
        if node.op_type in _QUANTIZERS:
            raise Decline("quantized constants stay quantized: their float form is larger")
        if not has_kernel(node.op_type):
            raise Decline(f"{node.op_type} has no kernel that is exact to the last bit")
        # Left by an earlier run: an output of the graph needs a node of its own.
        return not is_op(node, "Identity") or not node.outputs[0].is_graph_output()

    def _fold(self, node: ir.Node) -> None:
        if any(v.is_graph_output() for v in node.outputs):
            self._fold_output(node)
            return
        graph = node.graph
        assert graph is not None
        tensors = [constant_tensor(v) for v in node.inputs]
        key = (self.roots.get(graph, graph), *_key(node, tensors))
        if key not in self.made:
            names = [self.editor.names.fresh(v.name or node.op_type) for v in node.outputs]
            self.made[key] = _Folded(names, self._evaluate(node, tensors), tensors)
        folded = self.made[key]
        for value, name, tensor in zip(node.outputs, folded.names, folded.tensors, strict=True):
            new = graph.initializers.get(name)
            if new is None:
                new = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype))
                new.shape = ir.Shape(tensor.shape.numpy())
                graph.register_initializer(new)
            self.editor.replace(value, new)
        operands = dict.fromkeys(v for v in node.inputs if v is not None)
        self.editor.remove(node)
        for value in operands:
            _drop_unused(value, self.editor)

    def _fold_output(self, node: ir.Node) -> None:
        """An output of the graph keeps a producer: a Constant node."""
        if len(node.outputs) != 1:
            raise Decline("a node of several outputs makes an output of the graph")
        tensor = self._evaluate(node, [constant_tensor(v) for v in node.inputs])[0]
        new = self.editor.node(node, "Constant", [], {"value": tensor}, like=node.outputs[0])
        self.editor.replace(node.outputs[0], new)
        self.editor.remove(node)

    def _evaluate(self, node: ir.Node, tensors: list[ir.TensorProtocol | None]) -> list[ir.TensorProtocol]:
        if any(t is not None and t.dtype == ir.DataType.STRING for t in tensors):
            raise Decline("strings are not folded")
        operands = {v: t for v, t in zip(node.inputs, tensors, strict=True) if v is not None and t is not None}
        freed = sum(t.nbytes for v, t in operands.items() if _dies(v))
        limit = freed + min(self.max_bytes, self.growth_left)
        arrays = evaluate(node, [None if t is None else np.asarray(t.numpy()) for t in tensors], limit)
        for value, array in zip(node.outputs, arrays, strict=True):
            found = ir.DataType.from_numpy(array.dtype)
            if value.dtype is not None and value.dtype != found:
                raise Decline(f"the result has type {found.name}, the graph says {value.dtype.name}")
        self.growth_left -= max(0, sum(a.nbytes for a in arrays) - freed)
        return [ir.tensor(np.ascontiguousarray(a).reshape(a.shape)) for a in arrays]


def _dies(value: ir.Value) -> bool:
    """Whether the constant is gone once its one user is gone."""
    return len(value.consumers()) == 1 and not value.is_graph_output()


def _drop_unused(value: ir.Value, editor: Editor) -> None:
    if value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    producer = value.producer()
    if producer is not None:
        editor.remove(producer)
    elif value.is_initializer():
        assert value.graph is not None and value.name is not None
        del value.graph.initializers[value.name]


def _key(node: ir.Node, tensors: list[ir.TensorProtocol | None]) -> tuple[object, ...]:
    attributes = tuple(sorted((n, repr(a.value)) for n, a in node.attributes.items()))
    return (node.op_type, attributes, tuple(None if t is None else id(t) for t in tensors))
