from __future__ import annotations

import gc
import random
from collections.abc import Callable

import numpy as np
import pytest

from planish.ir.errors import InputError
from planish.runtime import measure
from planish.runtime.measure import Timer, Timing, bootstrap, interleave, noise, ratio, speedup


class Machine:
    """A machine whose clock only moves when a program runs on it."""

    def __init__(self, seed: int = 0) -> None:
        self.time = 0.0
        self.factor: Callable[[], float] = lambda: 1.0
        self.spinning = 0.0  # until then, worker threads use the processor
        self.random = random.Random(seed)
        self.log: list[str] = []

    def program(self, name: str, seconds: float, spins: float = 0.0) -> Callable[[], object]:
        def run() -> None:
            self.log.append(name)
            slowed = 2.0 if self.time < self.spinning else 1.0
            self.time += seconds * self.factor() * slowed
            self.spinning = self.time + spins

        return run

    def timer(self) -> Timer:
        def sleep(seconds: float) -> None:
            self.time += seconds

        return Timer(lambda: self.time, lambda: self.time, lambda: min(self.time, self.spinning), sleep)


def test_a_clear_difference_stops_early() -> None:
    machine = Machine()
    machine.factor = lambda: machine.random.uniform(0.9, 1.1)
    slow, fast = machine.program("slow", 0.05), machine.program("fast", 0.04)
    for first, second, above in ((slow, fast, True), (fast, slow, False)):
        result = speedup(first, second, seconds=60, timer=machine.timer())
        assert result.median == pytest.approx(1.25 if above else 0.8, rel=0.08)
        assert (result.low > 1) if above else (result.high < 1)
        assert result.runs < 60
        assert result.confidence == measure.EARLY_LEVEL
        assert not result.noisy
        assert result.candidate_ms == pytest.approx(40 if above else 50, rel=0.1)


def test_equal_programs_are_not_told_apart() -> None:
    """Repeated looks must not find a difference where there is none, in more than the level allows."""
    wrong = 0
    for seed in range(60):
        machine = Machine(seed)
        machine.factor = lambda machine=machine: machine.random.uniform(0.8, 1.25)  # type: ignore[misc]
        a, b = machine.program("a", 0.03), machine.program("b", 0.03)
        result = speedup(a, b, seconds=6, timer=machine.timer(), seed=seed)
        wrong += not result.low <= 1 <= result.high
        assert result.low <= result.median <= result.high
    assert wrong <= 5


def test_no_difference_on_a_quiet_machine_is_decided_early() -> None:
    machine = Machine()
    result = speedup(machine.program("a", 0.03), machine.program("b", 0.03), seconds=60, timer=machine.timer())
    assert result.runs == 7
    assert not result.noisy
    assert (result.low, result.high) == (pytest.approx(1.0), pytest.approx(1.0))


def test_time_that_is_up_on_a_noisy_machine_says_noisy() -> None:
    machine = Machine()
    machine.factor = lambda: machine.random.lognormvariate(0, 0.7)
    a, b = machine.program("a", 0.03), machine.program("b", 0.029)
    result = speedup(a, b, seconds=1.0, timer=machine.timer())
    assert result.noisy
    assert result.confidence == measure.FINAL_LEVEL
    assert machine.time < 1.5


def test_slowness_that_hits_both_cancels() -> None:
    machine = Machine()
    machine.factor = lambda: 1 + machine.time  # the machine gets slower and slower
    result = speedup(machine.program("a", 0.05), machine.program("b", 0.04), seconds=30, timer=machine.timer())
    assert result.median == pytest.approx(1.25, rel=0.1)
    assert result.low > 1


def test_threshold_other_than_one() -> None:
    machine = Machine()
    machine.factor = lambda: machine.random.uniform(0.95, 1.05)
    a, b = machine.program("a", 0.05), machine.program("b", 0.045)
    result = speedup(a, b, seconds=60, threshold=1.3, timer=machine.timer())
    assert result.high < 1.3
    assert result.low > 1


