"""Patterns with global blocks and random ones, and a mask of the user's own."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from planish.ir.block_sparsity.pattern import Heads, Pattern
from planish.ir.errors import InputError


@dataclass(frozen=True)
class Longformer(Pattern):
    """A window of blocks, and the first `global_blocks`, which all rows see and which see all (arXiv:2004.05150)."""

    name: ClassVar[str] = "longformer"

    causal: bool = False
    local: int = 4
    global_blocks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("local", 1)
        self._at_least("global_blocks", 0)

    def kind(self, head: int, heads: Heads) -> Hashable:
        return None

    def sees(self, kind: Any, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        seen: np.ndarray = (
            (np.abs(row - column) < self.local) | (column < self.global_blocks) | (row < self.global_blocks)
        )
        return seen


@dataclass(frozen=True)
class BigBird(Longformer):
    """Longformer's, and `random` blocks for each row and head drawn from the rest (arXiv:2007.14062).

    What is drawn follows from `seed`, head, row and column alone, so that a longer causal layout extends a shorter one.
    In a row with fewer blocks left, all are seen.
    """

    name: ClassVar[str] = "bigbird"

    random: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("random", 0)
        self._at_least("seed", 0)

    def kind(self, head: int, heads: Heads) -> Hashable:
        return head if self.random else None

    def sees(self, kind: Any, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        seen = super().sees(kind, row, column)
        if not self.random:
            return seen
        left = ~seen & (column <= row) if self.causal else ~seen
        draw = np.where(left, _hashed(self.seed, int(kind), row, column), np.uint64(2**64 - 1))
        chosen = np.argsort(draw, axis=1, kind="stable")[:, : self.random]
        taken = np.zeros(draw.shape, bool)
        np.put_along_axis(taken, chosen, True, axis=1)
        return seen | (taken & left)


def _hashed(seed: int, head: int, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Well mixed 64 bits of four numbers (the finalizer of splitmix64 after each)."""
    state = np.zeros(np.broadcast_shapes(row.shape, column.shape), np.uint64)
    for number in (np.uint64(seed), np.uint64(head), row.astype(np.uint64), column.astype(np.uint64)):
        state = state + number + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state = state ^ (state >> np.uint64(31))
    return state


@dataclass(frozen=True)
class BlockMask(Pattern):
    """A mask of the user's own.

    Attributes:
        mask: rows of blocks as text, ``#`` (or ``1``) for a block that is seen; one tuple of rows for all heads, or
            one for each layout, which heads take in turn (head h has layout h mod layouts).
    """

    name: ClassVar[str] = "mask"

    mask: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = [len(layout) for layout in self.mask]
        if not rows or min(rows) < 1 or len(set(rows)) > 1:
            raise InputError("pattern 'mask': give one or more layouts of the same number of rows, at least one.")
        for index, layout in enumerate(self.mask):
            for at, row in enumerate(layout):
                if len(row) > rows[0] or set(row) - set("#1.0 "):
                    raise InputError(
                        f"pattern 'mask': row {at} of layout {index} is {row!r}; it takes up to {rows[0]} marks, # or "
                        "1 for a block that is seen, . or 0 or a blank for one that is not."
                    )

    @classmethod
    def of(cls, masks: np.ndarray, block: int = 64, *, causal: bool = True) -> BlockMask:
        """From an array (rows, rows) or (layouts, rows, rows) of bool.

        Raises:
            InputError: the array has another shape.
        """
        masks = np.asarray(masks).astype(bool)
        masks = masks[None] if masks.ndim == 2 else masks
        if masks.ndim != 3 or masks.shape[1] != masks.shape[2]:
            raise InputError(f"a block mask of shape {masks.shape}; it must be (rows, rows) or (layouts, rows, rows).")
        text = tuple(tuple("".join("#" if seen else "." for seen in row) for row in layout) for layout in masks)
        return cls(block=block, causal=causal, mask=text)

    def kind(self, head: int, heads: Heads) -> Hashable:
        if heads.query % len(self.mask):
            raise InputError(f"pattern 'mask': {heads.query} heads do not divide among {len(self.mask)} layouts.")
        return head % len(self.mask)

    def sees(self, kind: Any, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        size = len(self.mask[kind])
        last = max(int(row.max()), int(column.max()))
        if last >= size:
            raise InputError(
                f"pattern 'mask': it has {size} rows, {size * self.block} tokens; {(last + 1) * self.block} are asked."
            )
        marks = np.array([[mark in "#1" for mark in line.ljust(size)] for line in self.mask[kind]])
        seen: np.ndarray = marks[row, column]
        return seen
