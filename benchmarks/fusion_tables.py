"""What ``benchmarks/fusion.py`` prints."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.fusion_rows import MINE

#: What ONNX Runtime says before each of its messages.
_PREFIX = re.compile(r"(\w+: )?\[ONNXRuntimeError\] : \d+ : \w+ : ")
#: A table that is written to a file is as wide as it needs to be.
_WIDTH = 200


def show(result: dict[str, Any]) -> None:
    """Prints the tables of a result that are there."""
    console = Console()
    console = console if console.is_terminal else Console(width=_WIDTH)
    if "rows" in result:
        models(console, result)
    if "causal" in result:
        causal(console, result)
    if "cost" in result:
        cost(console, result["cost"])
    totals(console, result["summary"])


def interval(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.3f} {ratio['low']:.2f}–{ratio['high']:.2f}"


def cell(item: dict[str, Any] | None) -> str:
    """A peer of a row: its ratio, or why there is none."""
    if item is None:
        return ""
    if item["status"] in ("failed", "wrong"):
        reason = _PREFIX.sub("", " ".join(str(item.get("reason", "")).split()))
        return f"{item['status']}: {reason[:64]}"
    if item["status"] != "ok":
        return str(item["status"])
    return interval(item["ratio"]) if "ratio" in item else f"{item['ms']:.2f} ms"


def small(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def models(console: Console, result: dict[str, Any]) -> None:
    """The table of whole models."""
    rows = result["rows"]
    peers = [peer for peer in next(iter(rows))["peers"] if peer != "ort"]
    about = result["about"]
    title = f"time of plain ONNX Runtime / time of the peer (above 1: faster), {about['threads']} thread(s)"
    table = Table(title=title, caption="error: relative L2 to eager float32; other lengths: the worst of a dozen")
    for column in (
        "row",
        "plain ORT ms",
        *peers,
        *(f"{mine} error, worst of lengths" for mine in MINE if mine in peers),
    ):
        table.add_column(column, justify="left" if column == "row" else "right")
    for row in rows:
        plain = row["peers"]["ort"]
        first = f"{plain['ms']:.2f}" if "ms" in plain else cell(plain)
        cells = [cell(row["peers"].get(peer)) for peer in peers]
        table.add_row(row["row"], first, *cells, *(errors(row, mine) for mine in MINE if mine in peers))
    console.print(table)


def errors(row: dict[str, Any], mine: str) -> str:
    """The error of an own peer on the timed inputs, and the worst at other lengths."""
    lengths = row["lengths"].get(mine)
    checked = "" if lengths is None else ("failed" if lengths["worst"] is None else small(lengths["worst"]))
    return f"{small(row['peers'].get(mine, {}).get('relative_l2'))} {checked}"


def causal(console: Console, result: dict[str, Any]) -> None:
    """The table of causal attention."""
    rows = result["causal"]
    title = "causal attention, 12 heads of 64, batch 1: ms, and the ratios of planish, without and with kernels, to it"
    table = Table(title=title, caption="flushed: with session.set_denormal_as_zero; one process each")
    table.add_column("form")
    for row in rows:
        table.add_column(f"{row['length']}", justify="right")
    for name in rows[0]["peers"]:
        table.add_row(name, *(form(row["peers"][name]) for row in rows))
    for mine in (peer for peer in MINE if peer in rows[0]["peers"]):
        table.add_row(f"{mine} error", *(small(row["peers"][mine].get("relative_l2")) for row in rows))
        table.add_row("at other lengths", *(small(row["lengths"][mine]) or "failed" for row in rows))
    console.print(table)


def form(item: dict[str, Any]) -> str:
    if item["status"] != "ok":
        return cell(item)
    ratios = [interval(item[f"{mine}_against"]) for mine in MINE if f"{mine}_against" in item]
    return "  ".join([f"{item['ms']:.2f}", *ratios])


def cost(console: Console, rungs: list[dict[str, Any]]) -> None:
    """The table of the optimizer's cost."""
    table = Table(title="planish.optimize of a BERT with hidden size 64, gates off")
    for column in ("layers", "seconds", "processor seconds", "the same per layer", "nodes before", "nodes after"):
        table.add_column(column, justify="right")
    for rung in rungs:
        if rung["status"] != "ok":
            table.add_row(str(rung["layers"]), cell(rung))
            continue
        used = rung["optimize_processor_seconds"]
        times = (f"{rung['optimize_seconds']:.2f}", f"{used:.2f}", f"{used / rung['layers']:.4f}")
        table.add_row(str(rung["layers"]), *times, str(rung["nodes_before"]), str(rung["nodes_after"]))
    console.print(table)


def totals(console: Console, summary: dict[str, Any]) -> None:
    """What it all comes to, in lines."""
    lines = []
    for peer, mean in summary["geomean"].items():
        lines.append(
            f"{peer} / plain ORT, geometric mean of {summary['transformer_rows']} transformer rows: {mean:.3f}"
        )
    for mine, lengths in summary["causal"].items():
        for length, found in lengths.items():
            for which, why in (("default", ""), ("any", ", flushed or not")):
                if found[which] is not None:
                    name, ratio = found[which]
                    lines.append(f"causal {length}: {mine} / fastest plain form{why} ({name}): {interval(ratio)}")
    if summary["linear"] is not None:
        lines.append(f"cost of a further layer, end of the ladder / before: {summary['linear']:.2f}")
    lines += [
        f"{mine} is slower than {peer} on {row}: {interval(ratio)}" for mine, row, peer, ratio in summary["slower"]
    ]
    lines += [f"planish is not valid on {where}: {why}" for where, why in summary["invalid"]]
    for line in lines:
        console.print(line, highlight=False, markup=False)
