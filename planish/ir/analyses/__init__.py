"""Analyses: functions of a Program, cached by its structural hash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from planish.ir.hashing import structural_hash
from planish.ir.program import Program

T = TypeVar("T")


class AnalysisCache:
    """Results of analyses by (name, structural hash of the program).

    The manager calls :meth:`invalidate` after a pass that modified the graph, with the names that the pass
    declared to preserve; these move on to the new hash.
    """

    def __init__(self) -> None:
        self._results: dict[tuple[str, str], Any] = {}

    def __len__(self) -> int:
        return len(self._results)

    def get(self, name: str, program: Program, compute: Callable[[Program], T]) -> T:
        """Returns the cached result of `compute` on this program, or computes it."""
        key = (name, structural_hash(program))
        if key not in self._results:
            self._results[key] = compute(program)
        result: T = self._results[key]
        return result

    def invalidate(self, before: str, after: str, preserves: tuple[str, ...] = ()) -> None:
        """Forgets what was known under hash `before`, except that `preserves` now hold for hash `after`."""
        for name, key in [k for k in self._results if k[1] == before]:
            result = self._results.pop((name, key))
            if name in preserves:
                self._results[(name, after)] = result
