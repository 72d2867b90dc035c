"""Plans of a made-up decoder: 8 layers of 100 bytes and a tail of 150, caches of 2 bytes a token."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planish.runtime.offload.account import MemoryBudgetError
from planish.runtime.offload.plan import Facts, Rates, Request
from planish.runtime.offload.planner import least_bytes, make_plan, place, request_seconds

FACTS = Facts(
    units=(100,) * 8 + (150,), kv=(2,) * 8, carried=1, sides=0, logits=10, splits=frozenset(range(8)),
    workspace=lambda batch, tokens, capacity, split: 3 * max(tokens, batch),
)  # fmt: skip
SLOW_HOST, FAST_HOST = Rates(host=1.0), Rates(host=1e15, latency=0.0)


def test_everything_stays_where_it_fits() -> None:
    plan = make_plan(FACTS, Request(1, 64, 8), None)
    assert len(plan.resident) == 9 and not plan.kv_host() and plan.slots == 0 and plan.chunk == 64
    assert make_plan(FACTS, Request(1, 64, 8), plan.total).total == plan.total
    assert plan.total == 950 + 8 * 2 * 71 + 2 * 64 + 10 + 3 * 64


@pytest.mark.parametrize("budget", range(700, 2400, 100))
@pytest.mark.parametrize("rates", [SLOW_HOST, FAST_HOST, Rates()])
def test_no_plan_is_over_its_budget(budget: int, rates: Rates) -> None:
    plan = make_plan(FACTS, Request(1, 64, 8), budget, rates)
    assert plan.total <= budget
    assert plan.slots >= (1 if plan.streamed() else 0) and plan.kv_slots >= (1 if plan.kv_host() else 0)
    assert all(FACTS.units[k] <= plan.slot_bytes for k in plan.streamed())


def test_more_memory_is_never_slower() -> None:
    rates = Rates(link=1e3, device=1e6, host=1e9, latency=1e-6, launch=1e-9)
    plans = [make_plan(FACTS, Request(1, 64, 64), budget, rates) for budget in range(700, 2600, 100)]
    seconds = [request_seconds(plan) for plan in plans]
    assert seconds == sorted(seconds, reverse=True)


def test_the_rule_of_fastattention_decides_where_attention_is() -> None:
    """T_host(kv) + T_link < kv / BW_link, for the caches that are on the host."""
    request, budget = Request(1, 600, 8), 2300
    kv = FACTS.kv[0] * request.capacity
    for host, latency, cooperative in ((1e4, 0.0, True), (1e2, 0.0, False), (1e4, 2 * kv / 1e3, False)):
        plan = make_plan(FACTS, request, budget, Rates(link=1e3, device=1e9, host=host, latency=latency))
        assert plan.kv_host() and bool(plan.attended) is cooperative


def test_some_caches_are_copied_beside_the_attention_to_the_others() -> None:
    """With a host that reads twice as fast as the link copies, a third of the layers is copied."""
    rates = Rates(link=1e3, device=1e9, host=2e3, latency=0.0, launch=0.0)
    given = {"chunk": 16, "resident": range(9), "slots": 0}
    facts = replace(FACTS, units=(0,) * 9)
    plan = place(facts, Request(1, 600, 8), rates, **given)
    assert "layers 1, 4, 6 " in plan.table() and "layers 0, 2, ... 7 " in plan.table()
    assert len(plan.attended) == 5 and plan.attended < set(plan.kv_host())
    step = place(facts, Request(1, 600, 8), rates, attended=range(8), **given).seconds
    assert plan.seconds == pytest.approx(
        step * 6 / 8, rel=1e-4
    )  # three of eight copies take the time of six attended to
    assert "caches of 3 of 8 layers" in plan.table() and "caches of 5 of 8 layers" in plan.table()


def test_weights_that_fit_do_not_stream_for_the_caches() -> None:
    facts = replace(FACTS, workspace=lambda *_: 0)
    least = 950 + 2 * 600 * 2 + 200
    plan = make_plan(facts, Request(1, 600, 8), least + 2 * 600, SLOW_HOST)
    assert not plan.streamed() and plan.kv_host()


def test_layers_that_can_not_be_cut_keep_their_caches() -> None:
    facts = replace(FACTS, splits=frozenset())
    plan = make_plan(facts, Request(1, 64, 8), 1900)
    assert not plan.kv_host() and plan.streamed()
    with pytest.raises(MemoryBudgetError):
        make_plan(facts, Request(1, 600, 8), 2300)


def test_the_refusal_names_a_prompt_that_fits() -> None:
    request = Request(2, 5000, 8)
    with pytest.raises(MemoryBudgetError) as raised:
        make_plan(FACTS, request, 20_000)
    text = str(raised.value)
    fits = int(text.split("A prompt of ")[1].split()[0])
    assert make_plan(FACTS, replace(request, prompt=fits), 20_000).total <= 20_000
    assert least_bytes(FACTS, replace(request, prompt=fits + fits // 32)) > 20_000
    least = least_bytes(FACTS, request)
    assert make_plan(FACTS, request, least).total <= least


def test_copies_and_attention_share_main_memory() -> None:
    """Both at their shared rates until one has ended, then the other alone."""
    rates = Rates(link=100.0, host=200.0, shared_link=50.0, shared_host=100.0)
    assert rates.both(1000, 0) == (10.0, 0.0) and rates.both(0, 1000) == (0.0, 5.0)
    assert rates.both(500, 1000) == (10.0, 10.0)
    assert rates.both(500, 3000) == (10.0, 10.0 + 2000 / 200)
    assert rates.both(1000, 1000) == (10.0 + 500 / 100, 10.0)
    alone = Rates(link=100.0, host=200.0)
    assert alone.both(1000, 1000) == (10.0, 5.0)


def test_the_table_has_a_line_for_each_group_of_layers() -> None:
    plan = place(
        FACTS, Request(1, 64, 8), Rates(link=1e3, host=1e4, latency=0.0), chunk=16, resident=(0, 1, 8),
        kv_device=(0,), attended=range(1, 8),
    )  # fmt: skip
    text = plan.table().splitlines()
    assert [line.split("  ")[1] for line in text if "weights on the device" in line or "streamed," in line] == [
        "layer 0", "layer 1", "layers 2 to 7", "logits",
    ]  # fmt: skip
    assert "weights streamed, 100 ms" in text[-3] and "attended to there, 14.2 ms" in text[-3]
    assert "cache" not in text[-2]
    assert text[-1].startswith("  a step is estimated at 600 ms: copies 600 ms, attention on the host 99.4 ms")
