"""Items of work: rows of one segment each, which blocks of a kernel take."""

from __future__ import annotations

import numpy as np

#: Blocks of 256 threads that a multiprocessor runs at once, about; and items for each of them, so that none waits long.
_BLOCKS, _ITEMS = 6, 4


def items(pointers: np.ndarray, unit: int, processors: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts segments into items of nearly equal size.

    Args:
        pointers: (segments + 1,): rows of segment t are ``pointers[t]:pointers[t + 1]``.
        unit: rows of an item are a multiple of it, but for the last of a segment.
        processors: of the GPU.
        most: rows of an item, as a multiple of `unit`.

    Returns:
        (items, 3) int32: segment, begin, end; and (segments + 1,) int32: pointers to the items of each segment.
    """
    pointers = pointers.astype(np.int64)
    counts = pointers[1:] - pointers[:-1]
    wanted = processors * _BLOCKS * _ITEMS
    rows = unit * int(min(max(-(-int(counts.sum()) // (wanted * unit)), 1), most))
    pieces = -(-counts // rows)
    starts = np.concatenate([[0], np.cumsum(pieces)])
    segment = np.repeat(np.arange(len(counts)), pieces)
    begin = pointers[segment] + (np.arange(len(segment)) - starts[segment]) * rows
    end = np.minimum(begin + rows, pointers[segment + 1])
    return np.stack([segment, begin, end], 1).astype(np.int32), starts.astype(np.int32)
