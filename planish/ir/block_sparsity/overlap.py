"""How alike the lists of neighbouring rows of blocks are, which decides whether they are worth walking together."""

from __future__ import annotations

import numpy as np

#: Two tiles of queries are walked together if that costs no more than this times what they cost one by one.
MOST_UNION = 1.3


def union_cost(indptr: np.ndarray, indices: np.ndarray, samples: int = 64) -> float:
    """What two neighbouring rows name together, times two, over the sum of what each names: from 1 (alike) to 2.

    Args:
        indptr: (layouts, rows + 1); indices: those of all layouts, ascending within a row.
        samples: pairs of rows that are looked at, spread over all layouts and rows.
    """
    layouts, rows = indptr.shape[0], indptr.shape[1] - 1
    pairs = layouts * (rows // 2)
    together = apart = 0
    for pair in np.unique(np.linspace(0, pairs - 1, min(pairs, samples)).astype(int)) if pairs else ():
        layout, row = divmod(int(pair), rows // 2)
        start, middle, end = indptr[layout, 2 * row : 2 * row + 3]
        together += 2 * len(np.union1d(indices[start:middle], indices[middle:end]))
        apart += end - start
    return float(together / apart) if apart else 1.0


def worth_together(indptr: np.ndarray, indices: np.ndarray) -> bool:
    """Whether walking two neighbouring rows at once, over what either names, is worth what it saves."""
    return union_cost(indptr, indices) < MOST_UNION
