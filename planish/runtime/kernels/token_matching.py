"""What token merging finds similar tokens with: directions of keys, and products of those at even and odd places.

The operator is `planish::MergeTokens` (Bolya et al. 2023, arXiv:2210.09461); the glue chooses and counts, and the merge
itself is `traversal.Aggregate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.ir.ops.merge_reference import TINY
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import Lanes, argument, const, local, prim_func, script, size, store, sweep
from planish.runtime.kernels.template import Template

_UNROLL = 4


@dataclass(frozen=True)
class TokenDirections(Template):
    """The mean over heads of each row, divided by its length. Arguments, float32, compact:

    - ``keys`` (rows, heads, width);
    - ``unit`` (rows, width), out; zeros for a row whose mean is zero.
    """

    @property
    def symbol(self) -> str:
        return "token_directions_f32"

    def build(self, cpu: Cpu) -> Any:
        T = script()
        with prim_func(self.symbol) as built:
            rows, heads, width = size(), size(), size()
            keys, unit = argument("keys", (rows, heads, width)), argument("unit", (rows, width))
            with T.parallel(rows) as r:
                squares, square, factor = Lanes(cpu, _UNROLL), local(), local()
                sweep(cpu, width, _UNROLL, lambda c, _: store(unit, keys[r, 0, c], r, c))
                with T.serial(heads - 1) as h:
                    sweep(cpu, width, _UNROLL, lambda c, _: store(unit, unit[r, c] + keys[r, h + 1, c], r, c))
                share = local()
                store(share, const(1.0) / T.Cast("float32", heads), 0)

                def square_up(c: Any, update: Any) -> None:
                    store(unit, unit[r, c] * share[0], r, c)
                    update(squares, lambda s: s + unit[r, c] * unit[r, c])

                sweep(cpu, width, _UNROLL, square_up)
                squares.reduce(lambda a, b: a + b, square)
                store(factor, const(1.0) / T.max(T.sqrt(square[0]), const(TINY)), 0)
                sweep(cpu, width, _UNROLL, lambda c, _: store(unit, unit[r, c] * factor[0], r, c))
        return built[0]

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        mean = np.asarray(arguments[0], np.float64).mean(1)
        return np.asarray(mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), TINY))


@dataclass(frozen=True)
class TokenScores(Template):
    """Products of every other token with the ones between. Arguments, float32 and int64, compact:

    - ``unit`` (batch, tokens, width);
    - ``first`` (2,): the first token on either side, int64;
    - ``scores`` (batch, n, m), out: ``unit[first[0] + 2 i] · unit[first[1] + 2 j]``.
    """

    @property
    def symbol(self) -> str:
        return "token_scores_f32"

    def build(self, cpu: Cpu) -> Any:
        T = script()
        with prim_func(self.symbol) as built:
            batch, tokens, width, left, right = (size() for _ in range(5))
            unit = argument("unit", (batch, tokens, width))
            first = argument("first", (2,), "int64")
            scores = argument("scores", (batch, left, right))
            with T.parallel(batch * left) as row:
                place = [local(dtype="int64") for _ in range(3)]
                store(place[0], row // left, 0)
                store(place[1], row % left, 0)
                store(place[2], first[0] + 2 * place[1][0], 0)
                b, i, token = (buffer[0] for buffer in place)
                with T.serial(right) as j:
                    other, sums, total = local(dtype="int64"), Lanes(cpu, _UNROLL), local()
                    store(other, first[1] + 2 * j, 0)

                    def add(c: Any, update: Any, sums: Lanes = sums, other: Any = other) -> None:
                        update(sums, lambda s: s + unit[b, token, c] * unit[b, other[0], c])

                    sweep(cpu, width, _UNROLL, add)
                    sums.reduce(lambda a, b: a + b, total)
                    store(scores, total[0], b, i, j)
        return built[0]

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        unit, first, scores = arguments
        tokens = np.asarray(unit, np.float64)
        left, right = (tokens[:, start::2][:, :n] for start, n in zip(first, scores.shape[1:], strict=True))
        return np.asarray(left @ right.transpose(0, 2, 1))
