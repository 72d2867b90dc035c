"""Items of work: rows of one segment each, which blocks of a kernel take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from planish.runtime.cuda.relational.text import Generated

#: Blocks of 256 threads that a multiprocessor runs at once, about; and items for each of them, so that none waits long.
_BLOCKS, _ITEMS = 6, 4
#: Rows of an item of a product that keeps its weight, as a multiple of a tile; of others, and of parts, in rows.
MOST_TILES, MOST_ROWS = 4, 4096
#: Rows of a part of a long loop are a multiple of this.
LONG_UNIT = 64


def cut(g: Generated) -> tuple[int, int]:
    """`unit` and `most` of `items` for a kernel."""
    if g.kernel.gemm is not None and g.kernel.gemm.kind == "linear":
        return g.item_rows, MOST_TILES
    return 64, max(1, MOST_ROWS // g.item_rows)


def items(
    pointers: np.ndarray, unit: int, processors: int, most: int, chosen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts segments into items of nearly equal size.

    Args:
        pointers: (segments + 1,): rows of segment t are ``pointers[t]:pointers[t + 1]``.
        unit: rows of an item are a multiple of it, but for the last of a segment.
        processors: of the GPU.
        most: rows of an item, as a multiple of `unit`.
        chosen: segments to cut; None: all.

    Returns:
        (items, 4) int32: segment (its place among those cut), begin, end, number; and (segments + 1,) int32: pointers
        to the items of each segment.
    """
    pointers = pointers.astype(np.int64)
    chosen = np.arange(len(pointers) - 1) if chosen is None else chosen
    first, counts = pointers[chosen], pointers[chosen + 1] - pointers[chosen]
    wanted = processors * _BLOCKS * _ITEMS
    rows = unit * int(min(max(-(-int(counts.sum()) // (wanted * unit)), 1), most))
    pieces = -(-counts // rows)
    starts = np.concatenate([[0], np.cumsum(pieces)])
    which = np.repeat(np.arange(len(counts)), pieces)
    number = np.arange(len(which))
    begin = first[which] + (number - starts[which]) * rows
    end = np.minimum(begin + rows, (first + counts)[which])
    return np.stack([which, begin, end, number], 1).astype(np.int32), starts.astype(np.int32)
