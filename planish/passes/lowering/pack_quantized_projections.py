"""The quantized projections of an attention as one product, which GroupQueryAttention takes as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_tensor
from planish.passes.base import Decline
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass

_MICROSOFT = "com.microsoft"
_X, _CODES, _SCALES, _ZEROS, _ORDER, _BIAS = range(6)


@register
@dataclass(frozen=True)
class PackQuantizedProjections(RewritePass):
    """Puts the weights in few bits of queries, keys and values side by side, for the CUDA provider.

    The products of keys and values have few channels, so that on a GPU each takes about as long as that of queries; one
    product of all does not. Entries that read the same weights read the same packed ones.
    """

    name: ClassVar[str] = "pack-quantized-projections"
    remove_nodes: ClassVar[bool] = False

    def pattern(self, op: Any, q: Any, k: Any, v: Any) -> Any:
        return op.GroupQueryAttention(
            q, k, v, _domain=_MICROSOFT, _outputs=3, _allow_other_inputs=True, _allow_other_attributes=True
        )

    def check(self, match: Match) -> None:
        if match.target.name != "ort-cuda":
            raise Decline(f"target '{match.target}' has other kernels; this is for 'ort-cuda'")
        products = _products(match)
        first = products[0]
        for node in products:
            if len(node.outputs[0].uses()) > 1 or node.outputs[0].is_graph_output():
                raise Decline(f"'{node.outputs[0].name}' is used otherwise too")
            if node.inputs[_X] is not first.inputs[_X]:
                raise Decline("queries, keys and values are products of different values")
            if _settings(node) != _settings(first):
                raise Decline("their weights differ in bits, blocks or columns")
            if _input(node, _ORDER) is not None:
                raise Decline("columns are in an order of their own (g_idx)")
            if any(v is not None and constant_tensor(v) is None for v in node.inputs[_CODES:]):
                raise Decline("a weight is computed when the model runs")
        if len({_input(node, _ZEROS) is None for node in products}) > 1:
            raise Decline("some of their weights have zeros for blocks, and some have not")

    def rewrite(self, op: Any, match: Match) -> Any:
        products, node = _products(match), match.root
        first = products[0]
        codes, scales, zeros = (_joined(products, index) for index in (_CODES, _SCALES, _ZEROS))
        given: list[Any] = [first.inputs[_X], op.initializer(codes, name="qkv_codes")]
        given.append(op.initializer(scales, name="qkv_scales"))
        biases = [_input(product, _BIAS) for product in products]
        if zeros is not None or any(biases):
            given.append(None if zeros is None else op.initializer(zeros, name="qkv_zeros"))
        if any(biases):
            given += [None, op.initializer(_bias(products), name="qkv_bias")]
        count = sum(product.attributes.get_int("N", 0) for product in products)
        one = op.MatMulNBits(*given, _domain=_MICROSOFT, **{**dict(first.attributes), "N": count})
        one.type = first.outputs[0].type
        dims = match.shape(first.inputs[_X])
        if dims is not None:
            one.shape = ir.Shape((*dims[:-1], count))
        made = op.GroupQueryAttention(
            one, None, None, *node.inputs[3:], _domain=_MICROSOFT, _outputs=3, **dict(node.attributes)
        )
        for new, old in zip(made, match.outputs, strict=True):
            new.type, new.shape = old.type, old.shape
        return made


def _products(match: Match) -> list[ir.Node]:
    """Of queries, keys and values."""
    found = []
    for name in "qkv":
        value = match[name]
        node = value.producer() if value is not None else None
        if node is None or (node.domain, node.op_type) != (_MICROSOFT, "MatMulNBits"):
            raise Decline("queries, keys and values are not all products with quantized weights")
        found.append(node)
    return found


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _settings(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items() if name != "N"}


def _joined(products: Sequence[ir.Node], index: int) -> np.ndarray | None:
    """Inputs one behind the other: rows of codes, and vectors of scales and of zeros."""
    if _input(products[0], index) is None:
        return None
    arrays = [constant_tensor(node.inputs[index]).numpy() for node in products]  # type: ignore[union-attr]
    return np.concatenate([array if index == _CODES else array.reshape(-1) for array in arrays])


def _bias(products: Sequence[ir.Node]) -> np.ndarray:
    """Biases one behind the other, zeros where there is none."""
    scales = constant_tensor(products[0].inputs[_SCALES])
    assert scales is not None
    found = []
    for node in products:
        tensor = constant_tensor(_input(node, _BIAS))
        size = node.attributes.get_int("N", 0)
        found.append(np.zeros(size, scales.dtype.numpy()) if tensor is None else tensor.numpy())
    return np.concatenate(found)
