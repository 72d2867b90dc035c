"""How many layers have to go for the measured ratio to be the asked one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from planish.ir.program import Program
from planish.passes.base import ApproximatePass
from planish.passes.layers.predict import shares_gone
from planish.passes.layers.units import units_of

if TYPE_CHECKING:
    from planish.passes.layers.skip_layers import SkipLayers

#: A variant is not measured if its time, from those of its neighbours, is longer than the wanted one by this factor:
#: time is close to linear in the layers that are left, and a measurement tells a few percent at best.
CLEAR = 1.03


def tuned(
    p: SkipLayers, program: Program, gain: Callable[[ApproximatePass, float], float]
) -> tuple[ApproximatePass, str]:
    """The weakest variant of a pass whose measured gain reaches its `speedup`, and what to note.

    Embeddings, the head of the model and whatever else lies outside of the layers take time that skipping does not
    save, so the nominal ratio is hardly ever the measured one. The cost model says which variant to measure first,
    and each measurement corrects it for the next. If even the first and the last layer alone are not fast enough, the
    nominal ratio stays.
    """
    if p.speedup is None or not p.measured or p.rule == "released" or p.nominal is not None:
        return p, ""
    ratios = [p.speedup, *(r for r in _ratios(p, program) if r > p.speedup)]
    search = Search(shares_gone(p, program, ratios), p.speedup)
    predicted = [1 / max(1 - share, 1e-9) for share in search.gone]
    variants = [p, *(replace(p, nominal=ratio) for ratio in ratios[1:])]
    while (index := search.following()) is not None:
        search.enter(index, gain(variants[index], p.speedup))
    taken = search.enough
    if taken is None:
        last = len(ratios) - 1
        most = _text(ratios[last], predicted[last], search.measured[last])
        short = f"speedup={p.speedup:g} can not be measured here: at most {most}"
        return p, f"{p.name}: {short}; {p.speedup:g}x nominal is taken"
    text = _text(ratios[taken], predicted[taken], search.measured[taken])
    return variants[taken], f"{p.name}: {text} for the asked {p.speedup:g}x"


def _text(nominal: float, predicted: float, measured: float) -> str:
    return f"{nominal:.3g}x nominal, {predicted:.3g}x predicted, {measured:.3g}x measured"


@dataclass
class Search:
    """Finds the first of some variants that is fast enough.

    Attributes:
        gone: the share of the time that each variant should save, ascending.
        asked: the wanted ratio.
        measured: variant → its measured ratio.
    """

    gone: list[float]
    asked: float
    measured: dict[int, float] = field(default_factory=dict)
    _low: int = -1
    _high: int | None = None

    @property
    def enough(self) -> int | None:
        """The weakest variant that was measured to be fast enough."""
        return self._high

    def enter(self, index: int, ratio: float) -> None:
        self.measured[index] = ratio
        if ratio >= self.asked:
            self._high = index
        else:
            self._low = index

    def following(self) -> int | None:
        """The variant to measure next; None when it is known which one is the first."""
        high = len(self.gone) if self._high is None else self._high
        between = range(self._low + 1, high)
        if not between:
            return None
        times = {k: self._time(self.gone[k]) * self.asked for k in between}
        first = next((k for k in between if times[k] <= 1), between[-1])
        return None if self._high is not None and times[first] > CLEAR else first

    def _time(self, gone: float) -> float:
        """What is left of the time, from the measured variants; by the cost model where none was measured."""
        known = sorted((self.gone[k], 1 / ratio) for k, ratio in self.measured.items() if ratio > 0)
        x, y = zip((0.0, 1.0), *known, strict=True)
        if gone > x[-1]:
            slope = (1 - y[-1]) / x[-1] if x[-1] > 0 else 1.0
            return max(1 - slope * gone, 0.0)
        return float(np.interp(gone, x, y))


def _ratios(p: SkipLayers, program: Program) -> list[float]:
    """The nominal ratios that the stacks of a program allow, ascending."""
    found: set[float] = set()
    for entry in p.entry_names(program):
        for stack in p.stacks(program.entry(entry))[0]:
            total = len(units_of(stack, p.part))
            found.update(total / kept for kept in range(p.least, total))
    return sorted(found)
