"""bf16: the operands of products in bfloat16, on processors that have a unit for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from planish.ir import precision, processor
from planish.ir.errors import InputError
from planish.ir.graphs import constant_tensor, dims_of, is_op
from planish.ir.ledger import Declined
from planish.ir.ops import DIALECT_DOMAIN, dialect_op, import_functions
from planish.ir.ops.bf16_attention import IN_BF16
from planish.ir.ops.feed_forward import FUSED
from planish.ir.ops.linear import COMPUTE_TYPE, LINEAR, TRANSPOSED
from planish.ir.program import Program
from planish.passes.base import ApproximatePass, Decline, PassContext, PassResult
from planish.passes.canonicalize.editing import Editor
from planish.passes.canonicalize.eliminate_dead_code import EliminateDeadCode
from planish.passes.precision.bf16_choice import compute, is_candidate
from planish.passes.precision.sensitivity import Chosen, choose, measure, model_error
from planish.passes.registry import register

_BFLOAT16 = int(ir.DataType.BFLOAT16)
#: Fewer rows or columns than this have no use for a kernel.
_LEAST = 16


@register
@dataclass(frozen=True)
class Bf16(ApproximatePass):
    """Rounds the operands of products to bfloat16: those of weights, and those inside of attention.

    Sums stay float32, and so does everything else: norms, softmax, residuals. Works on the operators that the exact
    pipeline of a target with generated kernels writes, so it goes behind that. On processors without AMX nothing is
    changed: without a matrix unit bfloat16 gains nothing over float32.

    Attributes:
        attention: attention too.
        head: a head of the model that is the transpose of its embedding too.
        error: relative L2 of the model's outputs that may be lost on the calibration inputs, each entry by itself.
            Operators are then chosen by their own errors and by what they gain (`sensitivity`); None: all of them.
    """

    name: ClassVar[str] = "bf16"
    gives_up: ClassVar[str] = "Operands of matrix products keep 8 of the 24 bits of their mantissas."
    order: ClassVar[int] = 60
    lowered: ClassVar[bool] = True

    attention: bool = True
    head: bool = True
    error: float | None = None

    def __post_init__(self) -> None:
        if self.error is not None and not 0 < self.error < 1:
            raise InputError(f"error is {self.error:g}; it is a relative error between 0 and 1.")

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Raises InputError: `error` is given, and there is nothing to measure with."""
        if reason := unsupported(ctx):
            return PassResult(False, 0, [Declined(self.name, program.default_entry, reason)], [reason])
        if self.error is None:
            return self._change(program, ctx)
        chosen = self._choose(program, ctx, self.error)
        notes = chosen.notes(self.error)
        if not chosen.error <= self.error:
            reason = notes[-1]
            return PassResult(False, 0, [Declined(self.name, program.default_entry, reason)], notes[1:])
        result = self._change(program, ctx, chosen.names)
        return PassResult(result.modified, result.fired, result.declined, notes)

    def _change(self, program: Program, ctx: PassContext, names: frozenset[str] | None = None) -> PassResult:
        """Changes the nodes of these names, or all."""
        editor = Editor(program, self.name)
        declined: list[Declined] = []
        fired = 0
        for entry, model in program.entries.items():
            for node in list(model.graph.all_nodes()):
                try:
                    fired += (names is None or node.name in names) and self._node(editor, node)
                except Decline as decline:
                    declined.append(Declined(self.name, node.name or entry, decline.reason))
        if fired:
            store_rounded(program, editor)
            EliminateDeadCode().apply(program, ctx)
            for model in program.entries.values():
                import_functions(model)
        return PassResult(fired > 0, fired, declined)

    def _choose(self, program: Program, ctx: PassContext, limit: float) -> Chosen:
        candidates = []
        for entry, model in program.entries.items():
            nodes = [node for node in model.graph if self._may(node)]
            candidates += measure(program, entry, nodes, ctx, compute)
        lost = model_error(program, ctx, lambda copy, names: self._change(copy, ctx, names))
        return choose(candidates, limit, lost)

    def _may(self, node: ir.Node) -> bool:
        if is_op(node, "MatMul"):
            return self.head and tied_weight(node) is not None
        return is_candidate(node) and (self.attention or node.op_type not in IN_BF16)

    def _node(self, editor: Editor, node: ir.Node) -> bool:
        if node.domain == DIALECT_DOMAIN:
            if node.op_type in (*LINEAR, TRANSPOSED) and node.attributes.get_int(COMPUTE_TYPE, 1) != _BFLOAT16:
                node.attributes[COMPUTE_TYPE] = ir.AttrInt64(COMPUTE_TYPE, _BFLOAT16)
                if node.op_type == "LinearAdd":
                    _join(editor, node)
                return True
            if self.attention and node.op_type in IN_BF16:
                node.op_type = IN_BF16[node.op_type]
                return True
        return self.head and is_op(node, "MatMul") and _tied_head(editor, node)


