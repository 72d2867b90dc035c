"""The driver: capture → pipeline under gates → executable."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.capture import capture
from planish.ir.budget import Budget
from planish.ir.causal_lm import CausalLM
from planish.ir.errors import InputError, PlanishError, UnsupportedError
from planish.ir.ledger import Ledger, LedgerEntry
from planish.ir.program import Program
from planish.ir.sharing import unify_weights
from planish.ir.target import IMPLEMENTED, Target
from planish.passes.base import Pass, PassContext, PassResult
from planish.passes.finishing import FinishingBench
from planish.passes.gates import DEFAULT_APPROXIMATE_ERROR, Gates, Interrupted
from planish.passes.journal import DecisionJournal
from planish.runtime.bench import Bench
from planish.runtime.compile import for_another_machine, measured_on, require_memory
from planish.runtime.executable import Executable, Runner
from planish.runtime.report import Report

if TYPE_CHECKING:
    from planish.passes.instruments import Instrument

__all__ = ["Hooks", "Interrupted", "optimize"]


@dataclass
class Hooks:
    """What a caller such as the command line adds to a run.

    Attributes:
        progress: called with what is being done now.
        instruments: watch every pass.
        journal: decisions to continue from and to add to.
        reproducers: folder for reproducers of failed passes; None: a new folder under the system's temporary one,
            made when the first pass fails.
    """

    progress: Callable[[str], None] = lambda what: None
    instruments: Sequence[Instrument] = ()
    journal: DecisionJournal = field(default_factory=DecisionJournal)
    reproducers: Path | None = None


def optimize(
    model: Any,
    target: str | Target = "ort-cpu",
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    passes: str | Sequence[Pass] | None = None,
    approximate: str | Sequence[Pass] | None = None,
    calibration: Any = None,
    budget: Budget | None = None,
    task: str | CausalLM | None = None,
    hooks: Hooks | None = None,
) -> Executable:
    """Optimizes a model for a target; every change is held to a measured error and a measured gain.

    Args:
        model: a ``torch.nn.Module``, a path to an ONNX file, an ``onnx.ModelProto`` or an ``onnx_ir.Model``.
        target: for example ``"ort-cpu"`` or ``"ort-cpu:threads=2"``.
        example_inputs: for a torch module: what its forward takes, a tuple of tensors or a dict by parameter.
        dynamic_shapes: for a torch module: as for ``torch.export.export``; names may stand for ``Dim`` objects.
        passes: None for the target's exact pipeline, a pipeline string, or a list of passes. (A target on CUDA that
            says ``dtype=float16`` or ``bfloat16`` adds the approximate pass of this name.)
        approximate: approximate passes to run with the target's exact ones, in place of `passes`: a pipeline string or
            a list. They are put where they belong, in the order that they declare; all share the budget's error.
        calibration: inputs to measure with: a dict by input name, a tuple in input order, or a list of these.
            None: the example inputs; without these, inputs made from the specs, marked as synthetic.
        budget: limits of the gates; None for the defaults of :class:`planish.Budget`.
        task: ``"causal-lm"`` for a decoder of ``transformers``: the executable then has the entries ``prefill`` and
            ``decode``, and :meth:`planish.Executable.generate`. Example inputs and calibration are prompts:
            ``input_ids``, and an ``attention_mask`` where rows are padded. :class:`planish.CausalLM` has options.
        hooks: progress, instruments, the journal and reproducers.

    Returns:
        An executable; ``exe.report`` says what was done, what it cost and what it gained.

    Raises:
        InputError: something given is wrong; the message says what, where, and what to do.
        Interrupted: Ctrl-C; a ``KeyboardInterrupt`` that carries the best program so far.
    """
    hooks = hooks or Hooks()
    started = time.monotonic()
    target, budget = _implemented(Target.parse(target)), budget if budget is not None else Budget()
    if not isinstance(budget, Budget):
        raise InputError(f"budget is a {type(budget).__name__}; give planish.Budget(error=..., seconds=...).")
    if target.name == "ort-cuda" and target.memory is not None and task is not None:
        from planish.offload import optimize_budgeted

        return optimize_budgeted(
            model, target, task=task, passes=passes, approximate=approximate, budget=budget, hooks=hooks,
            example_inputs=example_inputs, dynamic_shapes=dynamic_shapes, calibration=calibration,
        )  # fmt: skip
    elsewhere = for_another_machine(target, measured=budget.gates)
    pipeline = resolve_pipeline(passes, target, approximate)
    hooks.progress("reading the model")
    program, compare, note = capture(hooks.progress, model, example_inputs, dynamic_shapes, calibration, target, task)
    pipeline = _with_shapes(program, pipeline)
    bench = Bench(measured_on(program, target), program.calibration)
    if compare is not None:
        hooks.progress("comparing the captured program with the module")
        _compare(compare, Bench(Target(), program.calibration) if elsewhere else bench)
    if not budget.gates:
        bench.forget(program)
    note = f"this machine can not run '{target}'" if elsewhere else note
    best, ledger = _run_passes(hooks, program, pipeline, bench, budget, note)
    ledger.synthetic = program.calibration is not None and program.calibration.synthetic
    hooks.progress("preparing the executable")
    runners = _runners(bench, best, ledger, target)
    report = _report(model, program, best, pipeline, ledger, time.monotonic() - started, budget)
    return Executable(best, runners, report=report, pipeline=report.pipeline)


def _compare(compare: Callable[[Bench], None], bench: Bench) -> None:
    """Compares a captured program with its module on the target; on the CPU where a GPU can not run it as it is."""
    try:
        compare(bench)
    except InputError as error:
        # What fails to run, with a cause, may be what a lowering replaces: CUDA has no kernel of a step in float32.
        if error.__cause__ is None or bench.target.device != "cuda":
            raise
        compare(Bench(Target(), bench.calibration))


def _runners(bench: Bench, best: Program, ledger: Ledger, target: Target) -> dict[str, Runner]:
    if len(best.entries) > 1 and unify_weights(best):
        bench.forget(best)
    require_memory(best, target)
    if bench.target != target:
        bench = Bench(target, best.calibration)
        ledger.notes.append("the program before it is beyond the memory of the target: gains were measured without it")
    runners = {name: bench.runner(best, name) for name in best.entries}
    ledger.notes += list(dict.fromkeys(note for runner in runners.values() for note in runner.notes))
    if target.buckets:
        from planish.runtime.ort_buckets import confirm_padding

        ledger.notes += confirm_padding(best, runners)
    return {**runners}


def resolve_pipeline(
    passes: str | Sequence[Pass] | None, target: Target, approximate: str | Sequence[Pass] | None = None
) -> list[Pass]:
    """The passes that `optimize` will run; what they require of the program is checked once there is one.

    Raises:
        InputError: a pipeline string that does not parse, something that is no pass, or levels that do not chain; both
            `passes` and `approximate`.
    """
    from planish.passes.defaults import default_pipeline, with_approximate
    from planish.passes.manager import check_levels
    from planish.passes.pipeline import as_passes

    if passes is None and target.device == "cuda" and target.dtype in ("float16", "bfloat16"):
        given = as_passes(approximate or [])
        asked = [] if any(p.name == target.dtype for p in given) else as_passes(target.dtype)
        approximate = [*given, *asked]
    if approximate is not None:
        if passes is not None:
            raise InputError(
                "approximate= goes with the target's exact passes; name all passes in passes=, or leave it out."
            )
        pipeline = with_approximate(target, as_passes(approximate))
    else:
        pipeline = as_passes(default_pipeline(target) if passes is None else passes)
    check_levels(pipeline)
    return pipeline


def _implemented(target: Target) -> Target:
    if target.name not in IMPLEMENTED:
        raise UnsupportedError(f"target '{target.name}' is not implemented yet; use {', '.join(IMPLEMENTED)}.")
    return target


def _with_shapes(program: Program, pipeline: list[Pass]) -> list[Pass]:
    """Rules look at dtypes and shapes, which an ONNX file need not hold: they are inferred first, as a pass."""
    from planish.ir.properties import holds
    from planish.passes import registry

    infer = registry.get("infer-shapes")
    if any(isinstance(p, infer) for p in pipeline) or holds("shapes", program):
        return pipeline
    return [infer(), *pipeline]


def _run_passes(
    hooks: Hooks, program: Program, pipeline: list[Pass], bench: Bench, budget: Budget, note: str
) -> tuple[Program, Ledger]:
    from planish.passes.instruments import Verify
    from planish.passes.manager import PassManager

    def run(candidate: Program, entry: str) -> list[dict[str, Any]]:
        try:
            return bench.run_entry(candidate, entry)
        finally:
            bench.forget(candidate)

    ctx = PassContext(program.target, run=None if note else run)
    manager = PassManager(pipeline, instruments=[Verify(), *hooks.instruments])
    manager.check(program)

    def apply(p: Pass, candidate: Program) -> PassResult:
        return PassManager([p], instruments=[Verify(changes=True), *hooks.instruments]).apply(candidate, ctx)

    if not budget.gates:
        return _without_gates(hooks, program, pipeline, apply)
    reason = note or _can_not_run(bench, program)
    if reason:
        ledger = Ledger(measured=False, notes=[f"nothing was changed: {reason}; give calibration inputs"])
        return program, ledger
    # Much of what ONNX Runtime has no kernel for on a GPU runs there once it is lowered.
    measured = FinishingBench(bench, apply) if bench.target.name == "ort-cuda" else bench
    gates = Gates(measured, budget, apply, hooks.journal, _Reproducers(hooks.reproducers), hooks.progress)
    return gates.optimize(program, pipeline)


def _can_not_run(bench: Bench, program: Program) -> str:
    """Why the original does not run on made-up inputs; inputs of the user that fail are the user's error."""
    assert program.calibration is not None
    if not program.calibration.synthetic:
        return ""
    try:
        bench.run(program)
    except PlanishError as error:
        return f"the original does not run on synthetic inputs ({error})"
    return ""


