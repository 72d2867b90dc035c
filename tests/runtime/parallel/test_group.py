"""All ranks in one process: numbers on CPUs and GPUs, who waits for what, and which way is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from planish.ir.compare import compare_outputs  # noqa: E402
from planish.ir.errors import InputError, UnsupportedError  # noqa: E402
from planish.ir.program import Program  # noqa: E402
from planish.ir.target import Target  # noqa: E402
from planish.passes.base import PassContext  # noqa: E402
from planish.passes.lowering.lower_cuda_normalization import LowerCudaNormalization  # noqa: E402
from planish.passes.parallel.pipeline_all_reduce import PipelineAllReduce  # noqa: E402
from planish.passes.parallel.split import tensor_parallel  # noqa: E402
from planish.passes.testing import apply_pass, run_reference  # noqa: E402
from planish.runtime.cuda import driver, toolchain  # noqa: E402
from planish.runtime.parallel.exchange import CopyExchange, exchange  # noqa: E402
from planish.runtime.parallel.group import Group, fastest  # noqa: E402
from tests.parallel_models import feeds, transformer  # noqa: E402

GPUS = torch.cuda.device_count() if driver.available() and toolchain.nvcc() is not None else 0
CPU = ("cpu", "cpu")


def parts(whole: Program, chunks: int = 1, fused: bool = False) -> list[Program]:
    programs = tensor_parallel(whole, 2).programs
    for program in programs:
        if fused:
            program.target = Target.parse("ort-cuda")
            assert apply_pass(LowerCudaNormalization(), program, PassContext(program.target)).fired
        if chunks > 1:
            assert apply_pass(PipelineAllReduce(chunks, 2), program).fired == 4
    return programs


def arrays(found: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: item.float().cpu().numpy() for name, item in found.items()}


class Late:
    """A lane whose addends arrive where somebody waits for them: the peer, or the rank whose memory they leave."""

    def copy(self, to: Any, origin: Any, read: Any) -> list[Any]:
        assert torch.isnan(to).all(), "what is in the slot has not been read"
        return [(to, origin)]

    def wait(self, event: list[Any]) -> None:
        for to, origin in event:
            to.copy_(origin)
        event.clear()

    def mark(self) -> None: ...


class Emptying:
    """Leaves nothing in a slot that is free."""

    def __init__(self, begin: Callable[[Any], Any]) -> None:
        self.inner = begin

    def begin(self, tensor: Any) -> Callable[[], Any]:
        wait = self.inner(tensor)

        def waited() -> Any:
            received = wait()

            def release() -> None:
                received.tensor.fill_(float("nan"))
                received.release()

            return type(received)(received.tensor, release)

        return waited


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_numbers_on_cpus(chunks: int, fused: bool) -> None:
    whole, given = transformer(length=150), feeds(length=150, batch=1)
    group = Group(parts(whole, chunks, fused), CPU)
    want = run_reference(whole, given)
    for _ in range(2):
        assert compare_outputs(want, arrays(group.run(given))).relative_l2 < 1e-6
    # What was read is written again: a layer has two sums, of which at most one and its neighbour are on their way.
    slots = [len(free) for inbox in group.exchange._inboxes for free in inbox.free.values()]
    assert all(count <= 3 for count in slots) and not any(inbox.sent for inbox in group.exchange._inboxes)


def test_an_addend_is_not_read_before_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots hold NaN but between the wait and the release."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    whole, given = transformer(length=150), feeds(length=150, batch=1)
    group = Group(parts(whole, 2, True), CPU)
    made = group.exchange
    assert isinstance(made, CopyExchange)
    made._lanes = [Late(), Late()]
    for rank in group.ranks:
        rank.reducer = Emptying(rank.reducer.begin)
    assert compare_outputs(run_reference(whole, given), arrays(group.run(given))).relative_l2 < 1e-6


def test_caches_are_parts_of_the_ranks() -> None:
    whole, given = transformer("cached", kv_heads=2), feeds("cached")
    want = run_reference(whole, given)
    got = arrays(Group(tensor_parallel(whole, 2).programs, CPU).run(given))
    assert got["present_0_key"].shape == (2, 2, 17, 8)
    assert compare_outputs(want, got).relative_l2 < 1e-6


def test_weights_are_there_once() -> None:
    whole = transformer(length=150)
    programs = tensor_parallel(whole, 2).programs
    first = Group(programs, CPU)
    chunked = [program.clone() for program in programs]
    for program in chunked:
        apply_pass(PipelineAllReduce(2, 8), program)
    second = Group(chunked, CPU, like=first)
    for one, two in zip(first.ranks, second.ranks, strict=True):
        mine = {v.name: t.data_ptr() for v, t in one._weights.items()}
        assert {v.name: t.data_ptr() for v, t in two._weights.items() if v.name in mine} == mine


def test_memory_of_other_lengths_is_let_go() -> None:
    whole = transformer()
    group = Group(tensor_parallel(whole, 2).programs, CPU)
    for length in (17, 20, 20, 9):
        given = feeds(length=length)
        assert compare_outputs(run_reference(whole, given), arrays(group.run(given))).relative_l2 < 1e-6
    lengths = {shape[1] for inbox in group.exchange._inboxes for shape, _ in inbox.free}
    assert lengths == {9, 20}


def test_ranks_that_do_not_fit_each_other() -> None:
    first, second = tensor_parallel(transformer(length=150), 2).programs
    with pytest.raises(InputError, match="these are the ranks"):
        Group([second, first], CPU)
    with pytest.raises(InputError, match="2 ranks on 1 devices"):
        Group([first, second], ["cpu"])
    apply_pass(PipelineAllReduce(2, 8), second)
    with pytest.raises(InputError, match="run the same passes on all of them"):
        Group([first, second], CPU)
    with pytest.raises(InputError, match="input 'x' is not given"):
        Group(parts(transformer(length=150)), CPU).run({})
    with pytest.raises(InputError, match="graphs are for GPUs"):
        Group(parts(transformer(length=150)), CPU).graph({})
    if GPUS < 2:
        with pytest.raises(UnsupportedError, match="2 ranks take 2 GPUs"):
            Group(parts(transformer(length=150)))


def test_exchanges() -> None:
    with pytest.raises(InputError, match="one of copy, nccl"):
        exchange("mail", CPU)
    with pytest.raises(UnsupportedError, match="between 2 ranks, not 3"):
        exchange("copy", ["cpu"] * 3)
    with pytest.raises(UnsupportedError, match="between GPUs; the devices are cpu, cpu"):
        exchange("nccl", CPU)
    made = CopyExchange(CPU)
    wait = made.reducer(0).begin(torch.ones(2))
    with pytest.raises(InputError, match="which rank 1 has not begun"):
        wait()
    made.restart()
    mine, theirs = (made.reducer(rank).begin(torch.full((2,), float(rank))) for rank in range(2))
    assert mine().tensor.tolist() == [1, 1] and theirs().tensor.tolist() == [0, 0]


def test_the_fastest_way_is_taken_if_it_is_clearly_faster() -> None:
    whole, given = transformer(length=150), feeds(length=150, batch=1)
    groups = {
        "whole": Group(parts(whole), CPU),
        "chunks": Group(parts(whole, 2), CPU),
        "other": Group(parts(whole), CPU),
    }
    noise = 1 + np.random.default_rng(0).normal(0, 0.005, (3, 15))

    def measured(*seconds: float) -> Callable[..., dict[str, list[float]]]:
        def interleave(fns: Any, seconds: float) -> dict[str, list[float]]:
            for call in fns.values():
                call()
            return times

        times = {name: list(s * n) for name, s, n in zip(groups, seconds, noise, strict=True)}
        return interleave

    found = fastest(groups, given, interleave=measured(1.0, 0.8, 0.9))
    assert found.name == "chunks" and found.group is groups["chunks"] and 1.2 < found.ratios["chunks"].median < 1.3
    assert fastest(groups, given, interleave=measured(1.0, 0.995, 1.1)).name == "whole"
    assert fastest(groups, given, gain=1.3, interleave=measured(1.0, 0.8, 0.9)).name == "whole"
    with pytest.raises(InputError, match="nothing to choose from"):
        fastest({}, given)


@pytest.mark.skipif(GPUS < 1, reason="no GPU, or no nvcc")
@pytest.mark.parametrize("kind", ["copy", "nccl"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_numbers_on_gpus(chunks: int, kind: str) -> None:
    """On one GPU both ranks are there, and their copies within it."""
    if kind == "nccl" and GPUS < 2:
        pytest.skip("NCCL takes two GPUs")
    whole, given = transformer(length=150), feeds(length=150, batch=1)
    devices = ["cuda:0", f"cuda:{min(GPUS, 2) - 1}"]
    group = Group(parts(whole, chunks, True), devices, kind, dtype="float16")
    want, half = run_reference(whole, given), {"x": torch.from_numpy(given["x"]).half().cuda()}
    for _ in range(3):
        assert compare_outputs(want, arrays(group.run(half))).relative_l2 < 2e-3
    if kind == "nccl":
        return
    graph = group.graph(half)
    for seed in range(3):
        given = feeds(length=150, batch=1, seed=seed)
        want, half = run_reference(whole, given), {"x": torch.from_numpy(given["x"]).half().cuda()}
        assert compare_outputs(want, arrays(graph(half))).relative_l2 < 2e-3
        assert compare_outputs(want, arrays(group.run(half))).relative_l2 < 2e-3
