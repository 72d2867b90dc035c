"""The charts of the HTML page: rows of labels and marks, positions in percent of the plot's width."""

from __future__ import annotations

import math
from typing import Any

from planish.ir.ledger import LedgerEntry, Ratio
from planish.runtime.report import Report
from planish.runtime.units import number, printable


def percent(value: float) -> str:
    return f"{100 * min(1.0, max(0.0, value)):.2f}%"


def nodes_chart(report: Report, hues: dict[str, int]) -> dict[str, Any] | None:
    """A waterfall: what is left after each pass, and what the pass took away or added."""
    steps = [e for e in report.acted if e.kept and e.nodes_before != e.nodes_after]
    if not steps:
        return None
    top = max([report.before.nodes] + [max(e.nodes_before, e.nodes_after) for e in steps]) or 1
    rows = [
        {"label": "before", "value": str(report.before.nodes), "marks": [_bar(0, report.before.nodes / top, "base")]}
    ]
    for entry in steps:
        low, high = sorted((entry.nodes_before, entry.nodes_after))
        change = entry.nodes_after - entry.nodes_before
        name = entry.name.partition("{")[0]
        marks = [_bar(0, low / top, "rest"), dict(_bar(low / top, high / top, "step"), hue=hues.get(name))]
        value = f"−{-change}" if change < 0 else f"+{change}"
        rows.append({"label": printable(entry.name, 60), "value": value, "marks": marks})
    left = report.after.nodes
    rows.append({"label": "after", "value": str(left), "marks": [_bar(0, left / top, "base")]})
    return {"title": "Nodes", "hint": "what each pass removed", "rows": rows, "ticks": [], "lines": []}


def _bar(start: float, end: float, role: str) -> dict[str, Any]:
    return {"role": role, "left": percent(start), "width": percent(end - start)}


def gain_chart(report: Report) -> dict[str, Any] | None:
    """Measured speed-ups with their intervals, around the line of no change."""
    steps = [(e, e.speedup) for e in report.ledger.entries if e.speedup is not None]
    if not steps:
        return None
    low = min([0.98] + [max(ratio.low, 0.0) for _, ratio in steps])
    high = max([1.02] + [min(ratio.high, 100.0) for _, ratio in steps])
    room = (high - low) * 0.08
    low, high = max(0.0, low - room), high + room

    def at(value: float) -> float:
        return (value - low) / (high - low)

    rows = []
    for entry, ratio in steps:
        tone = ratio_tone(ratio) if entry.kept else "bad" if ratio.slower else "dim"
        marks = [dict(_bar(at(ratio.low), at(ratio.high), "span"), tone=tone)]
        marks.append({"role": "dot", "left": percent(at(ratio.median)), "tone": tone})
        rows.append(_measured_row(entry, f"{ratio.median:.3f}×", marks))
    ticks = [{"left": percent(at(v)), "text": f"{v:g}×"} for v in _ticks(low, high)]
    lines = [{"left": percent(at(1.0)), "role": "one", "text": ""}]
    hint = "against what came before; right of 1× is faster"
    return {"title": "Speed-up", "hint": hint, "rows": rows, "ticks": ticks, "lines": lines}


def _ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-9)))
    for factor in (5.0, 2.0, 1.0, 0.5, 0.25, 0.2, 0.1):
        values = [
            round(k * step * factor, 6)
            for k in range(math.ceil(low / (step * factor)), 1 + int(high / (step * factor)))
        ]
        if len(values) >= 3:
            return values[:8]
    return [1.0]


def error_chart(report: Report) -> dict[str, Any] | None:
    """Errors against the original on a logarithmic scale, with the limits they were held to."""
    steps = []
    for entry in report.ledger.entries:
        error = entry.error_original or entry.error_previous
        if error is not None:
            steps.append((entry, error.cost))
    if not steps:
        return None
    loose = any(entry.kind == "approximate" for entry, _ in steps)
    limits = [("tolerance", report.ledger.tolerance), ("budget", report.error_budget if loose else None)]
    bounds = [(name, value) for name, value in limits if value and math.isfinite(value)]
    finite = [v for _, v in steps if math.isfinite(v) and v > 0] + [v for _, v in bounds]
    low = math.floor(math.log10(min([1e-7, *finite]))) - 0.5
    high = math.ceil(math.log10(max([1e-4, *finite]))) + 0.5

    def at(value: float) -> float:
        if value <= 0:
            return 0.0
        return (math.log10(value) - low) / (high - low) if math.isfinite(value) else 1.0

    rows = []
    for entry, value in steps:
        tone = "good" if entry.kept else "bad"
        marks = [
            dict(_bar(0, at(value), "stem"), tone=tone),
            {"role": "dot", "left": percent(at(value)), "tone": tone},
        ]
        rows.append(_measured_row(entry, number(value), marks))
    stride = max(1, math.ceil((high - low) / 6))
    powers = range(math.ceil(low), math.floor(high) + 1, stride)
    ticks = [{"left": percent(at(10.0**k)), "text": f"1e{k}"} for k in powers]
    lines = [{"left": percent(at(v)), "role": "limit", "text": f"{n} {number(v)}"} for n, v in bounds]
    for line, side in zip(lines, ("before", "after") if len(lines) > 1 else ("middle",), strict=True):
        line["side"] = side  # two labels lean away from each other
    return {"title": "Error", "hint": "against the original, logarithmic", "rows": rows, "ticks": ticks, "lines": lines}


def _measured_row(entry: LedgerEntry, value: str, marks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "label": printable(entry.name, 60),
        "value": value,
        "marks": marks,
        "whole": entry.kind == "composition",
        "undone": not entry.kept,
    }


def ratio_tone(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return "good" if ratio.faster else ("bad" if ratio.slower else "")
