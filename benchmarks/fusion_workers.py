"""The processes of ``benchmarks/fusion.py``: starting them, asking them one at a time, and pairing what they say."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fusion_peers import Job
from benchmarks.fusion_rows import MINE
from planish.ir.compare import compare_outputs
from planish.runtime.measure import ratio

HERE = Path(__file__).resolve().parent
#: Rounds that are taken even when the time is up, and rounds at most.
LEAST_ROUNDS, MOST_ROUNDS = 7, 200
#: Seconds after which a worker is given up.
BUILD_LIMIT, RUN_LIMIT = 1800.0, 600.0
#: Workers that build at the same time; builds take several times the memory of what is built.
BUILDERS = 2
#: A peer further than this from eager, in relative L2, is shown as wrong.
WRONG = 1e-3


def environment(threads: int) -> dict[str, str]:
    """What every process of the benchmark starts with."""
    count = str(threads)
    fixed = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    return os.environ | fixed | quiet


class Process:
    """One worker; waits on its pipe while it is not asked."""

    def __init__(self, job: Job, script: str = "fusion_peers.py") -> None:
        self.log = Path(job.folder) / "log.txt"
        command = [sys.executable, str(HERE / script), json.dumps(asdict(job))]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment(job.threads)
            )
        #: The answer that ended this worker: a failure; None while it works.
        self.failure: dict[str, Any] | None = None

    def ask(self, what: str, limit: float = RUN_LIMIT, **more: str) -> dict[str, Any]:
        """The answer to a request; a worker that fails answers nothing else from then on."""
        if self.failure is not None:
            return self.failure
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **more}).encode() + b"\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], limit)
            line = self.process.stdout.readline() if ready else b""
        except OSError:
            ready, line = [self.process.stdout], b""
        if not ready:
            answer = {"status": "failed", "reason": f"no answer to '{what}' in {limit:.0f} s"}
        elif not line:
            answer = {"status": "failed", "reason": self._death()}
        else:
            answer = json.loads(line)
        if "status" in answer:
            self.failure = answer
            self.close()
        return answer

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        try:
            self.process.wait(0.5 if self.failure else 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _death(self) -> str:
        code = self.process.wait()
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"exit code {code}" + (f": {lines[-1][:300]}" if lines else "")


class Workers:
    """The workers of one row, each a process that runs `script`; a context that ends them."""

    def __init__(self, jobs: Mapping[str, Job], script: str = "fusion_peers.py") -> None:
        for job in jobs.values():
            Path(job.folder).mkdir(parents=True, exist_ok=True)
        self.jobs = dict(jobs)
        self.processes = {name: Process(job, script) for name, job in jobs.items()}
        self.built: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.close()

    def build(self) -> None:
        """Builds and warms all of them, few at a time."""
        with ThreadPoolExecutor(BUILDERS) as pool:
            answers = pool.map(lambda process: process.ask("build", BUILD_LIMIT), self.processes.values())
            self.built = dict(zip(self.processes, answers, strict=True))

    def alive(self) -> list[str]:
        return [name for name, process in self.processes.items() if process.failure is None]

    def outputs(self, name: str, feeds: Path) -> dict[str, np.ndarray] | None:
        """The outputs of a worker on the inputs of a file, by number; None if it failed."""
        to = Path(self.jobs[name].folder) / "outputs.npz"
        if "status" in self.processes[name].ask("outputs", feeds=str(feeds), to=str(to)):
            return None
        with np.load(to, allow_pickle=False) as file:
            result = {key: file[key] for key in file.files}
        to.unlink()
        return result

    def time(self, names: Sequence[str], seconds: float, seed: int = 0) -> dict[str, list[float]]:
        """Seconds per run of the workers named: rounds in shuffled order, one worker at a time.

        A worker that fails on the way is left out.
        """
        times: dict[str, list[float]] = {name: [] for name in names}
        shuffle, started = random.Random(seed), time.monotonic()
        for done in range(1, MOST_ROUNDS + 1):
            order = list(times)
            shuffle.shuffle(order)
            for name in order:
                answer = self.processes[name].ask("run")
                if "status" in answer:
                    del times[name]
                else:
                    times[name].append(answer["seconds"])
            if done >= LEAST_ROUNDS and time.monotonic() - started >= seconds:
                break
        return times


def error(expected: dict[str, np.ndarray] | None, got: dict[str, np.ndarray] | None) -> float | None:
    """Relative L2, the worst over the outputs; infinite for another shape, None if there is nothing to compare."""
    if expected is None or got is None:
        return None
    return compare_outputs(expected, got).relative_l2


def entry(workers: Workers, name: str, distance: float | None) -> dict[str, Any]:
    """What the table says of a peer, before its times."""
    failure = workers.processes[name].failure
    result: dict[str, Any] = {"status": "ok", "relative_l2": finite(distance), **workers.built.get(name, {})}
    if failure is not None:
        return result | failure
    if distance is not None and not distance <= WRONG:
        result |= {"status": "wrong", "reason": f"{distance:.0e}"}
    return result


def pair(entries: dict[str, dict[str, Any]], times: Mapping[str, list[float]], baseline: str) -> None:
    """Adds median times, the ratios against the baseline, and those of planish's own peers against every peer."""
    for name, samples in times.items():
        item = entries[name]
        item["ms"] = float(np.median(samples)) * 1e3
        item["samples_ms"] = [round(s * 1e3, 5) for s in samples]
        if baseline in times:
            item["ratio"] = ratio(times[baseline], samples).to_dict()
        for mine in MINE:
            if mine in times and name != mine:
                item[f"{mine}_against"] = ratio(samples, times[mine]).to_dict()


def finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and np.isfinite(value) else None
