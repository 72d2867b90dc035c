"""Finds the pass, and within it the firing, that breaks a program; and writes what is needed to see it again."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from planish.ir.errors import PlanishError
from planish.ir.program import Program
from planish.ir.save import save_model
from planish.passes.base import Pass, PassContext
from planish.passes.driver import log_firings
from planish.passes.manager import PassManager
from planish.passes.pipeline import format_pipeline

#: Called with a program; True if it is good. What it raises of PlanishError counts as bad.
Check = Callable[[Program], bool]


@dataclass(frozen=True)
class BisectResult:
    """What bisection found.

    Attributes:
        culprit: the first pass after which the check fails; None if it fails after none, or before any.
        index: its place in the pipeline (0 is the first).
        broken_before: the check fails on the program as it was given.
        before: the program that the culprit was given.
        firing: number of the first bad firing of the culprit's rules (1 is the first), if it is made of rules.
        rule, nodes: the rule of that firing, and the nodes that it matched.
        region: the smallest model on which that rule fires: those nodes alone, if they can be cut out.
        runs: how often the check was asked.
    """

    culprit: Pass | None
    index: int | None = None
    broken_before: bool = False
    before: Program | None = None
    firing: int | None = None
    rule: str | None = None
    nodes: tuple[str, ...] = ()
    region: ir.Model | None = None
    runs: int = 0

    def __str__(self) -> str:
        if self.broken_before:
            return "the check fails before any pass runs"
        if self.culprit is None:
            return "the check holds after all passes"
        where = f", in firing {self.firing} of rule '{self.rule}' on {', '.join(self.nodes)}" if self.firing else ""
        return f"pass {(self.index or 0) + 1}, '{self.culprit}', breaks it{where}"


def bisect_passes(program: Program, passes: Sequence[Pass], check: Check) -> BisectResult:
    """Finds the first pass after which `check` fails, in about log2(number of passes) runs of it.

    A pass that raises, or leaves an invalid program, fails the check by that. `program` is not changed. Where the
    check fails, recovers and fails again along the pipeline, one of the passes that break it is found: the result
    is verified to hold right before the pass and to fail right after it.
    """
    search = _Search(program, list(passes), check)
    if not search.good(0):
        return BisectResult(None, broken_before=True, runs=search.runs)
    if search.good(len(passes)):
        return BisectResult(None, runs=search.runs)
    low, high = 0, len(passes)  # good after `low` passes, bad after `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if search.good(middle) else (low, middle)
    culprit, before = passes[low], search.state(low)
    assert before is not None  # it was good
    firing, rule, nodes = _first_bad_firing(before, culprit, search)
    region = smallest_region(before, culprit, nodes) if nodes else None
    return BisectResult(culprit, low, False, before, firing, rule, nodes, region, search.runs)


class _Search:
    def __init__(self, program: Program, passes: list[Pass], check: Check) -> None:
        self.program, self.passes, self.check = program, passes, check
        self.runs = 0

    def state(self, count: int) -> Program | None:
        """The program after the first `count` passes; None if one of them raises."""
        program = self.program.clone()
        try:
            PassManager(self.passes[:count]).apply(program, PassContext(program.target))
        except PlanishError:
            return None
        return program

    def good(self, count: int) -> bool:
        program = self.state(count)
        return program is not None and self.ask(program)

    def ask(self, program: Program) -> bool:
        self.runs += 1
        try:
            return bool(self.check(program))
        except PlanishError:
            return False


def _first_bad_firing(
    before: Program, culprit: Pass, search: _Search
) -> tuple[int | None, str | None, tuple[str, ...]]:
    """Bisects inside a pass that is made of rules, by letting only its first firings happen."""

    def fires(limit: int | None) -> tuple[bool, list[tuple[str, str, tuple[str, ...]]]]:
        program = before.clone()
        with log_firings(limit) as log:
            try:
                culprit.apply(program, PassContext(program.target))
            except Exception:  # the culprit may be what raises
                return False, log.fired
        return search.ask(program), log.fired

    fired = fires(None)[1]
    low, high = 0, len(fired)
    if not fired or not fires(0)[0]:
        return None, None, ()
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fires(middle)[0] else (low, middle)
    rule, _, nodes = fired[high - 1]
    return high, rule, nodes


def smallest_region(before: Program, culprit: Pass, names: Sequence[str]) -> ir.Model | None:
    """Cuts the nodes of these names out of the main graph of an entry; None unless `culprit` fires on that alone.

    Inputs of the cut are what the nodes read and do not compute (weights stay weights), outputs what others read.
    """
    for model in before.entries.values():
        inside = {n for n in model.graph if n.name in set(names)}
        if len(inside) != len(set(names)):
            continue
        read = dict.fromkeys(v for n in model.graph if n in inside for v in n.inputs if v is not None)
        inputs = [v for v in read if v.producer() not in inside and not v.is_initializer()]
        outputs = [
            v
            for n in model.graph
            if n in inside
            for v in n.outputs
            if v.is_graph_output() or any(user not in inside for user in v.consumers())
        ]
        try:
            graph = ir.convenience.extract(model.graph, inputs, outputs)
            region = ir.Model(
                graph, ir_version=model.ir_version, functions=[f.clone() for f in model.functions.values()]
            )
            fired = culprit.apply(Program.single(region.clone(), before.target), PassContext(before.target)).fired
        except (ValueError, PlanishError):  # types are unknown, or the pass needs what surrounds the nodes
            return None
        return region if fired else None
    return None


def write_reproducer(
    folder: str | Path,
    before: Program,
    pipeline: str | Sequence[Pass],
    error: str | BaseException,
    region: ir.Model | None = None,
) -> Path:
    """Writes ``before.onnx`` (one per entry if there are several), ``pipeline.txt`` and ``error.txt``.

    With `region`, from a :class:`BisectResult`, also ``region.onnx``.

    The folder appears complete or not at all; one that is there already keeps its place, and a number is added.

    Returns:
        The folder that was written.

    Raises:
        OSError, InputError: the disk does not take it; nothing is left behind.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, model in before.entries.items():
            write_model(model, temporary / ("before.onnx" if len(before.entries) == 1 else f"before.{name}.onnx"))
        if region is not None:
            write_model(region, temporary / "region.onnx")
        text = pipeline if isinstance(pipeline, str) else format_pipeline(pipeline)
        (temporary / "pipeline.txt").write_text(text + "\n", encoding="utf-8")
        problem = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        command = f"-p {shlex.quote(text)} -t {shlex.quote(str(before.target))}"
        again = "\n".join(f"  planish bisect {file.name} {command}" for file in sorted(temporary.glob("before*.onnx")))
        (temporary / "error.txt").write_text(f"{problem}\n\nTo see it again:\n{again}\n", encoding="utf-8")
        return _move(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _move(temporary: Path, folder: Path) -> Path:
    os.chmod(temporary, 0o755)
    for number in range(1, 10_000):
        wish = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            if not wish.exists():
                temporary.rename(wish)
                return wish
        except OSError:
            if not wish.exists():
                raise
    raise PlanishError(f"there are 10,000 reproducers named {folder.name} already.")


def write_model(model: ir.Model, path: Path) -> None:
    """Writes a model as one file, with its weights in a second one where it would pass protobuf's 2 GiB.

    Raises:
        InputError: the disk does not take it.
    """
    large = Program.single(model).weight_bytes() > 1 << 30
    save_model(model, path, weights_file=f"{path.name}.data" if large else None)
