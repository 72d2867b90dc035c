"""Which operators to compute in low precision, by what each one costs alone: mixed precision under an error budget.

One run of the model on its calibration inputs gives what every candidate is given in full precision. Each is computed
twice from that, exactly and in low precision, so that its error is its own and not what came before it. Independent
errors add up in squares: candidates are taken in the order of error squared per gain as long as the sum stays within
the budget. The sum is an estimate; what the whole model really loses is measured, and operators go back to full
precision one group after the other, the dearest first, until that is within the budget too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.ir.compare import compare_outputs
from planish.ir.errors import InputError
from planish.ir.graphs import constant_tensor
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.layers.importance import observe

_OBSERVED = "planish_given_{}"
#: Rows of an activation that an error is computed from.
ROWS = 256

Arrays = Sequence[npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Candidate:
    """An operator that may be computed in low precision.

    Attributes:
        name: of its node.
        error: relative L2 of its output in low precision, given what it is given in full precision.
        gain: what low precision saves of it, in any unit that is the same for all: operations, seconds.
        group: candidates of one group go back together.
    """

    name: str
    error: float
    gain: float
    group: str = ""

    @property
    def price(self) -> float:
        """Error squared per gain."""
        return self.error**2 / max(self.gain, 1e-30)


@dataclass(frozen=True)
class Chosen:
    """What is computed in low precision.

    Attributes:
        names: of the nodes.
        predicted: their errors, added up in squares.
        error: relative L2 of the model with them.
        back: groups that went back, each with the error of the model before it did, in order.
        left_out: candidates that the estimate left out.
    """

    names: frozenset[str]
    predicted: float
    error: float
    back: tuple[tuple[str, float], ...] = ()
    left_out: tuple[str, ...] = field(default=())

    def notes(self, limit: float) -> list[str]:
        """What a report should say."""
        count = f"{len(self.names)} operator{'s' * (len(self.names) != 1)}"
        found = [f"{count} kept in low precision: error {self.error:.2e} of {limit:.2e} allowed"]
        if self.left_out:
            found.append(f"too dear for their gain: {_listed(self.left_out)}")
        found += [f"'{group}' went back to float32: the error was {error:.2e} with it" for group, error in self.back]
        if not self.error <= limit:
            found.append(f"no choice meets an error of {limit:.2e}; the closest is {self.error:.2e}")
        return found


def measure(
    program: Program,
    entry: str,
    nodes: Iterable[ir.Node],
    ctx: PassContext,
    compute: Callable[[ir.Node, Arrays], tuple[npt.NDArray[np.generic], npt.NDArray[np.generic], float]],
    group: Callable[[ir.Node], str] = lambda node: node.name or "",
) -> list[Candidate]:
    """The candidates among the nodes of an entry's main graph, from one run on each calibration batch.

    Args:
        compute: ``compute(node, inputs)`` gives its output exactly, in low precision, and what that gains.
        group: the group of a node; by default each is one of its own.

    Raises:
        InputError: there is nothing to run with.
    """
    if ctx.run is None:
        raise InputError("errors of operators are measured on calibration inputs, and there is nothing to run.")
    names = [node.name for node in nodes]
    trial = Program({entry: program.entry(entry).clone()}, program.target, dict(program.provenance))
    graph = trial.entry(entry).graph
    by_name = {node.name: node for node in graph}
    found = [by_name[name] for name in names if name in by_name]
    observed: dict[ir.Value, str] = {}
    for node in found:
        for value in node.inputs:
            if value is not None and constant_tensor(value) is None and value not in observed:
                observed[value] = _OBSERVED.format(len(observed))
    for value, name in observed.items():
        observe(graph, value, name)
    squares = {node.name: [0.0, 0.0, 0.0] for node in found}
    for batch in ctx.run(trial, entry):
        for node in found:
            exact, low, gain = compute(node, [_array(value, observed, batch) for value in node.inputs])
            exact = np.asarray(exact, np.float64)
            totals = squares[node.name]
            totals[0] += float(np.square(exact - np.asarray(low, np.float64)).sum())
            totals[1] += float(np.square(exact).sum())
            totals[2] += gain
    return [Candidate(node.name or "", _root(squares[node.name]), squares[node.name][2], group(node)) for node in found]


def affordable(candidates: Sequence[Candidate], limit: float) -> tuple[list[Candidate], list[Candidate]]:
    """(taken, left out): in the order of their prices, as long as errors added up in squares stay within `limit`."""
    taken: list[Candidate] = []
    left: list[Candidate] = []
    total = 0.0
    for candidate in sorted(candidates, key=lambda c: (c.price, c.name)):
        # Written so that a NaN is left out.
        if total + candidate.error**2 <= limit**2:
            total += candidate.error**2
            taken.append(candidate)
        else:
            left.append(candidate)
    return taken, left


def choose(candidates: Sequence[Candidate], limit: float, error_with: Callable[[frozenset[str]], float]) -> Chosen:
    """The operators to compute in low precision so that the model's error is within `limit`, and never none of several.

    Args:
        error_with: the relative L2 of the model with the operators of these names in low precision.

    Returns:
        A choice; where even one group alone is not within `limit`, that with the least error of those tried.
    """
    kept, left = affordable(candidates, limit)
    if not kept and left:
        kept, left = left[:1], left[1:]
    back: list[tuple[str, float]] = []
    error = error_with(_names(kept))
    while not error <= limit and len({c.group for c in kept}) > 1:
        # Of a group, by its sums.
        groups = sorted({c.group for c in kept}, key=lambda g: (_price([c for c in kept if c.group == g]), g))
        back.append((groups[-1], error))
        kept = [c for c in kept if c.group != groups[-1]]
        error = error_with(_names(kept))
    predicted = math.sqrt(sum(c.error**2 for c in kept))
    return Chosen(_names(kept), predicted, error, tuple(back), tuple(c.name for c in left))


def model_error(
    program: Program, ctx: PassContext, change: Callable[[Program, frozenset[str]], object]
) -> Callable[[frozenset[str]], float]:
    """For `choose`: what a program loses, over all its entries, when `change(copy, names)` is done to a copy.

    Raises:
        InputError: there is nothing to run with.
    """
    run = ctx.run
    if run is None:
        raise InputError("the error of the model is measured on calibration inputs, and there is nothing to run.")
    expected = {entry: run(program, entry) for entry in program.entries}

    def error_with(names: frozenset[str]) -> float:
        trial = program.clone()
        change(trial, names)
        worst = 0.0
        for entry, batches in expected.items():
            for want, have in zip(batches, run(trial, entry), strict=True):
                worst = max(worst, compare_outputs(want, have).relative_l2)
        return worst

    return error_with


def _array(
    value: ir.Value | None, observed: dict[ir.Value, str], batch: dict[str, npt.NDArray[np.generic]]
) -> npt.NDArray[np.generic]:
    assert value is not None
    tensor = constant_tensor(value)
    return np.asarray(batch[observed[value]] if tensor is None else tensor.numpy())


def _root(totals: list[float]) -> float:
    return math.sqrt(totals[0] / totals[1]) if totals[1] else (0.0 if not totals[0] else math.inf)


def _price(group: Sequence[Candidate]) -> float:
    return sum(c.error**2 for c in group) / max(sum(c.gain for c in group), 1e-30)


def _names(candidates: Iterable[Candidate]) -> frozenset[str]:
    return frozenset(c.name for c in candidates)


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more
