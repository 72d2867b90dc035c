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
    SinkWindow,
    SlidingWindow,
    SlotPlan,
    Strided,
    slot_plan,
    slots_of,
)
from planish.ir.errors import InputError

few = st.integers(1, 4)
patterns = st.one_of(
    st.builds(SlidingWindow, block=few, local=few),
    st.builds(SinkWindow, block=few, local=few, sinks=st.integers(0, 3)),
    st.builds(Strided, block=few, local=few, stride=st.integers(2, 5)),
    st.builds(S2, block=few, local=few, stride=st.integers(3, 6), offset=st.integers(0, 1), share_kv=st.booleans()),
)


@settings(max_examples=60, deadline=None)
@given(patterns, few, st.integers(1, 2), st.lists(st.integers(1, 70), min_size=1, max_size=3))
def test_slots_hold_what_the_last_row_sees_and_each_token_has_one_place(pattern, kv, group, lengths) -> None:
    heads = Heads(kv * group, kv)
    plan = slot_plan(pattern, heads)
    assert SlotPlan.parse(plan.to_text()) == plan
    slots = plan.capacity(max(lengths))
    at = plan.positions(np.array(lengths), slots)
    assert at.shape == (len(lengths), kv, slots)
    for row, length in enumerate(lengths):
        layout = pattern.layout(length, heads)
        seen = layout.seen_by_group(kv)[:, -1].repeat(pattern.block, axis=1)[:, :length]
        for head in range(kv):
            held = at[row, head][at[row, head] >= 0].tolist()
            assert sorted(held) == np.flatnonzero(seen[head]).tolist()
            assert len(held) <= layout.retained(kv)[head, -1] * pattern.block


@settings(max_examples=40, deadline=None)
@given(patterns, few, st.integers(2, 60))
def test_a_token_is_never_moved(pattern, kv, length) -> None:
    plan = slot_plan(pattern, Heads(kv, kv))
    slots = plan.capacity(length)
    before, after = (plan.positions(np.array([n]), slots)[0] for n in (length - 1, length))
    changed = before != after
    # What is not the same any more was let go, or holds the new token.
    assert ((after[changed] == -1) | (after[changed] == length - 1)).all()
    assert (after == length - 1).sum() == kv


def test_capacity_grows_by_the_shards_alone() -> None:
    plan = slot_plan(S2(block=64, local=16, stride=8), Heads(32, 8))
    assert plan.capacity(1) == (16 + 1) * 64 and plan.capacity(32 * 1024) == (16 + 64) * 64
    assert slot_plan(SinkWindow(block=4, local=3, sinks=2), Heads(4, 4)).capacity(10**6) == 5 * 4
    phi = slot_plan(S2(block=64, local=16, stride=8, offset=1, share_kv=False), Heads(32, 8))
    assert phi.shards == 4 and phi.capacity(32 * 1024) == (16 + 64 * 4) * 64


def test_gather_takes_positions() -> None:
    plan = slot_plan(SinkWindow(block=2, local=1, sinks=1), Heads(1, 1))
    cache = np.arange(1, 9, dtype=np.float32).reshape(1, 1, 8, 1)
    assert plan.gather(cache, np.array([7]))[0, 0, :, 0].tolist() == [7, 0, 1, 2]
    assert plan.gather(cache, np.array([2]))[0, 0, :, 0].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("pattern", "heads", "message"),
    [
        (BigBird(causal=True), Heads(2, 2), r"'bigbird' can not be evicted: a block that goes out .* \(row \d+ sees"),
        (Longformer(), Heads(2, 2), "'longformer' can not be evicted: a block that goes out of use must never come"),
        (S2(causal=False), Heads(2, 2), "KV-efficiency"),
        (BlockMask.of(np.ones((2, 2))), Heads(2, 2), "'mask' can not be evicted"),
        (S2(dense_heads=1), Heads(4, 2), "head 2 is dense and keeps every block"),
        (Dense(), Heads(4, 2), "'dense' keeps every block"),
        (S2(stride=4, share_kv=False), Heads(16, 4), "keep 4, 4, 4, 4 of every 4 blocks.*share_kv=True"),
    ],
)
def test_what_can_not_be_evicted(pattern, heads, message: str) -> None:
    with pytest.raises(InputError, match=message):
        slot_plan(pattern, heads)


def test_damaged_plans() -> None:
    plan = slot_plan(S2(), Heads(4, 2))
    assert slots_of({"planish.cache_slots.3": plan.to_text(), "task": "causal-lm"}) == {3: plan}
    for text in ("", "1 2 3", "a b c d e", "0 1 0 0 |", "1 1 0 4 1|1,2"):
        with pytest.raises(InputError, match="damaged"):
            SlotPlan.parse(text)
    with pytest.raises(InputError, match="damaged"):
        slots_of({"planish.cache_slots.x": plan.to_text()})
