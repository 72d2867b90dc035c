"""What helps to find out what passes do: their catalogue, near misses, and which of them breaks a model."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.cli.files import open_program
from planish.ir.errors import InputError, PlanishError, unknown
from planish.ir.target import Target

if TYPE_CHECKING:
    import numpy as np

    from planish.ir.program import Program
    from planish.passes.base import Pass
    from planish.passes.bisect import BisectResult

_SKIP, _NOT_RUNNABLE, _LAST_BAD = 125, (126, 127), 127


def describe_passes() -> list[dict[str, Any]]:
    """Every registered pass: name, kind, first line of its doc, options with type and default."""
    from planish.passes import registry
    from planish.passes.pipeline import option_types

    described: list[dict[str, Any]] = []
    for name in registry.names():
        try:
            cls = registry.get(name)
        except PlanishError as error:  # another package's pass that does not import
            described.append({"name": name, "kind": "broken", "doc": str(error), "options": []})
            continue
        types = option_types(cls)
        options = []
        for field in dataclasses.fields(cls):
            if field.init:
                default = "required" if field.default is dataclasses.MISSING else repr(field.default)
                hint = types.get(field.name)
                kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
                options.append({"name": field.name, "type": kind, "default": default})
        doc = (cls.__doc__ or "").strip().partition("\n")[0]
        if cls.__doc__ and cls.__doc__.startswith(f"{cls.__name__}("):
            doc = ""  # what dataclass writes when nobody did
        kind = "approximate" if hasattr(cls, "gives_up") else "exact"
        entry = {"name": name, "kind": kind, "level": cls.level, "doc": doc, "options": options}
        if kind == "approximate":
            entry["gives_up"] = getattr(cls, "gives_up", "")
        described.append(entry)
    return described


def check_pass_names(names: Sequence[str]) -> None:
    """Raises InputError with a did-you-mean for the first name that is no pass; ``*`` stands for all of them."""
    from planish.passes import registry

    for name in names:
        if name != "*" and name not in registry.names():
            raise unknown("pass", name, registry.names())


def explain_pass(model: str | Path, text: str, target: Target, raw: bool = False) -> dict[str, Any]:
    """Where a pass fires and where it nearly does, on the program as the target's pipeline hands it to the pass.

    Args:
        text: one pass, with options if need be.
        raw: look at the model as it is, without the passes that usually come before.
    """
    from planish.passes.base import PassContext
    from planish.passes.defaults import default_pipeline
    from planish.passes.explain import explain
    from planish.passes.manager import PassManager
    from planish.passes.pipeline import parse_pipeline

    asked = parse_pipeline(text)
    if len(asked) != 1:
        raise InputError(f"explain takes one pass, or none for all of them, and '{text}' holds {len(asked)}.")
    p = asked[0]
    program = open_program(model, target)
    first: list[Pass] = []
    if not raw:
        usual = parse_pipeline(default_pipeline(target))
        place = next((k for k, item in enumerate(usual) if item.name == p.name), 0)
        first = usual[:place]
        PassManager(first).apply(program, PassContext(target))
    misses = explain(program, p)
    result = PassManager([p]).apply(program.clone(), PassContext(target))
    return {
        "pass": str(p),
        "after": [str(item) for item in first],
        "fired": result.fired,
        "near_misses": [dataclasses.asdict(miss) for miss in misses],
    }


def explain_all(model: str | Path, target: Target) -> dict[str, Any]:
    """The near misses of every pass of the target's pipeline that is made of rules, each where it really runs."""
    from planish.passes.defaults import default_pipeline
    from planish.passes.explain import explain_pipeline
    from planish.passes.pipeline import parse_pipeline

    passes = parse_pipeline(default_pipeline(target))
    program = open_program(model, target)
    return {
        "pipeline": [str(item) for item in passes],
        "passes": [
            {
                "pass": found.name,
                "position": found.position,
                "fired": found.fired,
                "near_misses": [dataclasses.asdict(miss) for miss in found.near_misses],
            }
            for found in explain_pipeline(program, passes)
        ],
    }


