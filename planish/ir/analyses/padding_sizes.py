"""Sizes that a graph computes, in numbers at the sample sizes: what Slices and Reshapes of inferred shapes lack."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from planish.ir.analyses.padding_facts import Size
from planish.ir.graphs import constant_array

#: A number of each sample.
Numbers = tuple[np.ndarray, ...]
#: Operators of which the result has one form at all sizes: no minimum, no choice.
_ALIKE = frozenset(
    ("Gather", "Concat", "Squeeze", "Unsqueeze", "Slice", "Reshape", "Identity", "Cast", "Add", "Sub", "Mul")
)
_MOST = 64


def evaluate(node: ir.Node, known: Sequence[Numbers | None], version: int) -> Numbers | None:
    """What a node makes of sizes; None where it is not known."""
    given = [v for v in known if v is not None]
    if node.domain or node.op_type not in _ALIKE or len(given) < len([v for v in node.inputs if v is not None]):
        return None
    names = ["" if v is None else f"i{k}" for k, v in enumerate(node.inputs)]
    proto = ir.to_proto(node)
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.append("y")
    graph = onnx.helper.make_graph(
        [proto], "g",
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, None) for n in names if n],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, None)],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)])
    try:
        run = ReferenceEvaluator(model)
        made = []
        for sample in range(len(given[0])):
            feeds = {n: v[sample] for n, v in zip(names, known, strict=True) if v is not None}
            made.append(np.asarray(run.run(None, feeds)[0]))
    except Exception:  # an index outside, a form that the reference does not take
        return None
    return tuple(made) if made[0].dtype.kind in "iu" and made[0].size <= _MOST else None


def constant_numbers(value: ir.Value, samples: int) -> Numbers | None:
    array = constant_array(value, _MOST)
    return None if array is None or array.dtype.kind not in "iu" else (array.astype(np.int64),) * samples


def sizes_by(node: ir.Node, sizes: Sequence[Size | None] | None, known: Sequence[Numbers | None]) -> list[Size] | None:
    """The sizes of a result that an operand gives; `sizes` are those of the first operand."""
    op = node.op_type
    if op in ("Expand", "Reshape") and len(known) > 1 and known[1] is not None and sizes is not None:
        asked = [tuple(int(v.reshape(-1)[k]) for v in known[1]) for k in range(known[1][0].size)]
        if op == "Expand":
            return _expanded(sizes, asked)
        return _reshaped(sizes, asked, bool(node.attributes.get_int("allowzero", 0)))
    if op == "ConstantOfShape" and known[0] is not None:
        return [tuple(int(v[k]) for v in known[0]) for k in range(known[0][0].size)]
    if op == "Range" and all(v is not None for v in known):
        start, limit, step = ([int(v.reshape(-1)[0]) for v in item] for item in known if item is not None)
        return [tuple(max(0, -(-(b - a) // c)) for a, b, c in zip(start, limit, step, strict=True))]
    return None


def _expanded(sizes: Sequence[Size | None], asked: Sequence[Size]) -> list[Size] | None:
    ones = (1,) * len(asked[0]) if asked else (1,)
    rank = max(len(sizes), len(asked))
    made = []
    for axis in range(rank):
        own = sizes[axis - rank + len(sizes)] if axis >= rank - len(sizes) else ones
        want = asked[axis - rank + len(asked)] if axis >= rank - len(asked) else ones
        if own is None:
            return None
        made.append(want if {*own} == {1} else own)
    return made


def _reshaped(sizes: Sequence[Size | None], asked: list[Size], zero: bool) -> list[Size] | None:
    """0 copies a size, and -1 is what is left."""
    if None in sizes or zero:
        return None
    given = [n for n in sizes if n is not None]
    made = [n if {*n} != {0} else given[k] if k < len(given) else None for k, n in enumerate(asked)]
    total = [prod(n[k] for n in given) for k in range(len(asked[0]) if asked else 0)]
    known = [n for n in made if n is not None and {*n} != {-1}]
    rest = tuple(n // prod(m[k] for m in known) for k, n in enumerate(total))
    return None if None in made else [rest if {*n} == {-1} else n for n in made if n is not None]
