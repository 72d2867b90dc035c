"""Decoders under a memory budget on a simulated device: the same tokens as the whole model, whatever the streams do."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from planish.driver import optimize
from planish.ir.budget import Budget
from planish.ir.causal_lm import DECODE, CausalLM
from planish.ir.errors import UnsupportedError
from planish.ir.target import Target
from planish.offload import split_for
from planish.passes.defaults import RECOGNIZE
from planish.runtime.executable import Executable
from planish.runtime.offload.account import MemoryBudgetError
from planish.runtime.offload.device import HostDevice
from planish.runtime.offload.engine import Engine
from planish.runtime.offload.plan import Plan, Rates, Request
from planish.runtime.offload.planner import least_bytes, place
from planish.runtime.offload.split import Split
from tests.causal_models import VOCABULARY, causal_model

CPU = Target("ort", "cpu", threads=1)
LENGTHS, NEW = (21, 9, 33), 6
REQUEST = Request(len(LENGTHS), max(LENGTHS), NEW)
SLOW, FAST = Rates(host=1.0), Rates(host=1e15, latency=0.0)


@functools.cache
def executable(name: str) -> Executable:
    return optimize(
        causal_model(name, 3), "ort-cpu:threads=1", task=CausalLM(chunks=True), passes=",".join(RECOGNIZE),
        budget=Budget(gates=False),
    )  # fmt: skip


@functools.cache
def split_of(name: str, target: str = "ort-cpu:threads=1") -> Split:
    program = executable(name).program
    assert program is not None
    return split_for(program.entries[DECODE], Target.parse(target))


def prompts() -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [random.integers(3, VOCABULARY, length) for length in LENGTHS]


@functools.cache
def expected(name: str) -> np.ndarray:
    exe = executable(name)
    return np.stack([exe.generate(row[None], NEW)[0, len(row) :] for row in prompts()])


def run(engine: Engine, plan: Plan) -> np.ndarray:
    tokens = [engine.prompt(prompts(), plan).argmax(-1)]
    for _ in range(NEW - 1):
        tokens.append(engine.step(tokens[-1]).argmax(-1))
    engine.close()
    return np.stack(tokens, 1)


def engine_of(name: str, limit: int | None = None, rates: Rates = SLOW, seed: int = 0, **options: Any) -> Engine:
    return Engine(split_of(name, **options), HostDevice(limit, seed), CPU, rates)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Gemma 2"])
def test_without_a_budget_everything_is_on_the_device(name: str) -> None:
    engine = engine_of(name)
    plan = engine.plan(REQUEST)
    assert not plan.streamed() and not plan.kv_host()
    np.testing.assert_array_equal(run(engine, plan), expected(name))
    assert engine.device.account.peak <= plan.total


@pytest.mark.parametrize("rates", [SLOW, FAST], ids=["copied", "cooperative"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8])
def test_a_budget_gives_the_same_tokens_and_is_kept(share: float, rates: Rates) -> None:
    facts = engine_of("Llama").parts.facts()
    whole, least = engine_of("Llama").plan(REQUEST).total, least_bytes(facts, REQUEST)
    limit = int(least + share * (whole - least))
    engine = engine_of("Llama", limit, rates, seed=int(share * 10))
    plan = engine.plan(REQUEST)
    assert plan.total <= limit and (plan.streamed() or plan.kv_host())
    np.testing.assert_array_equal(run(engine, plan), expected("Llama"))
    assert engine.device.account.peak <= plan.total


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "odd heads"])
@pytest.mark.parametrize("own", [True, False], ids=["own kernel", "onnxruntime"])
def test_attention_on_the_host(name: str, own: bool) -> None:
    engine = engine_of(name, rates=FAST)
    engine.parts.own_kernel = own
    plan = placed(engine, kv_device=(1,), attended=(0, 2))
    np.testing.assert_array_equal(run(engine, plan), expected(name))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("attended", [(1, 2), (2,), ()])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_streams_may_run_in_any_order(seed: int, attended: tuple[int, ...], slots: int) -> None:
    engine = engine_of("Llama", seed=100 + seed)
    plan = placed(engine, kv_device=(0,), attended=attended, slots=slots, kv_slots=1 + seed % 2)
    np.testing.assert_array_equal(run(engine, plan), expected("Llama"))


def test_a_forgotten_event_gives_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the runs above would prove nothing."""
    monkeypatch.setattr(HostDevice, "wait", lambda self, stream, event: None)
    found = []
    for seed in range(4):
        engine = engine_of("Llama", seed=seed)
        found.append((run(engine, placed(engine, (0,))) == expected("Llama")).all())
    assert not all(found)


def placed(
    engine: Engine, kv_device: tuple[int, ...], attended: tuple[int, ...] = (), slots: int = 2, kv_slots: int = 2
) -> Plan:
    """No weights on the device, and the caches of these layers alone."""
    given = {"chunk": 8, "kv_device": kv_device, "attended": attended, "slots": slots, "kv_slots": kv_slots}
    return place(engine.parts.facts(), REQUEST, Rates(), **given)


class _Order:
    """In the place of a random generator: the stream of computing first, or that of copies."""

    def __init__(self, last: bool) -> None:
        self.last = last

    def integers(self, count: int) -> int:
        return count - 1 if self.last else 0