def test_rounds_are_shuffled_from_the_seed() -> None:
    orders = []
    for seed in (0, 0, 1):
        machine = Machine()
        fns = {name: machine.program(name, 0.1) for name in "abcd"}
        times = interleave(fns, max_runs=20, seconds=1e9, seed=seed, timer=machine.timer())
        assert {len(samples) for samples in times.values()} == {20}
        rounds = [tuple(machine.log[i : i + 4]) for i in range(8, len(machine.log), 4)]
        assert all(sorted(order) == list("abcd") for order in rounds)
        assert len(set(rounds)) > 5
        orders.append(rounds)
    assert orders[0] == orders[1] != orders[2]


def test_short_functions_are_repeated_in_a_sample() -> None:
    machine = Machine()
    times = interleave({"tiny": machine.program("tiny", 1e-5)}, max_runs=3, timer=machine.timer())
    assert times["tiny"] == [pytest.approx(1e-5)] * 3
    assert len(machine.log) == pytest.approx(2 + 3 * 201, abs=6)


def test_worker_threads_that_spin_do_not_slow_the_next_variant() -> None:
    machine = Machine()
    fns = {"spinner": machine.program("spinner", 0.03, spins=0.04), "other": machine.program("other", 0.03)}
    times = interleave(fns, max_runs=12, seconds=1e9, timer=machine.timer())
    assert max(times["other"]) == pytest.approx(0.03)


def test_a_process_that_never_rests_is_not_waited_for() -> None:
    machine = Machine()
    machine.spinning = 1e9
    interleave({"a": machine.program("a", 0.03)}, max_runs=50, seconds=1e9, timer=machine.timer())
    assert machine.time < 50 * 0.06 + 5 * measure.SETTLE_SECONDS + 0.5


def test_limits() -> None:
    machine = Machine()
    slow = machine.program("slow", 100.0)
    assert len(interleave({"slow": slow}, seconds=5, timer=machine.timer())["slow"]) == measure.LEAST_ROUNDS
    assert len(interleave({"slow": slow}, seconds=1e9, max_runs=11, timer=machine.timer())["slow"]) == 11
    asked: list[int] = []

    def stop(times: dict[str, list[float]]) -> bool:
        asked.append(len(times["slow"]))
        return len(times["slow"]) == 9

    interleave({"slow": slow}, seconds=1e9, min_runs=4, stop=stop, timer=machine.timer())
    assert asked == [4, 5, 6, 7, 8, 9]


def test_collection_is_off_while_timing_and_back_after() -> None:
    states: list[bool] = []

    def fails() -> None:
        states.append(gc.isenabled())
        raise KeyboardInterrupt

    assert gc.isenabled()
    with pytest.raises(KeyboardInterrupt):
        interleave({"fails": fails})
    assert states == [False]
    assert gc.isenabled()


def test_bootstrap_covers_the_median() -> None:
    rng = np.random.default_rng(1)
    covered = sum(low <= 1.1 <= high for low, high in (bootstrap(rng.normal(1.1, 0.1, 40)) for _ in range(200)))
    assert covered >= 180
    assert bootstrap(np.array([1.0, 2.0, 3.0]), seed=3) == bootstrap(np.array([1.0, 2.0, 3.0]), seed=3)


def test_summary() -> None:
    timing = Timing.of([0.001 * k for k in range(1, 101)])
    assert timing.median == pytest.approx(50.5)
    assert timing.p90 == pytest.approx(90.1)
    assert timing.min == pytest.approx(1)
    assert timing.runs == 100
    assert set(timing.to_dict()) == {"median", "p90", "p99", "min", "mean", "std", "runs"}
    with pytest.raises(InputError, match="nothing was timed"):
        Timing.of([])


def test_noise_is_named() -> None:
    assert noise({"a": [1.0, 1.01, 0.99, 1.0, 1.02, 0.98]}) == ""
    assert "runs of 'b' differ from each other by" in noise({"a": [1.0] * 6, "b": [1.0, 2.0, 0.5, 1.5, 0.7, 2.0]})
    assert "times moved by 50%" in noise({"a": [1.0, 1.0, 1.0, 1.5, 1.5, 1.5]})
    assert noise({}) == ""


def test_a_clock_that_reads_zero() -> None:
    assert ratio([0.0] * 5, [0.0] * 5).median == 1.0


def test_unknown_clock() -> None:
    with pytest.raises(InputError, match="unknown clock 'cpu'. Known: process, wall"):
        speedup(lambda: None, lambda: None, clock="cpu")
