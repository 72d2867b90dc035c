"""A pattern put together from others: each query head has its own."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from planish.ir.block_sparsity.pattern import Heads, Pattern
from planish.ir.errors import InputError


@dataclass(frozen=True)
class Mixed(Pattern):
    """Query head h sees what it sees in ``patterns[choice[h]]``.

    Attributes:
        patterns: all with the block and the causality of this one.
        choice: one index a query head.
    """

    name: ClassVar[str] = "mixed"

    patterns: tuple[Pattern, ...] = ()
    choice: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if any((p.block, p.causal) != (self.block, self.causal) for p in self.patterns):
            raise InputError("pattern 'mixed': the patterns differ in block or in causal.")
        if any(index not in range(len(self.patterns)) for index in self.choice):
            raise InputError(f"pattern 'mixed': choice {self.choice} of {len(self.patterns)} patterns.")

    def kind(self, head: int, heads: Heads) -> Hashable:
        if heads.query != len(self.choice):
            raise InputError(f"pattern 'mixed': choices for {len(self.choice)} heads, and there are {heads.query}.")
        index = self.choice[head]
        return index, self.patterns[index].kind(head, heads)

    def sees(self, kind: Any, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        seen: np.ndarray = self.patterns[kind[0]].sees(kind[1], row, column)
        return seen
