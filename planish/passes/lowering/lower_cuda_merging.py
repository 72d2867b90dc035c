"""Encoders whose tokens merge, in half precision: attention and merging read one product of queries, keys, values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array, dims_of, is_op
from planish.ir.ops import import_functions
from planish.ir.program import Program
from planish.ir.schemas import DIALECT_DOMAIN
from planish.ir.target import Target
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.canonicalize.editing import Editor
from planish.passes.lowering.known_values import known_array
from planish.passes.lowering.merge_parts import MergeParts
from planish.passes.lowering.projections import Packed, Projection, packed
from planish.passes.registry import register
from planish.passes.tokens.emitter import Emitter

_HALF = ir.DataType.FLOAT16
#: Sizes of heads that kernels take.
_SIZES = (64, 128)


@register
@dataclass(frozen=True)
class LowerCudaMerging(ExactPass):
    """Writes merging and the attention around it as operators with kernels on GPUs, for ``ort-cuda:kernels``.

    The bias by size that merged tokens have in attention is a number for each key, and no mask. Queries, keys and
    values come from one product, and merging reads the keys there; residual sum, merge and layer norm are one pass.
    Short attention where nothing merges reads such a product too: ONNX Runtime's takes it apart in a pass of its own.

    Options:
        longest: so many tokens may attention without a mask have whose tokens do not merge; of more, ONNX Runtime's
            kernels are taken, which gain with the square of the tokens what that pass loses.
    """

    name: ClassVar[str] = "lower-cuda-merging"
    requires: ClassVar[tuple[str, ...]] = ("shapes",)

    longest: int = 256

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        editor = Editor(program, self.name)
        for model in program.entries.values():
            before = editor.fired
            for node in [node for node in model.graph if is_op(node, "Attention")]:
                try:
                    editor.fired += self._attention(node, editor, ctx.target)
                except Decline as decline:
                    editor.decline(node, decline.reason)
            if editor.fired > before:
                import_functions(model)
        return editor.result()

    def _attention(self, node: ir.Node, editor: Editor, target: Target) -> bool:
        keys, mask = node.inputs[1], node.inputs[3] if len(node.inputs) > 3 else None
        assert keys is not None
        mask = None if mask is not None and _hides_nothing(mask) else mask
        merges = [user for user, _ in keys.uses() if user is not node]
        merging = any(user.domain == DIALECT_DOMAIN for user in merges)
        bias = key_bias(mask, keys)
        if not merging and bias is None and (mask is not None or not self._is_short(node, target)):
            return False
        _check(node, target, mask if bias is None else None)
        parts = [MergeParts.of(user) for user in merges]
        together = None
        operands = [value for value in node.inputs[:3] if value is not None]
        users = {user for value in operands for user, _ in value.uses()} - {node, *merges}
        if all(parts) and not users and not any(value.is_graph_output() for value in operands):
            together = packed([Projection.of(value) for value in operands])
        emit = Emitter(editor, node)
        if together is None:
            if bias is None and not merging:
                return False  # it has a form without kernels of its own
            if bias is None:
                raise Decline("its projections are not products of one value, or something else reads its keys")
            y = _alone(emit, node, bias)
            qkv = shift = None
        else:
            qkv, shift, y = _packed(emit, node, together, bias)
        y.type, y.shape = node.outputs[0].type, node.outputs[0].shape
        editor.replace(node.outputs[0], y)
        for part in parts:
            if part is not None:
                part.rewrite(editor, qkv, shift)
        return True

    def _is_short(self, node: ir.Node, target: Target) -> bool:
        q, k = (dims_of(value) for value in node.inputs[:2] if value is not None)
        if q is None or q != k or len(q) != 3 or not isinstance(q[1], int) or q[1] > self.longest:
            return False
        causal = node.attributes.get_int("is_causal", 0) and q[1] > 1
        half = node.inputs[0] is not None and node.inputs[0].dtype == _HALF
        return target.name == "ort-cuda" and target.kernels and half and not causal


def key_bias(mask: ir.Value | None, keys: ir.Value) -> ir.Value | None:
    """What a mask adds to the scores of each key in all heads and queries, (batch, keys); None if it is no such mask.

    It is a value that was unsqueezed twice, and expanded to all queries, as `merge-tokens` writes it.
    """
    dims, value = dims_of(keys), mask
    while value is not None and is_op(value.producer(), "Cast", "Expand"):
        node = value.producer()
        assert node is not None
        if is_op(node, "Expand"):
            sizes = constant_array(node.inputs[1])
            if sizes is None or len(sizes) > 2:
                return None
        value = node.inputs[0]
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "Unsqueeze") or dims is None or len(dims) != 3:
        return None
    axes, found = constant_array(node.inputs[1]), node.inputs[0]
    if axes is None or sorted(axes.tolist()) != [1, 2] or found is None:
        return None
    source = found.producer()
    known = dims_of(found)
    if known is None and is_op(source, "Log", "Cast"):
        assert source is not None and source.inputs[0] is not None
        known = dims_of(source.inputs[0])
    return found if known == dims[:2] and None not in dims[:2] else None


def _hides_nothing(mask: ir.Value) -> bool:
    array = known_array(mask, 1 << 24)
    return array is not None and bool(array.all() if array.dtype == bool else not array.any())


def _check(node: ir.Node, target: Target, mask: ir.Value | None) -> None:
    if target.name != "ort-cuda" or not target.kernels:
        raise Decline(f"target '{target}' has no such kernels; 'ort-cuda:kernels' has")
    if any(value is None or value.dtype != _HALF for value in node.inputs[:3]):
        raise Decline("it is not float16, which alone has kernels")
    if mask is not None:
        raise Decline("its mask is not a number for each key")
    if any(value is not None for value in node.inputs[4:]) or len(node.outputs) > 1:
        raise Decline("it reads or writes a cache, or gives its scores")
    if node.attributes.get_float("softcap", 0.0) or node.attributes.get_int("is_causal", 0):
        raise Decline("it is causal, or its scores are capped")
    heads, kv_heads = (node.attributes.get_int(f"{name}_num_heads", 0) for name in ("q", "kv"))
    shapes = [dims_of(value) for value in node.inputs[:3] if value is not None]
    width = shapes[0][2] if shapes[0] is not None and len(shapes[0]) == 3 else None
    if not heads or heads != kv_heads or shapes[0] is None or shapes.count(shapes[0]) != 3:
        raise Decline("its queries, keys and values are not alike")
    if not isinstance(width, int) or width % heads or width // heads not in _SIZES:
        raise Decline(f"its heads are not of the sizes {' and '.join(map(str, _SIZES))}, which have kernels")


def _scale(node: ir.Node, heads: int) -> float:
    width = (dims_of(node.inputs[0]) or (0,))[-1] if node.inputs[0] is not None else 0
    assert isinstance(width, int)
    return node.attributes.get_float("scale", 1 / math.sqrt(width // heads))


def _alone(emit: Emitter, node: ir.Node, bias: ir.Value) -> ir.Value:
    heads = node.attributes.get_int("q_num_heads")
    settings = {"q_num_heads": heads, "kv_num_heads": heads, "scale": _scale(node, heads)}
    return emit.add("planish.FlashAttentionKeyBias", *node.inputs[:3], _float(emit, bias), **settings)


def _packed(
    emit: Emitter, node: ir.Node, together: Packed, bias: ir.Value | None
) -> tuple[ir.Value, np.ndarray, ir.Value]:
    """The product of queries, keys and values without its bias, the bias, and attention over both."""
    heads, query = node.attributes.get_int("q_num_heads"), node.inputs[0]
    assert query is not None
    weight, shift = together.weight, together.bias
    qkv = emit.add("MatMul", together.x, emit.constant(weight, "qkv_weight"))
    qkv.type = ir.TensorType(_HALF)
    qkv.shape = ir.Shape([*(dims_of(query) or ())[:2], weight.shape[1]])
    settings = {"num_heads": heads, "scale": _scale(node, heads)}
    operands = [qkv, emit.constant(shift, "qkv_bias")]
    if bias is None:
        return qkv, shift, emit.add("planish.PackedAttention", *operands, **settings)
    return qkv, shift, emit.add("planish.PackedAttentionKeyBias", *operands, _float(emit, bias), **settings)


def _float(emit: Emitter, value: ir.Value) -> ir.Value:
    if value.dtype in (None, ir.DataType.FLOAT):  # a logarithm that has no type yet is one of sizes
        return value
    made = emit.add("Cast", value, to=int(ir.DataType.FLOAT))
    made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    return made
