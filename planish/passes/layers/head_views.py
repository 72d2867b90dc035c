"""How heads lie in a value, and how they lie after a Reshape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

Dims = Sequence[int | str | None]


@dataclass(frozen=True)
class Layout:
    """`heads` blocks of `depth` neighbours along `axis`.

    Attributes:
        axis: counted from the end, so negative: broadcasting keeps it.
        depth: 1 where the axis counts heads; their size where they lie side by side.
        role: ``"q"``: the query heads; ``"kv"``: those of keys and values.
    """

    axis: int
    heads: int
    depth: int
    role: str

    @property
    def size(self) -> int:
        return self.heads * self.depth

    def at(self, axis: int) -> Layout:
        """The same along another axis."""
        return replace(self, axis=axis)

    def places(self, kept: Sequence[int]) -> np.ndarray:
        """Indices along the axis of what belongs to these heads, int64."""
        blocks = np.asarray(kept, np.int64)[:, None] * self.depth + np.arange(self.depth)
        return blocks.reshape(-1)


def through_reshape(layout: Layout, here: Dims | None, there: Dims | None) -> Layout | None:
    """How heads lie on the other side of a Reshape (either side may be given); None if that is not known.

    The sizes behind the axis are compared: what lies before it, batch and positions, may be joined or parted.
    """
    if here is None or there is None:
        return None
    tail = list(here[len(here) + layout.axis + 1 :])
    same = [layout.size, *tail]
    if None not in tail and list(there[-len(same) :]) == same:
        return layout
    if any(not isinstance(d, int) for d in tail):
        return None
    for count in range(1, len(there)):  # parted: the axis is now `heads` and `count` more
        ending = list(there[-(1 + count + len(tail)) :])
        inner = ending[1 : 1 + count]
        if len(ending) != 1 + count + len(tail) or any(not isinstance(d, int) for d in inner):
            continue
        parted = ending[0] == layout.heads and math.prod(inner) == layout.depth  # type: ignore[arg-type]
        if parted and ending[1 + count :] == tail:
            return replace(layout, axis=-(1 + count + len(tail)), depth=1)
    for count in range(1, len(tail) + 1):  # joined with `count` axes behind it
        depth = layout.depth * math.prod(tail[:count])  # type: ignore[arg-type]
        joined = [layout.heads * depth, *tail[count:]]
        if list(there[-len(joined) :]) == joined:
            return replace(layout, axis=-len(joined), depth=depth)
    return None
