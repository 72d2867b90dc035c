"""Elementary functions in float32 as TIR expressions: only additions, products, comparisons and integer arithmetic.

TVM calls the C library for ``exp`` or ``erf``, one number at a time; these take vectors and scalars alike, inside or
outside of a loop that is vectorized. The polynomials are weighted minimax fits; reduction and reconstruction of ``exp``
are those of Cody and Waite, "Software Manual for the Elementary Functions" (1980). Products that are added to something
are expected to be fused (one rounding), which LLVM does on every processor that kernels are generated for. Errors are
relative to the exact result, unless a function says otherwise. NaN gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

_LOG2E, _LN2 = 1.0 / math.log(2.0), math.log(2.0)
#: Added to a number below 2**22, leaves its nearest integer in the lowest bits.
_ROUND = 1.5 * 2.0**23
# exp(r), |r| <= ln(2) / 2, is 1 + r + r**2 (...): 1.1e-7.
_EXP = (0.008312523370388505, 0.04189014952459125, 0.166671145927313, 0.49999231536336697, 1.0, 1.0)
# log2(erfc(u / sqrt(2)) / 2) for u <= 7.
_LOG2_TAIL = (
    -9.317404214893172e-09,
    3.3536488814772557e-07,
    -5.077297052249284e-06,
    4.033962537743965e-05,
    -1.4837330340810467e-4,
    -2.885409486091275e-4,
    7.322153995244797e-3,
    -0.052712323708801544,
    -0.45912521741903306,
    -1.1511166976047023,
    -0.999999745188121,
)
# erf(x) / x in x**2, |x| <= 1; log2(erfc(u)) for 0.9 <= u <= 4.2.
_ERF_SMALL = (
    7.889119567500952e-05,
    -0.0008020841290193966,
    0.005189535340493683,
    -0.026854444592502406,
    0.11283600176271263,
    -0.3761262713596693,
    1.1283791659137523,
)
_LOG2_ERFC = (
    0.0002844745523055897,
    -0.0044083230741256965,
    0.03213909168512786,
    -0.1500942759503318,
    -0.9190828485844774,
    -1.626998754906154,
    -0.00025605862826113765,
)
# (tanh(x) / x - 1) / x**2 in x**2, |x| <= 0.64.
_TANH_SMALL = (
    -0.0055431124813562615,
    0.02049663543589237,
    -0.05369713479198139,
    0.13330950243892647,
    -0.3333326473966494,
)


#: Where constants are looked up while code is built: their places in a table, by value, or None.
_table: ContextVar[Callable[[float], Any] | None] = ContextVar("constants", default=None)


@contextmanager
def constants_in_memory(*functions: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, constants of these functions are read from the stack, through loads that the compiler may not move.

    LLVM takes the constants of an epilogue out of all loops around it, into registers that then are not there for the
    sums of the inner loop: those are spilled (only where it emits an object; its just-in-time compiler does not).
    To be entered while a PrimFunc is built, just outside of the loop that uses the functions.
    """
    import tvm.tirx as tx
    from tvm.tirx.script.builder import ir as T

    from planish.runtime.kernels.template import ON_STACK

    found: dict[float, int] = {}
    token = _table.set(lambda value: found.setdefault(value, len(found)) and None)
    try:
        for function in functions:
            function(tx.Var("x", "float32"))
    finally:
        _table.reset(token)
    if not found:
        yield
        return
    volatile = {"tirx.volatile": True, **ON_STACK}
    table = T.alloc_buffer((len(found),), "float32", scope="local", annotations=volatile)
    for value, place in found.items():
        T.buffer_store(table, tx.const(value, "float32"), [place])
    token = _table.set(lambda value: table[found[value]] if value in found else None)
    try:
        yield
    finally:
        _table.reset(token)


class _Names:
    """Names for values that are used more than once: as a tree, an expression would be written out once per use."""

    def __init__(self) -> None:
        self._bound: list[tuple[Any, Any]] = []

    def __call__(self, value: Any) -> Any:
        import tvm.tirx as tx

        variable = tx.Var("v", value.ty)
        self._bound.append((variable, value))
        return variable

    def close(self, value: Any) -> Any:
        import tvm.tirx as tx

        for variable, bound in reversed(self._bound):
            value = tx.Let(variable, bound, value)
        return value


def exp(x: Any) -> Any:
    """e**x to 4.2e-7, inf above 88.72; below -87.33, where results would be denormal, 0."""
    let = _Names()
    x = let(x)
    result = _pick(x < _like(x, -87.336), _like(x, 0.0), _exp(let, x))
    return let.close(_pick(x > _like(x, 88.72283), _like(x, math.inf), result))


def exp_nonpositive(x: Any) -> Any:
    """As `exp`, two operations less, for x <= 0 only: softmax."""
    let = _Names()
    x = let(x)
    return let.close(_pick(x < _like(x, -87.336), _like(x, 0.0), _exp(let, x)))


def erf(x: Any) -> Any:
    """2 / sqrt(pi) times the integral of exp(-t**2) from 0 to x, to 3e-7."""
    import tvm.tirx as tx

    let = _Names()
    x = let(x)
    u = let(_least(4.2, tx.abs(x)))
    square = let(u * u)
    # Above 1, 1 - erfc has nothing left to cancel.
    large = _copy_sign(_like(x, 1.0) - _exp2(let, let(_horner(_LOG2_ERFC, u))), x)
    return let.close(_pick(tx.abs(x) > _like(x, 1.0), large, x * _horner(_ERF_SMALL, square)))


