"""Capture of a torch module: torch.export, then the ONNX exporter, then names and shapes as the user knows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.ir.errors import InputError
from planish.ir.ledger import ErrorStats
from planish.ir.program import Program
from planish.ir.target import Target

_INSTALL = "pip install 'planish[torch]'"
_OLDEST = (2, 9)

try:
    import torch
except ImportError as _error:  # pragma: no cover - a test replaces the import
    raise InputError(f"a torch module needs torch, which is not installed ({_error}): {_INSTALL}.") from _error
if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < _OLDEST:
    raise InputError(f"torch {torch.__version__} is too old: planish needs {_OLDEST[0]}.{_OLDEST[1]}: {_INSTALL}.")

from planish.frontends import torch_check, torch_export, torch_inputs, torch_names, torch_shapes  # noqa: E402
from planish.frontends.pyg.capture import opaque_layers  # noqa: E402
from planish.frontends.torch_legalize import legalize  # noqa: E402

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Captured:
    """A captured module.

    Attributes:
        program: the module as a Program with the entry ``"main"``.
        check: ``check(run) -> ErrorStats`` compares the program, run by `run(program, inputs)`, with the eager module
            on the example inputs and on a second shape, and raises InputError where they differ.
        example: the example inputs by input name.
    """

    program: Program
    check: Callable[[torch_check.Run], ErrorStats]
    example: dict[str, np.ndarray]


def capture(
    module: torch.nn.Module,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    target: Target | str = "ort-cpu",
    *,
    kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Captured:
    """Captures a torch module as a Program at opset 23.

    The module is captured in eval mode without gradients and left as it was; its inputs are copied. Weights are
    not copied: the program reads the module's own memory, so do not train or edit the module in place while the
    program is in use.

    Args:
        module: the module, on the CPU.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. NumPy arrays
            stand for tensors; None, numbers and strings become constants.
        dynamic_shapes: torch.export's format, or shorter: ``{"ids": {0: "batch", 1: "seq"}}`` (equal names are one
            symbol), or ``{0: "batch"}`` for every input. None: all shapes static.
        target: where the program will run.
        kwargs: further keyword arguments of forward.
        progress: called with the name of each stage.

    Raises:
        InputError: the module or its inputs can not be captured; the line says what, where and what to do.
    """
    report = progress or (lambda stage: None)
    check_module(module)
    torch_export.register_caches()
    call = torch_inputs.bind(module, example_inputs, kwargs)
    shapes = torch_shapes.normalize(call, dynamic_shapes)
    report("torch.export")
    traced = torch_shapes.grow(call, shapes)
    with torch_export.eval_mode(module), opaque_layers(module):
        exported = torch_export.export_program(module, traced.clone(), shapes)
        signature = torch_names.read_signature(exported, traced, shapes)
        report("onnx")
        model = torch_export.to_onnx(module, exported)
    report("names")
    torch_names.apply_names(model, signature)
    torch_names.share_weights(model)
    torch_names.shorten_metadata(model)
    legalize(model)
    model.graph.name = type(module).__name__
    program = Program.single(model, target, **_provenance(module, signature))
    check = torch_check.EagerCheck(module, program, call.clone(), signature, shapes)
    return Captured(program, check, check.arrays(check.call))


def check_module(module: Any) -> None:
    """Raises InputError for what is no module on the CPU."""
    if isinstance(module, type) and issubclass(module, torch.nn.Module):
        raise InputError(f"{module.__name__} is a class; give an instance: {module.__name__}(…).")
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError("a TorchScript module can not be captured; give the original torch.nn.Module.")
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(module).__module__}.{type(module).__qualname__}.")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device.type != "cpu":
            remedy = "load its weights first" if tensor.device.type == "meta" else "call module.cpu() first"
            raise InputError(
                f"{type(module).__name__}: '{name}' is on device '{tensor.device}'; planish captures on the CPU: "
                f"{remedy}."
            )


def _provenance(module: torch.nn.Module, signature: torch_names.Signature) -> dict[str, str]:
    spans = []
    for symbol, name in sorted(signature.symbols.items(), key=lambda item: item[1]):
        low, high = signature.ranges.get(symbol, (0, None))
        spans.append(f"{name}={low if low > 2 else 1}..{'' if high is None else high}")
    return {
        "frontend": "torch",
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        "torch": torch.__version__,
        "opset": str(torch_export.OPSET),
        "dynamic_shapes": ", ".join(dict.fromkeys(spans)) if spans else "none: every size is the example's",
    }
