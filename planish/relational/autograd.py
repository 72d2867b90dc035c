"""Compiled programs as functions of PyTorch with a generated backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from planish.ir.errors import InputError
from planish.ir.relational.graph import Graph
from planish.ir.relational.inter import Variable
from planish.runtime.relational.engine import Engine, full_shape

if TYPE_CHECKING:
    from planish.relational.compiled import CompiledProgram


def run(compiled: CompiledProgram, graph: Graph, operands: Sequence[Any]) -> list[Tensor]:
    """The outputs of a program on tensors; with gradients, if they are enabled and an operand requires them."""
    variables = compiled.program.arguments
    tensors = [checked(v, t, graph, compiled.device) for v, t in zip(variables, operands, strict=True)]
    if len({tensor.device for tensor in tensors}) > 1:
        places = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        raise InputError(f"arguments are on {places}; they must be on one device.")
    wrt = tuple(v.name for v, t in zip(variables, tensors, strict=True) if t.requires_grad)
    if not torch.is_grad_enabled() or not wrt:
        engine = compiled.inference(graph)
        found = call(engine, graph, {v.name: t for v, t in zip(variables, tensors, strict=True)})
        return [found[name] for name in compiled.program.outputs]
    made = _Relational.apply(compiled, graph, wrt, *tensors)
    return list(made) if isinstance(made, tuple) else [made]


def checked(variable: Variable, tensor: Any, graph: Graph, device: str = "cpu") -> Tensor:
    """The tensor; raises InputError unless it is float32, on such a device, and of the right shape."""
    if not isinstance(tensor, Tensor):
        hint = "give tensors only, or NumPy arrays only" if device == "cpu" else "it must be a tensor on a GPU"
        raise InputError(f"'{variable.name}' is a {type(tensor).__name__}; {hint}.")
    if tensor.dtype != torch.float32 or tensor.device.type != device:
        place = "the CPU" if device == "cpu" else "a GPU"
        raise InputError(f"'{variable.name}' is {tensor.dtype} on {tensor.device}; it must be float32 on {place}.")
    wanted = full_shape(variable, graph)
    if tuple(tensor.shape) != wanted:
        raise InputError(
            f"'{variable.name}' has shape {tuple(tensor.shape)}; this graph and '{variable}' ask for {wanted}."
        )
    return tensor


def call(engine: Any, graph: Graph, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of an engine, for processors or for GPUs."""
    if not isinstance(engine, Engine):
        found: dict[str, Tensor] = engine.call(graph, arguments)
        return found
    compact = {name: tensor.detach().contiguous() for name, tensor in arguments.items()}
    outputs = {name: torch.empty(engine.shape(name, graph)) for name in engine.lowered.outputs if name not in compact}
    engine.run(graph, {name: tensor.data_ptr() for name, tensor in (compact | outputs).items()})
    # An output may be an argument as it is.
    return {name: outputs[name] if name in outputs else compact[name].clone() for name in engine.lowered.outputs}


class _Relational(torch.autograd.Function):  # type: ignore[misc]
    """Forward and backward of a program; the gradients of all operands that require one are made in one pass."""

    @staticmethod
    def forward(ctx: Any, compiled: CompiledProgram, graph: Graph, wrt: tuple[str, ...], *tensors: Tensor) -> Any:
        both, forward, backward = compiled.training(graph, wrt)
        names = [v.name for v in compiled.program.arguments]
        arguments = dict(zip(names, tensors, strict=True))
        found = call(forward, graph, arguments)
        everything = arguments | found
        needed = [v.name for v in backward.lowered.arguments if v.name not in both.gradients]
        ctx.save_for_backward(*(everything[name] for name in needed))
        ctx.needed, ctx.names = needed, names
        ctx.graph, ctx.both, ctx.backward_engine = graph, both, backward
        outputs = tuple(found[name] for name in both.outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        both, engine, graph = ctx.both, ctx.backward_engine, ctx.graph
        arguments = dict(zip(ctx.needed, ctx.saved_tensors, strict=True))
        wanted = {v.name for v in engine.lowered.arguments}
        like = next(gradient for gradient in gradients if gradient is not None)
        for output, name, gradient in zip(both.outputs, both.gradients, gradients, strict=True):
            if name in wanted:
                shape = full_shape(both.forward.variable(output), graph)
                arguments[name] = torch.zeros(shape, device=like.device) if gradient is None else gradient
        found = call(engine, graph, arguments)
        results = dict(zip(both.wrt, both.backward.outputs, strict=True))
        return (None, None, None, *(found[results[name]] if name in results else None for name in ctx.names))
