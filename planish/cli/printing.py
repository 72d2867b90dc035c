"""How the commands show their results to people. Plain data in, tables out; nothing is computed here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planish.cli import machine
from planish.cli.layer_tree import layer_tree
from planish.runtime.units import (
    count_text,
    milliseconds,
    number,
    percent_change,
    printable,
    ratio_text,
    size,
)

if TYPE_CHECKING:
    from planish.cli.benchmark import Comparison
    from planish.ir.diff import ModelDiff
    from planish.runtime.report import Report

_OPS, _BLOCKS, _LINES = 30, 40, 40


def _console() -> Console:
    return Console(highlight=False)


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=Text(title, style="bold") if title else None, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def _text(value: Any, limit: int = 120, style: str = "") -> Text:
    return Text(printable(str(value), limit), style=style)


def optimized(report: Report, output: str | None, failed: Sequence[str]) -> None:
    """The report, where the artifact is, and the verdict as the last line."""
    console = _console()
    if output is not None:
        console.print(_text(f"Artifact: {output}", 400))
    else:
        console.print(Text("Nothing was written; give -o FOLDER for an artifact.", style="dim"))
    if failed:
        console.print(_text(f"Rolled back: {', '.join(failed)}", 600, "red"))
    report.print(console)


def ran(result: Mapping[str, Any]) -> None:
    """Outputs of one run with their ranges."""
    console = _console()
    table = _table("", "output", "type", "min", "max", "mean", right=("min", "max", "mean"))
    for name, item in result["outputs"].items():
        kind = f"{item['dtype']}{item['shape']}" if "dtype" in item else item["type"]
        numbers = [f"{item[key]:.6g}" if key in item else "" for key in ("min", "max", "mean")]
        table.add_row(_text(name), kind, *numbers)
    console.print(table)
    if result["synthetic"]:
        console.print(Text("Inputs were synthetic; give --inputs for your own.", style="yellow"))
    if result["saved"]:
        console.print(_text(f"Outputs: {result['saved']}", 400))
    console.print(f"First run: {milliseconds(result['milliseconds'])}")


def benched(found: Comparison) -> None:
    """Times, throughput, ratios with intervals, and what to know about the machine."""
    console = _console()
    columns = ("Avg", "P50", "P90", "P99", "Min", "Std")
    times = _table("Time of a run", "", *columns, right=columns)
    versus = _table("Against the first", "", "runs", "samples/s", "speed-up", "error", right=("runs", "samples/s"))
    for row in found.rows:
        name, t = _text(row.name, 60), row.timing
        times.add_row(name, *(milliseconds(v) for v in (t.mean, t.median, t.p90, t.p99, t.min, t.std)))
        speed = Text("baseline", style="dim")
        if row.speedup is not None:
            style = "green" if row.speedup.faster else ("red" if row.speedup.slower else "")
            speed = Text(ratio_text(row.speedup), style=style)
        error = number(row.error.relative_l2) if row.error is not None else ""
        versus.add_row(name, str(t.runs), f"{row.throughput:.4g}", speed, error)
    console.print(times)
    console.print(versus)
    console.print(_text("Inputs: " + ", ".join(f"{n} {kind}" for n, kind in found.inputs.items()), 400, "dim"))
    for note in found.notes:
        console.print(_text(f"Note: {note}", 400, "yellow"))


def verified(result: Mapping[str, Any], ok: bool) -> None:
    """Each finding with a tick or a cross, then the verdict."""
    console = _console()
    console.print(f"✓ {result['files']} files, {size(result['bytes'])}: sizes and hashes are those of the manifest")
    for sample in result["golden"]:
        error, limit = sample["error"], result["tolerance"]
        good = error["relative_l2"] <= limit
        text = f"golden sample of {sample['entry']}: error {number(error['relative_l2'])}, limit {number(limit)}"
        console.print(_text(f"{'✓' if good else '✗'} {text}", 400, "" if good else "red"))
    if not result["golden"]:
        console.print(Text("– no golden samples: outputs were not checked", style="yellow"))
    for label, key in (("differs from where it was made", "differences"), ("not part of it", "unlisted")):
        for item in result[key]:
            console.print(_text(f"– {label}: {item}", 400, "yellow"))
    for note in result["notes"]:
        console.print(_text(f"Note: {note}", 400, "yellow"))
    words = "holds on this machine" if ok else "does NOT hold on this machine"
    console.print(_text(f"{result['path']} {words}.", 400, "bold green" if ok else "bold red"))


def inspected(found: Mapping[str, Any]) -> None:
    """Interface, weights, costs, operators with coverage, blocks; what a machine has, and what it would need."""
    console = _console()
    machine.show(found, console)
    if "ops" not in found:
        return
    facts = Table.grid(padding=(0, 2))
    for label, value in _facts(found):
        facts.add_row(Text(label, style="bold"), _text(value, 600))
    console.print(facts)
    console.print(_ops(found))
    for entry, layers in found["layers"].items():
        console.print(layer_tree(layers, entry if len(found["layers"]) > 1 else ""))
    console.print(_blocks(found["blocks"]))
    for note in found["notes"]:
        console.print(_text(f"Note: {note}", 400, "yellow"))


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    several = len(found["inputs"]) > 1
    rows = [(found["kind"].capitalize(), found["path"])]
    for role in ("inputs", "outputs"):
        for entry, specs in found[role].items():
            label = role.capitalize() + (f" of {entry}" if several else "")
            rows += [(label if k == 0 else "", spec) for k, spec in enumerate(specs)]
    kinds = ", ".join(f"{kind} {size(count)}" for kind, count in found["dtypes"].items())
    rows += [
        ("Opsets", ", ".join(f"{domain} {version}" for domain, version in found["opsets"].items())),
        ("Nodes", str(found["nodes"])),
        ("Weights", f"{found['weights']} tensors, {size(found['weight_bytes'])}" + (f" ({kinds})" if kinds else "")),
    ]
    if found["flops"] is not None:
        at = ", ".join(f"{name}={value}" for name, value in found["dims"].items())
        moved = f"{count_text(found['flops'])} FLOPs, {size(found['bytes_moved'])} moved"
        rows.append(("One run", f"{moved}, peak activations {size(found['peak_activation_bytes'])}"))
        rows += [("  at", at)] if at else []
    if found["functions"]:
        rows.append(("Functions", ", ".join(found["functions"])))
    if found["made_by"]:
        rows.append(("Made by passes", ", ".join(f"{name} {count}" for name, count in found["made_by"].items())))
    coverage = found["coverage"]
    if coverage is not None:
        text = f"{100 * coverage['share']:.4g}% of nodes have a kernel"
        for kind, words in (("functions", "run as functions"), ("missing", "can not run")):
            if coverage[kind]:
                text += f"; {words}: " + ", ".join(f"{op} ×{n}" for op, n in coverage[kind].items())
        rows.append((f"On {found['target']}", text))
    return [*rows, *((key.replace("_", " ").capitalize(), text) for key, text in found["provenance"].items())]


def _ops(found: Mapping[str, Any]) -> Table:
    table = _table("Operators", "operator", "nodes", "FLOPs", "share", right=("nodes", "FLOPs", "share"))
    total = found["flops"] or 0
    for op, count in list(found["ops"].items())[:_OPS]:
        flops = found["flops_by_op"].get(op)
        share = f"{100 * flops / total:.1f}%" if flops and total else ""
        table.add_row(_text(op, 60), str(count), count_text(flops) if flops else "", share)
    rest = list(found["ops"].values())[_OPS:]
    if rest:
        table.add_row(f"{len(rest)} other operators", str(sum(rest)), "", "")
    return table


def _blocks(blocks: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("Blocks", "block", "nodes", "operators", right=("nodes",))
    for block in blocks[:_BLOCKS]:
        ops = ", ".join(f"{op} {count}" if count > 1 else op for op, count in list(block["ops"].items())[:8])
        more = len(block["ops"]) - 8
        table.add_row(
            _text(block["name"], 60), str(block["nodes"]), _text(ops + (f", … {more} more" * (more > 0)), 200)
        )
    if len(blocks) > _BLOCKS:
        rest = blocks[_BLOCKS:]
        table.add_row(f"{len(rest)} other blocks", str(sum(block["nodes"] for block in rest)), "")
    return table


def passes(found: Sequence[Mapping[str, Any]]) -> None:
    """A line or two per pass: name, kind, what it does, options with their defaults."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("pass", "kind", "what it does"):
        table.add_column(name, no_wrap=name != "what it does")
    for item in found:
        style = {"approximate": "yellow", "broken": "red"}.get(item["kind"], "")
        doc = _text(item["doc"], 300)
        if item["options"]:
            doc.append("\n" + ", ".join(f"{o['name']}={o['default']}" for o in item["options"]), style="dim")
        table.add_row(_text(item["name"], style="bold"), Text(item["kind"], style=style), doc)
    _console().print(table)


