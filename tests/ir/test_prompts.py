from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.prompts import pad_right, read_prompts

Rows = list[tuple[int, int, int]]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=5))
def test_rows_keep_their_tokens_whatever_side_the_padding_is_on(rows: Rows) -> None:
    width = max(sum(row) for row in rows)
    ids = np.arange(1, len(rows) * width + 1, dtype=np.int32).reshape(len(rows), width)
    mask = np.zeros(ids.shape, np.int64)
    for row, (before, tokens, _) in enumerate(rows):
        mask[row, before : before + tokens] = 1
    moved, lengths = pad_right(*read_prompts(ids, mask))
    assert moved.dtype == lengths.dtype == np.int64
    assert moved.shape[1] == lengths.max()
    for row, (before, tokens, _) in enumerate(rows):
        assert lengths[row] == tokens
        np.testing.assert_array_equal(moved[row, :tokens], ids[row, before : before + tokens])
        assert (moved[row, tokens:] == 0).all()


def test_no_mask_is_no_padding() -> None:
    ids, mask = read_prompts([[1, 2, 3]])
    assert mask.all() and ids.dtype == np.int64
