"""Side by side: models and artifacts timed against each other, interleaved, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from planish.cli.files import is_artifact, made_up_inputs, open_executable
from planish.ir.compare import compare_outputs
from planish.ir.errors import InputError
from planish.ir.ledger import ErrorStats, Ratio
from planish.ir.target import Target
from planish.runtime.executable import Executable
from planish.runtime.measure import Timing, interleave, noise, ratio


@dataclass(frozen=True)
class Row:
    """One contestant; `speedup` and `error` are against the first one, and None for itself.

    `throughput` is in samples per second: the size of the first dimension of the first input, over the mean time.
    """

    name: str
    path: str
    kind: str
    timing: Timing
    throughput: float
    speedup: Ratio | None = None
    error: ErrorStats | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Comparison:
    """A benchmark's rows in the order of the command line, and what a reader must know."""

    rows: list[Row]
    inputs: dict[str, str]
    synthetic: bool
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    paths: Sequence[str | Path],
    inputs: Mapping[str, np.ndarray] | None = None,
    *,
    target: str | Target = "ort-cpu",
    dims: Mapping[str, int] | None = None,
    entry: str | None = None,
    seconds: float = 10.0,
    max_runs: int = 200,
    clock: str = "wall",
    seed: int = 0,
    allow_native: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Comparison:
    """Times contestants in shuffled rounds, after checking how far their outputs are from the first one's.

    Args:
        paths: ONNX files (run on plain ONNX Runtime with all of its optimizations) and artifacts.
        inputs: by name; None makes them up from the first contestant's inputs, at `dims`.
        entry: which one to time, of programs that have several.
        seconds: for the timing of all of them together.
        clock: ``"wall"``, or ``"process"`` for processor time.

    Raises:
        InputError: a path that can not be opened, or inputs that do not fit a contestant.
    """
    target = Target.parse(target)
    given = inputs
    if given is None:
        progress("making up inputs")
        given = made_up_inputs(paths[0], target, dims, entry)
    elif dims:
        raise InputError("sizes of dimensions are for synthetic inputs; leave out --dim or --inputs.")
    names = _names(paths)
    executables: dict[str, Executable] = {}
    outputs: dict[str, Mapping[str, Any]] = {}
    for name, path in zip(names, paths, strict=True):
        progress(f"preparing {name}")
        executables[name] = open_executable(path, target, allow_native=allow_native)
        try:
            outputs[name] = executables[name].run(given, entry)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    progress("timing")
    feeds = dict(given)
    fns = {name: _runs(exe, feeds, entry) for name, exe in executables.items()}
    times = interleave(fns, seconds=seconds, max_runs=max_runs, clock=clock, seed=seed)
    first = names[0]
    size = next((int(a.shape[0]) for a in feeds.values() if a.ndim), 1)
    rows = []
    for name, path in zip(names, paths, strict=True):
        timing = Timing.of(times[name])
        versus = None if name == first else ratio(times[first], times[name])
        apart = None if name == first else _error(outputs[first], outputs[name])
        kind = "artifact" if is_artifact(path) else "model"
        rows.append(Row(name, str(path), kind, timing, 1e3 * size / timing.mean, versus, apart))
    shown = {name: f"{a.dtype}{list(a.shape)}" for name, a in feeds.items()}
    return Comparison(rows, shown, inputs is None, _notes(times, rows, inputs is None))


def _runs(executable: Executable, feeds: dict[str, Any], entry: str | None) -> Callable[[], object]:
    return lambda: executable.run(feeds, entry)


def _error(expected: Mapping[str, Any], got: Mapping[str, Any]) -> ErrorStats | None:
    """None when the outputs have other names: two unrelated models are timed, not compared."""
    return compare_outputs(expected, got) if expected.keys() == got.keys() else None


def _names(paths: Sequence[str | Path]) -> list[str]:
    """Short names that tell the contestants apart: the last part of the path, or all of it."""
    short = [Path(path).name or str(path) for path in paths]
    names = [str(path) if short.count(name) > 1 else name for name, path in zip(short, paths, strict=True)]
    return [f"{name} #{names[: k + 1].count(name)}" if names.count(name) > 1 else name for k, name in enumerate(names)]


def _notes(times: Mapping[str, Sequence[float]], rows: Sequence[Row], synthetic: bool) -> list[str]:
    notes = []
    if synthetic:
        notes.append("Inputs were synthetic; give --inputs for times and errors on your own data.")
    warning = noise(times)
    if warning:
        notes.append(warning[:1].upper() + warning[1:].replace("clock='process'", "--clock process"))
    undecided = [row.name for row in rows if row.speedup is not None and not (row.speedup.faster or row.speedup.slower)]
    if undecided:
        notes.append(f"No measurable difference to the first: {', '.join(undecided)}. More --seconds may show one.")
    if any(row.error is None for row in rows[1:]):
        notes.append("Outputs have different names, so they were not compared.")
    return notes
