"""Prompts of different lengths as one array, padded on either side, and what a program takes: padded on the right."""

from __future__ import annotations

from typing import Any

import numpy as np

from planish.ir.errors import InputError


def read_prompts(ids: Any, mask: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and which of them count, checked.

    Args:
        ids: integers (batch, sequence).
        mask: (batch, sequence), 1 for tokens and 0 for padding, which is before or after a row's tokens; None: no
            padding.

    Returns:
        ids int64 and mask bool, both (batch, sequence).

    Raises:
        InputError: another shape or dtype, a row without tokens, or padding between tokens.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or not ids.size:
        raise InputError(f"input_ids has the shape {list(ids.shape)}; give (batch, sequence), both at least 1.")
    if ids.dtype.kind not in "iu":
        raise InputError(f"input_ids is {ids.dtype}; give integers.")
    mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask)
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask has the shape {list(mask.shape)}; it must be input_ids', {list(ids.shape)}.")
    if mask.dtype.kind not in "biuf" or not ((mask == 0) | (mask == 1)).all():
        raise InputError("attention_mask holds values other than 0 and 1.")
    mask = mask.astype(bool)
    if not mask.any(axis=1).all():
        raise InputError(f"row {int(np.argmin(mask.any(axis=1)))} of attention_mask hides every token.")
    begins = mask[:, 0] + (np.diff(mask.astype(np.int8), axis=1) == 1).sum(axis=1)
    if (begins > 1).any():
        raise InputError(
            f"row {int(np.argmax(begins > 1))} of attention_mask hides tokens between others; padding can only be "
            "before or after a row's tokens."
        )
    return ids.astype(np.int64), mask


def pad_right(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows moved to the left edge: ids (batch, longest row) int64, filled up with 0, and lengths (batch) int64."""
    lengths = mask.sum(axis=1).astype(np.int64)
    result = np.zeros((len(ids), int(lengths.max())), np.int64)
    at = np.arange(result.shape[1]) < lengths[:, None]
    result[at] = ids[mask]  # both in row-major order, and as many of each row
    return result, lengths
