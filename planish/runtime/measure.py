"""Timing on a machine that does other things too: interleaved, paired, and honest about what it can not decide.

Variants run in rounds, each once per round in a shuffled order, so that a slow second hits all of them alike and no
variant always runs after the same other one. What is compared are ratios within a round.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from planish.ir.errors import InputError
from planish.ir.ledger import Ratio

#: A sample is repeated calls for at least this long; a single call below it is mostly the clock and the dispatch.
SAMPLE_SECONDS = 0.002
#: Calls shorter than this get an untimed call before each sample: another variant has just emptied the caches.
SHORT_SECONDS = 0.02
#: ONNX Runtime's workers spin for tens of milliseconds after a run, on the core that the next variant needs.
SETTLE_SECONDS = 0.06
#: Rounds that are taken even when the time is up.
LEAST_ROUNDS = 3
#: An interval narrower than this decides that there is no difference worth waiting for.
RESOLUTION = 0.01
#: Level of the interval at the end, and of each look before it: looking often at 95 % would find a difference
#: between equal programs in far more than one run of twenty.
FINAL_LEVEL = 0.95
EARLY_LEVEL = 0.998
_RESAMPLES = 2000


@dataclass(frozen=True)
class Timer:
    """The clocks of a measurement; a test gives its own.

    Attributes:
        now: what a sample is timed with, in seconds.
        elapsed: what the time limit is held against, in seconds.
        cpu: processor time of the process, in seconds; tells whether worker threads still spin.
        sleep: waits for a number of seconds.
    """

    now: Callable[[], float] = time.perf_counter
    elapsed: Callable[[], float] = time.monotonic
    cpu: Callable[[], float] = time.process_time
    sleep: Callable[[float], None] = time.sleep

    @classmethod
    def named(cls, clock: str) -> Timer:
        """``"wall"``, or ``"process"``: processor time, right for one thread on a machine with other work."""
        if clock == "wall":
            return cls()
        if clock == "process":
            return cls(now=time.process_time)
        raise InputError(f"unknown clock '{clock}'. Known: process, wall.")


@dataclass(frozen=True)
class Timing:
    """Summary of the samples of one variant; all times in milliseconds per call."""

    median: float
    p90: float
    p99: float
    min: float
    mean: float
    std: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarizes times in seconds; raises InputError if there are none."""
        if not len(seconds):
            raise InputError("nothing was timed; give at least one run.")
        ms = np.asarray(seconds, np.float64) * 1e3
        p50, p90, p99 = np.percentile(ms, (50, 90, 99))
        return cls(float(p50), float(p90), float(p99), float(ms.min()), float(ms.mean()), float(ms.std()), len(ms))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class _Rounds:
    """Warm-up, then rounds of one sample per variant."""

    def __init__(self, fns: Mapping[str, Callable[[], object]], seed: int, timer: Timer) -> None:
        self.fns, self.timer = dict(fns), timer
        self.random = random.Random(seed)
        self.times: dict[str, list[float]] = {name: [] for name in fns}
        self.repeats: dict[str, int] = {}
        self.short: dict[str, bool] = {}
        self.unsettled = 0
        self.started = timer.elapsed()

    def warm_up(self) -> None:
        for name, fn in self.fns.items():
            seconds = self._time(fn, 1)
            if seconds < 0.5:  # the first call also allocates; a call this slow is not worth a second
                seconds = self._time(fn, 1)
            self.repeats[name] = min(max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-7))), 10_000)
            self.short[name] = seconds < SHORT_SECONDS

    def round(self) -> None:
        order = list(self.fns)
        self.random.shuffle(order)
        for name in order:
            fn = self.fns[name]
            self._settle()
            if self.short[name]:
                fn()
            self.times[name].append(self._time(fn, self.repeats[name]))

    def spent(self) -> float:
        return self.timer.elapsed() - self.started

    def _time(self, fn: Callable[[], object], repeats: int) -> float:
        now = self.timer.now
        started = now()
        for _ in range(repeats):
            fn()
        return (now() - started) / repeats

    def _settle(self) -> None:
        """Waits until the process is idle; gives up for good if it never is (another thread of the user works)."""
        if self.unsettled >= 3:
            return
        timer = self.timer
        limit = timer.elapsed() + SETTLE_SECONDS
        while timer.elapsed() < limit:
            before = timer.cpu()
            timer.sleep(0.0005)
            if timer.cpu() - before < 0.0002:
                self.unsettled = 0
                return
        self.unsettled += 1


def interleave(
    fns: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 5.0,
    min_runs: int = 7,
    max_runs: int = 200,
    seed: int = 0,
    clock: str = "wall",
    stop: Callable[[dict[str, list[float]]], bool] | None = None,
    timer: Timer | None = None,
) -> dict[str, list[float]]:
    """Times several functions against each other.

    Args:
        fns: functions without arguments, by name.
        seconds: limit on everything, warm-up included; :data:`LEAST_ROUNDS` rounds are taken in any case.
        min_runs: rounds before `stop` is asked.
        max_runs: rounds at most.
        seed: of the shuffled order.
        clock: ``"wall"`` or ``"process"``.
        stop: called with the times so far after each round; True ends the measurement.
        timer: clocks, in place of those that `clock` names.

    Returns:
        Seconds per call, by name: lists of equal length, one item per round.
    """
    rounds = _Rounds(fns, seed, timer or Timer.named(clock))
    collecting = gc.isenabled()
    gc.disable()  # a collection in one variant's sample is not that variant's time
    try:
        rounds.warm_up()
        for done in range(1, max_runs + 1):
            rounds.round()
            if done >= LEAST_ROUNDS and rounds.spent() >= seconds:
                break
            if stop is not None and done >= min_runs and stop(rounds.times):
                break
    finally:
        if collecting:
            gc.enable()
    return rounds.times


