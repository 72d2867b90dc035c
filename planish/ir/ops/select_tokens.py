"""planish::UnmergeTokens gives every token what it was merged into; planish::PruneTokens keeps those of high scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, Dim, InferenceError, Operand, Schema, TensorInfo, same_dim
from planish.ir.ops.body import FunctionBody
from planish.ir.ops.merge_tokens import FLOAT, INDEX, TOKENS, dims3

_UNMERGE = Schema(
    "UnmergeTokens",
    (Operand("y", TOKENS), Operand("index", INDEX, "I")),
    (Operand("x", TOKENS),),
    doc="x[b, i] = y[b, index[b, i]]: y (batch, kept, width), index (batch, tokens) as MergeTokens gives it, x (batch, "
    "tokens, width). Indices must be at least 0 and below kept.",
)

_PRUNE = Schema(
    "PruneTokens",
    (Operand("x", FLOAT), Operand("scores", FLOAT)),
    (Operand("y", FLOAT), Operand("kept", INDEX, "I")),
    (
        Attribute("keep", ir.AttributeType.INT, default=0),
        Attribute("ratio", ir.AttributeType.FLOAT, default=0.0),
        Attribute("protected", ir.AttributeType.INT, default=0),
        Attribute("drop", ir.AttributeType.INT, default=0),
    ),
    doc="Keeps the first `protected` tokens of x (batch, tokens, width), and of the others the keep + floor(ratio · "
    "their number) ones of the highest scores (batch, tokens), at most all; with drop above 0 all but that many. Of "
    "equal scores the lower position comes first. What is kept stays in order: y (batch, kept, width), kept (batch, "
    "kept) has the positions in x.",
)


def kept_count(tokens: int, keep: int, ratio: float, protected: int, drop: int = 0) -> int:
    """How many tokens PruneTokens keeps."""
    front = min(protected, tokens)
    free = tokens - front
    if drop:
        return front + max(free - drop, 0)
    return front + min(keep + int(np.floor(np.float32(ratio) * np.float32(free))), free)


def _infer_unmerge(inputs: Sequence[TensorInfo | None], _: Mapping[str, Any]) -> Sequence[TensorInfo]:
    y, index = dims3(inputs[0], "y"), dims3(inputs[1], "index", 2)
    batch = same_dim(y[0], index[0], "the batch of y and index")
    return [TensorInfo(inputs[0].dtype if inputs[0] is not None else None, (batch, index[1], y[2]))]


def _infer_prune(inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
    x, scores = dims3(inputs[0], "x"), dims3(inputs[1], "scores", 2)
    for name, value in attributes.items():
        if value < 0:
            raise InferenceError(f"{name} is {value}; it must not be negative")
    batch = same_dim(x[0], scores[0], "the batch of x and scores")
    tokens = same_dim(x[1], scores[1], "the tokens of x and scores")
    kept: Dim = kept_count(tokens, **attributes) if isinstance(tokens, int) else None
    return [TensorInfo(ir.DataType.FLOAT, (batch, kept, x[2])), TensorInfo(ir.DataType.INT64, (batch, kept))]


def _unmerge_body(opset: int) -> ir.Function:
    made = FunctionBody(_UNMERGE, opset)
    y, index = made.values.values()
    return made.function(made.add("GatherND", y, made.add("Unsqueeze", index, made.ints(2)), batch_dims=1))


def _prune_body(opset: int) -> ir.Function:
    made = FunctionBody(_PRUNE, opset)
    x, scores = made.values.values()
    batch, tokens = made.size(x, 0), made.size(x, 1)
    front = made.add("Min", made.number("protected"), tokens)
    free = made.add("Sub", tokens, front)
    share = made.add("Mul", made.add("Cast", free, to=ir.DataType.FLOAT), made.number("ratio"))
    whole = made.add("Cast", made.add("Floor", share), to=ir.DataType.INT64)
    some = made.add("Min", made.add("Add", made.number("keep"), whole), free)
    drop, none = made.number("drop"), made.ints(0)
    most = made.add("Max", made.add("Sub", free, drop), none)
    count = made.add("Where", made.add("Greater", drop, none), most, some)
    best = made.outputs("TopK", 2, made.cut(scores, front), count, axis=1)[1]
    rest = made.add("Add", made.outputs("TopK", 2, best, count, axis=1, largest=0)[0], front)
    kept = made.add(
        "Concat", made.add("Expand", made.span(made.ints(0), front), made.shape(batch, front)), rest, axis=1
    )
    return made.function(made.add("GatherND", x, made.add("Unsqueeze", kept, made.ints(2)), batch_dims=1), kept)


def _unmerge_reference(y: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, ...]:
    return (np.take_along_axis(np.asarray(y, np.float64), np.asarray(index)[..., None], axis=1),)


def _prune_reference(
    x: np.ndarray, scores: np.ndarray, keep: int = 0, ratio: float = 0.0, protected: int = 0, drop: int = 0
) -> tuple[np.ndarray, ...]:
    batch, tokens, _ = x.shape
    front = min(protected, tokens)
    count = kept_count(tokens, keep, ratio, protected, drop) - front
    order = np.argsort(-np.asarray(scores)[:, front:], axis=1, kind="stable")[:, :count]
    first = np.broadcast_to(np.arange(front), (batch, front))
    kept = np.concatenate([first, np.sort(order, 1) + front], axis=1).astype(np.int64)
    return np.take_along_axis(np.asarray(x, np.float64), kept[..., None], axis=1), kept


UNMERGE_TOKENS = DialectOp(_UNMERGE, _infer_unmerge, _unmerge_body, _unmerge_reference, lambda *_: 0, min_opset=13)
#: Comparisons of scores count nothing.
PRUNE_TOKENS = DialectOp(_PRUNE, _infer_prune, _prune_body, _prune_reference, lambda *_: 0, min_opset=15)