def _without_gates(
    hooks: Hooks, program: Program, pipeline: list[Pass], apply: Callable[[Pass, Program], PassResult]
) -> tuple[Program, Ledger]:
    from planish.passes.group import PassGroup

    ledger = Ledger(measured=False, notes=["gates were off: error and gain were not measured"])
    group = PassGroup(program, pipeline, apply, _Reproducers(hooks.reproducers), lambda p: hooks.progress(str(p)))
    candidate = group.build()
    counts = program.node_count(), candidate.program.node_count()
    ledger.entries = [*candidate.entries, LedgerEntry("all passes", "composition", *counts, verdict="not measured")]
    return candidate.program, ledger


class _Reproducers:
    """Writes what is needed to see a pass fail again; a folder is made only when one does."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __call__(self, before: Program, p: Pass, error: str) -> Path | None:
        from planish.passes.bisect import write_reproducer

        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="planish-reproducer-"))
        try:
            return write_reproducer(self.folder / p.name, before, str(p), error)
        except (OSError, PlanishError):
            return None  # a full disk must not turn a rolled-back pass into a failed run


def _report(
    model: Any,
    before: Program,
    after: Program,
    pipeline: list[Pass],
    ledger: Ledger,
    seconds: float,
    budget: Budget,
) -> Report:
    from planish.passes.pipeline import format_pipeline

    total = next((e for e in reversed(ledger.entries) if e.kind == "composition"), None)
    return Report.build(
        model=_name(model),
        before=before,
        after=after,
        pipeline=_as_run(format_pipeline(pipeline), ledger, len(pipeline)),
        ledger=ledger,
        error=total.error_original if total else None,
        speedup=total.speedup if total else None,
        seconds=seconds,
        error_budget=DEFAULT_APPROXIMATE_ERROR if budget.error is None else budget.error,
        **_costs(before, after, before.sizes()),
    )


def _as_run(asked: str, ledger: Ledger, count: int) -> str:
    """The pipeline with the variants that tuned passes chose, so that it makes this result again."""
    names = [entry.name for entry in ledger.entries if entry.kind != "composition"]
    return ",".join(names) if len(names) == count else asked


def _costs(before: Program, after: Program, dims: Mapping[str, int]) -> dict[str, Any]:
    from planish.ir.analyses.cost import cost
    from planish.ir.analyses.liveness import liveness

    result: dict[str, Any] = {}
    for name, program in (("before", _sized(before, dims)), ("after", after)):
        result[f"cost_{name}"] = int(cost(program, dims=dims).flops)
        result[f"peak_{name}"] = int(liveness(program, dims=dims).peak_bytes)
    return result


def _sized(program: Program, dims: Mapping[str, int]) -> Program:
    """The program, or where a file lacks shapes a copy with those that follow from the sizes of the inputs."""
    import onnx_ir as ir

    from planish.ir.infer import infer_shapes
    from planish.ir.properties import holds
    from planish.passes.canonicalize.raise_opset import RaiseOpset

    if holds("shapes", program):
        return program
    program = program.clone()
    RaiseOpset().apply(program, PassContext(program.target))  # inference knows more of newer operators
    for model in program.entries.values():
        for value in model.graph.inputs:
            if value.shape is not None:
                sizes = [d if isinstance(d, int) else dims.get(d.value or "", d) for d in value.shape]
                value.shape = ir.Shape(sizes)
        infer_shapes(model)
    return program


def _name(model: Any) -> str:
    if isinstance(model, str | Path):
        return Path(model).name
    return type(model).__name__
