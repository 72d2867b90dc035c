"""A kernel under construction: which operators it computes, at which level, and after which loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from planish.ir.relational.access import Relation
from planish.ir.relational.domains import Domain
from planish.ir.relational.inter import Op
from planish.ir.relational.intra import Access


class Cannot(Exception):
    """An operator does not fit where it was tried."""


@dataclass(frozen=True)
class Item:
    """An operator in a kernel.

    Attributes:
        time: rows' statements run at even times, inner loops at odd ones.
        reduces: it accumulates inner rows into the row.
        scatter: it adds to rows in memory.
    """

    op: Op
    level: str
    section: int
    time: int
    sources: tuple[Access, ...]
    reduces: bool = False
    scatter: bool = False


@dataclass(eq=False)
class Building:
    """A kernel under construction.

    Attributes:
        rows, relation: of its loops.
        items: what it computes.
        placed: level, section and time from which on a value is there.
        product, x, y: the product of tiles and its operands.
        section: 0 before the product (or without one), 1 after it.
        limit: when something is added to a finished kernel: its position; what it reads must come from before it.
    """

    rows: Domain
    relation: Relation | None
    items: list[Item] = field(default_factory=list)
    placed: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    product: Op | None = None
    x: Access | None = None
    y: Access | None = None
    section: int = 0
    limit: int | None = None

    def add(
        self, op: Op, level: str, section: int, sources: tuple[Access, ...], *, scatter: bool = False, after: str = ""
    ) -> None:
        """Puts an operator at the earliest time at which what it reads is there."""
        time = 0 if level == "row" else 1
        for name in [s.value for s in sources if s.local] + ([after] if after else []):
            at = self.placed[name]
            if at[1] == section:
                time = max(time, at[2])
        if time % 2 != (level == "inner"):
            time += 1
        reduces = level == "inner" and not scatter and op.over != op.result.domain
        self.items.append(Item(op, level, section, time, sources, reduces, scatter))
        if not scatter:
            self.placed[op.name] = ("row" if reduces else level, section, time + reduces)

    def has(self, name: str, level: str, section: int) -> bool:
        found = self.placed.get(name)
        return found is not None and found[:2] == (level, section)

    def mapped(self, over: Domain) -> str | None:
        """The level of a loop over `over`, if the kernel has one."""
        if over == self.rows:
            return "row"
        return "inner" if self.relation is not None and self.relation.fine == over else None

    def save(self) -> Any:
        return (
            list(self.items),
            dict(self.placed),
            self.product,
            self.x,
            self.y,
            self.section,
            self.limit,
            self.relation,
        )

    def load(self, saved: Any) -> None:
        items, placed, self.product, self.x, self.y, self.section, self.limit, self.relation = saved
        self.items, self.placed = list(items), dict(placed)
