"""One entry of a program as compiled code of TVM."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from planish.ir.errors import UnsupportedError
from planish.ir.spec import TensorSpec
from planish.runtime.kernels.cpu import LEVELS
from planish.runtime.kernels.template import Template, compile_module, import_tvm
from planish.runtime.relax.device import CpuDevice
from planish.runtime.relax.operand import weights_of
from planish.runtime.relax.translator import CHECK, Translator

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class Compiled:
    """Code and weights.

    Attributes:
        executable: of Relax's virtual machine; its function ``main`` takes the inputs, then the weights.
        weights: name → array, in the order in which the function takes them.
    """

    executable: Any
    weights: dict[str, np.ndarray]

    def export(self, path: Path) -> None:
        """Writes the code as one shared library.

        Raises:
            UnsupportedError: there is no C compiler that links it.
        """
        try:
            self.executable.export_library(str(path))
        except (RuntimeError, OSError, ValueError) as error:
            raise UnsupportedError(
                f"the compiled program can not be linked ({last_line(error)}); a C compiler (cc) must be installed."
            ) from error


def build(model: ir.Model, inputs: Sequence[TensorSpec], device: CpuDevice) -> Compiled:
    """Compiles the graph of a model.

    Raises:
        UnsupportedError: an operator, dtype or form that has no code; TVM is not installed.
    """
    tvm = import_tvm()
    from tvm import relax

    # Every emitter is registered by its module.
    from planish.runtime.relax import blocks, elementwise, gathers, images, products, views  # noqa: F401

    translator = Translator(device, model)
    module, _ = translator.function(model.graph, inputs)
    with tvm.transform.PassContext(opt_level=3), device.target():
        module = relax.transform.DeadCodeElimination()(module)
        from planish.runtime.relax.schedules import schedule_module

        module = schedule_module(module, device.schedule)
        module[CHECK] = translator.check()
        try:
            executable = tvm.compile(module, target=device.target(), relax_pipeline=lowering())
        except tvm.error.InternalError as error:
            raise UnsupportedError(f"TVM {tvm.__version__} does not compile the program: {last_line(error)}") from error
    for template in translator.kernels.values():
        executable.mod.import_module(_kernel(template, device.cpu.name))
    return Compiled(executable, weights_of(translator.parameters))


def lowering(*planned: Any) -> Any:
    """From calls of code and views to the instructions of the virtual machine; `planned` run when memory is planned.

    Relax's own list begins with a pass that takes a copy for a view: outputs would share memory with weights.
    """
    tvm = import_tvm()
    from tvm.relax import transform

    return tvm.transform.Sequential(
        [
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            *planned,
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )


@functools.cache
def _kernel(template: Template, level: str) -> Any:
    """The compiled module of a template: programs of one process share it."""
    return compile_module([template], LEVELS[level])


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:400] if lines else type(error).__name__
