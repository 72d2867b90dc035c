"""What lists of key blocks have in common, where standard operators can make use of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from planish.passes.base import Decline


@dataclass(frozen=True)
class LocalForm:
    """Block r of queries sees the last `local` blocks up to its own, and those of `fixed` before them (causal).

    Attributes:
        local: blocks, the query's own among them.
        fixed: (blocks,), bool.
    """

    local: int
    fixed: np.ndarray


@dataclass(frozen=True)
class Run:
    """Neighbouring heads that have one layout; numbers of heads, from first to past the last."""

    layout: int
    heads: tuple[int, int]
    kv_heads: tuple[int, int]


def runs(head_layout: np.ndarray, kv_heads: int) -> list[Run]:
    """All heads in as few runs as there are; in one, heads of queries are a multiple of those of keys."""
    shared = len(head_layout) // kv_heads
    bounds = [0, *(np.flatnonzero(np.diff(head_layout)) + 1).tolist(), len(head_layout)]
    found = []
    for first, last in itertools.pairwise(bounds):
        cuts = [first, last]
        if first % shared or last % shared:
            cuts = sorted({first, last, *range(-(-first // shared) * shared, last, shared)})
        for a, b in itertools.pairwise(cuts):
            found.append(Run(int(head_layout[a]), (a, b), (a // shared, -(-b // shared))))
    return found


def lists_of(indptr: np.ndarray, indices: np.ndarray) -> list[list[np.ndarray]]:
    """The lists by layout and row, sorted; what is below 0 names no block."""
    return [[np.sort(row[row >= 0]) for row in np.split(indices[e[0] : e[-1]], (e - e[0])[1:-1])] for e in indptr]


def uniform(rows: list[np.ndarray]) -> np.ndarray | None:
    """The blocks that all rows see alike; None if they do not."""
    return rows[0] if all(np.array_equal(row, rows[0]) for row in rows[1:]) else None


def local_form(rows: list[np.ndarray]) -> LocalForm:
    """The form of a causal layout.

    Raises:
        Decline: it has none, with the row that says so.
    """
    count = len(rows)
    seen = np.zeros((count, count), bool)
    for r, row in enumerate(rows):
        seen[r, row[row <= r]] = True
    local = count
    for r in range(count):
        missing = np.flatnonzero(~seen[r, : r + 1])
        local = min(local, r - int(missing[-1])) if len(missing) else local
    if local < 1:
        raise Decline("a row of its lists lacks the diagonal block")
    far = np.tril(np.ones((count, count), bool), -local)
    fixed = np.asarray((seen & far).any(0))
    wrong = np.flatnonzero((far & fixed != (seen & far)).any(1))
    if len(wrong):
        raise Decline(f"row {wrong[0]} of its lists is not of {local} local blocks and of ones that all later rows see")
    return LocalForm(local, fixed)
