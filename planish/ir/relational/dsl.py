"""The language in which relational layers are written: loops over nodes and edges, traced once into a program.

Every statement is for all rows of its loop at once, before the next one begins. `functions` has what is applied to
values; `planish.relational` is the public face of both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from planish.ir.errors import InputError, did_you_mean
from planish.ir.relational.builder import Builder
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
    reaches,
)
from planish.ir.relational.inter import Location, Operand, Program
from planish.ir.relational.verify import error_at

_OWN = {str(Path(__file__).with_name(name)) for name in ("dsl.py", "functions.py", "builder.py")}
#: What a row is called in messages.
_ROWS = {
    NODE: "nodes",
    EDGE: "edges",
    SRC_PAIR: "(source, type) pairs",
    DST_PAIR: "(destination, type) pairs",
    EDGE_TYPE: "edge types",
    NODE_TYPE: "node types",
    NONE: "nothing",
}
#: How `+=` and its kin accumulate.
ACCUMULATIONS = {"sum": "sum", "mean": "mean", "max": "max_rows", "min": "min_rows"}


def here() -> Location:
    """The line of the user's source that is being traced."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in _OWN:
        frame = frame.f_back
    return Location(frame.f_code.co_filename, frame.f_lineno)


def fault(message: str) -> InputError:
    """An error at the user's line; the caller raises it."""
    return error_at(here(), message)


