import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.block_sparsity import (
    S2,
    BigBird,
    BlockMask,
    Dense,
    Heads,
    Longformer,
    Pattern,
    SinkWindow,
    SlidingWindow,
    Strided,
    layout_from_masks,
    layout_from_sparse_attention,
    make_pattern,
)
from planish.ir.errors import InputError
from planish.ir.ops.block_sparse_attention import layout_mask

FEW = settings(max_examples=40, deadline=None)


@st.composite
def heads(draw):
    kv = draw(st.integers(1, 4))
    return Heads(kv * draw(st.integers(1, 3)), kv)


def of(cls, **ranges):
    """Instances of a pattern, each option drawn from its values."""
    return st.builds(cls, block=st.sampled_from([1, 3, 16]), **ranges)


few, flag = st.integers(1, 5), st.booleans()
local_patterns = st.one_of(
    of(Dense),
    of(SlidingWindow, local=few),
    of(SinkWindow, local=few, sinks=st.integers(0, 3)),
    of(Strided, local=few, stride=few),
    of(S2, local=few, stride=st.integers(1, 9), offset=st.integers(0, 1), share_kv=flag, same=flag),
)
all_patterns = st.one_of(
    local_patterns,
    of(SlidingWindow, local=few, causal=st.just(False)),
    of(S2, local=few, stride=few, causal=st.just(False)),
    of(Longformer, local=few, global_blocks=st.integers(0, 2), causal=flag),
    of(BigBird, local=few, random=st.integers(0, 3), seed=st.integers(0, 9), causal=flag),
)


