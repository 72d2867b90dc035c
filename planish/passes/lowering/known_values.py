"""Values that follow from constants, and are too large or not exact enough to be folded: masks, tables of angles."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array, is_op
from planish.passes.base import Decline
from planish.passes.canonicalize.kernels import evaluate, has_kernel

_DEPTH = 16


def known_array(value: ir.Value | None, limit: int, depth: int = _DEPTH) -> np.ndarray | None:
    """The contents of a value that depends on constants alone, of at most `limit` elements; else None.

    Cosines and sines differ from the runtime's by rounding.
    """
    array = constant_array(value, limit)
    node = value.producer() if value is not None else None
    if array is not None or node is None or depth == 0 or node.domain or len(node.outputs) > 1:
        return array
    turned = is_op(node, "Cos", "Sin")
    if not turned and not has_kernel(node.op_type):
        return None
    operands = [None if item is None else known_array(item, limit, depth - 1) for item in node.inputs]
    if any(item is not None and array is None for item, array in zip(node.inputs, operands, strict=True)):
        return None
    if turned:
        (angles,) = operands
        assert angles is not None
        return np.asarray(np.cos(angles) if node.op_type == "Cos" else np.sin(angles))
    try:
        found = np.asarray(evaluate(node, operands, 8 * limit)[0])
    except (Decline, ValueError, TypeError, IndexError, KeyError):
        return None
    return found if found.size <= limit else None
