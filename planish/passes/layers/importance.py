"""How much each layer changes the hidden state: 1 − mean cosine between its input and its output (arXiv 2506.10100)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.analyses.layers import LayerStack
from planish.ir.program import Program
from planish.passes.canonicalize.editing import Editor
from planish.passes.layers.units import Unit, problem, remove, units_of

#: Runs one entry on each of its calibration batches; outputs by name.
Run = Callable[[Program, str], list[dict[str, Any]]]
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
        done = remove(graph, stack, gone, Editor(trial, "skip-layers"))
        left = [u for u in units if u.index not in chosen and not problem(stack, [u])]
        if not left:
            break
        pairs = [
            [_observe(graph, done.now(v), f"{u.index}_{i}") for i, v in enumerate((u.before, u.after))] for u in left
        ]
        batches = run(trial, entry)
        values = {u.index: _importance(u, batches, *pair, stack.width) for u, pair in zip(left, pairs, strict=True)}
        best = min(values, key=lambda index: (values[index], index))
        chosen[best] = values[best]
    return chosen


def _importance(unit: Unit, batches: Sequence[Mapping[str, Any]], before: str, after: str, width: int | None) -> float:
    cosines = []
    for batch in batches:
        x, y = (np.asarray(batch[name], np.float64) for name in (before, after))
        if unit.part is not None:  # what is observed is the branch
            x = y - x
        # An image with channels first has its vectors along the channels.
        axis = 1 if y.ndim == 4 and y.shape[-1] != width and y.shape[1] == width else -1
        cosines.append(cosine(x, y, axis).ravel())
    return 1.0 - float(np.concatenate(cosines).mean())


def _observe(graph: ir.Graph, value: ir.Value, mark: str) -> str:
    """Makes a value an output of the graph under a name of its own."""
    name = f"planish_observed_{mark}"
    node = ir.node("Identity", [value], name=name)
    node.outputs[0].name = name
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    return name


def cosine(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Cosine similarity along an axis; 1 where both vectors are zero."""
    product = (x * y).sum(axis)
    size = np.sqrt((x * x).sum(axis) * (y * y).sum(axis))
    return np.divide(product, size, out=np.ones_like(product), where=size > 0)


def text(importances: Mapping[int, float]) -> str:
    """``3: 0.012, 7: 0.020``, in the order of choice."""
    return ", ".join(f"{index}: {value:.3g}" for index, value in importances.items())
