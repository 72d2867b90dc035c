"""Ranges of activations over the calibration inputs, and the 8-bit codes that cover them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

METHODS = ("min-max", "percentile", "mse")
#: Numbers of one activation that are looked at, evenly spread; ranges are of all of them.
_SAMPLE = 1 << 18
_SHARES = np.linspace(1.0, 0.5, 26)


@dataclass(frozen=True)
class Range:
    """number = (code − zero) · scale, codes from 0 to 255."""

    scale: float
    zero: int


def range_of(arrays: Iterable[npt.NDArray[np.float32]], method: str, percentile: float) -> Range:
    """The range for an activation.

    Args:
        arrays: its values, one array for each batch.
        method: ``"min-max"``; ``"percentile"``, which clips (100 − percentile) percent in all, as many at each end;
            or ``"mse"``, the part of the whole range with the least squared error.
    """
    found = [array.reshape(-1) for array in arrays if array.size]
    if not found:
        return Range(1.0, 0)
    low, high = min(float(a.min()) for a in found), max(float(a.max()) for a in found)
    if method == "min-max":
        return _range(low, high)
    sample = _sampled(found)
    if method == "percentile":
        rest = (100 - percentile) / 2
        a, b = np.percentile(sample, [rest, 100 - rest])
        return _range(max(low, float(a)), min(high, float(b)))
    candidates = [_range(low * share, high * share) for share in _SHARES]
    errors = [float(np.square(rounded(sample, item) - sample).mean()) for item in candidates]
    return candidates[int(np.argmin(errors))]


def rounded(numbers: npt.NDArray[np.float32], chosen: Range) -> npt.NDArray[np.float32]:
    """What is left of numbers in 8 bits."""
    codes = np.clip(np.rint(numbers / chosen.scale) + chosen.zero, 0, 255)
    left: npt.NDArray[np.float32] = ((codes - chosen.zero) * chosen.scale).astype(np.float32)
    return left


def _range(low: float, high: float) -> Range:
    """Zero has a code of its own: padding and what a Relu cuts off stay exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / 255)) or 1.0
    return Range(scale, int(np.clip(round(-low / scale), 0, 255)))


def _sampled(arrays: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    step = max(1, sum(a.size for a in arrays) // _SAMPLE)
    return np.concatenate([a[::step] for a in arrays])
