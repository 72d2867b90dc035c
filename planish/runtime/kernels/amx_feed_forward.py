"""A feed-forward network in one kernel, in bfloat16 on Intel's matrix unit (AMX).

The hidden layer stays in the second-level cache: a panel of 32 of its columns is what the second product takes in one
step, so that the first product writes its results as tiles, rounded, and nothing is converted or fetched from memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.runtime.kernels import gemm, tir_math
from planish.runtime.kernels.amx import ACTIVATIONS, SIDE, STEP, TILE, amx, configure, rounded_pair, tile_op
from planish.runtime.kernels.amx_gemm import SHAPE, multiply, round_band, rounded_operand, unpack
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, prim_func, size
from planish.runtime.kernels.template import ON_STACK, Template

#: Rows at a time, at most: with their hidden layer they are to fit into the second-level cache.
_ROWS = 192


@dataclass(frozen=True)
class FeedForward(Template):
    """``y = activation(x W + b) V + c + residual``, or gated, ``activation(x G) * (x U)`` in place of the first part.

    Operands of the products are rounded to bfloat16, the hidden layer among them; sums are float32.

    Arguments of the kernel: float32 x (M, K), packed W (`amx_gemm.pack`) and float32 b (F,), or gated packed G and U,
    packed V, float32 c (N,), residual (M, N) and y (M, N).

    Attributes:
        activation: as of `gemm.Gemm`, and there is one.
        gated: the first part has two products.
    """

    activation: str = "gelu"
    gated: bool = False

    def __post_init__(self) -> None:
        gemm.check_activation(self.activation)

    @property
    def symbol(self) -> str:
        return f"feed_forward_bf16_{'gated_' * self.gated}{self.activation}"

    def cpu(self) -> Cpu:
        return amx("a feed-forward network")

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        """In float64, with a hidden layer that is rounded from float64."""
        x, first, second, v, c, residual = arguments[:6]
        hidden = first.shape[0] * SHAPE.width if self.gated else len(second)
        rows, act = rounded_operand(x), tir_math.REFERENCES[self.activation]
        h = rows @ unpack(first, x.shape[1], hidden).astype(np.float64)
        up = rows @ unpack(second, x.shape[1], hidden).astype(np.float64) if self.gated else None
        h = act(h + second) if up is None else act(h) * up
        y = rounded_operand(h.astype(np.float32)) @ unpack(v, hidden, len(c)).astype(np.float64)
        return np.asarray(y + c + residual)

    def build(self, cpu: Cpu) -> Any:
        with prim_func(self.symbol) as built:
            import tvm.tirx as tx
            from tvm.tirx.script.builder import ir as T

            m, n, k, middle, steps = size(), size(), size(), size(), size()
            x = argument("x", (m, k))
            first = [argument(f"w{i}", (middle, steps, 2 * TILE), "uint16") for i in range(1 + self.gated)]
            bias = None if self.gated else argument("b", (size(),))
            panels = size()
            # A panel of the hidden layer is a step of the second product; their count says itself.
            second = argument("v", (panels, middle, 2 * TILE), "uint16")
            c, r = argument("c", (n,)), argument("residual", (m, n))
            y = argument("y", (m, n))
            block = tx.const(_ROWS, "int64")
            count = T.bind((m + block - 1) // block)
            # Blocks of equal height, in whole pairs of tiles.
            pair, least = tx.const(2 * SIDE, "int64"), tx.max(count, tx.const(1, "int64"))
            height = T.bind(((m + least - 1) // least + pair - 1) // pair * pair)
            tiles = T.alloc_buffer(((height // SIDE * steps + 1) * TILE,), "uint16", align=64)
            hidden = T.alloc_buffer(((height // SIDE * middle + 1) * TILE,), "uint16", align=64)
            with T.serial(count) as at:
                row = gemm.opaque(at * height)
                rows = gemm.opaque(tx.min(height, m - row))
                with T.parallel(tx.const(0, "int64"), (rows + 2 * SIDE - 1) // (2 * SIDE) * 2) as band:
                    round_band(x, tiles, gemm.opaque(band), steps, row)
                with T.parallel(tx.const(0, "int64"), middle) as p:
                    self._first(tiles, steps, first, bias, hidden, middle, gemm.opaque(p), rows)
                with T.parallel(tx.const(0, "int64"), panels) as p:
                    _second(hidden, middle, second, c, r, y, gemm.opaque(p), row, rows)
        return built[0]

    def _first(
        self, tiles: Any, steps: Any, weights: list[Any], bias: Any, hidden: Any, middle: Any, p: Any, rows: Any
    ) -> None:
        """A panel of the hidden layer, as tiles."""
        import tvm.tirx as tx
        from tvm.tirx.script.builder import ir as T

        results = [_stack(SHAPE.rows * SHAPE.width) for _ in weights]
        b = None if bias is None else _bias(bias, p)
        act, vector = ACTIVATIONS[self.activation], f"float32x{SIDE}"
        configure()
        with T.serial((rows + SHAPE.rows - 1) // SHAPE.rows) as step:
            for weight, result in zip(weights, results, strict=True):
                multiply(2, tiles, steps, weight, result, p, gemm.opaque(step * SHAPE.rows), step)
            with T.serial(tx.const(2, "int64")) as band:
                start = gemm.opaque(((step * 2 + band) * middle + p) * TILE)
                with T.serial(tx.const(SIDE, "int64")) as i:
                    parts = []
                    for j in range(2):
                        at = (band * SIDE + i) * SHAPE.width + j * SIDE
                        value = results[0].vload([at], vector)
                        value = act(value if b is None else value + b.vload([j * SIDE], vector))
                        parts.append(T.bind(value if b is not None else value * results[1].vload([at], vector)))
                    T.buffer_store(hidden, rounded_pair(*parts), [tx.Ramp(start + i * STEP, 1, STEP)])
        tile_op("tilerelease")


def _second(hidden: Any, middle: Any, weight: Any, c: Any, r: Any, y: Any, p: Any, row: Any, rows: Any) -> None:
    """A panel of the result."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    result = _stack(SHAPE.rows * SHAPE.width)
    configure()
    with T.serial((rows + SHAPE.rows - 1) // SHAPE.rows) as step:
        done = gemm.opaque(step * SHAPE.rows)
        multiply(2, hidden, middle, weight, result, p, done, step)
        height = gemm.opaque(tx.min(tx.const(SHAPE.rows, "int64"), rows - done))
        gemm.finish(SHAPE, [result], None, c, r, y, p, gemm.opaque(row + done), height)
    tile_op("tilerelease")


def _stack(numbers: int) -> Any:
    from tvm.tirx.script.builder import ir as T

    return T.alloc_buffer((numbers,), "float32", scope="local", align=64, annotations=ON_STACK)


def _bias(bias: Any, p: Any) -> Any:
    """The biases of a panel; zeros past the last one."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    made = _stack(SHAPE.width)
    with T.serial(tx.const(SHAPE.width, "int64")) as i:
        column = p * SHAPE.width + i
        T.buffer_store(made, tx.if_then_else(column < bias.shape[0], bias[column], tx.const(0.0, "float32")), [i])
    return made
