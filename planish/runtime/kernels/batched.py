"""Stacks of matrix products of two activations, float32.

Panels of the right operand's columns are packed once, and then meet all rows of the left one: sums stay in registers
over the whole depth (Goto & van de Geijn 2008, doi:10.1145/1356052.1356053, without their blocks of the depth).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.runtime.kernels.attention_task import tile
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, const, prim_func, script, size, store
from planish.runtime.kernels.template import Template

_VECTORS = 2  # of columns in a tile


@dataclass(frozen=True)
class BatchedMatMul(Template):
    """y[i] = a[i] b[i]. Arguments in order, compact:

    - ``a`` (count or 1, m, k);
    - ``b`` (count or 1, k, n);
    - ``y`` (count, m, n), out.
    """

    @property
    def symbol(self) -> str:
        return "batched_matmul_f32"

    def build(self, cpu: Cpu) -> Any:
        T, lanes = script(), cpu.lanes
        panel, tall = lanes * _VECTORS, 12 if cpu.registers >= 32 else 6
        with prim_func(self.symbol) as built:
            m, k, n, count, lefts, rights = (size() for _ in range(6))
            a = argument("a", (lefts, m, k))
            b = argument("b", (rights, k, n))
            y = argument("y", (count, m, n))
            panels = T.Bind((n + panel - 1) // panel)
            with T.parallel(count * panels) as task:
                i = T.Bind(task // panels)
                first = T.Bind(task % panels * panel)
                left, right = T.Bind(i % lefts), T.Bind(i % rights)
                width = T.Bind(T.min(panel, n - first))
                pack = T.alloc_buffer((k, panel), "float32", scope="global")
                self._pack(pack, b, right, first, width, k, lanes)

                def rows(at: Any, height: int, limit: Any) -> None:
                    acc = tile(
                        (height, _VECTORS, lanes),
                        k,
                        lambda r, d: a[left, T.min(at + r, limit), d],
                        lambda c, d, j: pack[d, c * lanes + j],
                        lambda r, c, j: const(0.0),
                    )
                    _write(y, acc, height, i, at, first, width, limit, lanes)

                with T.serial(m // tall) as block:
                    rows(block * tall, tall, m - 1)
                with T.serial((m % tall + 3) // 4) as block:
                    rows(m // tall * tall + block * 4, 4, m - 1)
        return built[0]

    @staticmethod
    def _pack(pack: Any, b: Any, right: Any, first: Any, width: Any, k: Any, lanes: int) -> None:
        T, panel = script(), lanes * _VECTORS
        with T.If(width == panel):
            with T.Then(), T.serial(k) as d:
                for c in range(_VECTORS):
                    with T.vectorized(lanes) as j:
                        store(pack, b[right, d, first + c * lanes + j], d, c * lanes + j)
            with T.Else(), T.serial(k) as d:
                with T.serial(width) as j:
                    store(pack, b[right, d, first + j], d, j)
                with T.serial(panel - width) as j:
                    store(pack, const(0.0), d, width + j)

    def reference(self, *arguments: np.ndarray) -> Any:
        a, b = (np.asarray(x, np.float64) for x in arguments[:2])
        return np.matmul(a, b)


def _write(y: Any, acc: Any, height: int, i: Any, at: Any, first: Any, width: Any, limit: Any, lanes: int) -> None:
    T = script()
    for r in range(height):
        with T.If(at + r <= limit), T.Then():
            for c in range(_VECTORS):
                with T.If(width >= (c + 1) * lanes):
                    with T.Then(), T.vectorized(lanes) as j:
                        store(y, acc[r, c, j], i, at + r, first + c * lanes + j)
                    with T.Else(), T.serial(T.max(width - c * lanes, 0)) as j:
                        store(y, acc[r, c, j], i, at + r, first + c * lanes + j)
