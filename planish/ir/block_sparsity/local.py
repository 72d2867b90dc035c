"""Patterns of a local window and of columns that stay: dense, sliding window, sinks, strided, S2."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from planish.ir.block_sparsity.pattern import Heads, Pattern
from planish.ir.errors import InputError


@dataclass(frozen=True)
class LocalPattern(Pattern):
    """A window of blocks around the row, and columns that every row sees: the KV-efficient family.

    A block of keys is seen by the rows of its window, and by all later ones or none, so that what leaves the window
    and is no such column can be freed.

    Attributes:
        local: blocks of the window, that of the row itself included; to each side if the pattern is not causal.
    """

    local: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("local", 1)

    @abstractmethod
    def stays(self, kind: Any, column: np.ndarray) -> np.ndarray:
        """Columns of blocks that rows see at any distance, bool."""

    def sees(self, kind: Any, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        seen: np.ndarray = (np.abs(row - column) < self.local) | self.stays(kind, column)
        return seen


@dataclass(frozen=True)
class Dense(LocalPattern):
    """Every block."""

    name: ClassVar[str] = "dense"

    def kind(self, head: int, heads: Heads) -> Hashable:
        return None

    def stays(self, kind: Any, column: np.ndarray) -> np.ndarray:
        return np.ones_like(column, bool)


@dataclass(frozen=True)
class SlidingWindow(LocalPattern):
    """The last `local` blocks; to both sides if it is not causal."""

    name: ClassVar[str] = "sliding-window"

    def kind(self, head: int, heads: Heads) -> Hashable:
        return None

    def stays(self, kind: Any, column: np.ndarray) -> np.ndarray:
        return np.zeros_like(column, bool)


@dataclass(frozen=True)
class SinkWindow(LocalPattern):
    """The last `local` blocks and the first `sinks` (StreamingLLM, arXiv:2309.17453)."""

    name: ClassVar[str] = "sink-window"

    sinks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("sinks", 0)

    def kind(self, head: int, heads: Heads) -> Hashable:
        return None

    def stays(self, kind: Any, column: np.ndarray) -> np.ndarray:
        found: np.ndarray = column < self.sinks
        return found


@dataclass(frozen=True)
class Strided(LocalPattern):
    """The last `local` blocks, and the last of every `stride` (the fixed pattern of arXiv:1904.10509)."""

    name: ClassVar[str] = "strided"

    stride: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("stride", 1)

    def kind(self, head: int, heads: Heads) -> Hashable:
        return None

    def stays(self, kind: Any, column: np.ndarray) -> np.ndarray:
        found: np.ndarray = (column + 1) % self.stride == 0
        return found


@dataclass(frozen=True)
class S2(LocalPattern):
    """S2-Attention (arXiv:2407.17678): each head sees a window and its own shard of the blocks before it.

    Head h sees block n from row m if m - n < local, or (n + h · step + offset) mod stride = 0. Consecutive heads have
    consecutive shards, so that `stride / step` of them see the whole context. Not causal, the stride is relative:
    blocks at distance d >= local with (d - local + h · step + offset) mod stride = 0, to both sides.

    Attributes:
        stride: one block in `stride` is seen at any distance.
        step: by how many blocks the shards of two heads differ; None: max(1, stride // heads), by query heads.
        offset: 0: the first block belongs to head 0, as in the authors' code. 1: as in the configurations of
            ONNX Runtime's SparseAttention and of Phi-3-small. A checkpoint needs the one that it was trained with.
        share_kv: whether query heads with the same keys and values have one shard, so that those can be freed.
        same: whether all heads have the shard of head 0.
        dense_heads: the last so many key-value heads (query heads if not `share_kv`) are dense.
        dense_every: layer i is dense if (i + 1) is a multiple of this (Phi-3-small: 2); 0: none is.
    """

    name: ClassVar[str] = "s2"

    stride: int = 8
    step: int | None = None
    offset: int = 0
    share_kv: bool = True
    same: bool = False
    dense_heads: int = 0
    dense_every: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("stride", 1)
        for name in ("offset", "dense_heads", "dense_every"):
            self._at_least(name, 0)
        if self.step is not None:
            self._at_least("step", 0)

    def is_dense(self, layer: int) -> bool:
        return self.dense_every > 0 and (layer + 1) % self.dense_every == 0

    def kind(self, head: int, heads: Heads) -> Hashable:
        """The shift of the head's shard, or None if it is dense."""
        count = heads.kv if self.share_kv else heads.query
        if self.dense_heads > count:
            what = "heads of keys" if self.share_kv else "heads"
            raise InputError(f"pattern 's2': dense_heads is {self.dense_heads}, and there are {count} {what}.")
        index = heads.kv_of(head) if self.share_kv else head
        if index >= count - self.dense_heads:
            return None
        step = max(1, self.stride // heads.query) if self.step is None else self.step
        return ((0 if self.same else index * step) + self.offset) % self.stride

    def stays(self, kind: Any, column: np.ndarray) -> np.ndarray:
        if kind is None:
            return np.ones_like(column, bool)
        found: np.ndarray = (column + kind) % self.stride == 0
        return found

    def sees(self, kind: Any, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        if self.causal or kind is None:
            return super().sees(kind, row, column)
        beyond = np.abs(row - column) - self.local
        seen: np.ndarray = (beyond < 0) | ((beyond + kind) % self.stride == 0)
        return seen
