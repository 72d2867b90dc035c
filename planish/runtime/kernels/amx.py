"""Instructions on tiles and on bfloat16 for templates: Intel's AMX, and AVX-512 beside it.

They are described in the "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 1, chapter 18, and
volume 2: sixteen rows of 64 bytes a tile; ``tdpbf16ps`` adds the product of 16 x 32 and 32 x 16 numbers to a tile of
float32, rows of the second in pairs. Denormal numbers count as zero in it, and in roundings to bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from planish.ir.errors import UnsupportedError
from planish.runtime.kernels.cpu import Cpu, detect
from planish.runtime.kernels.template import ON_STACK

#: Rows of a tile, and float32 numbers in a row of one.
SIDE = 16
#: bfloat16 numbers in a row of a tile.
STEP = 32
#: bfloat16 numbers in a tile.
TILE = SIDE * STEP
#: 2**r for 0 <= r < 1, to 9e-5, highest power first; 1 at 0.
_EXP2 = (0.07706641, 0.22764568, 0.69511663, 1.0)
#: log2(Phi(x) / Phi(-x)) / x in x**2 for |x| <= 6, highest power first; Phi is the normal distribution.
_LOGIT = (1.22862578e-05, -1.40253008e-03, 1.09241340e-01, 2.29790141)
_LOG2E = 1 / math.log(2.0)


def amx(what: str) -> Cpu:
    """The level of instructions.

    Raises:
        UnsupportedError: this processor lacks it.
    """
    found = detect("amx")
    if found is None:
        raise UnsupportedError(
            f"{what} in bfloat16 needs a processor with AMX (Linux flags amx_bf16, amx_tile, avx512_bf16), which this "
            "one lacks. Use compute type float32."
        )
    return found


def tile_op(name: str, *arguments: Any) -> None:
    """An instruction on tiles; small integers are numbers of tiles."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    values = [tx.const(a, "int8") if isinstance(a, int) else a for a in arguments]
    T.evaluate(tx.call_llvm_intrin("void", f"llvm.x86.{name}", *values))


def configure() -> None:
    """Eight tiles of sixteen rows of 64 bytes."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    config = T.alloc_buffer((64,), "uint8", scope="local", align=64, annotations=ON_STACK)
    values = {0: 1} | {16 + 2 * tile: 64 for tile in range(8)} | {48 + tile: SIDE for tile in range(8)}
    for byte in range(64):
        T.buffer_store(config, tx.const(values.get(byte, 0), "uint8"), [byte])
    tile_op("ldtilecfg", T.address_of(config[0]))


def load(tile: int, element: Any, bytes_a_row: int = 64) -> None:
    """Loads a tile from memory that starts at an element of a buffer."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    tile_op("tileloadd64", tile, T.address_of(element), tx.const(bytes_a_row, "int64"))


def keep(tile: int, element: Any, bytes_a_row: int) -> None:
    """Stores a tile."""
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    tile_op("tilestored64", tile, T.address_of(element), tx.const(bytes_a_row, "int64"))


def rounded(x: Any) -> Any:
    """Sixteen float32 numbers as the bits of bfloat16, uint16: to nearest even; NaN stays NaN."""
    import tvm.tirx as tx

    made = tx.call_llvm_pure_intrin("bfloat16x16", "llvm.x86.avx512bf16.cvtneps2bf16.512", x)
    return tx.reinterpret("uint16x16", made)


def rounded_pair(low: Any, high: Any) -> Any:
    """Twice sixteen numbers as 32 of bfloat16 (uint16), those of `low` first."""
    import tvm.tirx as tx

    made = tx.call_llvm_pure_intrin("bfloat16x32", "llvm.x86.avx512bf16.cvtne2ps2bf16.512", high, low)
    return tx.reinterpret("uint16x32", made)


def interleaved(low: Any, high: Any) -> Any:
    """The same with numbers of `low` and `high` in turn: a row of the second operand of a product."""
    import tvm.tirx as tx

    order = [tx.const(i // 2 + SIDE * (i % 2), "int32") for i in range(2 * SIDE)]
    return tx.Shuffle([rounded_pair(low, high)], order)


def exp2(x: Any) -> Any:
    """2**x of sixteen numbers to 1e-4, for what is rounded to bfloat16 next; -inf gives 0, NaN stays."""
    import tvm.tirx as tx

    given, r = tx.Var("x", x.ty), tx.Var("r", x.ty)
    plain = (tx.const(-1, "int16"), tx.const(4, "int32"))  # all lanes, rounding as always
    zero = _like(0.0)
    fraction = tx.call_llvm_pure_intrin(
        "float32x16", "llvm.x86.avx512.mask.reduce.ps.512", given, tx.const(9, "int32"), zero, *plain
    )  # x - floor(x), 0 for infinities
    p = _horner(_EXP2, r)
    result = tx.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.mask.scalef.ps.512", p, given, zero, *plain)
    return tx.Let(given, x, tx.Let(r, fraction, result))


def _sigmoid(bits: Any) -> Any:
    """1 / (1 + 2**-bits) to 1.5e-4; `bits` may be any number."""
    import tvm.tirx as tx

    whole, zero = _like(1.0) + exp2(_like(0.0) - bits), _like(0.0)
    return tx.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.rcp14.ps.512", whole, zero, tx.const(-1, "int16"))


def _gelu(x: Any) -> Any:
    """x / 2 (1 + erf(x / sqrt(2))) to 1.3e-3 above -4, below absolutely to 1e-7."""
    import tvm.tirx as tx

    given, u = tx.Var("x", x.ty), tx.Var("u", x.ty)
    square = tx.Var("square", x.ty)
    result = given * _sigmoid(u * _horner(_LOGIT, square))
    result = tx.Select(given < _like(-8.0), _like(0.0), result)
    clamped = tx.max(tx.min(given, _like(6.0)), _like(-6.0))
    return tx.Let(given, x, tx.Let(u, clamped, tx.Let(square, u * u, result)))


def _gelu_tanh(x: Any) -> Any:
    import tvm.tirx as tx

    given, scale = tx.Var("x", x.ty), 2 * math.sqrt(2 / math.pi) * _LOG2E
    inner = given * (given * given * _like(0.044715 * scale) + _like(scale))
    return tx.Let(given, x, given * _sigmoid(inner))


def _times_sigmoid(factor: float) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        import tvm.tirx as tx

        given = tx.Var("x", x.ty)
        return tx.Let(given, x, given * _sigmoid(given * _like(factor * _LOG2E)))

    return apply


def _relu(x: Any) -> Any:
    import tvm.tirx as tx

    return tx.max(_like(0.0), x)  # NaN stays, in this order


#: Activations of sixteen numbers, for what is rounded to bfloat16 next: relative errors stay below half of its 2**-8.
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _times_sigmoid(1.0),
    "quick_gelu": _times_sigmoid(1.702),
}


def _horner(coefficients: tuple[float, ...], x: Any) -> Any:
    p = _like(coefficients[0])
    for c in coefficients[1:]:
        p = p * x + _like(c)
    return p


def _like(value: float) -> Any:
    import tvm.tirx as tx

    return tx.Broadcast(tx.const(value, "float32"), SIDE)
