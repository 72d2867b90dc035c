"""What a translation asks of the device that it makes code for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.template import Template, target
from planish.runtime.relax.operand import Operand

if TYPE_CHECKING:
    from planish.runtime.relax.translator import Translator


class Device(ABC):
    """A device: its kernels, its functions of numbers, and the schedules of the loops that are generated.

    Attributes:
        name: of the target, ``"tvm-cpu"``.
        floats: dtypes of numbers that its kernels take.
    """

    name: str
    floats: tuple[str, ...] = ("float32",)

    @abstractmethod
    def target(self) -> Any:
        """TVM's description of it."""

    @abstractmethod
    def linear(
        self, t: Translator, x: Any, weight: Operand, bias: Operand | None, activation: str | None, residual: Any
    ) -> Any:
        """The variable of ``activation(x W + bias) + residual`` for a matrix `x` of rows and a constant W (K, N)."""

    @abstractmethod
    def gated(self, t: Translator, x: Any, gate: Operand, up: Operand) -> Any:
        """The variable of ``silu(x W_gate) * (x W_up)``."""

    @abstractmethod
    def call(self, t: Translator, template: Template, inputs: Sequence[Any], types: Sequence[Any]) -> Any:
        """The variable of what a template computes; a tuple of several outputs as one."""

    @abstractmethod
    def number(self, t: Translator, number: float) -> Any:
        """A constant argument of a kernel, as `call` takes it."""

    @abstractmethod
    def sizes(self, t: Translator, sizes: Sequence[Any]) -> Any:
        """Sizes as an argument of a kernel, as `call` takes it."""

    @abstractmethod
    def math(self, name: str, x: Any) -> Any:
        """A function of :mod:`planish.runtime.kernels.tir_math`, of an expression of one of :attr:`floats`."""

    @abstractmethod
    def schedule(self, function: Any) -> Any:
        """A function of elementwise code, scheduled."""

    def more_outputs(self, t: Translator) -> list[Any]:
        """Variables that ``main`` gives behind the program's outputs."""
        return []


@dataclass(frozen=True)
class CpuDevice(Device):
    """A processor: every kernel is a template of TIR, and weights are packed for it."""

    cpu: Cpu
    name = "tvm-cpu"

    def target(self) -> Any:
        return target(self.cpu)

    def linear(
        self, t: Translator, x: Any, weight: Operand, bias: Operand | None, activation: str | None, residual: Any
    ) -> Any:
        from planish.runtime.kernels import gemm

        rows, columns = x.ty.shape[0], int(weight.dims[1])
        bias = bias or Operand.constant(np.zeros(columns, np.float32), f"no_bias.{columns}")
        inputs = [x, self._packed(t, weight), t.tensor(bias)]
        if residual is not None:
            inputs.append(residual)
        return t.call(gemm.Gemm(activation, residual=residual is not None), inputs, ((rows, columns), "float32"))

    def gated(self, t: Translator, x: Any, gate: Operand, up: Operand) -> Any:
        from planish.runtime.kernels import gemm

        inputs = [x, self._packed(t, gate), self._packed(t, up)]
        return t.call(gemm.GatedGemm("silu"), inputs, ((x.ty.shape[0], gate.dims[1]), "float32"))

    def _packed(self, t: Translator, weight: Operand) -> Any:
        """The variable of a weight (K, N) in panels of columns, as the kernel reads it."""
        from planish.runtime.kernels import gemm

        assert weight.array is not None
        key = ("packed", id(weight))
        if key not in t.derived:
            width = gemm.panel_width(self.cpu)
            panels = gemm.pack(np.asarray(weight.array, np.float32), width)
            t.derived[key] = (weight, t.parameter(panels, f"{weight.name or 'weight'}.panels{width}"))
        return t.derived[key][1]

    def call(self, t: Translator, template: Template, inputs: Sequence[Any], types: Sequence[Any]) -> Any:
        t.kernels[template.symbol] = template
        out = types[0] if len(types) == 1 else list(types)
        return t.emit(t.relax.call_dps_packed(template.symbol, list(inputs), out_ty=out))

    def number(self, t: Translator, number: float) -> Any:
        return t.tensor(Operand.constant(np.array([number], np.float32), f"number.{number!r}"))

    def sizes(self, t: Translator, sizes: Sequence[Any]) -> Any:
        made = np.empty(len(sizes), object)
        made[:] = list(sizes)
        return t.tensor(Operand.of_sizes(made))

    def math(self, name: str, x: Any) -> Any:
        from planish.runtime.kernels import tir_math

        return getattr(tir_math, name)(x)

    def schedule(self, function: Any) -> Any:
        from planish.runtime.relax.schedules import schedule

        return schedule(function, self.cpu)
