"""The language in which relational layers are written: loops over nodes and edges, traced once into a program.

Every statement is for all rows of its loop at once, before the next one begins. `dsl_rows` has the variables of loops,
`functions` what is applied to values; `planish.relational` is the public face of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

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
)
from planish.ir.relational.dsl_rows import ROWS, Accumulation, Loop, Row, Started, Weight
from planish.ir.relational.dsl_values import Value, fault, here
from planish.ir.relational.inter import Operand, Program

#: How `+=` and its kin accumulate.
ACCUMULATIONS = {"sum": "sum", "mean": "mean", "max": "max_rows", "min": "min_rows"}


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
            raise fault(f"a loop over all {ROWS[domain]} inside of another loop; inside of nodes write n.incoming()")
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
            raise fault(f"the loop over {ROWS[row.loop]} has ended; its variable can be read, but not set")

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
            raise fault(f"'{name}' is set at another row than that of the loop; {ROWS[row.loop]} only set their own")
        self.check_running(row)
        value = self.value(value, row.domain)
        inner = self.inner_of(row)
        if value.over not in (row.domain, NONE):
            raise fault(
                f"'{name}' of {ROWS[row.domain]} is set to a value by {ROWS[value.over]} without accumulation: "
                "write `for e in n.incoming(): n.h += e.m`"
            )
        if inner is not None:
            raise fault(f"'{name}' of {ROWS[row.domain]} is set inside of the loop over their edges; set it outside")
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
        if isinstance(given, Weight):
            raise given.unindexed()
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise fault(f"{type(given).__name__} is no value of a layer; values are rows' attributes, weights, numbers")
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
                f"'{value.name}' is a value by {ROWS[value.over]}, and is used in a loop over {ROWS[over]}"
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
