"""A fixed mask as lists of blocks: what planish::BlockSparseAttentionTiles reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TiledMask:
    """A mask by blocks, exactly; see :mod:`planish.ir.ops.block_sparse_attention` for what the arrays are.

    Attributes:
        density: listed blocks among all blocks of all layouts.
        blind: whether some query sees no key.
    """

    indptr: np.ndarray
    indices: np.ndarray
    head_layout: np.ndarray
    entry_tile: np.ndarray
    tiles: np.ndarray
    density: float
    blind: bool


def tiled(mask: np.ndarray, heads: int, block: int) -> TiledMask:
    """The lists of `mask`, (1 or heads, queries, keys) of bool, in blocks of `block`."""
    layouts: dict[bytes, int] = {}
    kept, head_layout = [], []
    for one in mask:
        key = np.packbits(one).tobytes()
        if key not in layouts:
            layouts[key] = len(layouts)
            kept.append(one)
        head_layout.append(layouts[key])
    known: dict[bytes, int] = {}
    tiles: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    indices: list[int] = []
    entry_tile: list[int] = []
    for one in kept:
        seen, whole, parts = _blocks(one, block)
        ends.append(len(indices) + np.concatenate([[0], np.cumsum(seen.sum(1))]))
        for row, column in zip(*np.nonzero(seen), strict=True):
            tile = -1
            if not whole[row, column]:
                # Keys first, as the kernel has its scores.
                part = np.ascontiguousarray(parts[row, column].T)
                tile = known.setdefault(part.tobytes(), len(tiles))
                if tile == len(tiles):
                    tiles.append(part)
            indices.append(int(column))
            entry_tile.append(tile)
    total = sum(-(-one.shape[0] // block) * -(-one.shape[1] // block) for one in kept)
    return TiledMask(
        np.stack(ends).astype(np.int32),
        np.array(indices, np.int32),
        np.array(head_layout if len(head_layout) == heads else head_layout * heads, np.int32),
        np.array(entry_tile, np.int32),
        np.stack(tiles) if tiles else np.zeros((0, block, block), bool),
        len(indices) / max(total, 1),
        bool((~mask.any(-1)).any()),
    )


def _blocks(mask: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, columns) whether a block is seen, and whether all of it is; and the blocks themselves."""
    queries, keys = mask.shape
    rows, columns = -(-queries // block), -(-keys // block)

    def cut(fill: bool) -> np.ndarray:
        padded = np.full((rows * block, columns * block), fill)
        padded[:queries, :keys] = mask
        return padded.reshape(rows, block, columns, block).swapaxes(1, 2)

    # What is past the ends is neither seen nor missing.
    parts = cut(False)
    return np.asarray(parts.any((2, 3))), np.asarray(cut(True).all((2, 3))), parts
