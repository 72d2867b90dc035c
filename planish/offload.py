"""The driver of memory budgets: a decoder is captured once, cut along its layers, and lowered part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.budget import Budget
from planish.ir.causal_lm import DECODE, IDS, PREFILL, CausalLM
from planish.ir.errors import InputError
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.base import ApproximatePass, Pass, PassContext
from planish.passes.defaults import RECOGNIZE, lowering
from planish.passes.gates import DEFAULT_APPROXIMATE_ERROR
from planish.passes.lowering.lower_cuda_cache import LowerCudaCache
from planish.passes.manager import PassManager
from planish.passes.pipeline import as_passes, format_pipeline, parse_pipeline
from planish.runtime.compile import for_another_machine
from planish.runtime.executable import Executable
from planish.runtime.offload.account import MemoryBudgetError, size_text
from planish.runtime.offload.device import Device
from planish.runtime.offload.engine import Engine
from planish.runtime.offload.pieces import Lower
from planish.runtime.offload.plan import Plan, Request
from planish.runtime.offload.planned import PlannedDevice
from planish.runtime.offload.planner import request_seconds
from planish.runtime.offload.runner import BudgetRunner
from planish.runtime.offload.split import Split, split_decoder
from planish.runtime.offload.table import milliseconds

_HALF = "float16"
#: What makes weights smaller, tried in this order if the error budget allows.
_LOWER_PRECISION = ("float16", "quantize-weights,float16", "quantize-weights{bits=4},float16")
#: How much faster a lower precision must be than one that loses less, by the estimate.
_WORTH = 1.05
#: Tokens after the calibration's prompts that estimates are for.
_TOKENS = 32


def lower_for(target: Target) -> Lower:
    """What chooses the forms of one part for a target."""
    # A part reads a chunk of one row, or a token of each.
    names = [f"{name}{{chunks=True}}" if name == LowerCudaCache.name else name for name in lowering(target)]
    passes = parse_pipeline(",".join(("infer-shapes", *names, "infer-shapes")))

    def lower(model: ir.Model) -> ir.Model:
        program = Program.single(model, target)
        PassManager(passes).apply(program, PassContext(target))
        return program.main

    return lower


def split_for(decode: ir.Model, target: Target) -> Split:
    """The entry ``decode``, captured with chunks and not lowered, in parts that are.

    Raises:
        UnsupportedError: it can not be cut along its layers.
    """
    return split_decoder(decode, lower_for(target))


def optimize_budgeted(
    model: Any,
    target: Target,
    *,
    task: str | CausalLM,
    passes: str | Sequence[Pass] | None = None,
    approximate: str | Sequence[Pass] | None = None,
    budget: Budget | None = None,
    device: Device | None = None,
    **options: Any,
) -> Executable:
    """`planish.optimize` for a causal language model whose target has ``memory=``.

    The program is captured, recognized and compared on the CPU, where the whole model has room. If its weights do not
    fit and the budget has an error, float16 and quantized weights are tried, and kept where the error allows. Then it
    is cut along its layers; what goes where is planned for each generation.

    Args:
        passes, approximate: as for `optimize`; they run before the program is cut, those for the CPU first, and then
            float16, which a target's ``dtype=float16`` asks for too.
        device: None: the GPU of the target.
        options: of `optimize`.

    Raises:
        MemoryBudgetError: even the calibration's prompts do not fit.
    """
    from planish.driver import optimize

    _require_float16(target.dtype)
    wanted = replace(CausalLM.parse(task), chunks=True)
    pipeline = as_passes(",".join(RECOGNIZE) if passes is None else passes)
    early = as_passes(approximate or [])
    if late := [p.name for p in early if not isinstance(p, ApproximatePass) or p.lowered]:
        raise InputError(f"'{late[0]}' can not run on a program that a memory budget will cut; leave it out.")
    if any(p.name == "quantize-entries" for p in early):
        raise InputError(
            "'quantize-entries' chooses by times on the CPU, and a model under a budget has one entry; give "
            "planish.Budget(error=...), and the plan chooses the precision, or name quantize-weights."
        )
    for name in (p.name for p in early):
        _require_float16(name)
    # The CPU, which compares the program, is no faster in float16; it is for the device.
    halving = [p for p in early if p.name == _HALF] or as_passes(_HALF if target.dtype == _HALF else [])
    early = [p for p in early if p.name != _HALF]
    elsewhere = device is None and for_another_machine(target, measured=(budget or Budget()).gates)
    own = device or (PlannedDevice(target.memory, target) if elsewhere else _gpu(target))
    host = Target("ort", "cpu", threads=target.threads)
    # Gains on the CPU say nothing of the GPU: nothing is rolled back for them.
    limits = replace(budget or Budget(), min_gain=0.0)
    exe = optimize(model, host, task=wanted, passes=[*pipeline, *early], budget=limits, **options)
    assert exe.program is not None and exe.report is not None
    program, notes = exe.program, exe.report.ledger.notes
    program = _halved(program, halving, target, limits, notes)
    program, engine = _smaller(program, target, own, limits, notes)
    runner = BudgetRunner(engine, _request(program))
    notes += runner.notes
    return Executable(
        program, {PREFILL: runner}, report=exe.report, pipeline=exe.pipeline, provenance=exe.provenance, target=target
    )


def _require_float16(dtype: str | None) -> None:
    if dtype == "bfloat16":
        raise InputError(f"a memory budget takes {_HALF}, whose error the CPU can measure, not bfloat16.")


def _halved(program: Program, halving: Sequence[Pass], target: Target, budget: Budget, notes: list[str]) -> Program:
    """The program in the half precision that was asked for, unless it loses more than the error budget."""
    if not halving:
        return program
    candidate = program.clone()
    candidate.target = target
    if not PassManager(list(halving)).apply(candidate, PassContext(target)).modified:
        return program
    if not budget.gates:
        return candidate
    error, limit = _error(program, candidate, target), budget.error
    if budget.metric is not None or limit is None:  # a metric is of the outputs of whole programs
        limit = DEFAULT_APPROXIMATE_ERROR
    if not error <= limit:
        notes.append(f"{_HALF} was taken back: error {error:.2g} > {limit:.2g}")
        return program
    notes.append(f"{_HALF}: error {error:.2g}")
    return candidate


def _gpu(target: Target) -> Device:
    from planish.runtime.offload.cuda_device import CudaDevice
    from planish.runtime.ort_cuda import require

    require(target)
    return CudaDevice(target.memory, target)


def _engine(program: Program, target: Target, device: Device) -> Engine:
    split = split_for(program.entries[DECODE], target)
    engine = Engine(split, device, target)
    if not isinstance(device, PlannedDevice):
        engine.measure()
    return engine


def _smaller(
    program: Program, target: Target, device: Device, budget: Budget, notes: list[str]
) -> tuple[Program, Engine]:
    """The program in the precision that the error budget allows and whose estimated time is the least.

    What streams nothing is not made smaller, and precisions are tried in the order of what they lose.
    """
    original, engine = program, _engine(program, target, device)
    if budget.error is None or budget.metric is not None or not budget.gates:
        return program, engine
    request = replace(_request(program), new=_TOKENS)
    best, before, half = _planned(engine, request), engine.parts.facts().weights, False
    for passes in _LOWER_PRECISION:
        if best is not None and not best.streamed() and not best.kv_host():
            break
        candidate = original.clone()
        candidate.target = target  # a GPU's products take half precision with weights in few bits
        # What float16 alone leaves as it is has that precision already.
        wanted = as_passes(passes)[: 1 if half else None]
        if not PassManager(wanted).apply(candidate, PassContext(target)).modified:
            half = half or passes == _LOWER_PRECISION[0]
            continue
        error, name = _error(original, candidate, target), format_pipeline(wanted)
        if not error <= budget.error:
            notes.append(f"{name} was taken back: error {error:.2g} > {budget.error:.2g}")
            continue
        made = _engine(candidate, target, device)
        found, now = _planned(made, request), made.parts.facts().weights
        if found is None:
            notes.append(f"{name} was taken back: weights of {size_text(now)} do not fit either")
            continue
        step = f"a step is estimated at {milliseconds(found.seconds)}"
        if best is not None:
            step += f" in the place of {milliseconds(best.seconds)}"
            if request_seconds(found) > request_seconds(best) / _WORTH:
                notes.append(f"{name} was taken back: error {error:.2g}, {step}")
                continue
        program, engine, best = candidate, made, found
        sizes = f"{size_text(before)} → {size_text(now)}"
        notes.append(f"{name} for the memory budget: weights {sizes}, error {error:.2g}, {step}")
    return program, engine


def _planned(engine: Engine, request: Request) -> Plan | None:
    """The plan of a request; None where nothing fits."""
    try:
        return engine.plan(request)
    except MemoryBudgetError:
        return None


def _error(before: Program, after: Program, target: Target) -> float:
    """Relative L2 of the logits of the calibration prompts, on the CPU."""
    from planish.ir.causal_lm import LOGITS
    from planish.ir.compare import compare_outputs
    from planish.runtime.bench import Bench

    bench = Bench(Target("ort", "cpu", threads=target.threads), before.calibration)
    wanted, got = bench.run_entry(before, PREFILL), bench.run_entry(after, PREFILL)
    pairs = zip(wanted, got, strict=True)
    return max(compare_outputs({LOGITS: a[LOGITS]}, {LOGITS: b[LOGITS]}).relative_l2 for a, b in pairs)


def _request(program: Program) -> Request:
    """The calibration's first prompts and one token after them."""
    calibration = program.calibration
    shape = (1, 1) if calibration is None else np.shape(calibration.batches[0][IDS])
    return Request(int(shape[0]), int(shape[1]), 2)