@pytest.mark.parametrize("copies_first", [False, True])
@pytest.mark.parametrize("resident", [(0, 1, 2, 3), ()])
@pytest.mark.parametrize("attended", [(0, 1, 2), (1,)])
def test_attention_on_the_host_waits_for_the_caches_of_the_prompt(
    copies_first: bool, resident: tuple[int, ...], attended: tuple[int, ...]
) -> None:
    engine = engine_of("Llama")
    engine.device._random = _Order(copies_first)  # type: ignore[attr-defined]
    plan = place(
        engine.parts.facts(),
        REQUEST,
        Rates(),
        chunk=8,
        resident=resident,
        slots=0 if resident else 2,
        attended=attended,
    )
    np.testing.assert_array_equal(run(engine, plan), expected("Llama"))


def test_forms_of_the_gpu_are_chosen_within_a_part() -> None:
    split = split_of("Llama", target="ort-cuda:sm_80")
    kinds = [node.op_type for node in split.layers[1].whole.model.graph]
    assert "SkipSimplifiedLayerNormalization" in kinds
    assert len({id(unit.whole.model) for unit in split.layers}) == 1
    engine = engine_of("Llama", target="ort-cuda:sm_80")
    np.testing.assert_array_equal(run(engine, placed(engine, (), (0, 1, 2))), expected("Llama"))


def test_one_generation_after_another_keeps_weights_and_gives_the_rest_back() -> None:
    engine = engine_of("Llama", rates=FAST)
    plan = placed(engine, kv_device=(2,), attended=(0, 1))
    first = run(engine, plan)
    held = engine.device.account.used
    np.testing.assert_array_equal(run(engine, plan), first)
    assert engine.device.account.used == held
    free = engine.plan(REQUEST)
    np.testing.assert_array_equal(run(engine, free), first)
    kinds = {what for what, size in engine.device.account.by.items() if size}
    assert kinds == {"weights", "sessions"}


def test_too_small_a_budget_says_by_how_much_and_what_fits() -> None:
    facts = engine_of("Llama").parts.facts()
    limit = least_bytes(facts, REQUEST) - 1
    with pytest.raises(MemoryBudgetError) as raised:
        engine_of("Llama", limit).plan(REQUEST)
    text = str(raised.value)
    assert "3 x (33 + 6) tokens take at least" in text and "more than the budget" in text
    assert "A prompt of 32 tokens fits" in text and "one row fits" in text
    fitting = replace(REQUEST, prompt=32)
    assert engine_of("Llama", limit).plan(fitting).total <= limit


def test_what_has_no_layers_can_not_be_cut() -> None:
    from planish.ir.printer import parse_model
    from planish.runtime.offload.split import split_decoder

    model = parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> one (int64[batch,1] input_ids) => (float[batch,1] logits) {'
        "logits = Cast<to=1>(input_ids)}"
    )
    with pytest.raises(UnsupportedError, match="no layers with a cache of their own"):
        split_decoder(model)


def test_an_account_that_is_passed_raises() -> None:
    device = HostDevice(1000)
    device.allocate(600, "caches")
    with pytest.raises(MemoryBudgetError, match=r"pass the memory budget of 1 KiB by .*; taken: 1 KiB of caches"):
        device.allocate(600, "weights")


def test_the_table_says_what_is_where() -> None:
    engine = engine_of("Llama")
    text = placed(engine, kv_device=(0,), attended=(1,)).table()
    assert "2 buffers for weights that stream" in text and "caches of 1 of 3 layers" in text
    for layer, way in ((1, "attended to there"), (2, "copied")):
        assert any(
            line.startswith(f"  layer {layer} ") and f"cache on the host, {way}" in line for line in text.split("\n")
        )


def test_sessions_of_a_long_prompt_make_room_for_a_short_one() -> None:
    """What sessions were given once is theirs until a plan has no room for it."""
    short, long = Request(1, 4, 2), Request(1, 60, 2)
    limit = engine_of("Llama").plan(short).total
    least = least_bytes(engine_of("Llama").parts.facts(), long)
    engine = engine_of("Llama", max(limit, least))
    seen = []
    for request in (short, long, short, long, short):
        plan = engine.plan(request)
        ids = np.random.default_rng(request.prompt).integers(3, VOCABULARY, request.prompt)
        tokens = [engine.prompt([ids], plan).argmax(-1)]
        tokens.append(engine.step(tokens[-1]).argmax(-1))
        engine.close()
        np.testing.assert_array_equal(
            np.stack(tokens, 1)[0], executable("Llama").generate(ids[None], 2)[0, request.prompt :]
        )
        seen.append(engine.device.account.by["sessions"])
        assert engine.device.account.peak <= max(limit, least)
    assert seen[1] > seen[0] == seen[2] == seen[4]


def test_what_would_run_on_the_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where ONNX Runtime copies what is read on the host when it is bound, and no more."""
    from planish.runtime.offload import bound

    engine = engine_of("Llama")
    piece = engine.parts.layers[0].whole.piece
    read = [value for value in piece.model.graph.inputs if value.uses() and not bound.reads_on_host(value)]
    unused = {value.name for value in piece.model.graph.inputs if not value.uses()}
    monkeypatch.setattr(bound, "read_on_host", lambda session, kind: unused)
    bound.PieceSession(piece, engine.device, CPU)
    monkeypatch.setattr(bound, "read_on_host", lambda session, kind: {read[0].name})
    with pytest.raises(UnsupportedError, match="no kernel on the GPU for .* give dtype=float16 in the target"):
        bound.PieceSession(piece, engine.device, CPU)