def bisect(
    model: str | Path,
    pipeline: str | None,
    command: str | None,
    target: Target,
    inputs: Mapping[str, np.ndarray] | None = None,
    progress: Callable[[str], None] = lambda what: None,
    show: Callable[[str], None] = lambda line: None,
) -> BisectResult:
    """Finds the pass that breaks a model.

    Args:
        command: a shell command that exits with 0 for a good model and 1 to 127 (but 125) for a bad one, as for
            ``git bisect run``; ``{model}`` in it, or ``$PLANISH_MODEL``, is the ONNX file. None compares outputs
            with those of the model as it is, within the tolerance of its dtype.
        inputs: for the comparison; None makes them up.
    """
    from planish.driver import resolve_pipeline
    from planish.passes.bisect import bisect_passes

    passes = resolve_pipeline(pipeline, target)
    if not passes:
        raise InputError("the pipeline holds no pass, so there is nothing to bisect.")
    program = open_program(model, target)
    check = _outputs_agree(program, inputs) if command is None else _command_check(command)
    count = 0

    def counted(candidate: Program) -> bool:
        nonlocal count
        count += 1
        progress(f"check {count}: {candidate.node_count()} nodes")
        good = check(candidate)
        show(f"check {count}: {candidate.node_count()} nodes: {'good' if good else 'bad'}")
        return good

    try:
        return bisect_passes(program, passes, counted)
    except CheckError as error:
        raise InputError(str(error)) from None


def _outputs_agree(program: Program, inputs: Mapping[str, np.ndarray] | None) -> Callable[[Program], bool]:
    from planish.ir.compare import compare_outputs, tolerance
    from planish.ir.inputs import synthesize
    from planish.runtime.ort import compile_ort

    feeds = dict(inputs) if inputs is not None else synthesize(program)
    expected = compile_ort(program.main, program.target).run(feeds)
    limit = tolerance(expected)

    def check(candidate: Program) -> bool:
        got = compile_ort(candidate.main, candidate.target).run(feeds)
        return compare_outputs(expected, got).relative_l2 <= limit

    return check


def _command_check(command: str) -> Callable[[Program], bool]:
    from planish.passes.bisect import write_model

    def check(candidate: Program) -> bool:
        with tempfile.TemporaryDirectory(prefix="planish-bisect-") as folder:
            path = Path(folder) / "model.onnx"
            write_model(candidate.main, path)
            line = command.replace("{model}", shlex.quote(str(path)))
            # Its output goes to stderr: stdout is for our own result.
            done = subprocess.run(line, shell=True, env={**os.environ, "PLANISH_MODEL": str(path)}, stdout=sys.stderr)
        return _good(done.returncode, command)

    return check


class CheckError(Exception):
    """The check itself does not work. No PlanishError, which bisection would take for a bad model."""


def _good(code: int, command: str) -> bool:
    if code == _SKIP:
        raise CheckError(f"--check '{command}' exited with 125 (can not test); bisection over passes can not skip one.")
    if code in _NOT_RUNNABLE:
        raise CheckError(f"--check '{command}' can not be run (exit code {code}); is the command right?")
    if code < 0 or code > _LAST_BAD:
        raise CheckError(f"--check '{command}' died (exit code {code}); let it exit with 1 to 124 for a bad model.")
    return code == 0


def save_found(result: BisectResult, folder: str | Path) -> Path:
    """Writes the program before the culprit, the culprit, and a command to see it again."""
    from planish.passes.bisect import write_reproducer

    assert result.before is not None and result.culprit is not None
    try:
        return write_reproducer(folder, result.before, str(result.culprit), str(result))
    except OSError as error:
        raise InputError(f"can not write the reproducer '{folder}': {error.strerror or error}.") from None


def bisected(result: BisectResult, folder: Path | None) -> dict[str, Any]:
    """A bisection as plain data."""
    return {
        "culprit": str(result.culprit) if result.culprit is not None else None,
        "index": result.index,
        "broken_before": result.broken_before,
        "rule": result.rule,
        "firing": result.firing,
        "nodes": list(result.nodes),
        "checks": result.runs,
        "reproducer": str(folder) if folder is not None else None,
        "verdict": str(result),
    }
