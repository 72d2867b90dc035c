"""From what a caller has, a module or a file, to a program with inputs to measure with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from planish.ir.causal_lm import CausalLM
from planish.ir.errors import InputError, PlanishError
from planish.ir.program import Calibration, Program
from planish.ir.target import Target
from planish.runtime.bench import Bench


def capture(
    progress: Callable[[str], None],
    model: Any,
    example_inputs: Any,
    dynamic_shapes: Any,
    calibration: Any,
    target: Target,
    task: str | CausalLM | None,
) -> tuple[Program, Callable[[Bench], Any] | None, str]:
    """A program with inputs to measure with, from what `planish.optimize` is given; the arguments are its own.

    Returns:
        The program; its comparison with the module it came from, None for a file; why there is nothing to measure with,
        empty if there is.

    Raises:
        InputError: something given is wrong; the message says what, where, and what to do.
    """
    if task is not None:
        return *_capture_causal_lm(progress, model, example_inputs, dynamic_shapes, calibration, target, task), ""
    program, compare, example = _capture_any(progress, model, example_inputs, dynamic_shapes, target)
    return program, compare, _calibrate(program, calibration if calibration is not None else example)


def _capture_any(
    progress: Callable[[str], None], model: Any, example_inputs: Any, dynamic_shapes: Any, target: Target
) -> tuple[Program, Callable[[Bench], Any] | None, Any]:
    """The program, its comparison with the module it came from, and inputs to measure with, where there are any."""
    if _is_module(model):
        from planish.frontends import torch

        captured = torch.capture(model, example_inputs, dynamic_shapes, target, progress=progress)
        return captured.program, lambda bench: captured.check(bench.run_inputs), captured.example
    if dynamic_shapes is not None:
        raise InputError("dynamic_shapes is for torch modules; an ONNX model says itself which sizes are dynamic.")
    from planish.frontends.onnx import load_onnx

    return load_onnx(model, target), None, example_inputs


def _capture_causal_lm(
    progress: Callable[[str], None],
    model: Any,
    example_inputs: Any,
    dynamic_shapes: Any,
    calibration: Any,
    target: Target,
    task: str | CausalLM,
) -> tuple[Program, Callable[[Bench], Any]]:
    """The calibrated program of a causal language model, and its comparison with the model."""
    options = CausalLM.parse(task)
    if not _is_module(model):
        raise InputError(f"task 'causal-lm' takes a model of transformers, not {type(model).__name__}.")
    if dynamic_shapes is not None:
        raise InputError("task 'causal-lm': batch and lengths are always dynamic; leave dynamic_shapes out.")
    from planish.frontends.causal_lm import capture_causal_lm

    captured = capture_causal_lm(model, example_inputs, target, options=options, progress=progress)
    batches = captured.example if calibration is None else captured.batches(calibration)
    synthetic = captured.synthetic and calibration is None
    first, *others = [Calibration(found, synthetic, entry) for entry, found in batches.items()]
    first.others = others
    captured.program.calibration = first
    return captured.program, lambda bench: captured.check(
        lambda program, entry, inputs: bench.run_inputs(program, inputs, entry)
    )


def _calibrate(program: Program, given: Any) -> str:
    """Sets the program's calibration; returns why there is nothing to measure with, if so."""
    from planish.ir.inputs import synthesize
    from planish.ir.signature import as_batches

    entry = program.default_entry
    if given is not None:
        program.calibration = Calibration(as_batches(given, program.inputs(entry)), entry=entry)
        return ""
    try:
        program.calibration = Calibration([synthesize(program, entry)], synthetic=True, entry=entry)
    except PlanishError as error:
        return str(error)
    return ""


def _is_module(model: Any) -> bool:
    torch = sys.modules.get("torch")  # a module can not exist before torch is imported
    return torch is not None and isinstance(model, torch.nn.Module)
