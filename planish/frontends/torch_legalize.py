"""What the ONNX exporter writes and ONNX Runtime does not take, put right without changing a value."""

from __future__ import annotations

import onnx_ir as ir


def legalize(model: ir.Model) -> int:
    """Makes an exported model one that ONNX Runtime runs. Returns the number of nodes that changed."""
    return 0
