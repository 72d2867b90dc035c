"""The report as one HTML page: no network, no other file, readable in ten seconds, whatever the model is called.

This module turns a report into what the template shows: words, positions in percent, colours. The template only
lays it out, with autoescape on: names come from model files, which nobody vouches for.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from pathlib import Path
from typing import Any

from planish.ir.ledger import LedgerEntry
from planish.runtime.folder import whole_file
from planish.runtime.report import Report
from planish.runtime.report_charts import error_chart, gain_chart, nodes_chart, percent, ratio_tone
from planish.runtime.report_graph import graph_view
from planish.runtime.report_text import idle_names, op_rows, reasons, spec_text
from planish.runtime.units import (
    count_text,
    duration,
    milliseconds,
    number,
    percent_change,
    printable,
    ratio_text,
    size,
)

_TEMPLATES = Path(__file__).parent / "templates"
_SHOWN_OPS = 18
_SHOWN_REASONS = 8
_SHOWN_SPECS = 40
_NAME = 120


def render_html(report: Report) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    # Only this script may run on the page: an injected one does not match the digest.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        **page(report),
        style=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=digest,
    )


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Writes the page whole or not at all.

    Raises:
        InputError: the folder does not exist or can not be written.
    """
    text = render_html(report)
    with whole_file(Path(path)) as file:
        file.write(text.encode())


def page(report: Report) -> dict[str, Any]:
    """Everything that the template shows, as plain data."""
    # Passes that did something come first, so that theirs are the hues that are easiest to tell apart.
    names = dict.fromkeys(entry.name.partition("{")[0] for entry in [*report.acted, *report.idle])
    hues = dict(zip(names, _hues(), strict=False))
    model = printable(report.model, 300)
    return {
        "title": printable(Path(report.model).name or report.model, 80),
        "model": model,
        "target": report.target,
        "version": report.version,
        "verdict": printable(report.verdict, 500),
        "tone": _tone(report),
        "tiles": _tiles(report),
        "remarks": [printable(line, 400) for line in report.remarks()],
        "budget_lines": report.budget_lines(),
        "ledger": [_row(entry, hues) for entry in report.ledger.entries if entry not in report.idle],
        "idle": idle_names(report),
        "idle_count": len(report.idle),
        "charts": [chart for chart in (nodes_chart(report, hues), gain_chart(report), error_chart(report)) if chart],
        "ops": _ops(report),
        "graph": graph_view(report, hues),
        "inputs": [(printable(spec.name, _NAME), spec_text(spec)) for spec in report.inputs[:_SHOWN_SPECS]],
        "outputs": [(printable(spec.name, _NAME), spec_text(spec)) for spec in report.outputs[:_SHOWN_SPECS]],
        "pipeline": report.pipeline or "(no passes)",
        "seconds": duration(report.seconds),
    }


def _hues() -> list[int]:
    """Hues for passes in the order of the pipeline: neighbours are far apart on the circle."""
    first = [212, 28, 150, 280, 345, 52, 185, 312]
    return first + [round(first[-1] + 137.5 * k) % 360 for k in range(1, 200)]


def _tone(report: Report) -> str:
    return ratio_tone(report.speedup) or "plain"


def _tiles(report: Report) -> list[dict[str, Any]]:
    before, after = report.before, report.after
    change = percent_change(before.nodes, after.nodes)
    undone = sum(not entry.kept for entry in report.passes)
    acted = report.acted
    passes = [f"{len(report.idle)} had nothing to do"] if report.idle else []
    passes += [f"{undone} rolled back"] if undone else []
    weights = f"weights {size(after.weight_bytes)}"
    if size(before.weight_bytes) != size(after.weight_bytes):
        weights = f"weights {size(before.weight_bytes)} → {size(after.weight_bytes)}"
    flops = [f"{count_text(before.flops)} → {count_text(after.flops)} FLOPs"] if before.flops and after.flops else []
    peaks = before.peak_activation_bytes, after.peak_activation_bytes
    memory: dict[str, Any] = {
        "label": "Weights",
        "value": size(after.weight_bytes),
        "sub": [report.size_change() or "unchanged"],
    }
    if None not in peaks:
        drop = percent_change(*peaks)
        was, now = size(peaks[0]), size(peaks[1])
        if was.partition(" ")[2] == now.partition(" ")[2]:
            was = was.partition(" ")[0]  # one unit is enough
        sub = [f"{drop} · {weights}" if drop else weights]
        memory = {"label": "Peak activations", "value": now, "was": was if drop else None, "sub": sub}
    return [
        _speed_tile(report),
        _error_tile(report),
        {"label": "Nodes", "value": str(after.nodes), "was": str(before.nodes), "note": change, "sub": flops},
        memory,
        {"label": "Passes kept", "value": f"{sum(e.kept for e in acted)} of {len(acted)}", "sub": passes},
    ]


