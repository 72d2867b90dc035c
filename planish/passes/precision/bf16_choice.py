"""What `bf16` computes in bfloat16 under an error budget of its own; see `sensitivity`."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.ir.ops import DIALECT_DOMAIN, dialect_op
from planish.ir.ops.base import TensorInfo
from planish.ir.ops.bf16_attention import IN_BF16
from planish.ir.ops.linear import COMPUTE_TYPE, LINEAR, TRANSPOSED
from planish.passes.precision.sensitivity import ROWS, Arrays

Array = npt.NDArray[np.generic]


def is_candidate(node: ir.Node) -> bool:
    """Whether `bf16` may change a node of the dialect."""
    if node.domain != DIALECT_DOMAIN:
        return False
    return node.op_type in IN_BF16 or (
        node.op_type in (*LINEAR, TRANSPOSED) and node.attributes.get_int(COMPUTE_TYPE, 1) == 1
    )


def compute(node: ir.Node, inputs: Arrays) -> tuple[Array, Array, float]:
    """The output of a candidate exactly and with rounded operands, on some of the rows, and the operations of all."""
    if node.domain != DIALECT_DOMAIN:
        x, weight = inputs[0], inputs[1]
        rows = x.reshape(-1, x.shape[-1])[:ROWS].astype(np.float64)
        gain = 2.0 * x.size * weight.shape[1]
        return rows @ weight.astype(np.float64), _rounded(rows) @ _rounded(weight), gain
    op = dialect_op(node.op_type)
    attributes = op.attributes_of(node)
    infos = [TensorInfo(ir.DataType.from_numpy(a.dtype), a.shape) for a in inputs]
    gain = float(op.flops(infos, op.infer(infos, attributes), attributes))
    if node.op_type in IN_BF16:
        # One sequence of a batch; a mask may be the same for all.
        some = [array[:1] for array in inputs]
        (exact,) = op.reference(*some, **attributes)
        (low,) = dialect_op(IN_BF16[node.op_type]).reference(*some, **attributes)
        return exact, low, gain
    names = [operand.name for operand in op.schema.inputs]
    some = [
        a.reshape(-1, a.shape[-1])[:ROWS] if name in ("x", "residual") else a
        for name, a in zip(names, inputs, strict=True)
    ]
    (exact,) = op.reference(*some, **attributes)
    (low,) = op.reference(*some, **attributes | {COMPUTE_TYPE: int(ir.DataType.BFLOAT16)})
    return exact, low, gain


def _rounded(array: Array) -> npt.NDArray[np.float64]:
    return np.asarray(array, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
