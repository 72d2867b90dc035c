"""What ``benchmarks/fusion.py`` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

#: Relative L2 that an exact pass may cost on these models.
LIMIT = 1e-5


def show(result: dict[str, Any]) -> None:
    """Prints the tables of a result that are there."""
    console = Console()
    console = Console(width=max(console.width, 170)) if not console.is_terminal else console
    if "rows" in result:
        models(console, result)
        totals(console, result["summary"])


def interval(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.3f} {ratio['low']:.2f}–{ratio['high']:.2f}"


def cell(item: dict[str, Any] | None) -> str:
    """A peer of a row: its ratio, or why there is none."""
    if item is None:
        return ""
    if item["status"] in ("failed", "wrong"):
        reason = " ".join(str(item.get("reason", "")).split())
        return f"{item['status']}: {reason[:48]}"
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
    for column in ("row", "plain ORT ms", *peers, "planish error", "at other lengths"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for row in rows:
        mine, plain = row["peers"].get("planish", {}), row["peers"]["ort"]
        lengths = row["lengths"].get("planish")
        checked = "" if lengths is None else ("failed" if lengths["worst"] is None else small(lengths["worst"]))
        first = f"{plain['ms']:.2f}" if "ms" in plain else cell(plain)
        cells = [cell(row["peers"].get(peer)) for peer in peers]
        table.add_row(row["row"], first, *cells, small(mine.get("relative_l2")), checked)
    console.print(table)


def totals(console: Console, summary: dict[str, Any]) -> None:
    if summary["geomean"] is not None:
        text = f"planish / plain ORT, geometric mean of {summary['transformer_rows']} transformer rows"
        console.print(f"{text}: {summary['geomean']:.3f}", highlight=False)
    for row, peer, ratio in summary["slower"]:
        console.print(f"slower than {peer} on {row}: {interval(ratio)}", highlight=False, markup=False)
    for row, reason in summary["invalid"]:
        console.print(f"planish is not valid on {row}: {reason}", highlight=False, markup=False)
