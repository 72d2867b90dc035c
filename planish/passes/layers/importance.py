"""How much each layer changes the hidden state: 1 − mean cosine between its input and its output (arXiv 2506.10100)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.analyses.layers import LayerStack
from planish.ir.causal_lm import LENGTHS, PREFILL
from planish.ir.program import Program
from planish.passes.canonicalize.editing import Editor
from planish.passes.layers.units import Unit, problem, remove, units_of

#: Runs one entry on each of its calibration batches; outputs by name.
Run = Callable[[Program, str], list[dict[str, Any]]]
_BEFORE, _AFTER, PADDING = "planish_before_{}", "planish_after_{}", "planish_padding_{}"
_MASK = "attention_mask"
Find = Callable[[ir.Model], LayerStack]


def least_important(program: Program, entry: str, find: Find, part: str, count: int, run: Run) -> dict[int, float]:
    """Greedy choice of `count` units: the least important one goes, and what is left is measured again.

    Args:
        find: finds the stack in a model; called on copies.
        run: runs an entry on its calibration batches.

    Returns:
        Index of the layer → its importance at the time it was chosen, in the order of choice.
    """
    chosen: dict[int, float] = {}
    for _ in range(count):
        trial = Program({entry: program.entry(entry).clone()}, program.target, dict(program.provenance))
        graph = trial.entry(entry).graph
        stack = find(trial.entry(entry))
        units = units_of(stack, part)
        gone = [unit for unit in units if unit.index in chosen]
        # Asked before anything is removed: then what a layer feeds is not the next layer any more.
        left = [u for u in units if u.index not in chosen and not problem(stack, [u])]
        if not left:
            break
        done = remove(graph, stack, gone, Editor(trial, "skip-layers"))
        for unit in left:
            observe(graph, done.now(unit.before), _BEFORE.format(unit.index))
            observe(graph, done.now(unit.after), _AFTER.format(unit.index))
        for name in padding_inputs(graph, entry):
            observe(graph, next(v for v in graph.inputs if v.name == name), PADDING.format(name))
        batches = run(trial, entry)
        values = {unit.index: _importance(unit, batches, stack.width) for unit in left}
        best = min(values, key=lambda index: (values[index], index))
        chosen[best] = values[best]
    return chosen


def _importance(unit: Unit, batches: Sequence[Mapping[str, Any]], width: int | None) -> float:
    cosines = []
    for batch in batches:
        x, y = (np.asarray(batch[name.format(unit.index)], np.float64) for name in (_BEFORE, _AFTER))
        if unit.part is not None:  # what is observed is the branch
            x = y - x
        # An image with channels first has its vectors along the channels.
        axis = 1 if y.ndim == 4 and y.shape[-1] != width and y.shape[1] == width else -1
        found = cosine(x, y, axis)
        cosines.append(found[tokens(batch, found.shape)].ravel())
    return 1.0 - float(np.concatenate(cosines).mean())


def padding_inputs(graph: ir.Graph, entry: str) -> list[str]:
    """The inputs that say which tokens are padding; in `decode` there is none."""
    known = {_MASK, LENGTHS} if entry == PREFILL else {_MASK}
    return [v.name for v in graph.inputs if v.name in known]


def tokens(batch: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """Which of the vectors count: those of tokens that are not padding, where the inputs say so."""
    mask = batch.get(PADDING.format(_MASK))
    lengths = batch.get(PADDING.format(LENGTHS))
    if lengths is not None and len(shape) == 2:
        mask = np.arange(shape[1]) < np.asarray(lengths)[:, None]
    if mask is None or np.shape(mask) != shape:
        return np.ones(shape, bool)
    real: np.ndarray = np.asarray(mask) != 0
    return real


def observe(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Makes a value an output of the graph under a name of its own."""
    node = ir.node("Identity", [value], name=name)
    node.outputs[0].name = name
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    graph.append(node)
    graph.outputs.append(node.outputs[0])


def cosine(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Cosine similarity along an axis; 1 where both vectors are zero."""
    product = (x * y).sum(axis)
    size = np.sqrt((x * x).sum(axis) * (y * y).sum(axis))
    result: np.ndarray = np.divide(product, size, out=np.ones_like(product), where=size > 0)
    return result


def text(importances: Mapping[int, float]) -> str:
    """``3: 0.012, 7: 0.020``, in the order of choice."""
    return ", ".join(f"{index}: {value:.3g}" for index, value in importances.items())