def explained(found: Mapping[str, Any], limit: int) -> None:
    """How often the pass fires, then its near misses, the nearest first."""
    console = _console()
    where = f" after {', '.join(found['after'])}" if found["after"] else " on the model as it is"
    console.print(_text(f"{found['pass']}{where}", 600, "bold"))
    _near_misses(console, found["near_misses"], limit)
    count = len(found["near_misses"])
    misses_text = f"{count} near misses" if count else "nothing else in the model begins like its pattern"
    console.print(Text(f"Fires {found['fired']} times; {misses_text}.", style="bold"))


def explained_all(found: Mapping[str, Any], limit: int) -> None:
    """Every pass that fires or nearly does, in the order of the pipeline."""
    console = _console()
    quiet = []
    for item in found["passes"]:
        count = len(item["near_misses"])
        if not count and not item["fired"]:
            quiet.append(item["pass"])
            continue
        console.print(_text(f"{item['pass']}: fires {item['fired']} times, {count} near misses", 300, "bold"))
        _near_misses(console, item["near_misses"], limit)
    if quiet:
        console.print(_text(f"Neither fire nor nearly do: {', '.join(quiet)}", 1000, "dim"))


def _near_misses(console: Console, misses: Sequence[Mapping[str, Any]], limit: int) -> None:
    """A table of near misses; those of equal reason but for names, as in every layer, share a row."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for miss in misses:
        words = re.sub(r"'[^']*'", "''", miss["reason"])
        groups.setdefault((miss["rule"], miss["declined"], len(miss["matched_nodes"]), words), []).append(miss)
    if groups:
        table = _table("", "at node", "rule", "matched", "reason", "failed at", right=("matched",))
        for group in list(groups.values())[:limit]:
            miss = group[0]
            got = "all" if miss["declined"] else f"{len(miss['matched_nodes'])} of {miss['pattern_nodes']}"
            at = miss["failed_at"] if miss["failed_at"] != miss["node"] else ""
            node = miss["node"] + (f" and {len(group) - 1} like it" if len(group) > 1 else "")
            table.add_row(_text(node), _text(miss["rule"]), got, _text(miss["reason"], 300), _text(at))
        console.print(table)
    if len(groups) > limit:
        rest = sum(map(len, list(groups.values())[limit:]))
        console.print(Text(f"and {rest} more, further from a match; --limit shows them.", style="dim"))


def bisected(found: Mapping[str, Any]) -> None:
    """The culprit, or that there is none."""
    console = _console()
    if found["reproducer"]:
        console.print(_text(f"Reproducer: {found['reproducer']}", 400))
    style = "bold green" if found["culprit"] is None and not found["broken_before"] else "bold red"
    verdict = found["verdict"][:1].upper() + found["verdict"][1:]
    console.print(_text(f"{verdict} ({found['checks']} checks).", 600, style))


def diffed(found: ModelDiff) -> None:
    """What differs, the coarse first."""
    console = _console()
    if found.same:
        console.print(Text("The models are equal, up to the names of nodes and inner values.", style="bold green"))
        return
    for line in found.interface:
        console.print(_text(line, 300))
    if found.ops:
        table = _table("Operators", "operator", "A", "B", "change", right=("A", "B", "change"))
        for op, (old, new) in found.ops.items():
            table.add_row(
                _text(op, 60), str(old), str(new), Text(f"{new - old:+d}", style="green" if new < old else "")
            )
        console.print(table)
    if found.blocks:
        table = _table("Blocks", "block", "A", "B", "operators", right=("A", "B"))
        for block in found.blocks[:_BLOCKS]:
            ops = ", ".join(f"{op} {new - old:+d}" for op, (old, new) in block.ops.items())
            table.add_row(_text(block.name, 60), str(block.before), str(block.after), _text(ops, 300))
        if len(found.blocks) > _BLOCKS:
            table.add_row(f"{len(found.blocks) - _BLOCKS} other blocks", "", "", "")
        console.print(table)
    _listed(console, "Weights", [f"{w.change} {w.name}: {w.detail}" for w in found.weights])
    _listed(console, "Nodes only in A", found.removed)
    _listed(console, "Nodes only in B", found.added)
    words = [f"{found.nodes[0]} → {found.nodes[1]} nodes"]
    change = percent_change(*found.weight_bytes)
    words.append(
        f"weights {size(found.weight_bytes[0])} → {size(found.weight_bytes[1])}" if change else "weights of equal size"
    )
    console.print(Text("The models differ: " + ", ".join(words) + ".", style="bold"))


def _listed(console: Console, title: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    console.print(Text(f"{title}: {len(lines)}", style="bold"))
    for line in lines[:_LINES]:
        console.print(_text(f"  {line}", 300))
    if len(lines) > _LINES:
        console.print(Text(f"  and {len(lines) - _LINES} more", style="dim"))
