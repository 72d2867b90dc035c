"""What `quantize` and `quantize-weights` change under an error budget of their own; see `sensitivity`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.ir.program import Program
from planish.passes.base import PassContext, PassResult
from planish.passes.precision.products import product
from planish.passes.precision.ranges import range_of, rounded
from planish.passes.precision.sensitivity import ROWS, Arrays, choose, measure, model_error

if TYPE_CHECKING:
    from planish.passes.precision.quantize import Quantize
    from planish.passes.precision.quantize_weights import QuantizeWeights

Floats = npt.NDArray[np.float32]
Rounding = Callable[[Floats], Floats]


def within_error(
    passed: Quantize | QuantizeWeights,
    program: Program,
    ctx: PassContext,
    nodes: dict[str, list[ir.Node]],
    low: Rounding,
) -> PassResult:
    """Runs a pass on the operators that its `error` affords, and on the tables that its embeddings are.

    Args:
        nodes: the candidates of each entry.
        low: what is left of a weight (n, k).

    Raises:
        InputError: there is nothing to measure with.
    """
    limit = passed.error
    assert limit is not None
    activations = passed.name == "quantize"
    rounded_weights: dict[str | None, npt.NDArray[np.float64]] = {}  # by node: every batch asks for the same

    def compute(node: ir.Node, inputs: Arrays) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
        x, weight, gain = _operands(node, inputs)
        whole = range_of([x], "min-max", 100.0)
        given = rounded(x, whole) if activations else x
        if node.name not in rounded_weights:
            rounded_weights[node.name] = low(np.ascontiguousarray(weight)).T.astype(np.float64)
        exact = x.astype(np.float64) @ weight.T.astype(np.float64)
        return exact, given.astype(np.float64) @ rounded_weights[node.name], gain

    candidates = []
    for entry, found in nodes.items():
        rounded_weights.clear()  # nodes of two entries may have one name
        candidates += measure(program, entry, found, ctx, compute)
    names = {c.name for c in candidates}

    def only(chosen: frozenset[str]) -> Quantize | QuantizeWeights:
        return replace(passed, error=None, exclude=tuple(sorted({*passed.exclude, *(names - chosen)})))

    lost = model_error(program, ctx, lambda copy, chosen: only(chosen).apply(copy, ctx))
    picked = choose(candidates, limit, lost)
    notes = picked.notes(limit)
    if not picked.error <= limit:
        return PassResult(False, 0, [], notes)
    result = only(picked.names).apply(program, ctx)
    result.notes = notes + result.notes
    return result


def _operands(node: ir.Node, inputs: Arrays) -> tuple[Floats, Floats, float]:
    """(rows of the left operand, weight (n, k), operations of all rows); a convolution as patches of its input."""
    if node.op_type == "Conv":
        return _patches(node, *(np.asarray(a, np.float32) for a in inputs[:2]))
    found = product(node)
    assert found is not None
    x, weight = np.asarray(inputs[0], np.float32), found.weight()
    return x.reshape(-1, x.shape[-1])[:ROWS], weight, 2.0 * x.size * len(weight)


def _patches(node: ir.Node, x: Floats, weight: Floats) -> tuple[Floats, Floats, float]:
    """Some places of a convolution's first group."""
    rank, group = weight.ndim - 2, node.attributes.get_int("group", 1)
    strides = node.attributes.get_ints("strides", [1] * rank)
    dilations = node.attributes.get_ints("dilations", [1] * rank)
    channels = weight.shape[1]
    # What is padded is zero, which is exact in 8 bits: places inside are what errors come from.
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(
        x[:, :channels], [min(s, n) for s, n in zip(spans, x.shape[2:], strict=True)], axis=tuple(range(2, 2 + rank))
    )
    cut = (
        slice(None),
        slice(None),
        *(slice(None, None, s) for s in strides),
        *(slice(None, None, d) for d in dilations),
    )
    windows = np.moveaxis(windows[cut], 1, 1 + rank)
    places = int(np.prod(windows.shape[: 1 + rank]))
    first = weight[: len(weight) // group][
        (slice(None), slice(None), *(slice(0, n) for n in windows.shape[2 + rank :]))
    ]
    gain = 2.0 * places * weight.size
    chosen = np.random.default_rng(0).permutation(places)[:ROWS]
    at = np.unravel_index(chosen, windows.shape[: 1 + rank])
    return windows[at].reshape(len(chosen), -1), first.reshape(len(first), -1), gain
