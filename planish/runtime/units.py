"""Numbers as people read them: sizes, times, errors, changes. And text of others made safe to print."""

from __future__ import annotations

import math

from planish.ir.ledger import Ratio

_SIZES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_COUNTS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def size(count: float | None) -> str:
    """``90.3 MiB``; a dash for None."""
    if count is None:
        return "–"
    for unit, name in _SIZES:
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def count_text(count: float | None) -> str:
    """``2.4 G``; a dash for None."""
    if count is None:
        return "–"
    for unit, name in _COUNTS:
        if abs(count) >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f}"


def milliseconds(value: float | None) -> str:
    """``12.4 ms``, ``83 µs``, ``2.10 s``; a dash for None."""
    if value is None:
        return "–"
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    if value >= 1:
        return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms"
    return f"{value * 1000:.0f} µs" if value >= 0.1 else f"{value * 1000:.1f} µs"


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 0.05 else f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def number(value: float | None) -> str:
    """An error: ``3.1e-07``, ``0``, ``0.4``, ``infinite``; a dash for None."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 10_000:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def ratio_text(ratio: Ratio | None) -> str:
    """``1.18× [1.15, 1.21]``, with a third decimal where two would show nothing."""
    if ratio is None:
        return "–"
    digits = 3 if abs(ratio.median - 1) < 0.095 else 2
    return f"{ratio.median:.{digits}f}× [{ratio.low:.{digits}f}, {ratio.high:.{digits}f}]"


def percent_change(before: float | None, after: float | None) -> str:
    """``−51%``, ``+0.3%``; ``""`` for less than 0.05% or when one side is not known."""
    if before is None or after is None or not before:
        return ""
    change = 100 * (after - before) / before
    if abs(change) < 0.05:
        return ""
    sign = "−" if change < 0 else "+"
    return f"{sign}{abs(change):.0f}%" if abs(change) >= 0.5 else f"{sign}{abs(change):.1g}%"


def printable(text: str, limit: int = 200) -> str:
    """Text from a model file made safe for a terminal: no control characters, bounded length."""
    shown = "".join(c if c.isprintable() else "�" for c in text[: limit + 1])
    return shown if len(text) <= limit else shown[: limit - 1] + "…"
