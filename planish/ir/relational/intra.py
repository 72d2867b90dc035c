"""The intra-operator IR: kernels of two templates, with access schemes and schedules, and no word about a processor.

The lower of the two levels (Hector, Wu, Hidayetoğlu et al. 2023, arXiv:2301.06284). A kernel loops over the rows of a
domain. Its statements belong to a row, or to the loop over the finer rows of it (the edges into a node, the edges of a
(destination, edge type) pair). Two templates:

- **traversal**: only such statements. Reductions into a row stay in registers; no atomic operations.
- **segment GEMM**: rows come in segments, each with a weight of its own (`Gemm.segments`), and are worked on in tiles
  of a few dozen: statements *before* fill the left operand of the tile (a gather, or a reduction over the edges of each
  row), one product per tile follows, and statements *after* take the rows of the result on: into memory, added to rows
  of another domain, or as an operand for the edges of the row. Neither gathered rows nor products need memory.

How a statement reads a value is its access scheme (`Access`): at the row, or through index tables of the graph
(`planish.ir.relational.graph.Graph.table`), at the level of the row or of the inner loop. A table of `PREFIXES` is one
that schedules make.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from planish.ir.relational.domains import Domain
from planish.ir.relational.inter import Variable

Level = Literal["row", "inner"]


@dataclass(frozen=True)
class Access:
    """How a value is read or written.

    Attributes:
        value: its name.
        level: whether the index starts from the row of the kernel or from that of the inner loop.
        tables: index tables that are applied to it, first to last; none: the row itself.
        local: the value is one that the kernel has just computed for this row.
        one: the value has a single row, for all.
    """

    value: str
    level: Level = "row"
    tables: tuple[str, ...] = ()
    local: bool = False
    one: bool = False

    def __str__(self) -> str:
        if self.local:
            return self.value
        index = {"row": "r", "inner": "e"}[self.level]
        for table in self.tables:
            index = f"{table}[{index}]"
        return f"{self.value}[{'' if self.one else index}]"


@dataclass(frozen=True)
class Statement:
    """One operator at one row.

    Attributes:
        kind, attrs: as in the inter-operator IR; also ``rows``, the number of rows of the inner loop.
        result: what it defines, for this row.
        operands: what it reads.
        store: where the result goes in memory, if it does.
        add: the stored rows are added to what is there (a scatter); the result is nowhere else.
    """

    kind: str
    result: Variable
    operands: tuple[Access, ...] = ()
    attrs: tuple[tuple[str, Any], ...] = ()
    store: Access | None = None
    add: bool = False

    def attr(self, name: str, default: Any = None) -> Any:
        return dict(self.attrs).get(name, default)

    def __str__(self) -> str:
        given = ", ".join([*map(str, self.operands), *(f"{key}={value}" for key, value in self.attrs)])
        text = f"{self.result.name} = {self.kind}({given})"
        if self.store is not None:
            text = f"{self.store} {'+=' if self.add else ':='} {text}"
        return text


@dataclass(frozen=True)
class Loop:
    """The finer rows of a row: numbers ``pointers[r] : pointers[r + 1]``, looked up in `rows` if that is a table.

    A reduction in the body (kinds sum, mean, max_rows, min_rows) accumulates into the row.
    """

    fine: Domain
    pointers: str
    rows: str | None
    body: tuple[Statement, ...]

    def __str__(self) -> str:
        numbers = f"{self.pointers}[r] : {self.pointers}[r + 1]"
        head = f"for e in {self.rows}[{numbers}]" if self.rows else f"for e in {numbers}"
        return "\n".join([f"{head}:  # {self.fine}", *(f"  {statement}" for statement in self.body)])


@dataclass(frozen=True)
class Gemm:
    """The product of a tile.

    Attributes:
        kind: ``"linear"``: ``result[r] = x[r] W[type]``; ``"outer"``: ``result[type] += x[r]' y[r]``, summed over rows.
        result: of a row, or of a type.
        x, y: operands by row (`y` of outer products only), both as values of the row or read from memory.
        weight: the weight of linear products, read at the type of the segment; (.., in, out).
        segments: the table of pointers to the rows of each type; None: all rows are one segment.
        heads: matrices that are multiplied separately: 0 if there is no axis of heads.
        store: where rows of the result go in memory, if they do.
    """

    kind: Literal["linear", "outer"]
    result: Variable
    x: Access
    y: Access | None = None
    weight: str | None = None
    segments: str | None = None
    heads: int = 0
    store: Access | None = None

    def __str__(self) -> str:
        at = f"segment of {self.segments}" if self.segments else "0"
        if self.kind == "outer":
            return f"{self.result.name}[{at}] += {self.x}' {self.y}" + (f"  # {self.heads} heads" if self.heads else "")
        to = f"{self.store} := " if self.store else ""
        return f"{to}{self.result.name} = {self.x} {self.weight}[{at}]" + (
            f"  # {self.heads} heads" if self.heads else ""
        )


@dataclass(frozen=True)
class Schedule:
    """How a kernel runs; nothing but `compute` changes the result beyond the rounding of float32.

    Attributes:
        tile_rows: rows of a tile of a segment GEMM, at most.
        parallel: rows, or tiles, may run at the same time.
        compute: what operands of products are rounded to; sums are float32. ``"bfloat16"`` changes results.
    """

    tile_rows: int = 48
    parallel: bool = False
    compute: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Kernel:
    """An instance of one of the templates."""

    name: str
    rows: Domain
    before: tuple[Statement | Loop, ...]
    gemm: Gemm | None = None
    after: tuple[Statement | Loop, ...] = ()
    schedule: Schedule = field(default_factory=Schedule)

    @property
    def template(self) -> str:
        return "traversal" if self.gemm is None else "segment GEMM"

    def statements(self) -> Iterator[Statement]:
        for item in (*self.before, *self.after):
            yield from item.body if isinstance(item, Loop) else (item,)

    def reads(self) -> dict[str, None]:
        """Values read from memory, in order."""
        found: dict[str, None] = {}
        for statement in self.statements():
            found |= {a.value: None for a in statement.operands if not a.local}
        if self.gemm is not None:
            found |= {a.value: None for a in (self.gemm.x, self.gemm.y) if a is not None and not a.local}
            if self.gemm.weight is not None:
                found[self.gemm.weight] = None
        return found

    def writes(self) -> dict[str, bool]:
        """Values written to memory, in order, and whether they are added to."""
        found = {s.store.value: s.add for s in self.statements() if s.store is not None}
        if self.gemm is not None and self.gemm.kind == "outer":
            found[self.gemm.result.name] = True
        elif self.gemm is not None and self.gemm.store is not None:
            found[self.gemm.store.value] = False
        return found

    def tables(self) -> dict[str, None]:
        """Index tables that it uses, in order."""
        found: dict[str, None] = {}
        for item in (*self.before, *self.after):
            if isinstance(item, Loop):
                found |= {item.pointers: None} | ({item.rows: None} if item.rows else {})
        for statement in self.statements():
            if statement.kind == "rows":
                found[statement.attr("pointers")] = None
            for access in (*statement.operands, *([statement.store] if statement.store else [])):
                found |= dict.fromkeys(access.tables)
        if self.gemm is not None:
            for scheme in (self.gemm.x, self.gemm.y, self.gemm.store):
                found |= dict.fromkeys(scheme.tables if scheme is not None else ())
        return found

    def __str__(self) -> str:
        lines = [f"{self.template} {self.name} over {self.rows}  # {self.schedule}"]
        for item in self.before:
            lines += [f"  {line}" for line in str(item).splitlines()]
        if self.gemm is not None:
            lines.append(f"  tile: {self.gemm}")
        for item in self.after:
            lines += [f"  {line}" for line in str(item).splitlines()]
        return "\n".join(lines)


@dataclass(frozen=True)
class View:
    """A value that is part of another, or joined of others: rows of node types are consecutive.

    Attributes:
        kind: ``"pick"``: `result` is the rows of one node type of the one value of `parts`; ``"join"``: of all types.
    """

    kind: Literal["pick", "join"]
    result: Variable
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} {self.result.name} of {', '.join(self.parts)}"


@dataclass(frozen=True)
class Lowered:
    """A program as kernels.

    Attributes:
        name: of the program.
        arguments: what a call is given; values by edge in the order of the given edges.
        values: every value that is in memory, arguments included.
        steps: kernels and views in the order in which they run.
        start: for values that kernels add to: the value that they start from, or None for zeros.
        outputs: names.
        aliases: values that are others in another shape.
    """

    name: str
    arguments: tuple[Variable, ...]
    values: dict[str, Variable]
    steps: tuple[Kernel | View, ...]
    start: dict[str, str | None]
    outputs: tuple[str, ...]
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return tuple(step for step in self.steps if isinstance(step, Kernel))

    def __str__(self) -> str:
        starts = [f"{name} starts from {value or 'zeros'}" for name, value in self.start.items()]
        outs = f"outputs {', '.join(self.outputs)}"
        return "\n".join([f"lowered {self.name}", *map(str, self.steps), *starts, outs])
