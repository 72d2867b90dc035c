"""Lists of blocks (CSR) for a number of rows, what can be told of them, and how to make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planish.ir.errors import InputError


@dataclass(frozen=True, eq=False)
class Layout:
    """The lists of blocks that heads see, as ``planish::BlockSparseAttention`` reads them.

    Attributes:
        block: tokens of a block, of queries and of keys.
        is_causal: whether rows list no block after their own; inside a block on the diagonal no later token is seen.
        indptr: (layouts, rows + 1) int32: where the list of each row begins and ends in `indices`.
        indices: (entries,) int32: blocks of keys, ascending in each row.
        head_layout: (query heads,) int32: the layout of each head.
    """

    block: int
    is_causal: bool
    indptr: np.ndarray
    indices: np.ndarray
    head_layout: np.ndarray

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return int(self.indptr.shape[1]) - 1

    @property
    def counts(self) -> np.ndarray:
        """(layouts, rows) int: blocks that each row sees."""
        return np.diff(self.indptr, axis=1)

    def masks(self) -> np.ndarray:
        """(layouts, rows, rows) bool: does the row see the block?"""
        mask = np.zeros((len(self.indptr), self.rows, self.rows), bool)
        counts = self.counts
        for layout, ends in enumerate(self.indptr):
            rows = np.repeat(np.arange(self.rows), counts[layout])
            mask[layout, rows, self.indices[ends[0] : ends[-1]]] = True
        return mask

    def allowed(self) -> np.ndarray:
        """(rows, rows) bool: blocks that dense attention sees, on and under the diagonal if it is causal."""
        full = np.ones((self.rows, self.rows), bool)
        return np.tril(full) if self.is_causal else full

    def density(self) -> float:
        """Share of the blocks of dense attention that heads see, over all heads; 1 is dense."""
        seen = self.counts.sum(axis=1)[self.head_layout].sum()
        return float(seen / (len(self.head_layout) * self.allowed().sum()))

    def coverage(self) -> float:
        """Share of the blocks of dense attention that at least one head sees: 1 if the context is sharded whole."""
        union = self.masks()[np.unique(self.head_layout)].any(axis=0)
        allowed = self.allowed()
        return float((union & allowed).sum() / allowed.sum())

    def dense_rows(self) -> int:
        """The most blocks a sequence may have for all its rows to see, in all heads, what dense attention sees."""
        missing = (self.allowed() & ~self.masks()).any(axis=0)
        return int(np.maximum(*np.nonzero(missing)).min()) if missing.any() else self.rows

    def seen_by_group(self, kv_heads: int) -> np.ndarray:
        """(key-value heads, rows, rows) bool: blocks that some query head of the group sees.

        Raises:
            InputError: the heads of queries are not a multiple of those of keys.
        """
        heads = len(self.head_layout)
        check_heads(heads, kv_heads)
        masks = self.masks()
        groups = self.head_layout.reshape(kv_heads, heads // kv_heads)
        return np.stack([masks[np.unique(group)].any(axis=0) for group in groups])

    def kv_violation(self, kv_heads: int) -> tuple[int, int, int] | None:
        """Where the pattern is not KV-efficient: (key-value head, row, block), the first; None if it is.

        The rule (S2-Attention, arXiv:2407.17678): a block of keys that a row sees was seen by all rows since its own,
        so that a block that goes out of use never comes back and its keys and values can be freed.
        """
        if not self.is_causal:
            return 0, 0, min(1, self.rows - 1)
        seen = self.seen_by_group(kv_heads)
        back = seen[:, 1:] & ~seen[:, :-1] & np.tril(np.ones((self.rows - 1, self.rows), bool))
        found = np.argwhere(back)
        return (int(found[0, 0]), int(found[0, 1]) + 1, int(found[0, 2])) if len(found) else None

    def retained(self, kv_heads: int) -> np.ndarray:
        """(key-value heads, rows) int: blocks up to a row that it or a later row (of this layout) sees."""
        later = np.logical_or.accumulate(self.seen_by_group(kv_heads)[:, ::-1], axis=1)[:, ::-1]
        kept: np.ndarray = (later & np.tril(np.ones((self.rows, self.rows), bool))).sum(axis=2)
        return kept

    def check_rows(self) -> None:
        """Every row must see a block, or its softmax has nothing to divide by.

        Raises:
            InputError: a row does not; names head and row.
        """
        empty = np.argwhere(self.counts[self.head_layout] == 0)
        if len(empty):
            head, row = empty[0]
            raise InputError(
                f"the pattern lets row {row} of head {head} (queries {row * self.block} to "
                f"{(row + 1) * self.block - 1}) see no block of keys; every row must see one, its diagonal block at "
                "the least."
            )

    def picture(self) -> str:
        """The layouts as text: a line a row, ``#`` for a block that it sees."""
        from planish.ir.ops.block_sparse_attention import layout_picture

        return layout_picture(self.indptr, self.indices, self.rows, is_causal=self.is_causal)

    def summary(self) -> str:
        """One line: rows, layouts, density and coverage."""
        count = len(self.indptr)
        return (
            f"{self.rows} blocks of {self.block}, {count} layout{'s' * (count > 1)}, density {self.density():.3f}, "
            f"all heads together see {self.coverage():.3f}"
        )


