"""What a user allows an optimization to cost, and asks it to gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from planish.ir.errors import InputError

#: Called with (expected outputs, got outputs), both lists over the calibration batches of dicts by output
#: name; returns a number that is 0 for equal outputs and grows with the damage.
Metric = Callable[[list[Mapping[str, Any]], list[Mapping[str, Any]]], float]


@dataclass(frozen=True)
class Budget:
    """Limits of the two gates.

    Attributes:
        error: largest error allowed against the original model; in units of `metric`, or relative L2 without
            one. None: the tolerance of the output dtype for exact passes, 1e-2 for approximate ones together.
        metric: a function of (expected, got); None for relative L2.
        min_gain: smallest speed-up ratio that a change must reach to be kept, for example 1.02. None: exact
            passes must not be measurably slower, approximate passes must be measurably faster. Below 1: what a pass
            that saves memory may cost.
        seconds: wall time for all measuring of one optimization. None: 12 seconds.
        gates: False applies the passes without measuring anything; the report then says "not measured".
    """

    error: float | None = None
    metric: Metric | None = None
    min_gain: float | None = None
    seconds: float | None = None
    gates: bool = True

    def __post_init__(self) -> None:
        for name in ("error", "min_gain", "seconds"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or not math.isfinite(value) or value < 0):
                raise InputError(f"budget.{name} is {value!r}; it must be a finite number of at least 0.")
        if self.metric is not None and not callable(self.metric):
            raise InputError(f"budget.metric must be a function of (expected, got), not {type(self.metric).__name__}.")
        if self.metric is not None and self.error is None:
            raise InputError("budget.metric is given without budget.error; say how much of the metric may be lost.")
