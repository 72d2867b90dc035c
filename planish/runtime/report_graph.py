"""The graph before and after by block, as the HTML page shows it: aligned, alike blocks folded, bounded."""

from __future__ import annotations

import re
from typing import Any

from planish.ir.blocks import Block, BlockNode
from planish.runtime.report import Report
from planish.runtime.units import printable

KEPT, GONE = -1, -2
#: Rows of blocks on the page at most; the rest is counted.
SHOWN_BLOCKS = 1000
_NAME = 120


def graph_view(report: Report, hues: dict[str, int]) -> dict[str, Any]:
    """Rows of blocks for the table, and the nodes in them as compact lists that the page draws when asked.

    A node is ``[operator, name, mark]``: the operator by index, and the mark is the index of a pass (the pass
    that made the node, or on the left side the pass that replaced it), KEPT or GONE.
    """
    if not report.graph_before and not report.graph_after:
        return {"rows": [], "data": None, "legend": [], "hidden": 0}
    names: list[str] = []
    ops: list[str] = []
    marks = _Marks(report, names)
    rows = _fold(_align(report.graph_before, report.graph_after))
    shown, data = rows[:SHOWN_BLOCKS], []
    top = max([1] + [max(_count(b), _count(a)) for _, b, a, _ in shown])
    view = []
    for title, before, after, alike in shown:
        left = [_packed(n, marks.before(n), ops) for n in before.nodes] if before else []
        right = [_packed(n, marks.after(n), ops) for n in after.nodes] if after else []
        data.append([left, right, before.hidden if before else 0, after.hidden if after else 0])
        made: dict[int, int] = {}
        for item in right:
            if item[2] >= 0:
                made[item[2]] = made.get(item[2], 0) + 1
        counts = _count(before), _count(after)
        view.append(
            {
                "title": printable(title, _NAME),
                "alike": alike,
                "before": counts[0],
                "after": counts[1],
                "old": f"{100 * counts[0] / top:.2f}%",
                "new": f"{100 * counts[1] / top:.2f}%",
                "made": [(names[k], hues.get(names[k]), n) for k, n in sorted(made.items())],
            }
        )
    pass_hues = [hues.get(name) for name in names]
    blob = {"ops": ops, "passes": [printable(n, _NAME) for n in names], "hues": pass_hues, "blocks": data}
    legend = _legend(report, hues)
    return {"rows": view, "data": blob, "legend": legend, "hidden": len(rows) - len(shown)}


def _count(block: Block | None) -> int:
    return block.count if block else 0


class _Marks:
    """Which pass made a node of the new graph, and which one replaced a node of the old graph."""

    def __init__(self, report: Report, names: list[str]) -> None:
        self._names, self._index = names, {}
        self._survivors: set[str] = set()
        self._replaced: dict[str, int] = {}
        for block in report.graph_after:
            for node in block.nodes:
                self._survivors.add(node.name)
                mark = self.after(node)
                if mark >= 0:
                    for source in node.sources:
                        self._replaced.setdefault(source, mark)

    def after(self, node: BlockNode) -> int:
        if not node.origin:
            return KEPT
        name = node.origin.partition("{")[0]
        if name not in self._index:
            self._index[name] = len(self._names)
            self._names.append(name)
        return self._index[name]

    def before(self, node: BlockNode) -> int:
        if node.name in self._replaced:
            return self._replaced[node.name]
        return KEPT if node.name in self._survivors else GONE

    _index: dict[str, int]


def _packed(node: BlockNode, mark: int, ops: list[str]) -> list[Any]:
    name = printable(node.op, 60)
    if name not in ops:
        ops.append(name)
    return [ops.index(name), printable(node.name, _NAME), mark]


_Row = tuple[str, Block | None, Block | None, int]


def _align(before: list[Block], after: list[Block]) -> list[_Row]:
    """Pairs blocks by name, in the order of the old graph; blocks only in the new one follow their neighbour."""
    old, new = {b.name: b for b in before}, {b.name: b for b in after}
    order = [block.name for block in before]
    known = set(order)
    previous = -1
    for block in after:
        if block.name in known:
            previous = max(previous, order.index(block.name)) if len(order) < 5000 else len(order) - 1
        else:
            previous += 1
            order.insert(previous, block.name)
            known.add(block.name)
    return [(name, old.get(name), new.get(name), 1) for name in order]


def _fold(rows: list[_Row]) -> list[_Row]:
    """Joins neighbouring blocks that differ only in their number and hold the same operators from the same passes."""
    folded: list[tuple[_Row, str, tuple[Any, ...]]] = []
    for name, before, after, _ in rows:
        key = (re.sub(r"\d+", "#", name, count=0), _shape(before), _shape(after))
        if folded and folded[-1][2] == key and name != re.sub(r"\d+", "#", name):
            (first, b, a, count), _, _ = folded[-1]
            folded[-1] = ((first, b, a, count + 1), name, key)
        else:
            folded.append(((name, before, after, 1), name, key))
    return [
        (f"{first} … {last.rpartition('.')[2]}" if count > 1 else first, b, a, count)
        for (first, b, a, count), last, _ in folded
    ]


def _shape(block: Block | None) -> tuple[Any, ...]:
    if block is None:
        return ()
    return (block.hidden, *((node.op, node.origin) for node in block.nodes))


def _legend(report: Report, hues: dict[str, int]) -> list[tuple[str, int | None, int]]:
    """(pass, hue, nodes that it made), the largest first."""
    made: dict[str, int] = {}
    for block in report.graph_after:
        for node in block.nodes:
            if node.origin:
                name = node.origin.partition("{")[0]
                made[name] = made.get(name, 0) + 1
    ordered = sorted(made.items(), key=lambda item: (-item[1], item[0]))
    return [(printable(name, _NAME), hues.get(name), count) for name, count in ordered]
