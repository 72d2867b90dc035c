"""Matrix products with what follows them fused: ``y = activation(x W + b) + residual``, in float32.

The scheme is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (ACM TOMS 34(3), 2008):
weights are packed once into panels of `panel_width` columns, a tile of rows times such a panel is accumulated in
registers, and all rows of a block use a panel before the next one, so that it comes from memory once per block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.ir.errors import InputError
from planish.runtime.kernels import tir_math
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, prim_func, size
from planish.runtime.kernels.template import ON_STACK, Template

#: Rows of x for one task, about, at most: the more, the fewer times weights come from memory, the fewer tasks.
_BLOCK_ROWS = 256
#: Steps of the inner loop that are written out, and how many steps ahead weights are fetched into the nearest cache.
_UNROLL, _AHEAD = 4, 32
#: Lines of the next panels that are fetched in each turn of the inner loop: from memory one takes as long as a tile.
_NEXT = 2


@dataclass(frozen=True)
class Tile:
    """What is kept in registers: `rows` rows of `vectors` vectors of `lanes` numbers."""

    rows: int
    vectors: int
    lanes: int

    @property
    def width(self) -> int:
        return self.vectors * self.lanes


def tile(cpu: Cpu) -> Tile:
    """The tile for a processor: accumulators, a row of weights and one number of x fill its vector registers."""
    return Tile(8 if cpu.registers >= 32 else 4, 3, cpu.lanes)


def panel_width(cpu: Cpu) -> int:
    """Columns of a panel of packed weights."""
    return tile(cpu).width


def pack(weight: np.ndarray, width: int) -> np.ndarray:
    """Weights (K, N) as panels (ceil(N / width), K, width); the last one is filled up with zeros."""
    depth, columns = weight.shape
    panels = -(-columns // width)
    padded = np.zeros((depth, panels * width), weight.dtype)
    padded[:, :columns] = weight
    return np.ascontiguousarray(padded.reshape(depth, panels, width).transpose(1, 0, 2))


def unpack(panels: np.ndarray, columns: int) -> np.ndarray:
    """The inverse of `pack`: weights (K, N)."""
    count, depth, width = panels.shape
    return np.ascontiguousarray(panels.transpose(1, 0, 2).reshape(depth, count * width)[:, :columns])


def check_activation(activation: str | None) -> None:
    """Raises InputError for an activation that no template knows."""
    if activation is not None and activation not in tir_math.ACTIVATIONS:
        raise InputError(f"unknown activation '{activation}'. Known: {', '.join(sorted(tir_math.ACTIVATIONS))}, None.")


@dataclass(frozen=True)
class Gemm(Template):
    """``y = activation(x W + b) + residual``.

    Arguments of the kernel, all float32: x (M, K), W packed (P, K, panel width) with P = ceil(N / panel width), b (N,),
    with `residual` that (M, N), and y (M, N). M, N, K may be any size, 0 included.

    Attributes:
        activation: ``"relu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"silu"``, ``"quick_gelu"`` or None.
        residual: a matrix is added after the activation.
    """

    activation: str | None = None
    residual: bool = False

    def __post_init__(self) -> None:
        check_activation(self.activation)

    @property
    def symbol(self) -> str:
        return "_".join(["gemm_f32", *filter(None, [self.activation, "residual" if self.residual else None])])

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        x, panels, bias = arguments[:3]
        y: np.ndarray = x.astype(np.float64) @ unpack(panels, len(bias)).astype(np.float64) + bias
        if self.activation:
            y = tir_math.REFERENCES[self.activation](y)
        return y + arguments[3] if self.residual else y

    def build(self, cpu: Cpu) -> Any:
        return _build(self.symbol, cpu, 1, self.activation, bias=True, residual=self.residual)


@dataclass(frozen=True)
class GatedGemm(Template):
    """``y = activation(x G) * (x U)``, the first half of a gated feed-forward layer (Shazeer, arXiv:2002.05202).

    Arguments of the kernel, all float32: x (M, K), G and U packed (P, K, panel width) with P = ceil(N / panel width),
    and y (M, N).

    Attributes:
        activation: as of `Gemm`.
    """

    activation: str | None = "silu"

    def __post_init__(self) -> None:
        check_activation(self.activation)

    @property
    def symbol(self) -> str:
        return f"gated_gemm_f32_{self.activation or 'linear'}"

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        """Takes the width N from a last argument y (M, N), or all columns of the panels without one."""
        x, gate, up = (a.astype(np.float64) for a in arguments[:3])
        columns = arguments[3].shape[1] if len(arguments) > 3 else gate.shape[0] * gate.shape[2]
        activated = x @ unpack(gate, columns)
        if self.activation:
            activated = tir_math.REFERENCES[self.activation](activated)
        return np.asarray(activated * (x @ unpack(up, columns)))

    def build(self, cpu: Cpu) -> Any:
        return _build(self.symbol, cpu, 2, self.activation, bias=False, residual=False)


@dataclass(frozen=True)
class PackWeight(Template):
    """Weights as panels for `Gemm`: float32 (K, N), or with `transposed` (N, K), to (ceil(N / width), K, width).

    Attributes:
        transposed: the source has a row per output.
    """

    transposed: bool = False

    @property
    def symbol(self) -> str:
        return "pack_weight_f32_nk" if self.transposed else "pack_weight_f32_kn"

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        """Takes the width from a last argument (P, K, width)."""
        source, panels = arguments
        return pack(source.T if self.transposed else source, panels.shape[2]).astype(np.float64)

    def build(self, cpu: Cpu) -> Any:
        width = panel_width(cpu)
        with prim_func(self.symbol) as built:
            depth, columns, panels = size(), size(), size()
            source = argument("source", (columns, depth) if self.transposed else (depth, columns))
            packed = argument("packed", (panels, depth, width))
            import tvm.tirx as tx
            from tvm.tirx.script.builder import ir as T

            with T.parallel(panels) as p, T.serial(depth) as k, T.serial(tx.const(width, "int64")) as c:
                column = T.bind(p * width + c)
                at = (column, k) if self.transposed else (k, column)
                T.buffer_store(
                    packed, tx.if_then_else(column < columns, source[at], tx.const(0.0, "float32")), [p, k, c]
                )
        return built[0]


def _build(symbol: str, cpu: Cpu, weights: int, activation: str | None, *, bias: bool, residual: bool) -> Any:
    """The kernel of `Gemm` (one weight) and `GatedGemm` (two)."""
    shape = tile(cpu)
    with prim_func(symbol) as built:
        m, n, k, panels = size(), size(), size(), size()
        x = argument("x", (m, k))
        packed = [argument(f"w{i}", (panels, k, shape.width)) for i in range(weights)]
        b = argument("bias", (n,)) if bias else None
        r = argument("residual", (m, n)) if residual else None
        y = argument("y", (m, n))
        for_row_blocks(m, panels, shape, lambda *at: _task(shape, x, packed, activation, b, r, y, *at))
    return built[0]


def for_row_blocks(m: Any, panels: Any, shape: Tile, body: Callable[[Any, Any, Any], None]) -> None:
    """Runs `body(panel, first row, rows)` in parallel; one after the other, tasks find their rows in the cache."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    def const(value: int) -> Any:
        return tx.const(value, "int64")

    blocks = opaque(m // (_BLOCK_ROWS + 1) + 1)
    # Blocks of equal size, in whole tiles; after rounding up, the last ones may be empty.
    size = opaque(((m + blocks - 1) // blocks + shape.rows - 1) // shape.rows * shape.rows)
    with T.parallel(const(0), blocks * panels) as t:
        row = opaque(t // panels * size)
        body(opaque(t % panels), row, opaque(tx.min(size, m - row)))


def opaque(value: Any) -> Any:
    """An integer that TVM does not substitute by its definition, which would grow with every use of a use."""
    from tvm.tirx.script.builder import ir as T

    buffer = T.alloc_buffer((1,), "int64", scope="local", annotations=ON_STACK)
    T.buffer_store(buffer, value, [0])
    return buffer[0]


def _task(
    shape: Tile, x: Any, packed: list[Any], activation: str | None, b: Any, r: Any, y: Any, p: Any, row: Any, rows: Any
) -> None:
    """A block of rows times a panel."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    results = [_stack(shape.rows * shape.width) for _ in packed]
    with T.serial((rows + shape.rows - 1) // shape.rows) as step:
        first = opaque(row + step * shape.rows)
        height = opaque(tx.min(tx.const(shape.rows, "int64"), row + rows - first))
        for weight, result in zip(packed, results, strict=True):
            _tile_rows(shape, x, weight, result, p, first, height, (step, _NEXT // len(packed)))
        finish(shape, results, activation, b, r, y, p, first, height)


def _stack(numbers: int) -> Any:
    from tvm.tirx.script.builder import ir as T

    return T.alloc_buffer((numbers,), "float32", scope="local", align=64, annotations=ON_STACK)


def _tile_rows(
    shape: Tile, x: Any, weight: Any, result: Any, p: Any, first: Any, height: Any, ahead: tuple[Any, int]
) -> None:
    """`height` rows from `first` on, in the largest tiles of halved height; `ahead` as of `_multiply`."""
    from tvm.tirx.script.builder import ir as T

    with T.If(height == shape.rows):
        with T.Then():
            _multiply(shape, shape.rows, x, weight, result, p, first, 0, ahead)
        with T.Else():
            rows = shape.rows // 2
            while rows:
                with T.If((height // rows) % 2 == 1), T.Then():
                    done = opaque(height // (2 * rows) * (2 * rows))
                    _multiply(shape, rows, x, weight, result, p, first + done, done)
                rows //= 2


def _multiply(
    shape: Tile,
    rows: int,
    x: Any,
    weight: Any,
    result: Any,
    p: Any,
    first: Any,
    at: Any,
    ahead: tuple[Any, int] | None = None,
) -> None:
    """``result[at : at + rows] = x[first : first + rows] W[p]``, accumulated in registers.

    With `ahead`, the number of the tile in its panel and of lines in a turn, a part of the next panel is fetched into
    the second-level cache.
    """
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    depth, vector = x.shape[1], f"float32x{shape.lanes}"
    # Few rows have too few sums to hide the latency of an addition: each is kept in several parts.
    parts = max(1, min(_UNROLL, 4 // rows))
    # A buffer for each vector: LLVM keeps those in registers.
    sums = [[[_stack(shape.lanes) for _ in range(shape.vectors)] for _ in range(rows)] for _ in range(parts)]
    lanes = tx.Ramp(0, 1, shape.lanes)
    for buffer in (b for part in sums for line in part for b in line):
        T.buffer_store(buffer, tx.Broadcast(tx.const(0.0, "float32"), shape.lanes), [lanes])

    def step(k: Any, part: int) -> None:
        for j in range(shape.vectors):
            fetch(weight[p, k + _AHEAD, j * shape.lanes], 3)
        line = [T.bind(weight.vload([p, k, j * shape.lanes], vector)) for j in range(shape.vectors)]
        for i in range(rows):
            factor = T.bind(tx.Broadcast(x[first + i, k], shape.lanes))
            for j, buffer in enumerate(sums[part][i]):
                T.buffer_store(buffer, buffer.vload([0], vector) + factor * line[j], [lanes])

    with T.serial(depth // _UNROLL) as outer:
        if ahead is not None:
            number, lines = ahead
            for i in range(lines):
                line = T.min((number * (depth // _UNROLL) + outer) * lines + i, depth * shape.vectors - 1)
                fetch(weight[p + 1, 0, line * shape.lanes], 2)
        for u in range(_UNROLL):
            step(outer * _UNROLL + u, u % parts)
    with T.serial(depth % _UNROLL) as inner:
        step(depth // _UNROLL * _UNROLL + inner, 0)
    for i in range(rows):
        for j in range(shape.vectors):
            total = sums[0][i][j].vload([0], vector)
            for part in sums[1:]:
                total = total + part[i][j].vload([0], vector)
            T.buffer_store(result, total, [tx.Ramp((at + i) * shape.width + j * shape.lanes, 1, shape.lanes)])


def fetch(element: Any, locality: int) -> None:
    """Asks for the line of an element: 3 for the nearest cache, 2 for the one behind it."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    flags = [tx.const(flag, "int32") for flag in (0, locality, 1)]
    T.evaluate(tx.call_llvm_intrin("void", "llvm.prefetch.p0", T.address_of(element), *flags))


def finish(
    shape: Tile, results: list[Any], activation: str | None, b: Any, r: Any, y: Any, p: Any, first: Any, height: Any
) -> None:
    """Writes `height` rows of results (rows, width) to y, with bias, activation or gate, and residual."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    columns, lanes, vector = y.shape[1], shape.lanes, f"float32x{shape.lanes}"
    start = T.bind(p * shape.width)
    act = tir_math.ACTIVATIONS[activation] if activation else (lambda value: value)

    def value(at: Any, dtype: str, bias: Any) -> Any:
        last = T.bind(results[0].vload([at], dtype) if bias is None else results[0].vload([at], dtype) + bias)
        return act(last) if len(results) == 1 else act(last) * results[1].vload([at], dtype)

    with tir_math.constants_in_memory(act), T.If(start + shape.width <= columns):
        with T.Then(), T.serial(height) as i, T.serial(tx.const(shape.vectors, "int64")) as j:
            at = [first + i, start + j * lanes]
            out = value(i * shape.width + j * lanes, vector, None if b is None else b.vload([at[1]], vector))
            if r is not None:
                out = out + r.vload(at, vector)
            T.buffer_store(y, out, [at[0], tx.Ramp(at[1], 1, lanes)])
        # The last panel: the width left need not be whole vectors.
        with T.Else(), T.serial(height) as i, T.serial(columns - start) as c:
            out = value(i * shape.width + c, "float32", None if b is None else b[start + c])
            if r is not None:
                out = out + r[first + i, start + c]
            T.buffer_store(y, out, [first + i, start + c])