@FEW
@given(all_patterns, heads(), st.integers(1, 200))
def test_lists_are_well_formed(pattern: Pattern, heads: Heads, length: int) -> None:
    layout = pattern.layout(length, heads)
    assert layout.rows == -(-length // pattern.block)
    assert layout.indptr.dtype == layout.indices.dtype == layout.head_layout.dtype == np.int32
    assert layout.head_layout.shape == (heads.query,)
    assert set(layout.head_layout.tolist()) == set(range(len(layout.indptr)))
    assert layout.indptr[0, 0] == 0 and layout.indptr[-1, -1] == len(layout.indices)
    assert (layout.counts > 0).all()
    for ends in layout.indptr:
        for row in range(layout.rows):
            listed = layout.indices[ends[row] : ends[row + 1]].tolist()
            assert listed == sorted(set(listed)) and row in listed
            assert listed[-1] <= row if pattern.causal else listed[-1] < layout.rows
    masks = layout.masks()
    assert len(np.unique(masks, axis=0)) == len(masks)  # equal ones are one
    tokens = layout_mask(layout.indptr, layout.indices, pattern.block, length, length)
    assert np.array_equal(tokens, masks.repeat(pattern.block, 1).repeat(pattern.block, 2)[:, :length, :length])


@FEW
@given(all_patterns, heads(), st.integers(1, 120), st.integers(1, 120))
def test_a_longer_layout_extends_a_shorter_one(pattern: Pattern, heads: Heads, one: int, other: int) -> None:
    if isinstance(pattern, BigBird) and not pattern.causal:
        return
    short, long = sorted((one, other))
    a, b = pattern.layout(short, heads), pattern.layout(long, heads)
    assert np.array_equal(a.masks()[a.head_layout], b.masks()[b.head_layout][:, : a.rows, : a.rows] & a.allowed()[None])


@FEW
@given(all_patterns, heads(), st.integers(1, 60))
def test_kv_efficiency_is_what_brute_force_finds(pattern: Pattern, heads: Heads, length: int) -> None:
    layout = pattern.layout(length, heads)
    seen = layout.masks()[layout.head_layout].reshape(heads.kv, -1, layout.rows, layout.rows).any(axis=1)
    wrong = [
        (h, m, n)
        for h in range(heads.kv)
        for m in range(layout.rows)
        for n in range(m)
        if seen[h, m, n] and not all(seen[h, row, n] for row in range(n, m))
    ]
    found = layout.kv_violation(heads.kv)
    if pattern.causal:
        assert (found is None) == (not wrong)
        assert found is None or any(found[0] == h and found[2] == n for h, _, n in wrong)
    else:
        assert found is not None
    kept = [
        [len({n for n in range(m + 1) if seen[h, m:, n].any()}) for m in range(layout.rows)] for h in range(heads.kv)
    ]
    assert layout.retained(heads.kv).tolist() == kept


@FEW
@given(local_patterns, heads(), st.integers(1, 200))
def test_windows_with_columns_that_stay_are_kv_efficient(pattern: Pattern, heads: Heads, length: int) -> None:
    layout = pattern.layout(length, heads)
    assert layout.kv_violation(heads.kv) is None
    assert (layout.dense_rows() >= min(pattern.local, layout.rows)) if not isinstance(pattern, Dense) else True
    last = layout.seen_by_group(heads.kv)[:, -1].sum(axis=1)
    assert np.array_equal(layout.retained(heads.kv)[:, -1], last)


@FEW
@given(few, st.integers(1, 8), st.integers(0, 1), st.integers(1, 30), st.booleans())
def test_heads_of_s2_together_see_everything(local: int, stride: int, offset: int, rows: int, share: bool) -> None:
    kv = stride if share else 1
    layout = S2(block=1, local=local, stride=stride, offset=offset, share_kv=share).layout(rows, Heads(2 * stride, kv))
    assert layout.coverage() == 1


def test_s2_is_the_formula() -> None:
    layout = S2(block=16, local=2, stride=4, offset=1, share_kv=False).layout(160, Heads(8, 2))
    masks = layout.masks()[layout.head_layout]
    for h in range(8):
        for m in range(10):
            for n in range(10):
                assert masks[h, m, n] == (m >= n and (m - n < 2 or (n + h * 1 + 1) % 4 == 0))
    assert len(layout.indptr) == 4 and layout.head_layout.tolist() == [0, 1, 2, 3] * 2
    assert layout.head_layout.tolist()[0] == 0 and layout.masks()[0, 9, 3] and not layout.masks()[0, 9, 0]


def test_options_of_s2() -> None:
    shared = S2(local=1, stride=4).layout(64 * 9, Heads(8, 4))
    assert shared.head_layout.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(S2(local=1, stride=4, same=True).layout(64 * 9, Heads(8, 4)).indptr) == 1
    dense = S2(local=1, stride=4, dense_heads=1).layout(64 * 9, Heads(8, 4))
    assert dense.masks()[dense.head_layout[6:]].sum() == 2 * 45 and dense.density() > shared.density()
    layers = [S2(dense_every=2).is_dense(i) for i in range(4)]
    assert layers == [False, True, False, True]
    stepped = S2(local=1, stride=8, step=3, share_kv=False)
    assert [stepped.kind(h, Heads(4, 4)) for h in range(4)] == [0, 3, 6, 1]


def test_phi_3_small_keeps_four_of_eight_shards_for_each_head_of_keys() -> None:
    layout = S2(offset=1, share_kv=False, local=16, stride=8).layout(32 * 1024, Heads(32, 8))
    last = layout.seen_by_group(8)[:, -1]
    assert set(last[:, : 512 - 16].sum(axis=1) / 496) == {0.5}
    assert layout.coverage() == 1
    shared = S2(local=16, stride=8).layout(32 * 1024, Heads(32, 8))
    assert (shared.retained(8)[:, -1] == 16 + 496 // 8).all()


@pytest.mark.parametrize(
    ("length", "density"), [(1024, 1.0), (2048, 0.79), (4096, 0.515), (8192, 0.335), (32768, 0.18)]
)
def test_density_of_s2_is_the_published_one_of_the_head_with_the_sink(length: int, density: float) -> None:
    """At block 64, 16 local blocks, stride 8."""
    assert S2(same=True).layout(length, Heads(1, 1)).density() == pytest.approx(density, abs=6e-3)


def test_dense_up_to_the_window_and_one_short_column_more() -> None:
    assert SlidingWindow(local=3).layout(64 * 9, Heads(1, 1)).dense_rows() == 3
    assert SinkWindow(local=3).layout(64 * 9, Heads(1, 1)).dense_rows() == 4
    assert Dense().layout(64 * 9, Heads(1, 1)).dense_rows() == 9
    assert SlidingWindow(local=3, causal=False).layout(64 * 9, Heads(1, 1)).dense_rows() == 3


def test_lists_of_onnx_runtimes_sparse_attention() -> None:
    """The worked example of its documentation."""
    rows = np.array([[0, 1, 3, 5, 8], [0, 1, 3, 6, 9]])
    columns = np.array([[0, 0, 1, 1, 2, 1, 2, 3, -1], [0, 0, 1, 0, 1, 2, 0, 2, 3]])
    layout = layout_from_sparse_attention(rows, columns, 4, 64)
    assert layout.picture() == "#\n##\n.##\n.###\n\n#\n##\n###\n#.##"
    assert layout.head_layout.tolist() == [0, 1, 0, 1]
    s2 = S2(block=64, local=2, stride=2, offset=1, share_kv=False).layout(256, Heads(4, 4))
    assert np.array_equal(s2.masks()[0], layout.masks()[0])
    with pytest.raises(InputError, match="3 heads do not divide among 2 layouts"):
        layout_from_sparse_attention(rows, columns, 3, 64)


def test_pictures() -> None:
    assert SinkWindow(local=2).layout(64 * 5, Heads(1, 1)).picture().split("\n") == ["#", "##", "###", "#.##", "#..##"]
    assert Longformer(local=1).layout(64 * 3, Heads(1, 1)).picture().split("\n") == ["###", "##.", "#.#"]
    assert "5 blocks of 64, 1 layout, density" in SinkWindow(local=2).layout(64 * 5, Heads(1, 1)).summary()


def test_a_mask_of_the_users_own() -> None:
    mask = np.array([[[1, 1, 0], [0, 1, 0], [1, 0, 1]], [[1, 0, 0], [1, 1, 0], [1, 0, 1]]], bool)
    pattern = BlockMask.of(mask, block=8)
    layout = pattern.layout(24, Heads(4, 2))
    assert layout.head_layout.tolist() == [0, 1, 0, 1]
    assert np.array_equal(layout.masks(), mask & np.tril(np.ones((3, 3), bool)))
    assert layout.kv_violation(2) == (0, 2, 0) or layout.kv_violation(2) is None
    assert BlockMask.of(mask[0], block=8).layout(20, Heads(1, 1)).kv_violation(1) == (0, 2, 0)


def test_bigbird_draws_anew_for_each_head() -> None:
    layout = BigBird(local=1, random=2, block=4).layout(4 * 20, Heads(4, 4))
    assert len(layout.indptr) == 4
    assert (layout.counts[:, 5:15] == 1 + 1 + 2).all()
    again = BigBird(local=1, random=2, block=4, seed=1).layout(4 * 20, Heads(4, 4))
    assert not np.array_equal(layout.indices, again.indices)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Heads(6, 4), "6 heads of queries and 4 of keys and values: the first must be a multiple"),
        (lambda: S2(block=0), "pattern 's2': block is 0; it must be an integer of at least 1"),
        (lambda: S2(local=0), "local is 0"),
        (lambda: SinkWindow(sinks=True), "sinks is True"),
        (lambda: make_pattern("stride", {}), "'stride'.*[Dd]id you mean 'strided'"),
        (lambda: make_pattern("s2", {"strides": 4}), "'strides'.*[Dd]id you mean 'stride'"),
        (lambda: S2(dense_heads=3).layout(9, Heads(4, 2)), "dense_heads is 3, and there are 2 heads of keys"),
        (lambda: S2().layout(0, Heads(1, 1)), "0 tokens"),
        (lambda: BlockMask(), "give one or more layouts"),
        (lambda: BlockMask(mask=(("#", "##"), ("#",))), "the same number of rows"),
        (lambda: BlockMask(mask=(("#x",),)), "row 0 of layout 0"),
        (lambda: BlockMask.of(np.ones((2, 3))), r"shape \(1, 2, 3\)"),
        (lambda: BlockMask.of(np.ones((2, 2)), 4).layout(9, Heads(1, 1)), "2 rows, 8 tokens; 12 are asked"),
        (lambda: BlockMask.of(np.ones((2, 2, 2)), 4).layout(8, Heads(3, 1)), "3 heads do not divide among 2 layouts"),
        (
            lambda: BlockMask.of(np.array([[1, 0], [0, 0]]), 4).layout(8, Heads(1, 1)),
            r"row 1 of head 0 \(queries 4 to 7\) see no block",
        ),
        (
            lambda: layout_from_masks(np.array([[[1, 0], [0, 1]], [[0, 1], [0, 1]]]), [0, 1], 4, is_causal=True),
            "row 0 of head 1",
        ),
    ],
)
def test_what_is_refused(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
