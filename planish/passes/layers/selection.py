"""Which layers to keep for an asked speed-up: Unified Layer Skipping (arXiv 2404.06954).

Of L layers, floor(L / s) are kept, the first and the last among them, whatever the input is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from planish.ir.errors import InputError

#: The first and the last are always kept.
LEAST = 2


def kept_count(total: int, speedup: float, what: str = "layers", *, least: int = LEAST) -> int:
    """How many of `total` layers are kept: floor(total / speedup).

    Raises:
        InputError: `speedup` is below 1, or would keep fewer than `least`; names the valid range.
    """
    most = total / least
    if not speedup >= 1:
        raise InputError(f"speedup is {speedup:g}; it is between 1 (keep all) and {most:g} for {total} {what}.")
    # A ratio that was written as a decimal fraction may miss a whole number by a rounding error.
    count = math.floor(total / speedup + 1e-9)
    if count < least:
        kept = "the first and the last are always kept" if least > 1 else "one is always kept"
        raise InputError(f"speedup is {speedup:g}; {total} {what} allow between 1 and {most:g}, since {kept}.")
    return count


def balanced(total: int, count: int) -> tuple[int, ...]:
    """`count` of `total` indices as evenly apart as integers can be: round(j (L - 1) / (n - 1)).

    Distances between neighbours differ by at most one, so that no run of skipped layers is longer than another one by
    more than one layer, for any ratio.
    """
    if count == 1:
        return (0,)
    return tuple(round(Fraction(j * (total - 1), count - 1)) for j in range(count))


def released(total: int, count: int) -> tuple[int, ...]:
    """The index sets of the paper's released code: multiples of floor(L / (n - 1)), the first and the last.

    Kept as it is, for comparison: below a ratio of 2 it skips one block of neighbours, and the last gap may be almost
    twice the others.
    """
    if count == 1:
        return (0,)
    step = total // (count - 1)
    between = [i for i in range(1, total - 1) if i % step == 0][: count - LEAST]
    return tuple(sorted({0, *between, total - 1}))


RULES: dict[str, Callable[[int, int], tuple[int, ...]]] = {"balanced": balanced, "released": released}


def removed_by_rule(total: int, speedup: float, rule: str = "balanced", what: str = "layers") -> tuple[int, ...]:
    """The indices that `rule` leaves out of `total` layers for a nominal speed-up.

    Raises:
        InputError: as :func:`kept_count`.
    """
    kept = set(RULES[rule](total, kept_count(total, speedup, what)))
    return tuple(i for i in range(total) if i not in kept)
