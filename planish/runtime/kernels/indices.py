"""Indices of gathers: negative ones counted from the end, and all of them checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, prim_func, script, size, store
from planish.runtime.kernels.template import Template

MESSAGE = "an index is outside of the tensor that is gathered from"


@dataclass(frozen=True)
class CheckIndices(Template):
    """y = i, or i + limit where i is negative. Arguments, compact:

    - ``indices`` (count, axes), of `dtype`;
    - ``limits`` (axes,), int64: the size of each axis that is indexed;
    - ``y`` (count, axes), int64, out.

    A run ends with an error, :data:`MESSAGE`, where an index is not in [-limit, limit).

    Attributes:
        dtype: ``"int64"`` or ``"int32"``.
    """

    dtype: str = "int64"

    @property
    def symbol(self) -> str:
        return f"check_indices_{self.dtype}"

    def build(self, cpu: Cpu) -> Any:
        T = script()
        from tvm import tirx

        with prim_func(self.symbol) as built:
            count, axes = size(), size()
            indices = argument("indices", (count, axes), self.dtype)
            limits = argument("limits", (axes,), "int64")
            y = argument("y", (count, axes), "int64")
            wrong = T.alloc_buffer((1,), "int64", scope="local")
            store(wrong, T.int64(0), 0)
            with T.serial(count) as i, T.serial(axes) as a:
                index = T.Bind(T.Cast("int64", indices[i, a]))
                found = T.Bind(index + T.Select(index < 0, limits[a], T.int64(0)))
                store(y, found, i, a)
                store(wrong, wrong[0] + T.Select(tirx.any(found < 0, found >= limits[a]), T.int64(1), T.int64(0)), 0)
            with T.Assert(wrong[0] == 0, MESSAGE):
                T.evaluate(0)
        return built[0]

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        indices, limits = arguments[:2]
        return np.where(indices < 0, indices + limits, indices).astype(np.int64)
