"""How many layers have to go for the measured ratio to be the asked one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from planish.ir.program import Program
from planish.passes.base import ApproximatePass
from planish.passes.layers.selection import LEAST
from planish.passes.layers.units import units_of

if TYPE_CHECKING:
    from planish.passes.layers.skip_layers import SkipLayers


def tuned(
    p: SkipLayers, program: Program, gain: Callable[[ApproximatePass, float], float]
) -> tuple[ApproximatePass, str]:
    """The weakest variant of a pass whose measured gain reaches its `speedup`, by bisection, and what to note.

    Embeddings, the head of the model and whatever else lies outside of the layers take time that skipping does not
    save, so the nominal ratio is hardly ever the measured one. If even the first and the last layer alone are not
    fast enough, the nominal ratio stays.
    """
    if p.speedup is None or not p.measured or p.rule == "released" or p.nominal is not None:
        return p, ""
    ratios = [r for r in _ratios(p, program) if r > p.speedup]
    first = gain(p, p.speedup)
    if first >= p.speedup or not ratios:
        return p, ""
    variants = [replace(p, nominal=ratio) for ratio in ratios]
    last = gain(variants[-1], p.speedup)
    if last < p.speedup:
        short = f"speedup={p.speedup:g} can not be measured here"
        return p, f"{p.name}: {short}: {ratios[-1]:.3g}x nominal gives {last:.2f}x; {p.speedup:g}x nominal is taken"
    low, high = -1, len(variants) - 1  # the variant at `high` is fast enough, the one at `low` is not
    while high - low > 1:
        middle = (low + high) // 2
        if gain(variants[middle], p.speedup) >= p.speedup:
            high = middle
        else:
            low = middle
    return variants[high], f"{p.name}: {ratios[high]:.3g}x nominal for a measured {p.speedup:g}x"


def _ratios(p: SkipLayers, program: Program) -> list[float]:
    """The nominal ratios that the stacks of a program allow, ascending."""
    found: set[float] = set()
    for entry in p.entry_names(program):
        for stack in p.stacks(program.entry(entry))[0]:
            total = len(units_of(stack, p.part))
            found.update(total / kept for kept in range(LEAST, total))
    return sorted(found)