@dataclass(frozen=True, eq=False)
class Value:
    """A value as it is read in a loop; arithmetic makes operators of it.

    Attributes:
        layer: the layer being written.
        operand: the value, and by which end it is read.
        over: the domain of the loop; ``none`` fits into every loop.
    """

    layer: Layer
    operand: Operand
    over: Domain

    @property
    def shape(self) -> tuple[int, ...]:
        """The trailing shape: sizes without the rows."""
        return self.layer.builder.variable(self.operand).shape

    @property
    def name(self) -> str:
        return self.operand.name

    def apply(self, kind: str, *others: Any, reverse: bool = False, **attrs: Any) -> Value:
        """The operator `kind` of this and `others`."""
        values = [self, *others]
        return self.layer.apply(kind, *(values[::-1] if reverse else values), **attrs)

    def __add__(self, other: Any) -> Value:
        return self.apply("add", other)

    def __radd__(self, other: Any) -> Value:
        return self.apply("add", other, reverse=True)

    def __sub__(self, other: Any) -> Value:
        return self.apply("sub", other)

    def __rsub__(self, other: Any) -> Value:
        return self.apply("sub", other, reverse=True)

    def __mul__(self, other: Any) -> Value:
        return self.apply("mul", other)

    def __rmul__(self, other: Any) -> Value:
        return self.apply("mul", other, reverse=True)

    def __truediv__(self, other: Any) -> Value:
        return self.apply("div", other)

    def __rtruediv__(self, other: Any) -> Value:
        return self.apply("div", other, reverse=True)

    def __neg__(self) -> Value:
        return self.apply("neg")

    def reshape(self, *shape: int) -> Value:
        """With other trailing sizes: ``x.reshape(heads, -1)``."""
        if shape.count(-1) == 1:
            total, given = _product(self.shape), _product([s for s in shape if s != -1])
            shape = tuple(total // given if s == -1 and given else s for s in shape)
        return self.apply("reshape", shape=tuple(shape))

    def sum(self, *axes: int) -> Value:
        """The sum over trailing axes."""
        return self.apply("fsum", axes=axes or tuple(range(len(self.shape))))

    def __bool__(self) -> bool:
        raise fault("a value is known when the layer runs, not while it is written; use max, min or step for choices")


def _product(sizes: Any) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


class Weight:
    """A weight by type: ``W[e.type]``. One by no type is a `Value`."""

    def __init__(self, layer: Layer, operand: Operand, domain: Domain) -> None:
        self.layer, self.operand, self.domain = layer, operand, domain

    def __getitem__(self, row: Any) -> Value:
        if not isinstance(row, Row) or not reaches(row.loop, self.domain, row.end):
            wanted = "e.type" if self.domain == EDGE_TYPE else "n.type or e.src.type"
            raise fault(f"weight '{self.operand.name}' is by {self.domain}: index it by a type, such as {wanted}")
        if row.domain not in (EDGE_TYPE, NODE_TYPE) or row.domain != self.domain:
            raise fault(f"weight '{self.operand.name}' is by {self.domain}, and is indexed by {_ROWS[row.domain]}")
        return Value(self.layer, Operand(self.operand.name, row.read(self.domain)), row.loop)


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
            return fault(f"{_ROWS[self.row.domain]} have no '{self.name}' here.{hint.rstrip('.')}")
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
            raise fault(f"{_ROWS[self.domain]} have no {end}; edges have")
        return self._to(NODE, end)

    @property
    def node(self) -> Row:
        """The node of a pair."""
        if self.domain not in (SRC_PAIR, DST_PAIR):
            raise fault(f"{_ROWS[self.domain]} have no node; pairs have")
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
            raise fault(f"{_ROWS[self.domain]} have no edges to loop over here; the variable of a loop over nodes has")
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


@dataclass(eq=False)
class Loop:
    """A loop that is being traced."""

    domain: Domain
    within: Row | None = None
    end: str = ""
    running: bool = True
    open: dict[tuple[Domain, str], Accumulation] = field(default_factory=dict)


class Layer:
    """A relational layer under construction.

    >>> g = Layer("mean_rgcn")
    >>> x = g.input("x", NODE, 8)
    >>> W = g.weight("W", EDGE_TYPE, 8, 4)
    >>> for n in g.nodes():
    ...     for e in n.incoming():
    ...         n.y += linear(e.src.x, W[e.type])
    >>> program = g.build(n.y)
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.builder = Builder(name)
        self.fields: dict[Domain, dict[str, Operand]] = {}
        #: What values are called by the attributes that they were first given to.
        self.labels: dict[str, str] = {}
        self.loops: list[Loop] = []

    # Arguments.
    def input(self, name: str, domain: Domain, *shape: int) -> None:
        """Declares data, which is then an attribute of the rows of `domain`: ``n.x`` for ``input("x", NODE, 64)``.

        Args:
            name: of the argument and attribute.
            domain: NODE, EDGE, NODE_TYPE, EDGE_TYPE, or NONE (read it as ``g.x``).
            shape: sizes of each row; none for one number.
        """
        self._check(name, shape)
        self.fields.setdefault(domain, {})[name] = self.builder.input(name, domain, *shape)

    def weight(self, name: str, domain: Domain, *shape: int) -> Any:
        """Declares a trained weight by EDGE_TYPE or NODE_TYPE, to be indexed as ``W[e.type]``, or by NONE, a value."""
        self._check(name, shape)
        if domain not in (EDGE_TYPE, NODE_TYPE, NONE):
            raise fault(f"weight '{name}' is by {domain}; weights are by EDGE_TYPE, NODE_TYPE or NONE")
        operand = self.builder.weight(name, domain, *shape)
        return Value(self, operand, NONE) if domain == NONE else Weight(self, operand, domain)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name in self.builder.known:
            raise fault(f"'{name}' is declared twice")
        if not name.isidentifier():
            raise fault(f"'{name}' is no name: letters, digits and _")
        if any(not isinstance(size, int) or size < 1 for size in shape):
            raise fault(f"'{name}': sizes must be whole numbers from 1, not {shape}")

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__.get("fields", {}).get(NONE, {}).get(name)
        if found is None:
            raise AttributeError(name)
        return Value(self, found, NONE)

    # Loops.
    def nodes(self) -> Iterator[Row]:
        """``for n in g.nodes():`` all nodes."""
        return self.loop(NODE)

    def edges(self) -> Iterator[Row]:
        """``for e in g.edges():`` all edges."""
        return self.loop(EDGE)

    def pairs(self, end: str) -> Iterator[Row]:
        """``for p in g.pairs("dst"):`` all distinct (destination, edge type), or with "src" (source, edge type)."""
        if end not in ("src", "dst"):
            raise fault(f"pairs are of 'src' or 'dst', not of '{end}'")
        return self.loop(SRC_PAIR if end == "src" else DST_PAIR)

    def edge_types(self) -> Iterator[Row]:
        """``for t in g.edge_types():`` all edge types: what is computed of weights."""
        return self.loop(EDGE_TYPE)

    def node_types(self) -> Iterator[Row]:
        """``for t in g.node_types():`` all node types."""
        return self.loop(NODE_TYPE)

    def loop(self, domain: Domain, within: Row | None = None, end: str = "") -> Iterator[Row]:
        if within is None and self.loops:
            raise fault(f"a loop over all {_ROWS[domain]} inside of another loop; inside of nodes write n.incoming()")
        loop = Loop(domain, within, end)
        self.loops.append(loop)
        yield Row(self, domain, domain, "", loop)
        self.loops.remove(loop)
        loop.running = False
        for accumulation in loop.open.values():
            self._close(loop, accumulation)

    def inner_of(self, row: Row) -> Loop | None:
        """The running loop over the edges of `row`."""
        inner = self.loops[-1] if self.loops else None
        found = inner is not None and inner.within is not None and inner.within.frame is row.frame
        return inner if found and row.loop == row.domain else None

    def check_running(self, row: Row) -> None:
        if row.frame is not None and not row.frame.running:
            raise fault(f"the loop over {_ROWS[row.loop]} has ended; its variable can be read, but not set")

    def _close(self, loop: Loop, accumulation: Accumulation) -> None:
        row, total = accumulation.row, self._found(accumulation.row, accumulation.name)
        for how, value, location in accumulation.terms:
            part = self.builder.emit(
                ACCUMULATIONS[how],
                value.operand,
                over=loop.domain,
                domain=row.domain,
                by=loop.end,
                name=accumulation.name,
                location=location,
            )
            total = part if total is None else self.builder.emit("add", total, part, over=row.domain, location=location)
        assert total is not None
        self.fields.setdefault(row.domain, {})[accumulation.name] = total

    # Fields.
    def _found(self, row: Row, name: str) -> Operand | None:
        return self.fields.get(row.domain, {}).get(name)

    def get(self, row: Row, name: str) -> Any:
        for loop in self.loops:
            if row.key(name) in loop.open:
                return loop.open[row.key(name)]
        found = self._found(row, name)
        inner = self.inner_of(row)
        if found is None or inner is not None:
            # Perhaps it is about to be accumulated; used as a value it says that it is none.
            return Accumulation(row, name) if found is None else Started(self, row, name, found)
        return Value(self, Operand(found.name, row.read(row.domain)), row.loop)

    def set(self, row: Row, name: str, value: Any) -> None:
        if isinstance(value, Accumulation):
            if value.row.key(value.name) != row.key(name):
                raise value.unfinished()
            return
        if row.loop != row.domain:
            raise fault(f"'{name}' is set at another row than that of the loop; {_ROWS[row.loop]} only set their own")
        self.check_running(row)
        value = self.value(value, row.domain)
        inner = self.inner_of(row)
        if value.over not in (row.domain, NONE):
            raise fault(
                f"'{name}' of {_ROWS[row.domain]} is set to a value by {_ROWS[value.over]} without accumulation: "
                "write `for e in n.incoming(): n.h += e.m`"
            )
        if inner is not None:
            raise fault(f"'{name}' of {_ROWS[row.domain]} is set inside of the loop over their edges; set it outside")
        op = value.operand
        own = self.builder.variable(op)
        if own.domain != row.domain or op.end:
            op = self.builder.emit("copy", op, over=row.domain, name=name, location=here())
        self.labels.setdefault(op.name, name)
        self.fields.setdefault(row.domain, {})[name] = op

    # Operators.
    def value(self, given: Any, over: Domain) -> Value:
        """`given`, a number or a value, as a value."""
        if isinstance(given, Accumulation):
            raise given.unfinished()
        if isinstance(given, Value):
            if given.layer is not self:
                raise fault(f"'{given.name}' belongs to the layer '{given.layer.name}', not to '{self.name}'")
            return given
        if isinstance(given, bool) or not isinstance(given, int | float):
            kind = "a weight by type without an index" if isinstance(given, Weight) else type(given).__name__
            raise fault(f"{kind} is no value of a layer; values are rows' attributes, weights and numbers")
        return Value(self, self.builder.emit("constant", over=NONE, value=float(given), shape=()), NONE)

    def lift(self, value: Value, over: Domain) -> Value:
        """A value of a node, read in the loop over the edges of that node."""
        loop = self.loops[-1] if self.loops else None
        if (
            loop is None
            or loop.domain != over
            or loop.within is None
            or value.over != loop.within.domain
            or value.over == over
        ):
            raise fault(
                f"'{value.name}' is a value by {_ROWS[value.over]}, and is used in a loop over {_ROWS[over]}"
                + ("; read it at e.src or e.dst" if value.over == NODE and over == EDGE else "")
                + ("; accumulate it first: `for e in n.incoming(): n.h += e.m`" if value.over == EDGE else "")
            )
        domain = self.builder.variable(value.operand).domain
        choice = ends(over, domain)
        end = value.operand.end or (loop.end if loop.end in choice and len(choice) > 1 else only_end(over, domain))
        return Value(self, Operand(value.operand.name, end), over)

    def apply(self, kind: str, *given: Any, by: str = "", name: str | None = None, **attrs: Any) -> Value:
        """An operator of values and numbers; traced at the user's line."""
        values = [self.value(v, NONE) for v in given]
        overs = {v.over for v in values} - {NONE}
        over = NONE
        if overs:
            over = EDGE if EDGE in overs else next(iter(overs))
            values = [v if v.over in (over, NONE) else self.lift(v, over) for v in values]
        made = self.builder.emit(
            kind, *(v.operand for v in values), over=over, by=by, name=name, location=here(), **attrs
        )
        return Value(self, made, over)

    def build(self, *outputs: Any) -> Program:
        """The program.

        Args:
            outputs: values such as ``n.y``, after their loops.

        Raises:
            InputError: with file and line, where something does not fit.
        """
        if self.loops:
            raise fault("build comes after the loops, not inside of one")
        names = []
        for value in outputs:
            if isinstance(value, Accumulation):
                raise value.unfinished()
            if not isinstance(value, Value):
                raise fault(f"an output is a value such as n.y, not {type(value).__name__}")
            operand = value.operand
            own = self.builder.variable(operand).domain
            if own != value.over or operand.end:
                operand = self.builder.emit("copy", operand, over=value.over, location=here())
            names.append(operand.name)
        return relabel(self.builder.build(*names), self.labels)


def relabel(program: Program, labels: Mapping[str, str]) -> Program:
    """The program with values named after the attributes that hold them, where such a name is free."""
    taken = {v.name for v in program.arguments}
    names: dict[str, str] = {}
    for op in program.ops:
        label = labels.get(op.name, op.name)
        name, number = label, 1
        while name in taken:
            name, number = f"{label}_{number}", number + 1
        taken.add(name)
        names[op.name] = name
    ops = [replace(op, result=replace(op.result, name=names[op.name])).renamed(names) for op in program.ops]
    return program.with_ops(ops, [names.get(name, name) for name in program.outputs])


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
