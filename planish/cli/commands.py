"""What the commands do, put together from the rooms of the library; `planish.cli.app` only parses and prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from planish.cli.files import batches, is_artifact, made_up_inputs, open_executable, open_program, save_outputs
from planish.ir.budget import Budget
from planish.ir.errors import InputError, PlanishError, unknown
from planish.ir.target import Target

if TYPE_CHECKING:
    import numpy as np

    from planish.driver import Interrupted
    from planish.passes.instruments import Instrument
    from planish.runtime.executable import Executable
    from planish.runtime.report import Report


class StoppedError(PlanishError):
    """Ctrl-C after which something was kept; the message says where."""

    exit_code = 130


_BUDGET_FIELDS = ("error", "min_gain", "seconds")


def parse_budget(text: str | None, gates: bool = True) -> Budget:
    """Reads ``"error=1e-3,min_gain=1.02,seconds=30"``.

    Raises:
        InputError: an unknown limit (with a did-you-mean), or a value that is no number.
    """
    values: dict[str, Any] = {"gates": gates}
    for item in filter(None, (part.strip() for part in (text or "").split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if name not in _BUDGET_FIELDS:
            raise unknown("limit in --budget", name, _BUDGET_FIELDS)
        if name in values:
            raise InputError(f"--budget: '{name}' is given twice.")
        try:
            values[name] = float(value)
        except ValueError:
            raise InputError(f"--budget: {name}={value or 'nothing'} is not a number; write {name}=1e-3.") from None
        if not equals:
            raise InputError(f"--budget: '{item}' has no value; write {name}=1e-3.")
    return Budget(**values)


def parse_dims(items: Sequence[str]) -> dict[str, int]:
    """Reads ``["batch=4", "sequence=128"]``."""
    dims = {}
    for item in items:
        name, _, value = item.partition("=")
        if not value.strip().isdecimal() or int(value) < 1:
            raise InputError(f"--dim: '{item}' is not of the form name=size, such as batch=4.")
        dims[name.strip()] = int(value)
    return dims


def make_target(text: str, threads: int | None) -> Target:
    """A target from the command line; ``--threads`` wins over the string."""
    target = Target.parse(text)
    if threads is None:
        return target
    if threads < 0:
        raise InputError(f"--threads is {threads}; it must be at least 0, where 0 lets the runtime choose.")
    return dataclasses.replace(target, threads=threads)


def failed_passes(report: Report, named: bool, approximate: bool = False) -> list[str]:
    """Passes that make a run count as "a gate failed".

    That is a pass that was rolled back because it raised or changed the numbers; and any pass that was rolled
    back if the user `named` the pipeline, or `approximate` passes: who asked for a pass wants to know that it is not in
    the result.
    """
    wrong = []
    for entry in report.passes:
        numbers = entry.error_original is not None and entry.kind == "exact"
        asked = named or (approximate and entry.kind == "approximate")
        if not entry.kept and (asked or numbers or entry.reproducer):
            wrong.append(entry.name)
    return wrong


def journal(path: str | None, resume: bool) -> Any:
    """The journal of decisions for ``--journal`` and ``--continue``."""
    from planish.passes.journal import DecisionJournal

    if path is None:
        if resume:
            raise InputError("--continue needs --journal FILE: the file that the interrupted run wrote.")
        return DecisionJournal()
    if resume and not Path(path).exists():
        raise InputError(f"--continue: there is no journal '{path}'; run once without --continue.")
    try:
        return DecisionJournal(path, resume=resume)
    except OSError as error:
        raise InputError(f"can not write the journal '{path}': {error.strerror or error}.") from None


def instruments(print_after: Sequence[str], verify: bool, file: TextIO) -> list[Instrument]:
    """What ``--print-after`` and ``--verify`` add to a run."""
    from planish.passes.instruments import Print, Verify

    added: list[Instrument] = [Verify(full=True)] if verify else []
    return added + ([Print(after=print_after, file=file)] if print_after else [])


def salvage(
    model: str | Path,
    interrupted: Interrupted,
    target: Target,
    pipeline: str | None,
    approximate: str | None = None,
    *,
    synthetic: bool,
) -> Executable | None:
    """The best program of an interrupted run as an executable, or None if nothing had been kept yet."""
    from planish.driver import resolve_pipeline
    from planish.passes.pipeline import format_pipeline
    from planish.runtime.compile import compile_entry
    from planish.runtime.executable import Executable
    from planish.runtime.report import Report

    if not any(entry.kept and entry.fired for entry in interrupted.ledger.entries):
        return None
    best = interrupted.best
    interrupted.ledger.synthetic = synthetic
    last = interrupted.ledger.entries[-1]
    text = format_pipeline(resolve_pipeline(pipeline, target, approximate)) if pipeline is None else pipeline
    report = Report.build(
        model=Path(model).name,
        before=open_program(model, target),
        after=best,
        pipeline=text,
        ledger=interrupted.ledger,
        error=last.error_original,
        speedup=None,
        seconds=sum(entry.seconds for entry in interrupted.ledger.entries),
    )
    return Executable(best, {"main": compile_entry(best, "main", target)}, report=report, pipeline=text)


def one_batch(paths: Sequence[str]) -> dict[str, np.ndarray] | None:
    """The inputs of commands that take one batch; None when there are none.

    Raises:
        InputError: more than one file, or one that can not be read.
    """
    found = batches(paths)
    if found is not None and len(found) > 1:
        raise InputError(f"--inputs is given {len(found)} times; this command takes one batch.")
    return found[0] if found else None


def run_once(
    path: str | Path,
    inputs: Sequence[str],
    output: str | None = None,
    entry: str | None = None,
    threads: int | None = None,
    dims: Sequence[str] = (),
    allow_native: bool = False,
) -> dict[str, Any]:
    """Runs an artifact or a model once; returns outputs as text and summary, and writes them if asked to."""
    import time

    target = make_target("ort-cpu", threads)
    sizes = parse_dims(dims)
    if inputs and sizes:
        raise InputError("--dim is for synthetic inputs; leave out --dim or --inputs.")
    executable = open_executable(path, target, allow_native=allow_native)
    feeds = one_batch(inputs)
    if feeds is None:
        feeds = made_up_inputs(path, target, sizes, entry)
    started = time.perf_counter()
    outputs = executable.run(feeds, entry)
    seconds = time.perf_counter() - started
    if output is not None:
        save_outputs(output, outputs)
    return {
        "path": str(path),
        "synthetic": not inputs,
        "milliseconds": seconds * 1e3,
        "inputs": {name: f"{value.dtype}{list(value.shape)}" for name, value in feeds.items()},
        "outputs": {name: _summary(value) for name, value in outputs.items()},
        "saved": output,
    }


def _summary(value: Any) -> dict[str, Any]:
    import numpy as np

    if not isinstance(value, np.ndarray | np.generic):
        return {"type": type(value).__name__, "length": len(value) if hasattr(value, "__len__") else None}
    array = np.asarray(value)
    found: dict[str, Any] = {"dtype": str(array.dtype), "shape": list(array.shape)}
    if array.size and array.dtype.kind in "fiubV":
        wide = array.astype(np.float64)
        found |= {"min": float(wide.min()), "max": float(wide.max()), "mean": float(wide.mean())}
    return found


def verify(path: str | Path, threads: int | None, allow_native: bool) -> tuple[dict[str, Any], bool]:
    """Verifies an artifact; returns what was found, and whether it holds."""
    from planish.runtime.artifact import verify_artifact

    result = verify_artifact(Path(path), threads=threads, allow_native=allow_native)
    return {"path": str(path)} | result.to_dict(), result.ok


def inspect(path: str | Path | None, target: Target, dims: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What `planish inspect` shows, as plain data; of an artifact also what is recorded of its making, and what it
    needs of a machine. Without a path, what this machine has for the target.
    """
    from planish.cli import machine

    if path is None:
        return machine.described(target)
    found: dict[str, Any] = {"path": str(path), "kind": "artifact" if is_artifact(path) else "model"}
    if is_artifact(path):
        found |= machine.needed(path)
        if found["compiled"]:
            return found
        if plan := machine.planned(path, target, dims or {}):
            return found | plan
    from planish.ir.inspect import inspect_program
    from planish.runtime.coverage import ort_cpu_coverage

    program = open_program(path, target)
    found |= inspect_program(program, dims).to_dict()
    found["target"] = str(target)
    coverage = ort_cpu_coverage(program) if target.name == "ort-cpu" else None
    found["coverage"] = coverage.to_dict() if coverage is not None else None
    return found
