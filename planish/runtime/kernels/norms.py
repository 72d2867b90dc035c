"""Layer normalization and RMS normalization over the last axis, with the residual addition before it when asked for.

Layer normalization: Ba, Kiros & Hinton 2016, arXiv:1607.06450. RMS normalization: Zhang & Sennrich 2019,
arXiv:1910.07467.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import Body, Lanes, argument, const, local, prim_func, script, size, store, sweep
from planish.runtime.kernels.template import Template

#: Vectors in flight: an addition takes four cycles and two of them start in each.
_UNROLL = 4


@dataclass(frozen=True)
class _Norm(Template):
    """What the two norms share; arguments in order, float32, compact:

    - ``x`` (rows, width);
    - ``residual`` (rows, width), if `residual`;
    - ``scale`` (width,);
    - ``bias`` (width,), if the norm has one;
    - ``epsilon`` (1,);
    - ``y`` (rows, width), out;
    - ``sum`` (rows, width), out, if `keep_sum`: x + residual, as float32.

    No argument may overlap another one in memory. Rows are independent of each other and run in parallel.

    Attributes:
        residual: normalize x + residual.
        keep_sum: give x + residual too; needs `residual`.
    """

    residual: bool = False
    keep_sum: bool = False

    def __post_init__(self) -> None:
        if self.keep_sum and not self.residual:
            raise ValueError("keep_sum without residual: there is no sum to keep")

    @property
    def _has_bias(self) -> bool:
        return False

    def _name(self, kind: str) -> str:
        return f"{'add_' * self.residual}{kind}_f32{'_bias' * self._has_bias}{'_sum' * self.keep_sum}"

    def build(self, cpu: Cpu) -> Any:
        T = script()
        with prim_func(self.symbol) as built:
            rows, width = size(), size()
            x = argument("x", (rows, width))
            residual = argument("residual", (rows, width)) if self.residual else None
            scale = argument("scale", (width,))
            bias = argument("bias", (width,)) if self._has_bias else None
            epsilon = argument("epsilon", (1,))
            y = argument("y", (rows, width))
            # Without a sum to give, the output's row is where it stays until it is normalized.
            row = x if residual is None else argument("sum", (rows, width)) if self.keep_sum else y
            with T.parallel(rows) as r:
                _Row(cpu, width, r, x, residual, row, scale, bias, epsilon, y).emit(self)
        return built[0]

    def _split(self, arguments: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
        """(x or x + residual as float32 gives it, scale, bias or 0, epsilon, the sum or nothing), in float64."""
        x, *rest = arguments
        total = np.asarray(x + rest.pop(0) if self.residual else x, np.float64)
        scale = np.asarray(rest.pop(0), np.float64)
        bias = np.asarray(rest.pop(0), np.float64) if self._has_bias else np.float64(0)
        return total, scale, bias, float(rest.pop(0)[0]), (total,) if self.keep_sum else ()


@dataclass(frozen=True)
class LayerNorm(_Norm):
    """y = (x - mean) / sqrt(variance + epsilon) * scale + bias, by rows.

    The variance is that of the deviations from a first mean, corrected by the mean deviation (the corrected two-pass
    algorithm: Chan, Golub & LeVeque 1983, doi:10.1080/00031305.1983.10483115), so a large mean costs no accuracy.

    Attributes:
        bias: there is one.
    """

    bias: bool = True

    @property
    def _has_bias(self) -> bool:
        return self.bias

    @property
    def symbol(self) -> str:
        return self._name("layer_norm")

    def reference(self, *arguments: np.ndarray) -> tuple[np.ndarray, ...]:
        total, scale, bias, epsilon, rest = self._split(arguments)
        if not total.shape[-1]:
            return (total, *rest)
        deviation = total - total.mean(-1, keepdims=True)
        variance = np.square(deviation).mean(-1, keepdims=True)
        return (deviation / np.sqrt(variance + epsilon) * scale + bias, *rest)


@dataclass(frozen=True)
class RmsNorm(_Norm):
    """y = x / sqrt(mean(x²) + epsilon) * scale, by rows."""

    @property
    def symbol(self) -> str:
        return self._name("rms_norm")

    def reference(self, *arguments: np.ndarray) -> tuple[np.ndarray, ...]:
        total, scale, _, epsilon, rest = self._split(arguments)
        if not total.shape[-1]:
            return (total, *rest)
        return (total / np.sqrt(np.square(total).mean(-1, keepdims=True) + epsilon) * scale, *rest)


@dataclass(frozen=True)
class _Row:
    """Emits the code of one row."""

    cpu: Cpu
    width: Any
    r: Any
    x: Any
    residual: Any
    row: Any
    scale: Any
    bias: Any
    epsilon: Any
    y: Any

    def emit(self, norm: _Norm) -> None:
        if isinstance(norm, LayerNorm):
            self._layer_norm()
        else:
            self._rms_norm()

    def _sweep(self, body: Body) -> None:
        sweep(self.cpu, self.width, _UNROLL, body)

    def _load(self, column: Any) -> Any:
        """What is normalized, on the first way over the row; `_keep` leaves it where the next ones find it."""
        value = self.x[self.r, column]
        return value if self.residual is None else value + self.residual[self.r, column]

    def _keep(self, column: Any) -> None:
        if self.residual is not None:
            store(self.row, self._load(column), self.r, column)

    def _layer_norm(self) -> None:
        T, r = script(), self.r
        width = T.Cast("float32", self.width)
        total, first = Lanes(self.cpu, _UNROLL), local()

        def sum_up(column: Any, update: Any) -> None:
            self._keep(column)
            update(total, lambda t: t + self.row[r, column])

        self._sweep(sum_up)
        total.reduce(lambda a, b: a + b, first)
        mean = local()
        store(mean, first[0] / width, 0)
        deviations, squares = Lanes(self.cpu, _UNROLL), Lanes(self.cpu, _UNROLL)

        def deviate(column: Any, update: Any) -> None:
            update(deviations, lambda t: t + (self.row[r, column] - mean[0]))
            update(squares, lambda t: t + (self.row[r, column] - mean[0]) * (self.row[r, column] - mean[0]))

        self._sweep(deviate)
        off, square = local(), local()
        deviations.reduce(lambda a, b: a + b, off)
        squares.reduce(lambda a, b: a + b, square)
        shift, factor = local(), local()
        store(shift, off[0] / width, 0)
        variance = T.max(square[0] / width - shift[0] * shift[0], const(0.0))
        store(factor, const(1.0) / T.sqrt(variance + self.epsilon[0]), 0)

        def apply(column: Any, update: Any) -> None:
            value = (self.row[r, column] - mean[0] - shift[0]) * factor[0] * self.scale[column]
            store(self.y, value if self.bias is None else value + self.bias[column], r, column)

        self._sweep(apply)

    def _rms_norm(self) -> None:
        T, r = script(), self.r
        squares, square, factor = Lanes(self.cpu, _UNROLL), local(), local()

        def sum_up(column: Any, update: Any) -> None:
            self._keep(column)
            update(squares, lambda t: t + self.row[r, column] * self.row[r, column])

        self._sweep(sum_up)
        squares.reduce(lambda a, b: a + b, square)
        mean = square[0] / T.Cast("float32", self.width)
        store(factor, const(1.0) / T.sqrt(mean + self.epsilon[0]), 0)

        def apply(column: Any, update: Any) -> None:
            store(self.y, self.row[r, column] * factor[0] * self.scale[column], r, column)

        self._sweep(apply)