def tanh(x: Any) -> Any:
    """The hyperbolic tangent, to 3e-7."""
    import tvm.tirx as tx

    let = _Names()
    x = let(x)
    u = let(_least(10.0, tx.abs(x)))
    square = let(u * u)
    one = _like(x, 1.0)
    large = _copy_sign(one - _like(x, 2.0) / (one + _exp(let, let(u + u))), x)
    return let.close(_pick(tx.abs(x) > _like(x, 0.625), large, x + x * (square * _horner(_TANH_SMALL, square))))


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), to 4e-7; below -87 it stays at 1.6e-38."""
    let = _Names()
    x = let(_most(-87.0, x))
    return let.close(_like(x, 1.0) / _one_plus_exp(let, x))


def relu(x: Any) -> Any:
    """max(x, 0)."""
    return _most(0.0, x)


def gelu(x: Any) -> Any:
    """x / 2 (1 + erf(x / sqrt(2))), to 6e-7 above -1, 4e-6 down to -5, 1e-5 down to -7; below, absolutely, 1e-10.

    Both halves come from the tail: x - x tail(x) for positive numbers, x tail(-x) for negative ones, so that nothing
    cancels in either.
    """
    import tvm.tirx as tx

    let = _Names()
    x = let(x)
    u = let(_least(10.0, tx.abs(x)))
    tail = _exp2(let, let(_horner(_LOG2_TAIL, u)))
    return let.close(_most(0.0, x) - u * tail)


def gelu_tanh(x: Any) -> Any:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3))): x sigmoid of twice that."""
    let = _Names()
    x = let(_most(-9.5, x))  # where the result is 0 to 1e-32
    scale = 2.0 * math.sqrt(2.0 / math.pi)
    inner = let(x * (x * x * _like(x, 0.044715 * scale) + _like(x, scale)))
    return let.close(x / _one_plus_exp(let, inner))


def silu(x: Any) -> Any:
    """x / (1 + exp(-x)), to 4e-7."""
    let = _Names()
    x = let(_most(-87.0, x))
    return let.close(x / _one_plus_exp(let, x))


def quick_gelu(x: Any) -> Any:
    """x sigmoid(1.702 x)."""
    let = _Names()
    x = let(_most(-51.0, x))
    return let.close(x / _one_plus_exp(let, let(x * _like(x, 1.702))))


#: By name; each takes an expression and gives one.
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "sigmoid": sigmoid,
    "silu": silu,
    "tanh": tanh,
}


def _reference_sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(1.0 / (1.0 + np.exp(-x)))


def _reference_gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x * 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2.0)))


def _reference_gelu_tanh(x: np.ndarray) -> np.ndarray:
    return np.asarray(x * _reference_sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


#: The same in float64, of arrays.
REFERENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": _reference_gelu,
    "gelu_tanh": _reference_gelu_tanh,
    "quick_gelu": lambda x: x * _reference_sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0.0),
    "sigmoid": _reference_sigmoid,
    "silu": lambda x: x * _reference_sigmoid(x),
    "tanh": lambda x: np.tanh(x),
}


def _one_plus_exp(let: _Names, x: Any) -> Any:
    """1 + exp(-x) for x >= -87; x may be any large number."""
    return _like(x, 1.0) + _exp(let, let(_like(x, 0.0) - _least(87.0, x)))


def _exp(let: _Names, x: Any) -> Any:
    """e**x where the result is normal; anything elsewhere."""
    shifted = let(x * _like(x, _LOG2E) + _like(x, _ROUND))
    r = let(x - (shifted - _like(x, _ROUND)) * _like(x, _LN2))
    return _scale(_horner(_EXP, r), shifted)


def _exp2(let: _Names, x: Any) -> Any:
    """2**x where the result is normal; anything elsewhere."""
    shifted = let(x + _like(x, _ROUND))
    r = let((x - (shifted - _like(x, _ROUND))) * _like(x, _LN2))
    return _scale(_horner(_EXP, r), shifted)


def _scale(x: Any, shifted: Any) -> Any:
    """x 2**n, with n in the lowest bits of `shifted`, added to the exponent."""
    import tvm.tirx as tx

    lanes = str(x.ty.dtype).removeprefix("float32")
    bits = tx.shift_left(tx.reinterpret(f"int32{lanes}", shifted), tx.const(23, f"int32{lanes}"))
    return tx.reinterpret(str(x.ty.dtype), tx.reinterpret(f"int32{lanes}", x) + bits)


def _horner(coefficients: tuple[float, ...], x: Any) -> Any:
    """The polynomial, highest power first."""
    result = _like(x, coefficients[0])
    for c in coefficients[1:]:
        result = result * x + _like(x, c)
    return result


def _copy_sign(magnitude: Any, sign: Any) -> Any:
    return _pick(sign < _like(sign, 0.0), _like(sign, 0.0) - magnitude, magnitude)


def _like(x: Any, value: float) -> Any:
    """A constant of the dtype of x."""
    import tvm.tirx as tx

    dtype, look_up = str(x.ty.dtype), _table.get()
    if look_up is not None and value and (found := look_up(value)) is not None:
        return tx.Broadcast(found, int(lanes)) if (lanes := dtype.removeprefix("float32x")) != dtype else found
    return tx.const(value, dtype)


def _pick(condition: Any, yes: Any, no: Any) -> Any:
    import tvm.tirx as tx

    return tx.Select(condition, yes, no)


# In this order, a NaN in x comes through: a comparison with it is false.
def _most(bound: float, x: Any) -> Any:
    import tvm.tirx as tx

    return tx.max(_like(x, bound), x)


def _least(bound: float, x: Any) -> Any:
    import tvm.tirx as tx

    return tx.min(_like(x, bound), x)
