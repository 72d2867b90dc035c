"""planish::MergeTokens and its relatives: similar tokens of a sequence become one.

=========================  ================================================================================
MergeTokens                bipartite soft matching; a merged token is the mean of its members by size
MergeTokensMaxNorm         the same, scaled to the norm of the longest member
MergeTokensEnergy          tokens with many similar ones are paired; the mean by size
MergeTokensEnergyMaxNorm   the same, scaled to the norm of the longest member
=========================  ================================================================================

Token merging (ToMe): Bolya et al. 2023, arXiv:2210.09461. Energy (PiToMe): Tran et al. 2024, arXiv:2405.16148.
Norms (ToFu): Kim et al. 2024, arXiv:2312.01026. An operator each, since the body of a function has no choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, Dim, InferenceError, Operand, Schema, TensorInfo, same_dim
from planish.ir.ops.merge_bodies import merge_body
from planish.ir.ops.merge_reference import merged_count, reference

FLOAT = frozenset({ir.DataType.FLOAT})
INDEX = frozenset({ir.DataType.INT64})
_INT, _FLOAT = ir.AttributeType.INT, ir.AttributeType.FLOAT
_COMMON = (
    Attribute("r", _INT, default=0),
    Attribute("ratio", _FLOAT, default=0.0),
    Attribute("protected", _INT, default=0),
    Attribute("heads", _INT, default=1),
)
ENERGY = (Attribute("margin", _FLOAT, default=0.0), Attribute("alpha", _FLOAT, default=1.0))
# GPUs have kernels in half precision; sizes are counts, and similarities and means are float32 in the bodies too.
TOKENS = FLOAT | {ir.DataType.FLOAT16}
_INPUTS = (Operand("x", TOKENS), Operand("keys", TOKENS), Operand("sizes", FLOAT, "S"))
_OUTPUTS = (Operand("y", TOKENS), Operand("merged_sizes", FLOAT, "S"), Operand("index", INDEX, "I"))


def dims3(info: TensorInfo | None, name: str, rank: int = 3) -> tuple[Dim, ...]:
    """The dims of an operand that must have this rank; Nones where they are unknown."""
    if info is None or info.dims is None:
        return (None,) * rank
    if len(info.dims) != rank:
        raise InferenceError(f"{name} has rank {len(info.dims)}; it must have {rank}")
    return info.dims


def _infer(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
    x, keys, sizes = dims3(inputs[0], "x"), dims3(inputs[1], "keys"), dims3(inputs[2], "sizes", 2)
    batch, tokens = x[:2]
    for other, name in ((keys, "keys"), (sizes, "sizes")):
        batch = same_dim(batch, other[0], f"the batch of x and {name}")
        tokens = same_dim(tokens, other[1], f"the tokens of x and {name}")
    heads = attributes["heads"]
    if heads < 1 or (isinstance(keys[2], int) and keys[2] % heads):
        raise InferenceError(f"keys of width {keys[2]} can not be {heads} heads")
    for name in ("r", "protected", "ratio"):
        if attributes[name] < 0:
            raise InferenceError(f"{name} is {attributes[name]}; it must not be negative")
    kept: Dim = None
    if isinstance(tokens, int):
        kept = tokens - merged_count(tokens, attributes["r"], attributes["ratio"], attributes["protected"])
    dtype = next((i.dtype for i in inputs[:2] if i is not None and i.dtype is not None), None)
    return [
        TensorInfo(dtype, (batch, kept, x[2])),
        TensorInfo(ir.DataType.FLOAT, (batch, kept)),
        TensorInfo(ir.DataType.INT64, (batch, tokens)),
    ]


def _flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> int:
    x, keys = inputs[0], inputs[1]
    assert x is not None and keys is not None
    (batch, tokens, _), width = x.sizes, keys.sizes[2]
    free = max(tokens - attributes["protected"], 0)
    pairs = free * free if "margin" in attributes else (free // 2) * (free - free // 2)
    size = width // attributes["heads"]
    # The mean over heads and its norm, the similarities, and the weighted sums.
    return int(batch * (tokens * (width + 3 * size) + 2 * pairs * size) + 2 * x.elements)


def _operator(name: str, energy: bool, max_norm: bool) -> DialectOp:
    who = (
        "Of the 2r tokens of the highest energy, the mean of ELU(similarity - margin) to all tokens, those of even "
        "rank go into the most similar one of odd rank; what stays keeps its order."
        if energy
        else "Of the tokens at even positions the r that have the most similar one at an odd position go into that "
        "one. The result has the protected tokens first, then those left at even positions, then those at odd ones."
    )
    schema = Schema(
        name,
        _INPUTS,
        _OUTPUTS,
        (*_COMMON, *(ENERGY if energy else ())),
        "Merges r + floor(ratio · tokens) tokens of x (batch, tokens, width) into others, at most half of those from "
        "position `protected` on; the first `protected` tokens stay as they are. Similarity is the cosine between "
        f"means over heads of keys (batch, tokens, heads · size). {who} Of equal numbers the one of the lower index "
        f"comes first. A token is the mean of its members by sizes (batch, tokens){MAX_NORM * max_norm}. "
        "index (batch, tokens) has the position in y (batch, kept, width) that each token went to.",
    )
    return DialectOp(
        schema,
        _infer,
        lambda opset: merge_body(schema, opset, energy, max_norm),
        reference(energy, max_norm),
        _flops,
        min_opset=18,
    )


MAX_NORM = ", scaled to the norm of the longest one"

#: The family, by name.
MERGE_TOKENS: dict[str, DialectOp] = {
    name: _operator(name, "Energy" in name, "MaxNorm" in name)
    for name in ("MergeTokens", "MergeTokensMaxNorm", "MergeTokensEnergy", "MergeTokensEnergyMaxNorm")
}
