"""The report in the terminal: the table that ONNX users know, the ledger, remarks, and one last sentence."""

from __future__ import annotations

from typing import Any

from planish.ir.ledger import ErrorStats, LedgerEntry, Ratio
from planish.ir.spec import TensorSpec
from planish.runtime.report import Report
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

#: Operators that the table shows; the rest are summed up in one row.
SHOWN_OPS = 24
#: Columns of a terminal from which on the ledger shows everything.
_WIDE = 130


def print_report(report: Report, console: Any = None) -> None:
    """Writes `report` to `console`, or to a new one on stdout."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    console.print(_summary(report))
    if report.passes:
        console.print(_ledger(report, wide=console.width >= _WIDE))
    for line in _after_ledger(report):
        console.print(line)
    good = report.speedup is None or not report.speedup.slower
    console.print(Text(printable(report.verdict, 500), style="bold green" if good else "bold yellow"))


def op_rows(before: dict[str, int], after: dict[str, int], limit: int) -> list[tuple[str, int, int]]:
    """(operator, before, after), most frequent first; beyond `limit` summed up, but never what is new."""
    names = sorted({*before, *after}, key=lambda n: (-max(before.get(n, 0), after.get(n, 0)), n))
    rows = [(name, before.get(name, 0), after.get(name, 0)) for name in names]
    if len(rows) <= limit + 1:
        return rows
    ranked = sorted(rows, key=lambda row: row[1] != 0)  # stable: by frequency among the new and among the others
    chosen, rest = {row[0] for row in ranked[:limit]}, ranked[limit:]
    other = (f"{len(rest)} other operators", sum(r[1] for r in rest), sum(r[2] for r in rest))
    return [*(row for row in rows if row[0] in chosen), other]


def _summary(report: Report) -> Any:
    from rich.table import Table
    from rich.text import Text

    title = f"{printable(report.model, 80)} on {report.target}, planish {report.version}"
    table = Table(title=Text(title, style="bold"), title_justify="left")
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    before, after = report.before, report.after
    for role, specs in (("IN", report.inputs), ("OUT", report.outputs)):
        for spec in specs[:8]:
            table.add_row(Text(f"{role}: {printable(spec.name, 40)}"), Text(spec_text(spec)), "", "")
    table.add_section()
    changed = {name for name in {*before.ops, *after.ops} if before.ops.get(name) != after.ops.get(name)}
    old_ops, new_ops = ({n: c for n, c in ops.items() if n in changed} for ops in (before.ops, after.ops))
    for name, old, new in op_rows(old_ops, new_ops, SHOWN_OPS):
        table.add_row(Text(printable(name, 60)), str(old), _changed(old, new), "")
    same = [count for name, count in before.ops.items() if name not in changed]
    if same:
        words = "other operators" if changed else "operators, as they were"
        table.add_row(Text(f"{len(same)} {words}", style="dim"), str(sum(same)), str(sum(same)), "")
    table.add_section()
    for label, old_value, new_value, show in (
        ("Nodes", before.nodes, after.nodes, str),
        ("Model size", before.weight_bytes, after.weight_bytes, size),
        ("FLOPs", before.flops, after.flops, count_text),
        ("Peak activations", before.peak_activation_bytes, after.peak_activation_bytes, size),
        ("Latency", before.latency_ms, after.latency_ms, milliseconds),
    ):
        if old_value is None and new_value is None:
            continue
        text = Text(show(new_value), style=_colour(old_value, new_value))
        change = Text(percent_change(old_value, new_value), style=_colour(old_value, new_value))
        table.add_row(label, show(old_value), text, change)
    table.add_section()
    speed = ratio_text(report.speedup) if report.speedup else "not measured"
    table.add_row("Speed-up", "", Text(speed, style=_ratio_style(report.speedup)), "")
    for name, found in report.by_entry.items():
        if found.speedup is not None:
            gain = Text(ratio_text(found.speedup), style=_ratio_style(found.speedup))
            table.add_row(f"Speed-up of {printable(name, 20)}", "", gain, "")
    table.add_row("Error", "", _error(report.error), "")
    for name, found in report.by_entry.items():
        if found.error is not None:
            table.add_row(f"Error of {printable(name, 20)}", "", _error(found.error), "")
    table.add_row("Time spent", "", duration(report.seconds), "")
    return table


def spec_text(spec: TensorSpec) -> str:
    """``float32[batch, 128]``, or ``sequence`` for what is not a tensor."""
    return printable(str(spec)[len(spec.name) + 2 :], 80)


def _changed(old: int, new: int) -> Any:
    from rich.text import Text

    return Text(str(new), style=_colour(old, new))


def _colour(old: float | None, new: float | None) -> str:
    if old is None or new is None or old == new:
        return ""
    return "green" if new < old else "yellow"


def _ratio_style(ratio: Ratio | None) -> str:
    if ratio is None:
        return "dim"
    return "green" if ratio.faster else ("red" if ratio.slower else "")


def _error(error: ErrorStats | None) -> Any:
    from rich.text import Text

    if error is None:
        return Text("not measured", style="dim")
    text = f"{number(error.relative_l2)} relative L2, {number(error.max_abs)} max abs"
    if error.metric is not None:
        text = f"{number(error.metric)} by your metric, {text}"
    return Text(text)


def _ledger(report: Report, wide: bool) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = ["pass", "kind", "fired", "declined", "nodes", "error", "gain", "time", "verdict"]
    shown = names if wide else ["pass", "nodes", "error", "gain", "verdict"]
    table = Table(title=Text("Passes", style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in shown:
        right = name in ("fired", "declined", "time")
        table.add_column(name, justify="right" if right else "left", no_wrap=name in ("kind", "nodes", "time", "gain"))
        if name == "pass":
            table.columns[-1].overflow = "fold"
    idle = {id(entry) for entry in report.idle}
    for entry in report.ledger.entries:
        if id(entry) not in idle:
            cells = _entry_cells(entry, wide)
            table.add_row(*(cells[name] for name in shown), end_section=entry.kind == "composition")
    return table


def _entry_cells(entry: LedgerEntry, wide: bool) -> dict[str, Any]:
    from rich.text import Text

    whole = entry.kind == "composition"
    same = entry.nodes_before == entry.nodes_after
    error, gain = entry.error_original or entry.error_previous, ""
    if entry.speedup is not None:
        gain = ratio_text(entry.speedup) if wide else ratio_text(entry.speedup).partition(" ")[0]
    return {
        "pass": Text(printable(entry.name, 80), style="bold" if whole else ""),
        "kind": "together" if whole else entry.kind,
        "fired": str(entry.fired or ""),
        "declined": str(len(entry.declined) or ""),
        "nodes": str(entry.nodes_after) if same else f"{entry.nodes_before} → {entry.nodes_after}",
        "error": "" if error is None else number(error.cost),
        "gain": Text(gain, style=_ratio_style(entry.speedup)),
        "time": duration(entry.seconds) if entry.seconds else "",
        "verdict": Text(printable(entry.verdict, 160), style="green" if entry.kept else "red"),
    }


def _after_ledger(report: Report) -> list[Any]:
    from rich.text import Text

    lines = []
    if report.idle:
        names = ", ".join(idle_names(report))
        lines.append(Text(f"Nothing to do for {len(report.idle)} passes: {names}", style="dim"))
    for entry in report.ledger.entries:
        if entry.reproducer:
            lines.append(Text(f"Reproducer of {printable(entry.name, 60)}: {printable(entry.reproducer)}", style="red"))
    lines += [Text(line) for line in report.budget_lines()]
    lines += [Text(f"Note: {printable(line, 400)}", style="yellow") for line in report.remarks()]
    return lines


def reasons(entry: LedgerEntry) -> list[tuple[str, int]]:
    """The reasons of an entry's declines with how often each occurs, most frequent first."""
    counts: dict[str, int] = {}
    for item in entry.declined:
        counts[item.reason] = counts.get(item.reason, 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def idle_names(report: Report) -> list[str]:
    """Passes that had nothing to do; one that ran several times as ``name ×2``."""
    counts: dict[str, int] = {}
    for entry in report.idle:
        counts[printable(entry.name, 80)] = counts.get(printable(entry.name, 80), 0) + 1
    return [name if count == 1 else f"{name} ×{count}" for name, count in counts.items()]
