"""Statements and loops of a kernel at one row: TIR from the intra-operator IR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from planish.ir.relational.domains import Domain
from planish.ir.relational.inter import Variable
from planish.ir.relational.intra import Access, Loop, Statement
from planish.runtime.kernels.loops import local, script
from planish.runtime.relational.operators import apply, stored
from planish.runtime.relational.values import (
    Computed,
    Stored,
    Value,
    in_registers,
    integer,
    number,
    opaque,
    spread,
    sweep,
)

_REDUCTIONS = frozenset(("sum", "mean", "max_rows", "min_rows"))
_ELEMENTWISE = frozenset(
    "copy neg exp log sqrt recip abs relu tanh sigmoid erf step leaky_relu add sub mul div max min".split()  # noqa: SIM905
)


class Rows:
    """Emits the statements of one section, at a row.

    Args:
        buffers: memory by name of value and of table.
        shapes: trailing shapes of values.
        lanes: of a vector.
        items: the section.
    """

    def __init__(
        self, buffers: dict[str, Any], shapes: dict[str, Variable], lanes: int, items: Sequence[Statement | Loop]
    ) -> None:
        self.buffers, self.shapes, self.lanes, self.items = buffers, shapes, lanes, items
        self.row: Any = None
        self.known: dict[str, Value] = {}
        self.inner: dict[str, Value] = {}
        self.fine: Domain | None = None
        self.at_row: dict[tuple[str, ...], Any] = {}
        self.at_inner: dict[tuple[str, ...], Any] = {}
        self.uses = _uses(items)

    def emit(self, row: Any, known: dict[str, Value], more_uses: Sequence[str] = ()) -> dict[str, Value]:
        """Everything at `row`; `known` are values of the row that are there already. Returns those that are then."""
        self.row, self.known, self.at_row = row, dict(known), {}
        for item in self.items:
            if isinstance(item, Loop):
                self._loop(item)
            else:
                self._statement(item, self.known, more_uses)
        return self.known

    def read(self, access: Access) -> Value:
        if access.local:
            return (
                self.inner[access.value]
                if access.level == "inner" and access.value in self.inner
                else self.known[access.value]
            )
        shape = self.shapes[access.value].shape
        if access.one:
            return Stored(shape, self.buffers[access.value])
        index = self.index(access)
        return Stored(shape, self.buffers[access.value], opaque(index * math.prod(shape)))

    def index(self, access: Access) -> Any:
        """The row that an access leads to."""
        cache, start = (self.at_inner, self.edge) if access.level == "inner" else (self.at_row, self.row)
        index = start
        for count in range(1, len(access.tables) + 1):
            tables = access.tables[:count]
            if tables not in cache:
                cache[tables] = opaque(script().Cast("int64", self.buffers[tables[-1]][index]))
            index = cache[tables]
        return index

    def _statement(self, statement: Statement, known: dict[str, Value], more_uses: Sequence[str] = ()) -> None:
        operands = [self.read(access) for access in statement.operands]
        if statement.add:
            assert statement.store is not None
            self._write(statement.store, statement.result, operands[0], add=True)
            return
        if statement.kind == "rows":
            pointers = self.buffers[statement.attr("pointers")]
            of_inner = known is self.inner and statement.result.domain == self.fine
            row = self.edge if of_inner else self.row
            count = script().Cast("float32", pointers[row + 1] - pointers[row])
            value: Value = Computed((), lambda lead, offset, n: count)
        else:
            value = apply(statement, operands, self.lanes)
        name = statement.result.name
        uses = self.uses.get(name, [])
        if statement.store is not None:
            if uses or not isinstance(value, Computed):
                value = stored(value, self.lanes)
            self._write(statement.store, statement.result, value)
        if not isinstance(value, Stored) and not self._inlined(value, uses, more_uses.count(name)):
            value = stored(value, self.lanes)
        known[name] = value

    def _inlined(self, value: Value, uses: list[Statement], more: int) -> bool:
        """Whether a value is computed where it is read: once, in the same loop over features."""
        if len(uses) + more != 1:
            return False
        if more:
            return True
        (user,) = uses
        if user.add or user.kind in _REDUCTIONS:
            return True
        return user.kind in (*_ELEMENTWISE, "dot") and (
            user.kind == "dot" or math.prod(user.result.shape) == value.size
        )

    def _write(self, access: Access, variable: Variable, value: Value, add: bool = False) -> None:
        buffer, shape = self.buffers[access.value], variable.shape
        base = 0 if access.one else opaque(self.index(access) * math.prod(shape))
        target = Stored(shape, buffer, base)

        def put(lead: Any, offset: Any, n: int) -> None:
            new = value.at(lead, offset, n)
            target.put(lead, offset, n, target.at(lead, offset, n) + new if add else new)

        sweep(shape, self.lanes, put)

    # ---- the inner loop

    def _loop(self, loop: Loop) -> None:
        T = script()
        pointers = self.buffers[loop.pointers]
        begin = opaque(T.Cast("int64", pointers[self.row]))
        count = opaque(T.Cast("int64", pointers[self.row + 1]) - begin)
        sums: dict[str, Stored] = {}
        for statement in loop.body:
            if statement.kind in _REDUCTIONS:
                room = in_registers(statement.result.shape)
                self._fill(room, {"max_rows": -math.inf, "min_rows": math.inf}.get(statement.kind, 0.0))
                sums[statement.result.name] = room
        self._hoist(loop)
        with T.serial(count) as p:
            at = opaque(begin + p)
            self.edge = at if loop.rows is None else opaque(T.Cast("int64", self.buffers[loop.rows][at]))
            self.inner, self.at_inner, self.fine = {}, {}, loop.fine
            for statement in loop.body:
                if statement.kind in _REDUCTIONS:
                    self._accumulate(statement, sums[statement.result.name])
                else:
                    self._statement(statement, self.inner)
            self.inner = {}
        for statement in loop.body:
            if statement.kind in _REDUCTIONS:
                name = statement.result.name
                self.known[name] = self._finished(statement.kind, sums[name], count)
                if statement.store is not None:
                    self._write(statement.store, statement.result, self.known[name])

    def _fill(self, room: Stored, start: float) -> None:
        sweep(room.shape, self.lanes, lambda lead, at, n: room.put(lead, at, n, number(start, n)))

    def _hoist(self, loop: Loop) -> None:
        """Finds what the loop reads by the row before it begins."""
        for statement in loop.body:
            for access in (*statement.operands, *([statement.store] if statement.store else [])):
                if access.level == "row" and not access.local and not access.one:
                    self.index(access)

    def _accumulate(self, statement: Statement, room: Stored) -> None:
        import tvm.tirx as tx

        (x,) = (self.read(access) for access in statement.operands)
        join = {"max_rows": tx.max, "min_rows": tx.min}.get(statement.kind, lambda a, b: a + b)
        sweep(
            room.shape,
            self.lanes,
            lambda lead, at, n: room.put(lead, at, n, join(room.at(lead, at, n), x.at(lead, at, n))),
        )

    def _finished(self, kind: str, room: Stored, count: Any) -> Stored:
        import tvm.tirx as tx

        T = script()
        if kind == "mean":
            factor = local()
            most = tx.max(count, integer(1))
            T.buffer_store(factor, T.float32(1) / T.Cast("float32", most), [0])
            self._update(room, lambda value, n: value * spread(factor[0], n))
        elif kind in ("max_rows", "min_rows"):
            some = local()
            T.buffer_store(some, T.Cast("float32", tx.min(count, integer(1))), [0])
            self._update(room, lambda value, n: tx.Select(spread(some[0], n) > number(0, n), value, number(0, n)))
        return room

    def _update(self, room: Stored, rule: Any) -> None:
        sweep(room.shape, self.lanes, lambda lead, at, n: room.put(lead, at, n, rule(room.at(lead, at, n), n)))


def _uses(items: Sequence[Statement | Loop]) -> dict[str, list[Statement]]:
    """The statements that read each value of a section; a value that a loop reads from outside counts twice."""
    found: dict[str, list[Statement]] = {}

    def note(statement: Statement, own: set[str] | None) -> None:
        for access in statement.operands:
            if access.local:
                uses = found.setdefault(access.value, [])
                uses.append(statement)
                if own is not None and access.value not in own:
                    uses.append(statement)

    for item in items:
        if isinstance(item, Loop):
            own = {s.result.name for s in item.body if s.kind not in _REDUCTIONS and not s.add}
            for statement in item.body:
                note(statement, own)
        else:
            note(item, None)
    return found