def speedup(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    *,
    seconds: float = 5.0,
    threshold: float = 1.0,
    min_runs: int = 7,
    max_runs: int = 200,
    seed: int = 0,
    clock: str = "wall",
    timer: Timer | None = None,
) -> Ratio:
    """Time of `baseline` over time of `candidate`: above 1, the candidate is faster.

    Stops early once the interval lies on one side of `threshold`, or is narrower than :data:`RESOLUTION`. A look
    before the end takes the stricter :data:`EARLY_LEVEL`, and a sign test at that level besides: a bootstrap of few
    pairs is too sure of itself.

    Returns:
        The median of the paired ratios with its bootstrap interval, at the level that was used. `noisy` if the
        interval still holds `threshold` and is wide, so that more time might have decided.
    """
    looks = _looks(min_runs, max_runs)
    early = False

    def decided(times: dict[str, list[float]]) -> bool:
        nonlocal early
        ratios = _ratios(times)
        if len(ratios) not in looks:
            return False
        low, high = bootstrap(ratios, EARLY_LEVEL, seed=seed)
        cleared = (low > threshold or high < threshold) and _sign_test(ratios, threshold) <= 1 - EARLY_LEVEL
        early = cleared or high - low < RESOLUTION
        return early

    times = interleave(
        {"baseline": baseline, "candidate": candidate},
        seconds=seconds,
        min_runs=min_runs,
        max_runs=max_runs,
        seed=seed,
        clock=clock,
        stop=decided,
        timer=timer,
    )
    return ratio(times["baseline"], times["candidate"], threshold, EARLY_LEVEL if early else FINAL_LEVEL, seed)


def ratio(
    baseline: Sequence[float], candidate: Sequence[float], threshold: float = 1.0, level: float = 0.95, seed: int = 0
) -> Ratio:
    """The paired ratio of two lists of times of equal length, in seconds."""
    ratios = _ratios({"baseline": baseline, "candidate": candidate})
    low, high = bootstrap(ratios, level, seed=seed)
    return Ratio(
        median=float(np.median(ratios)),
        low=low,
        high=high,
        runs=len(ratios),
        confidence=level,
        noisy=low <= threshold <= high and high - low > 2 * RESOLUTION,
        baseline_ms=float(np.median(baseline)) * 1e3,
        candidate_ms=float(np.median(candidate)) * 1e3,
    )


def bootstrap(ratios: np.ndarray, level: float = FINAL_LEVEL, *, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the median (Efron 1979), from a fixed seed."""
    picks = np.random.default_rng(seed).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    medians = np.median(ratios[picks], axis=1)
    low, high = np.quantile(medians, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def noise(times: Mapping[str, Sequence[float]]) -> str:
    """A warning if the machine was too restless for the times to mean much, else ``""``."""
    worst, name = max(((_spread(samples), name) for name, samples in times.items()), default=(0.0, ""))
    drift = max((abs(_drift(samples)) for samples in times.values()), default=0.0)
    parts = []
    if worst > 0.15:
        parts.append(f"runs of '{name}' differ from each other by {worst:.0%}")
    if drift > 0.15:
        parts.append(f"times moved by {drift:.0%} from the first half to the second")
    if not parts:
        return ""
    return f"the machine is noisy: {' and '.join(parts)}. Stop other work, or give one thread and clock='process'."


def _spread(samples: Sequence[float]) -> float:
    """Robust coefficient of variation: 1.4826 times the median absolute deviation, over the median."""
    values = np.asarray(samples, np.float64)
    if len(values) < LEAST_ROUNDS:
        return 0.0
    centre = float(np.median(values))
    return 1.4826 * float(np.median(np.abs(values - centre))) / centre if centre else 0.0


def _drift(samples: Sequence[float]) -> float:
    half = len(samples) // 2
    if half < LEAST_ROUNDS:
        return 0.0
    first, second = float(np.median(samples[:half])), float(np.median(samples[-half:]))
    return second / first - 1 if first else 0.0


def _ratios(times: Mapping[str, Sequence[float]]) -> np.ndarray:
    # A coarse clock can read zero; the smallest positive float keeps the ratio defined.
    first, second = (np.maximum(np.asarray(times[n], np.float64), 1e-12) for n in ("baseline", "candidate"))
    return first / second


def _looks(first: int, last: int) -> frozenset[int]:
    """Numbers of pairs at which to look: few, and further apart as they grow."""
    looks, at = set(), float(max(first, 1))
    while at <= last:
        looks.add(round(at))
        at = max(at * 1.25, at + 1)
    return frozenset(looks)


def _sign_test(ratios: np.ndarray, threshold: float) -> float:
    """Two-sided p-value of as many ratios on one side of `threshold` if both sides were equally likely."""
    above, below = int((ratios > threshold).sum()), int((ratios < threshold).sum())
    pairs, fewer = above + below, min(above, below)
    if not pairs:
        return 1.0
    return min(1.0, float(2 * sum(math.comb(pairs, k) for k in range(fewer + 1)) / 2**pairs))
