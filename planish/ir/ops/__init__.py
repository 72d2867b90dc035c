"""The dialect: operators of the domain ``planish``.

Operators of other packages are found through the entry point group ``planish.ops``; each entry point is a
:class:`~planish.ir.ops.base.DialectOp`.
"""

from __future__ import annotations

import onnx_ir as ir

from planish.ir.errors import PlanishError, unknown
from planish.ir.ops.base import (
    DIALECT_VERSION,
    FLOATS,
    Attribute,
    DialectOp,
    InferenceError,
    OpCost,
    Operand,
    Schema,
    TensorInfo,
    broadcast_dims,
)
from planish.ir.ops.bf16_attention import BF16_ATTENTION
from planish.ir.ops.block_sparse_attention import BLOCK_SPARSE
from planish.ir.ops.block_sparse_step import BLOCK_SPARSE_STEP
from planish.ir.ops.cache_attention import CACHE_STEPS, QUANTIZE_CACHE
from planish.ir.ops.feed_forward import FEED_FORWARD
from planish.ir.ops.flash_attention import FLASH_ATTENTION
from planish.ir.ops.key_mask_attention import KEY_MASK_ATTENTION
from planish.ir.ops.linear import LINEAR, LINEAR_TRANSPOSED
from planish.ir.ops.merge_fused import MERGE_FUSED
from planish.ir.ops.merge_tokens import MERGE_TOKENS
from planish.ir.ops.norms import NORMS
from planish.ir.ops.packed_attention import PACKED_ATTENTION
from planish.ir.ops.quantized_linear import QUANTIZED_LINEAR
from planish.ir.ops.quantized_swiglu import QUANTIZED_SWIGLU
from planish.ir.ops.relational import is_relational, make_op
from planish.ir.ops.select_tokens import PRUNE_TOKENS, UNMERGE_TOKENS
from planish.ir.ops.swiglu import SWIGLU
from planish.ir.ops.window_attention import WINDOW_ATTENTION
from planish.ir.schemas import DIALECT_DOMAIN, OpRecord

__all__ = [
    "DIALECT",
    "DIALECT_DOMAIN",
    "DIALECT_VERSION",
    "FLOATS",
    "Attribute",
    "DialectOp",
    "InferenceError",
    "OpCost",
    "Operand",
    "Schema",
    "TensorInfo",
    "broadcast_dims",
    "dialect_op",
    "dialect_record",
    "import_functions",
    "infer_node",
    "register_op",
]

#: The registry: operator name → operator. Filled by `register_op`; plug-ins are read at the first miss.
DIALECT: dict[str, DialectOp] = {}
_plugins_read = False


def register_op(op: DialectOp) -> DialectOp:
    """Adds an operator to the dialect.

    Raises:
        PlanishError: another operator has this name.
    """
    if DIALECT.setdefault(op.name, op) is not op:
        raise PlanishError(f"the dialect already has an operator planish::{op.name}; choose another name.")
    return op


def dialect_op(name: str) -> DialectOp:
    """The operator of this name.

    Raises:
        InputError: there is none; the message suggests the closest name.
    """
    op = _find(name)
    if op is None:
        raise unknown("operator planish::", name, DIALECT)
    return op


def dialect_record(name: str) -> OpRecord | None:
    """What a node of this operator must look like; None for an unknown name."""
    op = _find(name)
    return None if op is None else op.record()


def infer_node(node: ir.Node) -> bool:
    """Adds to the outputs of a dialect node what its rule tells; returns whether anything was learned.

    Inputs that contradict the rule teach nothing here: to refuse them is for the verifier.
    """
    from planish.ir.infer import merge_shape

    op = _find(node.op_type)
    if op is None:
        return False
    try:
        results = op.infer_node(node)
    except InferenceError:
        return False
    learned = False
    for value, info in zip(node.outputs, results, strict=False):
        if value.type is None and info.dtype is not None:
            value.type = ir.TensorType(info.dtype)
            learned = True
        if info.dims is not None:
            learned |= merge_shape(value, info.dims)
    return learned


def import_functions(model: ir.Model) -> list[str]:
    """Adds to `model` the bodies of the dialect operators that it uses, so that any ONNX runtime can run it.

    Returns the names of the operators. Bodies that are there already stay.
    """
    nodes = {node.op_type: node for node in model.graph.all_nodes() if node.domain == DIALECT_DOMAIN}
    used = sorted(nodes)
    if not used:
        return []
    opset = model.graph.opset_imports.get("", 23)
    model.graph.opset_imports[DIALECT_DOMAIN] = DIALECT_VERSION
    model.ir_version = max(model.ir_version, 10)  # the first with types inside of functions
    for name in used:
        key = (DIALECT_DOMAIN, name, "")
        if key not in model.functions:
            model.functions[key] = dialect_op(name).function_of(nodes[name], opset)
    return used


def _find(name: str) -> DialectOp | None:
    global _plugins_read
    if name not in DIALECT and is_relational(name):
        return register_op(make_op(name))
    if name not in DIALECT and not _plugins_read:
        _plugins_read = True
        from importlib.metadata import entry_points

        for point in entry_points(group="planish.ops"):
            register_op(point.load())
    return DIALECT.get(name)


for _op in (
    KEY_MASK_ATTENTION,
    SWIGLU,
    *LINEAR.values(),
    LINEAR_TRANSPOSED,
    *FEED_FORWARD.values(),
    *NORMS.values(),
    *FLASH_ATTENTION.values(),
    *BF16_ATTENTION.values(),
    *BLOCK_SPARSE.values(),
    BLOCK_SPARSE_STEP,
    QUANTIZE_CACHE,
    *CACHE_STEPS.values(),
    *WINDOW_ATTENTION.values(),
    *PACKED_ATTENTION.values(),
    *QUANTIZED_LINEAR.values(),
    *QUANTIZED_SWIGLU.values(),
    *MERGE_TOKENS.values(),
    *MERGE_FUSED.values(),
    UNMERGE_TOKENS,
    PRUNE_TOKENS,
):
    register_op(_op)
