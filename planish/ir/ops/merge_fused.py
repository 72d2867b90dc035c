"""planish::AddMergeTokensNorm and AddMergeTokensEnergyNorm: merging between a residual sum and a layer norm.

One pass over the tokens where the parts are four: the bias of a product, the residual, the merge, and the norm in
front of the feed-forward network. Keys are read where they are, in columns of a product of queries, keys and values.
GPUs have a kernel for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import Attribute, DialectOp, InferenceError, Operand, Schema, TensorInfo
from planish.ir.ops.body import FunctionBody
from planish.ir.ops.merge_bodies import merged
from planish.ir.ops.merge_reference import reference
from planish.ir.ops.merge_tokens import ENERGY, FLOAT, INDEX, MERGE_TOKENS, TOKENS, dims3

_INPUTS = (
    *(Operand(name, TOKENS) for name in ("x", "added", "added_shift", "keys")),
    Operand("key_shift", FLOAT, "S"),
    Operand("sizes", FLOAT, "S"),
    *(Operand(name, TOKENS) for name in ("gain", "shift")),
)
_OUTPUTS = (
    *(Operand(name, TOKENS) for name in ("y", "normed")),
    *(Operand(name, FLOAT, "S") for name in ("merged_sizes", "logs")),
    Operand("index", INDEX, "I"),
)
_INT, _FLOAT = ir.AttributeType.INT, ir.AttributeType.FLOAT
_ATTRIBUTES = (
    Attribute("r", _INT, default=0),
    Attribute("ratio", _FLOAT, default=0.0),
    Attribute("protected", _INT, default=0),
    Attribute("heads", _INT, required=True),
    Attribute("size", _INT, required=True),
    Attribute("first", _INT, default=0),
    Attribute("epsilon", _FLOAT, default=1e-5),
)
_DOC = (
    "{parent} of the tokens x + added + added_shift: x, added (batch, tokens, width), added_shift (width,). Keys are "
    "the columns first … first + heads · size - 1 of `keys` (batch, tokens, any); key_shift (size,) is added to their "
    "means over heads. normed is the layer norm of y over its last axis, with gain and shift (width,); logs (batch, "
    "kept) are the logarithms of merged_sizes."
)


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in ("size", "first", "epsilon")}


def _infer(
    parent: DialectOp, inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]
) -> Sequence[TensorInfo]:
    x, added, keys = (dims3(inputs[i], name) for i, name in ((0, "x"), (1, "added"), (3, "keys")))
    columns, first = attributes["heads"] * attributes["size"], attributes["first"]
    if min(first, columns - 1) < 0 or (isinstance(keys[2], int) and keys[2] < first + columns):
        raise InferenceError(f"columns {first} … {first + columns - 1} of keys that have {keys[2]}")
    for axis, (one, two) in enumerate(zip(x, added, strict=True)):
        if isinstance(one, int) and isinstance(two, int) and one != two:
            raise InferenceError(f"axis {axis} of x has size {one} and that of added {two}")
    for i, want in ((2, x[2]), (4, attributes["size"]), (6, x[2]), (7, x[2])):
        info = inputs[i]
        if info is not None and info.dims is not None and len(info.dims) != 1:
            raise InferenceError(f"{_INPUTS[i].name} has rank {len(info.dims)}; it must have 1")
        have = info.dims[0] if info is not None and info.dims is not None else None
        if isinstance(have, int) and isinstance(want, int) and have != want:
            raise InferenceError(f"{_INPUTS[i].name} has size {have}; it must be {want}")
    dtype = next((i.dtype for i in inputs[:2] if i is not None and i.dtype is not None), None)
    given = [TensorInfo(dtype, x), TensorInfo(dtype, (keys[0], keys[1], columns)), inputs[5]]
    y, sizes, index = parent.infer(given, _plain(attributes))
    return [y, y, sizes, sizes, index]


def _body(schema: Schema, opset: int, energy: bool) -> ir.Function:
    made = FunctionBody(schema, opset)
    x, added, added_shift, keys, key_shift, sizes, gain, shift = made.values.values()
    whole = [made.add("Cast", value, to=ir.DataType.FLOAT) for value in (x, added, added_shift)]
    total = made.add("Add", whole[0], made.add("Add", whole[1], whole[2]))
    first = made.number("first")
    last = made.add("Add", first, made.add("Mul", made.number("heads"), made.number("size")))
    columns = made.cut(keys, first, last, axis=2)
    y, counts, index = merged(made, total, columns, sizes, energy, False, key_shift)
    y = made.add("CastLike", y, x)
    normed = made.add("LayerNormalization", y, gain, shift, refs={"epsilon": "epsilon"}, axis=-1)
    return made.function(y, normed, counts, made.add("Log", counts), index)


def _reference(energy: bool) -> Callable[..., tuple[np.ndarray, ...]]:
    merge = reference(energy, False)

    def compute(
        x: np.ndarray, added: np.ndarray, added_shift: np.ndarray, keys: np.ndarray, key_shift: np.ndarray,
        sizes: np.ndarray, gain: np.ndarray, shift: np.ndarray,
        heads: int, size: int, first: int = 0, epsilon: float = 1e-5, **attributes: Any,
    ) -> tuple[np.ndarray, ...]:  # fmt: skip
        x, added, keys = (np.asarray(item, np.float64) for item in (x, added, keys))
        # What is added to a mean is added to all that it is of.
        columns = keys[:, :, first : first + heads * size] + np.tile(np.asarray(key_shift, np.float64), heads)
        y, counts, index = merge(x + added + added_shift, columns, sizes, heads=heads, **attributes)
        away = y - y.mean(-1, keepdims=True)
        normed = away / np.sqrt(np.square(away).mean(-1, keepdims=True) + epsilon) * gain + shift
        return y, normed, counts, np.log(counts), index

    return compute


def _operator(name: str, parent: DialectOp) -> DialectOp:
    energy = "margin" in {attribute.name for attribute in parent.schema.attributes}
    attributes = (*_ATTRIBUTES, *(ENERGY if energy else ()))
    schema = Schema(name, _INPUTS, _OUTPUTS, attributes, _DOC.format(parent=parent.name))

    def flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> int:
        x = inputs[0]
        assert x is not None
        keys = TensorInfo(x.dtype, (*x.sizes[:2], attributes["heads"] * attributes["size"]))
        merging = parent.flops([x, keys, inputs[5]], outputs, _plain(attributes))
        return merging + 2 * x.elements + 8 * outputs[0].elements

    return DialectOp(
        schema,
        lambda inputs, attributes: _infer(parent, inputs, attributes),
        lambda opset: _body(schema, opset, energy),
        _reference(energy),
        flops,
        min_opset=18,
    )


#: Name → operator.
MERGE_FUSED: dict[str, DialectOp] = {
    f"Add{parent}Norm": _operator(f"Add{parent}Norm", MERGE_TOKENS[parent])
    for parent in ("MergeTokens", "MergeTokensEnergy")
}
