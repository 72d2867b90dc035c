"""The products of `gemm` in bfloat16 with float32 sums, on Intel's matrix unit (AMX): see `amx`.

Operands are rounded to nearest even: weights when they are packed, x inside of the kernel.
A process must ask Linux once for the use of tiles: `planish.runtime.kernels.cpu.permit_tiles`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from planish.runtime.kernels import gemm, tir_math
from planish.runtime.kernels.amx import SIDE, STEP, TILE, amx, configure, keep, load, rounded, tile_op
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, prim_func, size
from planish.runtime.kernels.template import ON_STACK, Template

#: Two by two tiles of sums; what the epilogue sees of them.
SHAPE = gemm.Tile(2 * SIDE, 2, SIDE)
#: Lines of the next panel that are fetched in each step: from memory one takes as long as several products of tiles.
_NEXT = 8


def panel_width(cpu: Cpu) -> int:
    """Columns of a panel of packed weights."""
    return SHAPE.width


def pack(weight: np.ndarray) -> np.ndarray:
    """Float32 weights (K, N) as panels of tiles, uint16 (ceil(N / 32), ceil(K / 32), 1024); filled up with zeros."""
    depth, columns = weight.shape
    steps, panels = -(-depth // STEP), -(-columns // SHAPE.width)
    padded = np.zeros((steps * STEP, panels * SHAPE.width), ml_dtypes.bfloat16)
    padded[:depth, :columns] = weight
    tiles = padded.reshape(steps, SIDE, 2, panels, 2, SIDE).transpose(3, 0, 4, 1, 5, 2)
    return np.ascontiguousarray(tiles).reshape(panels, steps, 2 * TILE).view(np.uint16)


def unpack(panels: np.ndarray, depth: int, columns: int) -> np.ndarray:
    """The inverse of `pack`, as float32 (K, N)."""
    count, steps, _ = panels.shape
    tiles = panels.view(ml_dtypes.bfloat16).reshape(count, steps, 2, SIDE, SIDE, 2).transpose(1, 3, 5, 0, 2, 4)
    return np.asarray(tiles.reshape(steps * STEP, count * SHAPE.width)[:depth, :columns], np.float32)


def rounded_operand(x: np.ndarray) -> np.ndarray:
    return np.asarray(x.astype(ml_dtypes.bfloat16), np.float64)


@dataclass(frozen=True)
class Gemm(Template):
    """``y = activation(x W + b) + residual`` with operands of the product in bfloat16.

    Arguments of the kernel: float32 x (M, K), W packed (`pack`), float32 b (N,), with `residual` that (M, N), and y
    (M, N). M, N, K may be any size, 0 included.

    Attributes:
        activation: as of `gemm.Gemm`.
        residual: a matrix is added after the activation.
    """

    activation: str | None = None
    residual: bool = False

    def __post_init__(self) -> None:
        gemm.check_activation(self.activation)

    @property
    def symbol(self) -> str:
        return "_".join(["gemm_bf16", *filter(None, [self.activation, "residual" if self.residual else None])])

    def cpu(self) -> Cpu:
        return amx("a product")

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        x, panels, bias = arguments[:3]
        y: np.ndarray = rounded_operand(x) @ unpack(panels, x.shape[1], len(bias)).astype(np.float64) + bias
        if self.activation:
            y = tir_math.REFERENCES[self.activation](y)
        return y + arguments[3] if self.residual else y

    def build(self, cpu: Cpu) -> Any:
        return _build(self.symbol, 1, self.activation, bias=True, residual=self.residual)


@dataclass(frozen=True)
class GatedGemm(Template):
    """``y = activation(x G) * (x U)`` with operands of the products in bfloat16; see `gemm.GatedGemm`.

    Attributes:
        activation: as of `gemm.Gemm`.
    """

    activation: str | None = "silu"

    def __post_init__(self) -> None:
        gemm.check_activation(self.activation)

    @property
    def symbol(self) -> str:
        return f"gated_gemm_bf16_{self.activation or 'linear'}"

    def cpu(self) -> Cpu:
        return amx("a product")

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        """Takes the width N from a last argument y (M, N), or all columns of the panels without one."""
        x, gate, up = arguments[:3]
        columns = arguments[3].shape[1] if len(arguments) > 3 else gate.shape[0] * SHAPE.width
        gate, up = (unpack(panels, x.shape[1], columns).astype(np.float64) for panels in (gate, up))
        activated = rounded_operand(x) @ gate
        if self.activation:
            activated = tir_math.REFERENCES[self.activation](activated)
        return np.asarray(activated * (rounded_operand(x) @ up))

    def build(self, cpu: Cpu) -> Any:
        return _build(self.symbol, 2, self.activation, bias=False, residual=False)


@dataclass(frozen=True)
class PackWeight(Template):
    """Weights for `Gemm` (`pack`): float32 (K, N), or with `transposed` (N, K), to uint16.

    Attributes:
        transposed: the source has a row per output.
        bits: the source holds bfloat16 already, as uint16.
    """

    transposed: bool = False
    bits: bool = False

    @property
    def symbol(self) -> str:
        return f"pack_weight_bf16_{'nk' if self.transposed else 'kn'}{'_bits' * self.bits}"

    def cpu(self) -> Cpu:
        return amx("a product")

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        source = arguments[0].view(ml_dtypes.bfloat16).astype(np.float32) if self.bits else arguments[0]
        return pack(source.T if self.transposed else source)

    def build(self, cpu: Cpu) -> Any:
        with prim_func(self.symbol) as built:
            depth, columns, panels, steps = size(), size(), size(), size()
            shape, dtype = (
                (columns, depth) if self.transposed else (depth, columns),
                "uint16" if self.bits else "float32",
            )
            source = argument("source", shape, dtype)
            packed = argument("packed", (panels, steps, 2 * TILE), "uint16")
            import tvm.tirx as tx
            from tvm.tirx.script.builder import ir as T

            with T.parallel(panels) as p, T.serial(steps) as s, T.serial(tx.const(2 * TILE, "int64")) as at:
                row = T.bind(s * STEP + at % TILE // STEP * 2 + at % 2)
                column = T.bind(p * SHAPE.width + at // TILE * SIDE + at % STEP // 2)
                where = (column, row) if self.transposed else (row, column)
                inside = tx.all(row < depth, column < columns)
                value = tx.if_then_else(inside, source[where], tx.const(0, dtype))
                T.buffer_store(packed, value if self.bits else _bfloat16_bits(value), [p, s, at])
        return built[0]


def _build(symbol: str, weights: int, activation: str | None, *, bias: bool, residual: bool) -> Any:
    """The kernel of `Gemm` (one weight) and `GatedGemm` (two)."""
    with prim_func(symbol) as built:
        import tvm.tirx as tx
        from tvm.tirx.script.builder import ir as T

        m, n, k, panels, steps = size(), size(), size(), size(), size()
        x = argument("x", (m, k))
        packed = [argument(f"w{i}", (panels, steps, 2 * TILE), "uint16") for i in range(weights)]
        b = argument("bias", (n,)) if bias else None
        r = argument("residual", (m, n)) if residual else None
        y = argument("y", (m, n))
        # Tiles of x: whole pairs of them, so that the last rows are no case of their own.
        bands = (m + 2 * SIDE - 1) // (2 * SIDE) * 2
        tiles = T.alloc_buffer(((bands * steps + 1) * TILE,), "uint16", align=64)
        with T.parallel(tx.const(0, "int64"), bands) as band:
            round_band(x, tiles, gemm.opaque(band), steps, tx.const(0, "int64"))
        gemm.for_row_blocks(m, panels, SHAPE, lambda *at: _task(tiles, steps, packed, activation, b, r, y, *at))
    return built[0]


def _bfloat16_bits(x: Any) -> Any:
    """The bits of a float32 rounded to bfloat16, to nearest even; NaN stays NaN."""
    import tvm.tirx as tx

    lanes = str(x.ty.dtype).removeprefix("float32")

    def const(value: int) -> Any:
        return tx.const(value, f"uint32{lanes}")

    name = tx.Var("v", x.ty)
    bits = tx.Var("u", const(0).ty)
    nearest = tx.shift_right(bits + const(0x7FFF) + (tx.shift_right(bits, const(16)) & const(1)), const(16))
    result = tx.Select(name != name, const(0x7FC0), nearest).astype(f"uint16{lanes}")
    return tx.Let(name, x, tx.Let(bits, tx.reinterpret(f"uint32{lanes}", name), result))


def round_band(x: Any, tiles: Any, band: Any, steps: Any, base: Any) -> None:
    """Sixteen rows of x, from `base` + 16 `band` on, as tiles, one after the other; what x lacks is zero."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    rows, depth = x.shape
    zero = tx.const(0.0, "float32")
    with T.serial(tx.const(SIDE, "int64")) as i:
        row = gemm.opaque(base + band * SIDE + i)
        start = gemm.opaque(band * steps * TILE + i * STEP)
        whole = gemm.opaque(tx.if_then_else(row < rows, depth // SIDE, tx.const(0, "int64")))
        with T.serial(whole) as c:
            at = [tx.Ramp(start + c // 2 * TILE + c % 2 * SIDE, 1, SIDE)]
            T.buffer_store(tiles, rounded(x.vload([row, c * SIDE], f"float32x{SIDE}")), at)
        with T.serial(steps * STEP - whole * SIDE) as rest:
            column = gemm.opaque(whole * SIDE + rest)
            value = tx.if_then_else(tx.all(row < rows, column < depth), x[row, column], zero)
            T.buffer_store(tiles, _bfloat16_bits(value), [start + column // STEP * TILE + column % STEP])


def _task(
    tiles: Any,
    steps: Any,
    packed: list[Any],
    activation: str | None,
    b: Any,
    r: Any,
    y: Any,
    p: Any,
    row: Any,
    rows: Any,
) -> None:
    """A block of rows times a panel."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    results = [
        T.alloc_buffer((SHAPE.rows * SHAPE.width,), "float32", scope="local", align=64, annotations=ON_STACK)
        for _ in packed
    ]
    configure()
    with T.serial((rows + SHAPE.rows - 1) // SHAPE.rows) as step:
        first = gemm.opaque(row + step * SHAPE.rows)
        height = gemm.opaque(tx.min(tx.const(SHAPE.rows, "int64"), row + rows - first))
        for weight, result in zip(packed, results, strict=True):
            with T.If(height > SIDE):
                with T.Then():
                    multiply(2, tiles, steps, weight, result, p, first, step)
                with T.Else():
                    multiply(1, tiles, steps, weight, result, p, first, step)
        gemm.finish(SHAPE, results, activation, b, r, y, p, first, height)
    tile_op("tilerelease")


def multiply(bands: int, tiles: Any, steps: Any, weight: Any, result: Any, p: Any, first: Any, number: Any) -> None:
    """``result[: 16 bands] = x[first : first + 16 bands] W[p]``: sums in tiles 0 to 3, x in 4 and 5, W in 6 and 7.

    `number` counts the calls for this panel: each fetches a part of the next one into the second-level cache.
    """
    from tvm.tirx.script.builder import ir as T

    line = STEP  # numbers in a line of the cache
    for tile in range(2 * bands):
        tile_op("tilezero", tile)

    def step(s: Any) -> None:
        for j in range(2):
            load(6 + j, weight[p, s, j * TILE])
        for i in range(bands):
            load(4 + i, tiles[((first // SIDE + i) * steps + s) * TILE])
            for j in range(2):
                tile_op("tdpbf16ps", 2 * i + j, 4 + i, 6 + j)

    with T.If(number < 2 * TILE // line // _NEXT):
        with T.Then(), T.serial(steps) as s:
            ahead = gemm.opaque((number * steps + s) * _NEXT)
            for i in range(_NEXT):
                gemm.fetch(weight[p + 1, 0, (ahead + i) * line], 2)
            step(s)
        with T.Else(), T.serial(steps) as s:
            step(s)
    for i in range(bands):
        for j in range(2):
            keep(2 * i + j, result[i * SIDE * SHAPE.width + j * SIDE], 4 * SHAPE.width)
