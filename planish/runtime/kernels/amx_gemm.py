"""The products of `gemm` in bfloat16 with float32 sums, on Intel's matrix unit (AMX).

Operands are rounded to nearest even: weights when they are packed, x inside of the kernel. Tiles and their instructions
are those of the "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 1, chapter 18: sixteen rows of
64 bytes; ``tdpbf16ps`` adds the product of 16 x 32 and 32 x 16 numbers to a tile of float32, rows of the second in
pairs.
A process must ask Linux once for the use of tiles: `planish.runtime.kernels.cpu.permit_tiles`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from planish.ir.errors import UnsupportedError
from planish.runtime.kernels import gemm, tir_math
from planish.runtime.kernels.cpu import Cpu, detect
from planish.runtime.kernels.loops import argument, prim_func, size
from planish.runtime.kernels.template import ON_STACK, Template

#: Rows of a weight in a tile, as pairs; the depth K is filled up with zeros to a multiple.
STEP = 32
_SIDE = 16  # rows of a tile, and float32 numbers in one
_TILE = _SIDE * STEP  # bfloat16 numbers in a tile
#: Two by two tiles of sums; what the epilogue sees of them.
_SHAPE = gemm.Tile(2 * _SIDE, 2, _SIDE)
#: Steps of a weight that are fetched ahead into the nearest cache.
_AHEAD = 4


def panel_width(cpu: Cpu) -> int:
    """Columns of a panel of packed weights."""
    return _SHAPE.width


def _amx() -> Cpu:
    found = detect("amx")
    if found is None:
        raise UnsupportedError(
            "products in bfloat16 need a processor with AMX (Linux flags amx_bf16, amx_tile, avx512_bf16), which this "
            "one lacks. Use compute type float32."
        )
    return found


def pack(weight: np.ndarray) -> np.ndarray:
    """Float32 weights (K, N) as panels of tiles, uint16 (ceil(N / 32), ceil(K / 32), 1024); filled up with zeros."""
    depth, columns = weight.shape
    steps, panels = -(-depth // STEP), -(-columns // _SHAPE.width)
    padded = np.zeros((steps * STEP, panels * _SHAPE.width), ml_dtypes.bfloat16)
    padded[:depth, :columns] = weight
    tiles = padded.reshape(steps, _SIDE, 2, panels, 2, _SIDE).transpose(3, 0, 4, 1, 5, 2)
    return np.ascontiguousarray(tiles).reshape(panels, steps, 2 * _TILE).view(np.uint16)


def unpack(panels: np.ndarray, depth: int, columns: int) -> np.ndarray:
    """The inverse of `pack`, as float32 (K, N)."""
    count, steps, _ = panels.shape
    tiles = panels.view(ml_dtypes.bfloat16).reshape(count, steps, 2, _SIDE, _SIDE, 2).transpose(1, 3, 5, 0, 2, 4)
    return np.asarray(tiles.reshape(steps * STEP, count * _SHAPE.width)[:depth, :columns], np.float32)


def _rounded(x: np.ndarray) -> np.ndarray:
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
        return _amx()

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        x, panels, bias = arguments[:3]
        y: np.ndarray = _rounded(x) @ unpack(panels, x.shape[1], len(bias)).astype(np.float64) + bias
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
        return _amx()

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        """Takes the width N from a last argument y (M, N), or all columns of the panels without one."""
        x, gate, up = arguments[:3]
        columns = arguments[3].shape[1] if len(arguments) > 3 else gate.shape[0] * _SHAPE.width
        gate, up = (unpack(panels, x.shape[1], columns).astype(np.float64) for panels in (gate, up))
        activated = _rounded(x) @ gate
        if self.activation:
            activated = tir_math.REFERENCES[self.activation](activated)
        return np.asarray(activated * (_rounded(x) @ up))

    def build(self, cpu: Cpu) -> Any:
        return _build(self.symbol, 2, self.activation, bias=False, residual=False)


@dataclass(frozen=True)
class PackWeight(Template):
    """Weights for `Gemm` (`pack`): float32 (K, N), or with `transposed` (N, K), to uint16.

    Attributes:
        transposed: the source has a row per output.
    """

    transposed: bool = False

    @property
    def symbol(self) -> str:
        return "pack_weight_bf16_nk" if self.transposed else "pack_weight_bf16_kn"

    def cpu(self) -> Cpu:
        return _amx()

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        return pack(arguments[0].T if self.transposed else arguments[0])

    def build(self, cpu: Cpu) -> Any:
        with prim_func(self.symbol) as built:
            depth, columns, panels, steps = size(), size(), size(), size()
            source = argument("source", (columns, depth) if self.transposed else (depth, columns))
            packed = argument("packed", (panels, steps, 2 * _TILE), "uint16")
            import tvm.tirx as tx
            from tvm.tirx.script.builder import ir as T

            with T.parallel(panels) as p, T.serial(steps) as s, T.serial(tx.const(2 * _TILE, "int64")) as at:
                row = T.bind(s * STEP + at % _TILE // STEP * 2 + at % 2)
                column = T.bind(p * _SHAPE.width + at // _TILE * _SIDE + at % STEP // 2)
                where = (column, row) if self.transposed else (row, column)
                inside = tx.all(row < depth, column < columns)
                value = tx.if_then_else(inside, source[where], tx.const(0.0, "float32"))
                T.buffer_store(packed, _bfloat16_bits(value), [p, s, at])
        return built[0]


def _build(symbol: str, weights: int, activation: str | None, *, bias: bool, residual: bool) -> Any:
    """The kernel of `Gemm` (one weight) and `GatedGemm` (two)."""
    with prim_func(symbol) as built:
        import tvm.tirx as tx
        from tvm.tirx.script.builder import ir as T

        m, n, k, panels, steps = size(), size(), size(), size(), size()
        x = argument("x", (m, k))
        packed = [argument(f"w{i}", (panels, steps, 2 * _TILE), "uint16") for i in range(weights)]
        b = argument("bias", (n,)) if bias else None
        r = argument("residual", (m, n)) if residual else None
        y = argument("y", (m, n))
        # Tiles of x: whole pairs of them, so that the last rows are no case of their own.
        bands = (m + 2 * _SIDE - 1) // (2 * _SIDE) * 2
        tiles = T.alloc_buffer(((bands * steps + 1) * _TILE,), "uint16", align=64)
        with T.parallel(tx.const(0, "int64"), bands) as band:
            _round_band(x, tiles, gemm.opaque(band), steps)
        gemm.for_row_blocks(m, panels, _SHAPE, lambda *at: _task(tiles, steps, packed, activation, b, r, y, *at))
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


def _round_band(x: Any, tiles: Any, band: Any, steps: Any) -> None:
    """Sixteen rows of x as tiles, one after the other; rows and columns that x lacks are zero."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    rows, depth = x.shape
    zero = tx.const(0.0, "float32")
    with T.serial(tx.const(_SIDE, "int64")) as i:
        row = gemm.opaque(band * _SIDE + i)
        start = gemm.opaque(band * steps * _TILE + i * STEP)
        whole = gemm.opaque(tx.if_then_else(row < rows, depth // _SIDE, tx.const(0, "int64")))
        with T.serial(whole) as c:
            at = [tx.Ramp(start + c // 2 * _TILE + c % 2 * _SIDE, 1, _SIDE)]
            T.buffer_store(tiles, _bfloat16_bits(x.vload([row, c * _SIDE], f"float32x{_SIDE}")), at)
        with T.serial(steps * STEP - whole * _SIDE) as rest:
            column = gemm.opaque(whole * _SIDE + rest)
            value = tx.if_then_else(tx.all(row < rows, column < depth), x[row, column], zero)
            T.buffer_store(tiles, _bfloat16_bits(value), [start + column // STEP * _TILE + column % STEP])


def _intrinsic(name: str, *arguments: Any) -> None:
    """An instruction on tiles; small integers are numbers of tiles."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    values = [tx.const(a, "int8") if isinstance(a, int) else a for a in arguments]
    T.evaluate(tx.call_llvm_intrin("void", f"llvm.x86.{name}", *values))


def _configure() -> None:
    """Eight tiles of sixteen rows of 64 bytes."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    config = T.alloc_buffer((64,), "uint8", scope="local", align=64, annotations=ON_STACK)
    values = {0: 1} | {16 + 2 * tile: 64 for tile in range(8)} | {48 + tile: _SIDE for tile in range(8)}
    for byte in range(64):
        T.buffer_store(config, tx.const(values.get(byte, 0), "uint8"), [byte])
    _intrinsic("ldtilecfg", T.address_of(config[0]))


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
        T.alloc_buffer((_SHAPE.rows * _SHAPE.width,), "float32", scope="local", align=64, annotations=ON_STACK)
        for _ in packed
    ]
    _configure()
    with T.serial((rows + _SHAPE.rows - 1) // _SHAPE.rows) as step:
        first = gemm.opaque(row + step * _SHAPE.rows)
        height = gemm.opaque(tx.min(tx.const(_SHAPE.rows, "int64"), row + rows - first))
        for weight, result in zip(packed, results, strict=True):
            with T.If(height > _SIDE):
                with T.Then():
                    _multiply(2, tiles, steps, weight, result, p, first)
                with T.Else():
                    _multiply(1, tiles, steps, weight, result, p, first)
        gemm.finish(_SHAPE, results, activation, b, r, y, p, first, height)
    _intrinsic("tilerelease")


def _multiply(bands: int, tiles: Any, steps: Any, weight: Any, result: Any, p: Any, first: Any) -> None:
    """``result[: 16 bands] = x[first : first + 16 bands] W[p]``: sums in tiles 0 to 3, x in 4 and 5, W in 6 and 7."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    stride, out_stride = tx.const(2 * STEP, "int64"), tx.const(4 * _SHAPE.width, "int64")
    for tile in range(2 * bands):
        _intrinsic("tilezero", tile)
    with T.serial(steps) as s:
        for j in range(2):
            _intrinsic("tileloadd64", 6 + j, T.address_of(weight[p, s, j * _TILE]), stride)
        for i in range(bands):
            at = (first // _SIDE + i) * steps + s
            _intrinsic("tileloadd64", 4 + i, T.address_of(tiles[at * _TILE]), stride)
            for j in range(2):
                _intrinsic("tdpbf16ps", 2 * i + j, 4 + i, 6 + j)
    for i in range(bands):
        for j in range(2):
            at = T.address_of(result[i * _SIDE * _SHAPE.width + j * _SIDE])
            _intrinsic("tilestored64", 2 * i + j, at, out_stride)
