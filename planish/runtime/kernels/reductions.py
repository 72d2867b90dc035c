"""Softmax by rows, and reductions of an axis: float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import Lanes, argument, const, prim_func, script, size, store, sweep
from planish.runtime.kernels.template import Template

_UNROLL = 4
_LOWEST = float("-inf")
KINDS = ("sum", "mean", "max", "min", "sum_square")


@dataclass(frozen=True)
class Softmax(Template):
    """exp(x - max x) / Σ exp(x - max x), by rows. Arguments, compact: ``x`` (rows, width); ``y`` as x, out.

    Attributes:
        log: its logarithm.
    """

    log: bool = False

    @property
    def symbol(self) -> str:
        return "log_softmax_f32" if self.log else "softmax_f32"

    def build(self, cpu: Cpu) -> Any:
        from planish.runtime.kernels import tir_math

        T = script()
        with prim_func(self.symbol) as built:
            rows, width = size(), size()
            x, y = argument("x", (rows, width)), argument("y", (rows, width))
            with T.parallel(rows) as r:
                top, total = (T.alloc_buffer((1,), "float32", scope="local") for _ in range(2))
                largest, sums = Lanes(cpu, _UNROLL, _LOWEST), Lanes(cpu, _UNROLL)
                sweep(cpu, width, _UNROLL, lambda c, update: update(largest, lambda v: T.max(v, x[r, c])))
                largest.reduce(T.max, top)

                def add(c: Any, update: Any) -> None:
                    store(y, tir_math.exp(x[r, c] - top[0]), r, c)
                    update(sums, lambda v: v + y[r, c])

                sweep(cpu, width, _UNROLL, add)
                sums.reduce(lambda a, b: a + b, total)
                if self.log:
                    store(total, T.log(total[0]), 0)
                    sweep(cpu, width, 1, lambda c, _: store(y, x[r, c] - top[0] - total[0], r, c))
                else:
                    store(total, const(1.0) / total[0], 0)
                    sweep(cpu, width, 1, lambda c, _: store(y, y[r, c] * total[0], r, c))
        return built[0]

    def reference(self, *arguments: np.ndarray) -> Any:
        x = np.asarray(arguments[0], np.float64)
        shifted = x - x.max(-1, keepdims=True, initial=_LOWEST)
        total = np.exp(shifted).sum(-1, keepdims=True)
        return shifted - np.log(total) if self.log else np.exp(shifted) / total


@dataclass(frozen=True)
class Reduce(Template):
    """A reduction of the middle axis. Arguments, compact: ``x`` (outer, width, inner); ``y`` (outer, inner), out.

    Attributes:
        kind: ``"sum"``, ``"mean"``, ``"max"``, ``"min"`` or ``"sum_square"``.
    """

    kind: str = "sum"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, not '{self.kind}'")

    @property
    def symbol(self) -> str:
        return f"reduce_{self.kind}_f32"

    @property
    def _start(self) -> float:
        return {"max": float("-inf"), "min": float("inf")}.get(self.kind, 0.0)

    def _join(self, a: Any, b: Any) -> Any:
        T = script()
        if self.kind in ("max", "min"):
            return (T.max if self.kind == "max" else T.min)(a, b)
        return a + b

    def _item(self, value: Any) -> Any:
        return value * value if self.kind == "sum_square" else value

    def build(self, cpu: Cpu) -> Any:
        T = script()
        with prim_func(self.symbol) as built:
            outer, width, inner = size(), size(), size()
            x = argument("x", (outer, width, inner))
            y = argument("y", (outer, inner))
            with T.If(inner == 1):
                with T.Then(), T.parallel(outer) as o:
                    self._row(cpu, o, width, x, y)
                with T.Else():
                    block = 4 * cpu.lanes
                    parts = T.Bind((inner + block - 1) // block)
                    with T.parallel(outer * parts) as task:
                        self._columns(T.Bind(task // parts), T.Bind(task % parts * block), block, width, inner, x, y)
        return built[0]

    def _row(self, cpu: Cpu, o: Any, width: Any, x: Any, y: Any) -> None:
        T = script()
        lanes, result = Lanes(cpu, _UNROLL, self._start), T.alloc_buffer((1,), "float32", scope="local")
        sweep(cpu, width, _UNROLL, lambda c, update: update(lanes, lambda v: self._join(v, self._item(x[o, c, 0]))))
        lanes.reduce(self._join, result)
        store(y, result[0] / T.Cast("float32", width) if self.kind == "mean" else result[0], o, 0)

    def _columns(self, o: Any, first: Any, block: int, width: Any, inner: Any, x: Any, y: Any) -> None:
        """Some columns side by side: sums of a block stay in registers where it is whole."""
        T = script()
        mean = const(1.0) / T.Cast("float32", width)

        def finish(value: Any) -> Any:
            return value * mean if self.kind == "mean" else value

        with T.If(first + block <= inner):
            with T.Then():
                acc = T.alloc_buffer((block,), "float32", scope="local")
                with T.vectorized(block) as j:
                    store(acc, const(self._start), j)
                with T.serial(width) as w, T.vectorized(block) as j:
                    store(acc, self._join(acc[j], self._item(x[o, w, first + j])), j)
                with T.vectorized(block) as j:
                    store(y, finish(acc[j]), o, first + j)
            with T.Else():
                rest = T.Bind(inner - first)
                with T.serial(rest) as j:
                    store(y, const(self._start), o, first + j)
                with T.serial(width) as w, T.serial(rest) as j:
                    store(y, self._join(y[o, first + j], self._item(x[o, w, first + j])), o, first + j)
                with T.serial(rest) as j:
                    store(y, finish(y[o, first + j]), o, first + j)

    def reference(self, *arguments: np.ndarray) -> Any:
        x = np.asarray(arguments[0], np.float64)
        if self.kind in ("max", "min"):
            return (x.max if self.kind == "max" else x.min)(1, initial=self._start)
        if self.kind == "sum_square":
            return np.square(x).sum(1)
        return x.sum(1) if self.kind == "sum" else x.sum(1) / x.shape[1]