def layout_from_sparse_attention(rows: np.ndarray, columns: np.ndarray, heads: int, block: int) -> Layout:
    """The lists as com.microsoft.SparseAttention reads them (ONNX Runtime), causal; head h has layout h mod layouts.

    Args:
        rows: block_row_indices (layouts, rows + 1).
        columns: block_col_indices (layouts, most entries), filled up with -1.

    Raises:
        InputError: the heads do not divide among the layouts, or a row sees nothing.
    """
    count = len(rows)
    if count < 1 or heads % count:
        raise InputError(f"{heads} heads do not divide among {count} layouts.")
    masks = np.zeros((count, rows.shape[1] - 1, rows.shape[1] - 1), bool)
    for layout, ends in enumerate(rows):
        for row in range(len(ends) - 1):
            masks[layout, row, columns[layout, ends[row] : ends[row + 1]]] = True
    return layout_from_masks(masks, [head % count for head in range(heads)], block, is_causal=True)


def check_heads(heads: int, kv_heads: int) -> None:
    """Refuses query heads that do not divide among key-value heads."""
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise InputError(
            f"{heads} heads of queries and {kv_heads} of keys and values: the first must be a multiple of the second."
        )


def layout_from_masks(masks: np.ndarray, heads: Sequence[int], block: int, *, is_causal: bool) -> Layout:
    """Lists from masks of blocks; equal masks become one layout, and what a causal row can not see is not listed.

    Args:
        masks: (kinds, rows, rows) bool.
        heads: for each query head which of the masks it has.
        block: tokens of a block.

    Raises:
        InputError: a row that sees nothing.
    """
    masks = np.asarray(masks, bool)
    if is_causal:
        masks = masks & np.tril(np.ones(masks.shape[1:], bool))
    known: dict[bytes, int] = {}
    order, first = [], []
    for index, mask in enumerate(masks):
        key = np.packbits(mask).tobytes()
        if key not in known:
            known[key] = len(known)
            first.append(index)
        order.append(known[key])
    kept = masks[first]
    counts = kept.sum(axis=2)
    ends = np.concatenate([[0], counts.ravel().cumsum()])
    rows = counts.shape[1]
    indptr = np.stack([ends[i * rows : (i + 1) * rows + 1] for i in range(len(kept))]).astype(np.int32)
    indices = np.nonzero(kept)[2].astype(np.int32)
    layout = Layout(block, is_causal, indptr, indices, np.array([order[h] for h in heads], np.int32))
    layout.check_rows()
    return layout
