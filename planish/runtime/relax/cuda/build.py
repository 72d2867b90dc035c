"""One entry of a program as code for GPUs: compiled and linked without one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.ir.errors import UnsupportedError
from planish.runtime.kernels.template import import_tvm
from planish.runtime.relax.cuda.assemble import Codes, assembling, native_objects
from planish.runtime.relax.cuda.device import CudaDevice
from planish.runtime.relax.operand import weights_of
from planish.runtime.relax.translator import CHECK, Translator

if TYPE_CHECKING:
    import onnx_ir as ir

    from planish.ir.spec import TensorSpec

#: The function that gives the bytes of a run, beside weights and inputs, from sizes as `CHECK` takes them.
PLANNED = "planned_bytes"


@dataclass
class CudaProgram:
    """Code and weights.

    Attributes:
        executable: of Relax's virtual machine; its function ``main`` takes the inputs, then the weights.
        weights: name → array, in the order in which the function takes them.
        codes: for what GPUs there is code.
        planned: bytes of a run beside weights and inputs; None if they depend on sizes.
        device: what the translation has used.
    """

    executable: Any
    weights: dict[str, np.ndarray]
    codes: Codes
    planned: int | None
    device: CudaDevice

    def export(self, path: Path) -> None:
        """Writes the code as one shared library.

        Raises:
            UnsupportedError: there is no C compiler that links it, or no nvcc for a kernel.
        """
        with tempfile.TemporaryDirectory(prefix="planish-cuda-") as scratch:
            objects = native_objects(Path(scratch), self.codes, self.device.calls, self.device.ours)
            try:
                self.executable.export_library(str(path), addons=[str(item) for item in objects])
            except (RuntimeError, OSError, ValueError) as error:
                from planish.runtime.relax.build import last_line

                raise UnsupportedError(
                    f"the compiled program can not be linked ({last_line(error)}); a C compiler (cc) must be installed."
                ) from error


def build(model: ir.Model, inputs: Sequence[TensorSpec], arch: str | None, graph: bool = False) -> CudaProgram:
    """Compiles the graph of a model.

    Args:
        arch: the only architecture to compile for; None: all of :data:`assemble.ARCHITECTURES`, and PTX.
        graph: run what does not read the inputs directly as one CUDA graph; needs sizes that are known.

    Raises:
        UnsupportedError: an operator, dtype or form that has no code; TVM or nvcc is not installed.
    """
    tvm = import_tvm()
    from tvm import relax

    # Every emitter is registered by its module.
    from planish.runtime.relax import blocks, elementwise, gathers, images, products, views  # noqa: F401
    from planish.runtime.relax.build import last_line, lowering
    from planish.runtime.relax.cuda import caches, merging, quantized, sparse  # noqa: F401
    from planish.runtime.relax.schedules import schedule_module

    codes = Codes.of(arch)
    device = CudaDevice(arch=codes.architectures[0].rstrip("af"))
    translator = Translator(device, model)
    module, _ = translator.function(model.graph, inputs)
    if "bfloat16" in translator.dtypes:
        codes = codes.with_bfloat16()
        device.arch = codes.architectures[0].rstrip("af")
    plan = _Plan(translator)
    target = device.target()
    config = {"relax.backend.use_cuda_graph": graph}
    # What lies behind the inputs is the same in each run, as a graph asks of what it reads.
    module["main"] = module["main"].with_attr("num_input", len(inputs))
    with assembling(codes), tvm.transform.PassContext(opt_level=3, config=config), target:
        module = relax.transform.DeadCodeElimination()(module)
        module = schedule_module(module, device.schedule)
        module[CHECK] = translator.check()
        try:
            pipeline = lowering(plan.pass_(), relax.transform.RewriteCUDAGraph())
            executable = tvm.compile(module, target=target, relax_pipeline=pipeline)
        except tvm.error.InternalError as error:
            raise UnsupportedError(f"TVM {tvm.__version__} does not compile the program: {last_line(error)}") from error
    return CudaProgram(executable, weights_of(translator.parameters), codes, plan.planned, device)


class _Plan:
    """Reads how much memory was planned, and leaves a function in the module that computes it."""

    def __init__(self, translator: Translator) -> None:
        self.translator = translator
        self.planned: int | None = None

    def pass_(self) -> Any:
        tvm = import_tvm()

        def read(module: Any, _: Any) -> Any:
            total = self.translator.plain(self._total(module["main"]))
            self.planned = total if isinstance(total, int) else None
            module[PLANNED] = self._function(total)
            if self.translator.device.in_place:  # type: ignore[attr-defined]
                module["main"] = _with_memory(module["main"])
            return module

        return tvm.transform.module_pass(read, opt_level=0, name="ReadMemoryPlan")

    def _total(self, function: Any) -> Any:
        from tvm import relax

        total: Any = 0

        def visit(expression: Any) -> None:
            nonlocal total
            if not isinstance(expression, relax.Call) or not hasattr(expression.op, "name"):
                return
            if expression.op.name == "relax.memory.alloc_storage":
                total = total + expression.args[0].values[0]
            elif expression.op.name == "relax.builtin.alloc_tensor":
                item = np.dtype("bool" if expression.ty.dtype == "bool" else str(expression.ty.dtype)).itemsize
                total = total + self.translator.product([*expression.ty.shape, item])

        relax.analysis.post_order_visit(function, visit)
        return total

    def _function(self, total: Any) -> Any:
        from planish.runtime.kernels.loops import prim_func, script

        T, t = script(), self.translator
        with prim_func(PLANNED) as built:
            own = {var: T.arg(var.name, T.int64()) for var in t.symbols.values()}
            T.Return(t._substitute(t.dim(total), own))
        return built[0]


def _with_memory(function: Any) -> Any:
    """The function with a tuple of all tensors that it allocates behind its outputs.

    Whoever runs it as part of a CUDA graph holds them, so that nothing else gets their memory.
    """
    from tvm import relax

    body, made = function.body, []
    for block in body.blocks:
        for binding in block.bindings:
            operator = getattr(getattr(binding, "value", None), "op", None)
            if getattr(operator, "name", "") in ("relax.memory.alloc_tensor", "relax.builtin.alloc_tensor"):
                made.append(binding.var)
    results = next(b.value for block in body.blocks for b in block.bindings if b.var.same_as(body.body))
    result = relax.Var("results", relax.TupleType([*results.ty.fields, relax.TupleType([var.ty for var in made])]))
    last = relax.BindingBlock([relax.VarBinding(result, relax.Tuple([*results.fields, relax.Tuple(made)]))])
    return relax.Function(
        function.params, relax.SeqExpr([*body.blocks, last], result), result.ty, function.is_pure, function.attrs
    )
