"""Merging of tokens on GPUs: planish::MergeTokens and its relatives, by our kernel."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from planish.runtime.relax.cuda.assemble import Code
from planish.runtime.relax.operand import Operand
from planish.runtime.relax.translator import Translator, attribute, emits

#: As the kernel's macro VALUE counts them.
_DTYPES = ("float16", "bfloat16", "float32")
_SOURCES = ("merge_tokens.cu", "merge_energy.cu")


@emits("MergeTokens", "MergeTokensMaxNorm", "MergeTokensEnergy", "MergeTokensEnergyMaxNorm", domain="planish")
def _merge(t: Translator, node: ir.Node) -> list[Operand]:
    from planish.runtime.relax.cuda.device import CudaDevice

    x, keys, sizes = t.inputs(node)
    device = t.device
    if not isinstance(device, CudaDevice) or x is None or keys is None or sizes is None:
        t.refuse(node, "there is no code for it")
    t.require_float(node, x, keys)
    batch, tokens, width = x.dims
    keys = t.match(keys, [batch, tokens, keys.dims[2]])
    heads, protect = int(attribute(node, "heads", 1)), int(attribute(node, "protected", 0))
    if not isinstance(keys.dims[2], int):
        t.refuse(node, "its keys have no fixed size")
    count = _count(t, node, tokens, protect)
    energy, value = int("Energy" in node.op_type), _DTYPES.index(x.dtype)
    defines = (("FUSED", 0), ("VALUE", value))
    device.ours.add(Code("merge", energy, 0, value, _SOURCES[energy], defines))
    size = -(-keys.dims[2] // heads // 32) * 32
    # As merge_scratch of launch_merge.h, or more.
    scratch = t.product([batch, t.plain(t.dim(tokens) * (4 * size + 16) + 32)])
    kept = [batch, t.plain(t.dim(tokens) - t.dim(count))]
    types = [
        t.type([*kept, width], x.dtype),
        t.type(kept, "float32"),
        t.type([batch, tokens], "int64"),
        t.type([scratch], "uint8"),
    ]
    tensors = [t.tensor(x), t.tensor(keys), t.tensor(t.match(sizes, [batch, tokens]))]
    margin, alpha = float(attribute(node, "margin", 0.0)), float(attribute(node, "alpha", 1.0))
    numbers: list[Any] = [heads, protect, energy, int("MaxNorm" in node.op_type), margin, alpha]
    made = device.packed(t, "planish_merge_tokens", [*tensors, *numbers], types)
    y, merged, index = (t.emit(t.relax.TupleGetItem(made, place)) for place in range(3))
    return [
        Operand(x.dtype, [*kept, width], y),
        Operand("float32", kept, merged),
        Operand("int64", [batch, tokens], index),
    ]


def _count(t: Translator, node: ir.Node, tokens: Any, protect: int) -> Any:
    """How many tokens go; also of symbolic sizes."""
    from planish.ir.ops.merge_reference import merged_count

    r, ratio = int(attribute(node, "r", 0)), float(attribute(node, "ratio", 0.0))
    if isinstance(tokens, int):
        return merged_count(tokens, r, ratio, protect)
    if ratio:
        t.refuse(node, "a share of a number of tokens that is not known")
    tir, zero = t.tir, t.tir.IntImm("int64", 0)
    return t.plain(tir.min(tir.IntImm("int64", r), tir.floordiv(tir.max(t.dim(tokens) - protect, zero), 2)))


@emits("UnmergeTokens", domain="planish")
def _unmerge(t: Translator, node: ir.Node) -> Operand:
    y, index = t.inputs(node)
    assert y is not None and index is not None
    batch, kept, width = y.dims
    index = t.match(index, [batch, index.dims[1]])
    tir, last, zero = t.tir, t.dim(kept) - 1, t.tir.IntImm("int64", 0)

    def element(i: Any, rows: Any, at: Any) -> Any:
        return rows(i[0], tir.max(tir.min(at(i[0], i[1]), last), zero), i[2])

    dims = [batch, index.dims[1], width]
    return Operand(y.dtype, dims, t.force(t.compute("unmerge", [t.tensor(y), t.tensor(index)], element, dims, y.dtype)))
