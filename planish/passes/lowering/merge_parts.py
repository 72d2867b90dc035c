"""A merge of tokens with the residual sum in front of it and the layer norm behind it, as one operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array, dims_of, is_op
from planish.ir.schemas import DIALECT_DOMAIN
from planish.passes.canonicalize.editing import Editor
from planish.passes.lowering.weights import is_vector
from planish.passes.tokens.emitter import Emitter

_FUSED = {"MergeTokens": "AddMergeTokensNorm", "MergeTokensEnergy": "AddMergeTokensEnergyNorm"}
#: The widest tokens that the kernel has room for; they are read 8 numbers at a time.
_WIDEST, _PIECE = 1024, 8


@dataclass(frozen=True)
class MergeParts:
    """What becomes one operator.

    Attributes:
        merge: the operator of the dialect.
        x, added: summands of the tokens, (batch, tokens, width).
        added_shift: (width,), a third summand; None if there is none.
        norm: the layer norm of the merged tokens.
    """

    merge: ir.Node
    x: ir.Value
    added: ir.Value
    added_shift: ir.Value | None
    norm: ir.Node

    @classmethod
    def of(cls, node: ir.Node) -> MergeParts | None:
        """None where `node` is no merge, or has no sum that nothing else reads before it, or no norm behind it."""
        if node.domain != DIALECT_DOMAIN or node.op_type not in _FUSED:
            return None
        tokens, keys = node.inputs[:2]
        total = tokens.producer() if tokens is not None else None
        dims, columns = (dims_of(value) for value in (tokens, keys) if value is not None)
        if tokens is None or total is None or not is_op(total, "Add") or tokens.is_graph_output():
            return None
        if any(user is not node and not is_op(user, "Shape") for user, _ in tokens.uses()):
            return None
        if dims is None or not isinstance(dims[2], int) or dims[2] > _WIDEST or dims[2] % _PIECE:
            return None
        heads = node.attributes.get_int("heads", 1)
        if columns is None or not isinstance(columns[2], int) or columns[2] // heads % _PIECE:
            return None
        x, added = total.inputs
        if x is None or added is None or dims_of(x) != dims or dims_of(added) != dims:
            return None
        if _biased(x) is not None:
            x, added = added, x
        norms = [user for user, _ in node.outputs[0].uses() if is_op(user, "LayerNormalization")]
        norm = next((norm for norm in norms if _normalizes(norm, node.outputs[0])), None)
        if norm is None or len(norms) > 1:
            return None
        product, shift = _biased(added) or (added, None)
        return cls(node, x, product, shift, norm)

    def rewrite(self, editor: Editor, qkv: ir.Value | None, shift: np.ndarray | None) -> None:
        """Writes the operator, with keys of `qkv` plus `shift`, of which they are the second third, or as they are."""
        node, emit = self.merge, Emitter(editor, self.merge)
        tokens, keys, sizes = node.inputs
        assert tokens is not None and keys is not None and sizes is not None
        for user, place in list(tokens.uses()):
            if is_op(user, "Shape"):  # of the first merge, whose tokens have size 1
                user.replace_input_with(place, self.x)
        columns = (dims_of(keys) or (0,))[-1]
        heads = node.attributes.get_int("heads", 1)
        assert isinstance(columns, int)
        mean = np.zeros(columns // heads, np.float32)
        if shift is not None:
            mean = shift[columns : 2 * columns].astype(np.float64).reshape(heads, -1).mean(0).astype(np.float32)
        added_shift = self.added_shift
        if added_shift is None:
            width = (dims_of(self.x) or (0,))[-1]
            assert isinstance(width, int)
            added_shift = emit.constant(np.zeros(width, np.float16), "no_bias")
        epsilon = self.norm.attributes.get_float("epsilon", 1e-5)
        settings = {name: attribute.value for name, attribute in node.attributes.items()}
        settings |= {"heads": heads, "size": columns // heads, "first": 0 if qkv is None else columns}
        y, normed, merged, logs, index = emit.outputs(
            f"planish.{_FUSED[node.op_type]}", 5,
            self.x, self.added, added_shift, keys if qkv is None else qkv, emit.constant(mean, "key_bias"), sizes,
            *self.norm.inputs[1:3], epsilon=epsilon, **settings,
        )  # fmt: skip
        for new, old in zip((y, merged, index), node.outputs, strict=True):
            new.type, new.shape = old.type, old.shape
            editor.replace(old, new)
        normed.type, normed.shape = y.type, y.shape
        logs.type, logs.shape = merged.type, merged.shape
        editor.replace(self.norm.outputs[0], normed)
        for user, _ in list(merged.uses()):
            if is_op(user, "Log"):
                editor.replace(user.outputs[0], logs)


def _biased(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """A product and the bias that is added to it, where only this sum is read."""
    node = value.producer()
    if node is None or not is_op(node, "Add") or len(value.uses()) != 1:
        return None
    for product, bias in (tuple(node.inputs), tuple(node.inputs[::-1])):
        if product is not None and is_op(product.producer(), "MatMul") and is_vector(None, bias):
            array = constant_array(bias)
            if bias is not None and array is not None and array.shape == (dims_of(value) or (0,))[-1:]:
                return product, bias
    return None


def _normalizes(norm: ir.Node, value: ir.Value) -> bool:
    """Whether it is a layer norm of `value` over its last axis, with constants of its type, and no more is read."""
    weights = norm.inputs[1:3]
    if norm.inputs[0] is not value or len(weights) != 2 or norm.attributes.get_int("axis", -1) not in (-1, 2):
        return False
    if any(output.uses() or output.is_graph_output() for output in norm.outputs[1:]):
        return False
    return all(is_vector(None, weight) and weight is not None and weight.dtype == value.dtype for weight in weights)


__all__ = ["MergeParts"]
