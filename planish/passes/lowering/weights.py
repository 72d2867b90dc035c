"""What rules ask of the constants beside a product; checks of pattern variables."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from planish.ir.graphs import constant_tensor


def is_matrix(_: Any, value: ir.Value | None) -> bool:
    """Whether a value is a constant of two axes: a weight."""
    tensor = constant_tensor(value)
    return tensor is not None and len(tensor.shape) == 2


def is_vector(_: Any, value: ir.Value | None) -> bool:
    """Whether a value is a constant of one axis with more than one number: a bias."""
    tensor = constant_tensor(value)
    return tensor is not None and len(tensor.shape) == 1 and tensor.size > 1
