"""How close merging by energy is to another outcome, by image: kernels decide in float32, references in float64."""

from __future__ import annotations

import numpy as np

from planish.ir.ops.merge_reference import directions, merged_count

#: Below it a decision may fall either way: float32 sums of some hundred terms around one.
CLEAR = 1e-5


def clear(keys: np.ndarray, heads: int, r: int, protected: int, margin: float, alpha: float = 1.0) -> np.ndarray:
    """Whether each image of keys (batch, tokens, heads · size) has no decision as close as that, (batch) bool.

    Decisions are the order of the 2 · count highest energies, times the number of tokens that they are means over, and
    which of those of odd rank is the most similar.
    """
    count = merged_count(keys.shape[1], r, 0.0, protected)
    found = np.ones(len(keys), bool)
    if not count:
        return found
    for image, unit in enumerate(directions(keys, heads)):
        free = unit[protected:]
        scores = free @ free.T
        away = scores - margin
        energy = np.where(away > 0, away, alpha * np.expm1(np.minimum(away, 0))).sum(-1)
        order = np.argsort(-energy, kind="stable")
        gaps = -np.diff(energy[order][: 2 * count + 1])
        best = np.sort(scores[order[0 : 2 * count : 2]][:, order[1 : 2 * count : 2]], axis=1)
        gap = np.diff(best[:, -2:], axis=1)  # of one there is no second
        found[image] = gaps.min() > CLEAR and (gap.size == 0 or gap.min() > CLEAR)
    return found
