"""How far two sets of outputs are apart, and how far exact arithmetic in another order may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from planish.ir.ledger import ErrorStats

if TYPE_CHECKING:
    from planish.ir.program import Program

_TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
_EXACT = ErrorStats(0.0, 0.0, 1.0)
_WRONG = float("inf")


def tolerance(outputs: Mapping[str, Any]) -> float:
    """Relative L2 that an exact pass may cost, by the least precise floating dtype among `outputs`.

    The figures leave room for sums taken in another order through a few dozen layers, and no more.
    """
    names = {np.asarray(v).dtype.name for v in outputs.values() if not isinstance(v, list | dict)}
    return max((_TOLERANCE[n] for n in names if n in _TOLERANCE), default=_TOLERANCE["float32"])


def inner_tolerance(program: Program) -> float:
    """The same by what a program computes in: with inner values of 16 bits, outputs of 32 are no more precise."""
    nodes = (node for model in program.entries.values() for node in model.graph.all_nodes())
    kinds = {value.dtype.name.lower() for node in nodes for value in node.outputs if value.dtype is not None}
    return max((_TOLERANCE[kind] for kind in kinds & {"float16", "bfloat16"}), default=0.0)


def compare_outputs(expected: Mapping[str, Any], got: Mapping[str, Any]) -> ErrorStats:
    """Compares outputs by name; NaN equals NaN and an infinity equals itself, both nothing else.

    A missing output, another shape or another dtype is an infinite error: it is never a matter of degree.
    """
    worst = _EXACT
    for name, want in expected.items():
        stats = _compare(want, got[name]) if name in got else (_WRONG, _WRONG, -1.0)
        if stats[0] > worst.relative_l2 or worst.output is None:
            worst = ErrorStats(stats[0], max(stats[1], worst.max_abs), min(stats[2], worst.cosine), None, name)
        else:
            worst = ErrorStats(
                worst.relative_l2, max(stats[1], worst.max_abs), min(stats[2], worst.cosine), None, worst.output
            )
    return worst


def worst_of(stats: Sequence[ErrorStats]) -> ErrorStats:
    """The worst over several batches, field by field."""
    if not stats:
        return _EXACT
    top = max(stats, key=lambda s: s.relative_l2)
    return ErrorStats(top.relative_l2, max(s.max_abs for s in stats), min(s.cosine for s in stats), None, top.output)


def _compare(want: Any, got: Any) -> tuple[float, float, float]:
    if want is None or got is None:
        return (0.0, 0.0, 1.0) if want is got else (_WRONG, _WRONG, -1.0)
    if isinstance(want, list | tuple | dict):
        return _compare_nested(want, got)
    a, b = np.asarray(want), np.asarray(got)
    if a.shape != b.shape or a.dtype != b.dtype:
        return _WRONG, _WRONG, -1.0
    if a.size == 0:
        return 0.0, 0.0, 1.0
    if not _is_float(a.dtype):
        unequal = float(np.mean(a != b))
        distance = np.abs(a.astype(np.float64) - b.astype(np.float64)).max() if a.dtype.kind in "iub" else unequal
        return unequal, float(distance), 1.0 - unequal
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore"):  # widening a signalling NaN is no matter
        x, y = a.astype(wide).ravel(), b.astype(wide).ravel()
    finite = np.isfinite(x)
    if not np.array_equal(finite, np.isfinite(y)) or not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return _WRONG, _WRONG, -1.0
    x, y = x[finite], y[finite]
    if x.size == 0:
        return 0.0, 0.0, 1.0
    largest = float(np.abs(x - y).max())
    scale = max(np.abs(x).max(), np.abs(y).max()) or 1.0
    x, y = x / scale, y / scale  # so that squares neither overflow nor vanish
    difference, nx, ny = np.linalg.norm(x - y), np.linalg.norm(x), np.linalg.norm(y)
    relative = difference / nx if nx else (0.0 if not difference else _WRONG)
    cosine = float(np.real(np.vdot(x, y)) / (nx * ny)) if nx and ny else (1.0 if nx == ny else 0.0)
    return float(relative), largest, min(cosine, 1.0)


def _compare_nested(want: Any, got: Any) -> tuple[float, float, float]:
    if isinstance(want, dict):
        if not isinstance(got, dict) or want.keys() != got.keys():
            return _WRONG, _WRONG, -1.0
        pairs = [(want[k], got[k]) for k in want]
    elif not isinstance(got, list | tuple) or len(want) != len(got):
        return _WRONG, _WRONG, -1.0
    else:
        pairs = list(zip(want, got, strict=True))
    parts = [_compare(a, b) for a, b in pairs] or [(0.0, 0.0, 1.0)]
    return max(p[0] for p in parts), max(p[1] for p in parts), min(p[2] for p in parts)


def _is_float(dtype: np.dtype[Any]) -> bool:
    if dtype.kind in "fc":
        return True
    try:
        ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    except ValueError:
        return False
    return True
