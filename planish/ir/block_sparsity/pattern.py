"""What a pattern of block-sparse attention is, and the patterns by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from planish.ir.block_sparsity.layout import Layout, check_heads, layout_from_masks
from planish.ir.errors import InputError, unknown

#: Patterns by the name that options give them.
PATTERNS: dict[str, type[Pattern]] = {}


@dataclass(frozen=True)
class Heads:
    """Heads of an attention: of queries, and of keys and values.

    Raises:
        InputError: the first are not a multiple of the second.
    """

    query: int
    kv: int

    def __post_init__(self) -> None:
        check_heads(self.query, self.kv)

    def kv_of(self, head: int) -> int:
        """The key-value head that a query head reads."""
        return head // (self.query // self.kv)


@dataclass(frozen=True)
class Pattern(ABC):
    """Which blocks of keys the heads see, at any length.

    Attributes:
        block: tokens of a block.
        causal: whether a row sees no block after its own.
    """

    name: ClassVar[str]

    block: int = 64
    causal: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            PATTERNS[cls.name] = cls

    def __post_init__(self) -> None:
        self._at_least("block", 1)

    @abstractmethod
    def kind(self, head: int, heads: Heads) -> Hashable:
        """What sets the mask of a query head apart; heads of one kind see the same blocks."""

    @abstractmethod
    def sees(self, kind: Any, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Does a row of blocks see a block of keys? Row and column broadcast; causality is applied by the caller."""

    def is_dense(self, layer: int) -> bool:
        """Whether a layer, counted from 0, keeps dense attention."""
        return False

    def layout(self, length: int, heads: Heads) -> Layout:
        """The lists for `length` tokens; the last block may be part of one.

        Raises:
            InputError: a row sees nothing; the length is below 1; the heads do not fit the pattern.
        """
        if length < 1:
            raise InputError(f"a layout for {length} tokens; it takes 1 or more.")
        rows = -(-length // self.block)
        at = np.arange(rows)
        kinds = [self.kind(head, heads) for head in range(heads.query)]
        order = list(dict.fromkeys(kinds))
        masks = np.stack([np.broadcast_to(self.sees(k, at[:, None], at[None]), (rows, rows)) for k in order])
        return layout_from_masks(masks, [order.index(k) for k in kinds], self.block, is_causal=self.causal)

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"pattern '{self.name}': {name} is {value!r}; it must be an integer of at least {least}.")


def make_pattern(name: str, options: dict[str, Any]) -> Pattern:
    """The pattern of a name with options.

    Raises:
        InputError: an unknown name or option (with a did-you-mean), or a value out of range.
    """
    if name not in PATTERNS:
        raise unknown("pattern", name, tuple(PATTERNS))
    cls = PATTERNS[name]
    known = tuple(f.name for f in fields(cls))
    for option in options:
        if option not in known:
            raise unknown(f"option of pattern '{name}'", option, known)
    return cls(**options)