def unsupported(ctx: PassContext) -> str:
    """Why a target has no use for bfloat16; empty if it has."""
    if ctx.target.name != "ort-cpu" or not ctx.target.kernels:
        return f"target '{ctx.target}' has no products in bfloat16; 'ort-cpu:kernels' has"
    support = precision.bf16(processor.features())
    return "" if support.fast else support.form


def store_rounded(program: Program, editor: Editor) -> None:
    """Keeps weights as bfloat16 that nothing but products in bfloat16 reads; entries go on sharing them."""
    places: dict[int, list[ir.Value]] = {}
    for graph in program.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
                places.setdefault(id(value.const_value), []).append(value)
    for values in places.values():
        tensor = values[0].const_value
        if tensor is None or not all(map(_only_rounded, values)):
            continue
        # Rounded to nearest even, as the kernel would do when it packs the weight.
        rounded = ir.tensor(np.ascontiguousarray(tensor.numpy()).astype(ml_dtypes.bfloat16))
        name = editor.names.fresh(f"{values[0].name}_bf16")
        for value in values:
            made = ir.Value(name=name, const_value=rounded)
            made.type, made.shape = ir.TensorType(rounded.dtype), ir.Shape(rounded.shape.numpy())
            assert value.graph is not None and value.name is not None
            value.graph.register_initializer(made)
            editor.replace(value, made)
            del value.graph.initializers[value.name]


def _only_rounded(value: ir.Value) -> bool:
    """Whether all users of an initializer round it."""
    if not value.uses() or value.is_graph_input() or value.is_graph_output():
        return False
    return all(
        node.domain == DIALECT_DOMAIN
        and node.attributes.get_int(COMPUTE_TYPE, 1) == _BFLOAT16
        and dialect_op(node.op_type).schema.inputs[index].name.endswith("weight")
        for node, index in value.uses()
    )


def _join(editor: Editor, last: ir.Node) -> None:
    """Makes one operator of a product with an activation and the product behind it: a feed-forward network.

    What is between them then never is in memory, and is rounded once.
    """
    hidden = last.inputs[0]
    first = hidden.producer() if hidden is not None else None
    if first is None or first.domain != DIALECT_DOMAIN or first.op_type not in FUSED or hidden is None:
        return
    if len(hidden.uses()) > 1 or hidden.is_graph_output() or first.graph is not last.graph:
        return
    if first.attributes.get_int(COMPUTE_TYPE, 1) != _BFLOAT16:
        return
    insert(editor, last, FUSED[first.op_type], [*first.inputs, *last.inputs[1:]], [first, last])
    editor.remove(first)


def insert(
    editor: Editor, old: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], sources: Sequence[ir.Node]
) -> None:
    """Puts an operator of the dialect, in bfloat16, in place of a node of one output."""
    graph, output = old.graph, old.outputs[0]
    assert graph is not None
    name = editor.names.fresh(f"{op_type}_planish")
    made = ir.node(op_type, list(inputs), {COMPUTE_TYPE: _BFLOAT16}, domain=DIALECT_DOMAIN, name=name)
    made.outputs[0].name = editor.names.fresh(f"{output.name}_planish")
    made.outputs[0].type, made.outputs[0].shape = output.type, output.shape
    graph.insert_before(old, made)
    editor.mark(made, sources)
    editor.replace(output, made.outputs[0])
    editor.remove(old)


def tied_weight(node: ir.Node) -> ir.Value | None:
    """The float32 matrix whose transpose a MatMul multiplies with, where that is one."""
    right = node.inputs[1]
    transpose = right.producer() if right is not None else None
    if transpose is None or not is_op(transpose, "Transpose"):
        return None
    weight = transpose.inputs[0]
    tensor = constant_tensor(weight) if weight is not None else None
    if tensor is None or len(tensor.shape) != 2 or tensor.dtype != ir.DataType.FLOAT:
        return None
    return weight if list(transpose.attributes.get_ints("perm", [1, 0])) == [1, 0] else None


def _tied_head(editor: Editor, node: ir.Node) -> bool:
    """A product with the transpose of a weight that something else reads: packed from the weight as it is."""
    x, right, weight = *node.inputs, tied_weight(node)
    tensor = constant_tensor(weight)
    transpose = right.producer() if right is not None else None
    if x is None or tensor is None or transpose is None:
        return False
    rows, depth = (int(n) for n in tensor.shape.numpy())
    if not dims_of(x) or min(rows, depth) < _LEAST:
        raise Decline(f"its weight is {depth} by {rows}; kernels pay from {_LEAST} on")
    assert isinstance(node.graph, ir.Graph)
    bias = editor.constant(node.graph, np.zeros(rows, np.float32), "no_bias")
    insert(editor, node, TRANSPOSED, [x, weight, bias], [node, transpose])
    if not transpose.outputs[0].uses() and not transpose.outputs[0].is_graph_output():
        editor.remove(transpose)
    return True
