"""Loop variables of a relational layer that is being written, and what is accumulated into them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planish.ir.errors import InputError, did_you_mean
from planish.ir.relational.domains import (
    DST_PAIR,
    EDGE,
    EDGE_TYPE,
    NODE,
    NODE_TYPE,
    NONE,
    SRC_PAIR,
    Domain,
    ends,
    only_end,
)
from planish.ir.relational.dsl_values import Value, fault, here
from planish.ir.relational.inter import Location, Operand

if TYPE_CHECKING:
    from planish.ir.relational.dsl import Layer

#: What a row is called in messages.
ROWS = {
    NODE: "nodes",
    EDGE: "edges",
    SRC_PAIR: "(source, type) pairs",
    DST_PAIR: "(destination, type) pairs",
    EDGE_TYPE: "edge types",
    NODE_TYPE: "node types",
    NONE: "nothing",
}


@dataclass(eq=False)
class Loop:
    """A loop that is being traced."""

    domain: Domain
    within: Row | None = None
    end: str = ""
    running: bool = True
    open: dict[tuple[Domain, str], Accumulation] = field(default_factory=dict)


class Weight:
    """A weight by type: ``W[e.type]``. One by no type is a `Value`."""

    def __init__(self, layer: Layer, operand: Operand, domain: Domain) -> None:
        self.layer, self.operand, self.domain = layer, operand, domain

    def __getitem__(self, row: Any) -> Value:
        name, wanted = self.operand.name, "e.type" if self.domain == EDGE_TYPE else "n.type or e.src.type"
        if not isinstance(row, Row):
            raise fault(f"weight '{name}' is by {self.domain}: index it by a type, such as {wanted}")
        if row.domain != self.domain:
            given = ROWS[row.domain]
            raise fault(f"weight '{name}' is by {self.domain}, and is indexed by {given}; write {name}[{wanted}]")
        return Value(self.layer, Operand(name, row.read(self.domain)), row.loop)

    def unindexed(self) -> InputError:
        name = self.operand.name
        return fault(f"weight '{name}' is by {self.domain}: index it, as in {name}[e.type]")


@dataclass(eq=False)
class Accumulation:
    """What a node is being given by a loop over its edges; no value before that loop has ended."""

    row: Row
    name: str
    terms: list[tuple[str, Value, Location]] = field(default_factory=list)
    location: Location = field(default_factory=here)

    def __iadd__(self, value: Any) -> Accumulation:
        self.add("sum", value)
        return self

    def add(self, how: str, value: Any) -> None:
        loop = self.row.layer.inner_of(self.row)
        if loop is None:
            raise fault(
                f"'{self.name}' is accumulated outside of a loop over the edges of its node: "
                "write `for e in n.incoming(): n.h += e.m`"
            )
        value = self.row.layer.value(value, loop.domain)
        if value.over not in (loop.domain, NONE):
            value = self.row.layer.lift(value, loop.domain)
        self.terms.append((how, value, here()))
        loop.open[self.row.key(self.name)] = self

    def __getattr__(self, name: str) -> Any:
        raise self.unfinished()

    def unfinished(self) -> InputError:
        if not self.terms:
            known = self.row.layer.fields.get(self.row.domain, {})
            hint = did_you_mean(self.name, known) or " Set it first"
            return fault(f"{ROWS[self.row.domain]} have no '{self.name}' here.{hint.rstrip('.')}")
        return fault(
            f"'{self.name}' is read while it is being accumulated (since line {self.location.line}): "
            "it has a value after the loop over edges has ended"
        )


def _refuse(name: str) -> Any:
    def method(self: Accumulation, *_: Any) -> Any:
        raise self.unfinished()

    method.__name__ = name
    return method


for _name in "add radd sub rsub mul rmul truediv rtruediv neg bool".split():  # noqa: SIM905
    setattr(Accumulation, f"__{_name}__", _refuse(_name))


class Row:
    """The variable of a loop, ``n`` or ``e``, or what it leads to, ``e.src``. Attributes are values of it.

    Attributes:
        domain: what it is a row of.
        loop: the domain of the loop.
        end: the end of the edge by which the loop's row leads to it.
    """

    def __init__(self, layer: Layer, domain: Domain, loop: Domain, end: str = "", frame: Loop | None = None) -> None:
        for name, value in {"layer": layer, "domain": domain, "loop": loop, "end": end, "frame": frame}.items():
            object.__setattr__(self, name, value)

    layer: Layer
    domain: Domain
    loop: Domain
    end: str
    frame: Loop | None

    def key(self, name: str) -> tuple[Domain, str]:
        return self.domain, name

    def read(self, domain: Domain) -> str:
        """The end to write at an operand by `domain`."""
        found = ends(self.loop, domain)
        return self.end if self.end in found and len(found) > 1 else only_end(self.loop, domain)

    # Where a row leads to.
    def _to(self, domain: Domain, end: str = "") -> Row:
        return Row(self.layer, domain, self.loop, end or self.end, self.frame)

    @property
    def src(self) -> Row:
        """The source of an edge."""
        return self._end("src")

    @property
    def dst(self) -> Row:
        """The destination of an edge."""
        return self._end("dst")

    def _end(self, end: str) -> Row:
        if self.domain != EDGE:
            raise fault(f"{ROWS[self.domain]} have no {end}; edges have")
        return self._to(NODE, end)

    @property
    def node(self) -> Row:
        """The node of a pair."""
        if self.domain not in (SRC_PAIR, DST_PAIR):
            raise fault(f"{ROWS[self.domain]} have no node; pairs have")
        return self._to(NODE, "src" if self.domain == SRC_PAIR else "dst")

    @property
    def type(self) -> Row:
        """The type of an edge, of a pair, or of a node."""
        if self.domain in (EDGE_TYPE, NODE_TYPE):
            raise fault("a type has no type")
        return self._to(NODE_TYPE if self.domain == NODE else EDGE_TYPE)

    @property
    def src_type(self) -> Row:
        """The node type of the sources of an edge type; each edge type must have one."""
        return self._to(NODE_TYPE, "src")

    @property
    def dst_type(self) -> Row:
        """The node type of the destinations of an edge type; each edge type must have one."""
        return self._to(NODE_TYPE, "dst")

    @property
    def src_pair(self) -> Row:
        """The (source, type) pair of an edge."""
        return self._to(SRC_PAIR)

    @property
    def dst_pair(self) -> Row:
        """The (destination, type) pair of an edge."""
        return self._to(DST_PAIR)

    # Loops inside.
    def incoming(self) -> Iterator[Row]:
        """A loop over the edges into a node, inside of ``for n in g.nodes()``."""
        return self._edges("dst", NODE)

    def outgoing(self) -> Iterator[Row]:
        """A loop over the edges out of a node."""
        return self._edges("src", NODE)

    def edges(self) -> Iterator[Row]:
        """A loop over the edges of a pair, inside of ``for p in g.pairs("dst")``, or of a type."""
        return self._edges("", self.domain)

    def _edges(self, end: str, domain: Domain) -> Iterator[Row]:
        if self.domain != domain or self.loop != domain or domain == EDGE:
            raise fault(f"{ROWS[self.domain]} have no edges to loop over here; the variable of a loop over nodes has")
        self.layer.check_running(self)
        return self.layer.loop(EDGE, within=self, end=end)

    # Values.
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.layer.get(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            raise fault(f"'{name}' is what the row leads to, and no name for a value")
        self.layer.set(self, name, value)


class Started(Value):
    """A field with a value, read in a loop over edges: a value, and perhaps the start of an accumulation."""

    def __init__(self, layer: Layer, row: Row, name: str, found: Operand) -> None:
        super().__init__(layer, Operand(found.name, row.read(row.domain)), row.loop)
        object.__setattr__(self, "row", row)
        object.__setattr__(self, "field", name)

    def __iadd__(self, value: Any) -> Accumulation:  # type: ignore[override,misc]
        accumulation = Accumulation(self.row, self.field)  # type: ignore[attr-defined]
        accumulation.add("sum", value)
        return accumulation
