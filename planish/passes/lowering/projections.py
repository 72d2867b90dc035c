"""Products of one value with constant weights, which can be one product with the weights side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_tensor, is_op
from planish.passes.lowering.weights import is_matrix, is_vector


@dataclass(frozen=True)
class Projection:
    """``x @ weight + bias`` with constants."""

    x: ir.Value
    weight: np.ndarray
    bias: np.ndarray | None

    @classmethod
    def of(cls, value: ir.Value) -> Projection | None:
        """What makes `value`, if it is a product with a weight, and a bias or none."""
        node, bias = value.producer(), None
        if is_op(node, "Add"):
            assert node is not None
            for product, other in (node.inputs, node.inputs[::-1]):
                if product is not None and is_op(product.producer(), "MatMul") and is_vector(None, other):
                    node, bias = product.producer(), constant_tensor(other)
                    break
        if node is None or not is_op(node, "MatMul") or not is_matrix(None, node.inputs[1]) or node.inputs[0] is None:
            return None
        weight = constant_tensor(node.inputs[1])
        assert weight is not None
        shift = None if bias is None else np.asarray(bias.numpy())
        if shift is not None and len(shift) != weight.shape.numpy()[1]:
            return None
        return cls(node.inputs[0], np.asarray(weight.numpy()), shift)


@dataclass(frozen=True)
class Packed:
    """``x @ weight + bias`` with the columns of several products."""

    x: ir.Value
    weight: np.ndarray
    bias: np.ndarray


def packed(projections: Sequence[Projection | None]) -> Packed | None:
    """The product that several products of one value are together."""
    found = [item for item in projections if item is not None]
    if len(found) < len(projections) or len({id(item.x) for item in found}) > 1:
        return None
    if len({(item.weight.shape[0], item.weight.dtype) for item in found}) > 1:
        return None
    zeros = [np.zeros(item.weight.shape[1], item.weight.dtype) for item in found]
    biases = [zero if item.bias is None else item.bias for item, zero in zip(found, zeros, strict=True)]
    return Packed(found[0].x, np.concatenate([item.weight for item in found], axis=1), np.concatenate(biases))


def as_one(op: Any, qkv: Sequence[ir.Value | None], together: Packed | None) -> list[ir.Value | None]:
    """The first three inputs of com.microsoft's GroupQueryAttention: one product in place of three, if there is one."""
    if together is None:
        return list(qkv)
    one = op.MatMul(together.x, op.initializer(together.weight, name="qkv_weight"))
    return [op.Add(one, op.initializer(together.bias, name="qkv_bias")) if together.bias.any() else one, None, None]