def _speed_tile(report: Report) -> dict[str, Any]:
    ratio = report.speedup
    if ratio is None:
        return {"label": "Speed", "value": "–", "sub": ["not measured"]}
    digits = 3 if abs(ratio.median - 1) < 0.095 else 2
    sub = [f"{ratio.confidence:.0%} interval {ratio.low:.{digits}f} to {ratio.high:.{digits}f}"]
    if ratio.baseline_ms is not None:
        sub.append(f"{milliseconds(ratio.baseline_ms)} → {milliseconds(ratio.candidate_ms)}")
    for name, found in report.by_entry.items():
        if found.speedup is not None:
            sub.append(f"Speed-up of {name}: {ratio_text(found.speedup)}")
    words = {"good": "faster", "bad": "slower", "plain": "no measurable change"}
    tone = _tone(report)
    return {"label": "Speed", "value": f"{ratio.median:.{digits}f}×", "note": words[tone], "tone": tone, "sub": sub}


def _error_tile(report: Report) -> dict[str, Any]:
    error = report.error
    if error is None:
        return {"label": "Error", "value": "–", "sub": ["not measured"]}
    value = error.cost
    sub = ["relative L2" if error.metric is None else f"your metric · relative L2 {number(error.relative_l2)}"]
    sub[0] += f" · max abs {number(error.max_abs)}"
    if report.synthetic_inputs:
        sub.append("on synthetic inputs")
    tile: dict[str, Any] = {"label": "Error", "value": number(value), "sub": sub}
    if report.error_budget and any(e.kind == "approximate" and e.kept for e in report.passes):
        share = value / report.error_budget
        tile["meter"] = round(100 * min(1.0, share), 1) if math.isfinite(share) else 100.0
        tile["sub"].append(f"{100 * share:.0f}% of the budget of {number(report.error_budget)}")
    return tile


def _row(entry: LedgerEntry, hues: dict[str, int]) -> dict[str, Any]:
    name, brace, options = entry.name.partition("{")
    error = entry.error_original or entry.error_previous
    verdict, colon, why = entry.verdict.partition(":")
    why_not = reasons(entry)
    return {
        "name": printable(name, _NAME),
        "options": printable(brace + options, 200),
        "hue": hues.get(name),
        "whole": entry.kind == "composition",
        "kind": "together" if entry.kind == "composition" else entry.kind,
        "fired": entry.fired or "",
        "before": entry.nodes_before,
        "after": entry.nodes_after,
        "same": entry.nodes_before == entry.nodes_after,
        "error": "" if error is None else number(error.cost),
        "error_detail": "" if error is None else f"max abs {number(error.max_abs)}, cosine {error.cosine:.6f}",
        "gain": ratio_text(entry.speedup) if entry.speedup else "",
        "gain_tone": ratio_tone(entry.speedup),
        "seconds": duration(entry.seconds) if entry.seconds else "",
        "kept": entry.kept,
        "tone": ("kept" if entry.verdict.startswith("kept") else "") if entry.kept else "back",
        "chip": verdict if len(verdict) < 24 else ("kept" if entry.kept else "rolled back"),
        "why": printable((why if colon else "").strip() or (verdict if len(verdict) >= 24 else ""), 300),
        "declined": len(entry.declined),
        "reasons": [(printable(reason, 200), count) for reason, count in why_not[:_SHOWN_REASONS]],
        "more_reasons": max(0, len(why_not) - _SHOWN_REASONS),
        "reproducer": printable(entry.reproducer or "", 200),
    }


def _ops(report: Report) -> list[dict[str, Any]]:
    rows = op_rows(report.before.ops, report.after.ops, _SHOWN_OPS)
    top = max([1] + [max(old, new) for _, old, new in rows])
    return [
        {
            "name": printable(name, 60),
            "before": old,
            "after": new,
            "old": percent(old / top),
            "new": percent(new / top),
            "state": _state(old, new),
        }
        for name, old, new in rows
    ]


def _state(old: int, new: int) -> str:
    if not old or not new:
        return "new" if not old else "gone"
    return "same" if old == new else ("less" if new < old else "more")
