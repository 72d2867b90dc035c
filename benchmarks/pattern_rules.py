"""Rules of the kind that graph optimizers hold, for timing the pattern driver. They are written for coverage of
operators and pattern sizes, not for use: real passes check more before they act."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from planish.passes.pattern import OrValue
from planish.passes.rewrite import Rule

SQRT2 = math.sqrt(2)
SQRT_2_PI = math.sqrt(2 / math.pi)


def _layer_norm(op: Any, x: Any, eps: Any, scale: Any, bias: Any, axes: Any) -> Any:
    centred = op.Sub(x, op.ReduceMean(x, axes))
    variance = op.ReduceMean(op.Mul(centred, centred), axes)
    return op.Add(op.Mul(op.Div(centred, op.Sqrt(op.Add(variance, eps))), scale), bias)


def _rms_norm(op: Any, x: Any, eps: Any, scale: Any, axes: Any) -> Any:
    mean = op.ReduceMean(op.Pow(x, 2.0), axes)
    return op.Mul(op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, eps)))), scale)


def _gelu(op: Any, x: Any) -> Any:
    return 0.5 * (x * (op.Erf(x / SQRT2) + 1.0))


def _gelu_half_first(op: Any, x: Any) -> Any:
    return (0.5 * x) * (op.Erf(x * (1 / SQRT2)) + 1.0)


def _gelu_tanh(op: Any, x: Any) -> Any:
    return (0.5 * x) * (1.0 + op.Tanh(SQRT_2_PI * (x + 0.044715 * op.Pow(x, 3.0))))


def _attention(op: Any, q: Any, k: Any, v: Any, mask: Any, scale: Any) -> Any:
    scores = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))
    scaled = OrValue([op.Div(scores, scale), op.Mul(scores, scale)])
    return op.MatMul(op.Softmax(op.Add(scaled, mask), axis=-1), v)


def _rotary(op: Any, x: Any, cos: Any, sin: Any) -> Any:
    first, second = op.Split(x, _outputs=["first", "second"], _allow_other_inputs=True)
    turned = op.Concat(op.Neg(second), first, axis=-1)
    return op.Add(op.Mul(x, cos), op.Mul(turned, sin))


def _swiglu(op: Any, x: Any, gate: Any, up: Any) -> Any:
    g = op.MatMul(x, gate)
    return op.Mul(op.Mul(g, op.Sigmoid(g)), op.MatMul(x, up))


def _qkv(op: Any, x: Any, q: Any, k: Any, v: Any) -> Any:
    return op.MatMul(x, q), op.MatMul(x, k), op.MatMul(x, v)


def _split3(op: Any, x: Any, q: Any, k: Any, v: Any) -> Any:
    return op.Split(op.MatMul(x, op.Concat(q, k, v, axis=-1)), num_outputs=3, axis=-1, _outputs=3)


def _keep(op: Any, x: Any) -> Any:
    return x


#: Fire on the benchmark's graphs.
MATCHING: list[tuple[str, Callable[..., Any], Callable[..., Any]]] = [
    ("layer-norm", _layer_norm, lambda op, x, scale, bias: op.LayerNormalization(x, scale, bias)),
    ("gelu", _gelu, lambda op, x: op.Gelu(x)),
    (
        "matmul-bias",
        lambda op, x, w, b: op.MatMul(x, w) + b,
        lambda op, x, w, b: op.FusedMatMulBias(x, w, b, _domain="bench"),
    ),
    ("attention", _attention, lambda op, q, k, v, mask: op.Attention(q, k, v, mask)),
    ("merge-products", _qkv, _split3),
]

#: Have roots of which the graphs are full, and do not fire.
OTHER: list[tuple[str, Callable[..., Any], Callable[..., Any]]] = [
    ("rms-norm", _rms_norm, lambda op, x, scale: op.RMSNormalization(x, scale)),
    ("gelu-half-first", _gelu_half_first, lambda op, x: op.Gelu(x)),
    ("gelu-tanh", _gelu_tanh, lambda op, x: op.Gelu(x, approximate="tanh")),
    ("rotary", _rotary, lambda op, x: op.Identity(x)),
    ("swiglu", _swiglu, lambda op, x: op.Identity(x)),
    ("add-zero", lambda op, x: x + 0.0, _keep),
    ("mul-one", lambda op, x: x * 1.0, _keep),
    ("div-one", lambda op, x: x / 1.0, _keep),
    ("sub-zero", lambda op, x: x - 0.0, _keep),
    ("pow-one", lambda op, x: x**1.0, _keep),
    ("pow-two", lambda op, x: x**2.0, lambda op, x: op.Mul(x, x)),
    ("mul-mul", lambda op, x: (x * 3.0) * 5.0, lambda op, x: op.Mul(x, 15.0)),
    ("add-add", lambda op, x: (x + 3.0) + 5.0, lambda op, x: op.Add(x, 8.0)),
    ("silu", lambda op, x: x * op.Sigmoid(x), lambda op, x: op.Identity(x)),
    ("mish", lambda op, x: x * op.Tanh(op.Softplus(x)), lambda op, x: op.Mish(x)),
    ("hard-swish", lambda op, x: x * op.HardSigmoid(x), lambda op, x: op.HardSwish(x)),
    ("double-transpose", lambda op, x, p, q: op.Transpose(op.Transpose(x, perm=p), perm=q), _keep),
    ("double-reshape", lambda op, x, a, b: op.Reshape(op.Reshape(x, a), b), lambda op, x, b: op.Reshape(x, b)),
    ("double-cast", lambda op, x, t: op.Cast(op.Cast(x), to=t), lambda op, x, t: op.Cast(x, to=t)),
    ("double-relu", lambda op, x: op.Relu(op.Relu(x)), lambda op, x: op.Relu(x)),
    ("neg-neg", lambda op, x: op.Neg(op.Neg(x)), _keep),
    ("not-not", lambda op, x: op.Not(op.Not(x)), _keep),
    ("log-exp", lambda op, x: op.Log(op.Exp(x)), _keep),
    ("exp-log", lambda op, x: op.Exp(op.Log(x)), _keep),
    ("identity", lambda op, x: op.Identity(x), _keep),
    ("dropout", lambda op, x: op.Dropout(x), _keep),
    ("reciprocal-sqrt", lambda op, x: op.Div(1.0, op.Sqrt(x)), lambda op, x: op.Reciprocal(op.Sqrt(x))),
    ("softmax-log", lambda op, x: op.Log(op.Softmax(x)), lambda op, x: op.LogSoftmax(x)),
    (
        "matmul-transpose",
        lambda op, a, b: op.MatMul(a, op.Transpose(op.Transpose(b))),
        lambda op, a, b: op.MatMul(a, b),
    ),
    ("unsqueeze-squeeze", lambda op, x, a: op.Squeeze(op.Unsqueeze(x, a), a), _keep),
    ("slice-slice", lambda op, x, s, e, t, f: op.Slice(op.Slice(x, s, e), t, f), lambda op, x, s, e: op.Slice(x, s, e)),
    ("where-same", lambda op, c, x: op.Where(c, x, x), lambda op, x: op.Identity(x)),
    ("concat-split", lambda op, x, n: op.Concat(*op.Split(x, n, _outputs=2), axis=-1), _keep),
    ("expand-mul", lambda op, x, s, y: op.Mul(op.Expand(x, s), y), lambda op, x, y: op.Mul(x, y)),
    ("gemm-relu", lambda op, x, w, b: op.Relu(op.Gemm(x, w, b)), lambda op, x, w, b: op.Relu(op.Gemm(x, w, b))),
]


def rules(kind: list[tuple[str, Callable[..., Any], Callable[..., Any]]]) -> list[Rule]:
    return [Rule(name, pattern, rewrite) for name, pattern, rewrite in kind]
