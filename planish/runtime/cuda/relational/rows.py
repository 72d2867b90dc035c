"""Statements and loops of a kernel at one row: CUDA C++ from the intra-operator IR."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from planish.ir.relational.domains import Domain
from planish.ir.relational.inter import Variable
from planish.ir.relational.intra import Access, Loop, Statement
from planish.runtime.cuda.relational.group import Group
from planish.runtime.cuda.relational.operators import apply
from planish.runtime.cuda.relational.values import SMALL, Lazy, Memory, Same, Spread, Value, vector

REDUCTIONS = frozenset(("sum", "mean", "max_rows", "min_rows"))
_JOIN = {"max_rows": "Most", "min_rows": "Least"}
_START = {"max_rows": "-__int_as_float(0x7f800000)", "min_rows": "__int_as_float(0x7f800000)"}

Items = Sequence[Statement | Loop]


def apart(loop: Loop, shapes: Mapping[str, Variable]) -> bool:
    """Whether lanes can work on different inner rows: every value is a few numbers, nothing is spread over lanes."""
    for statement in loop.body:
        sizes = [math.prod(statement.result.shape)]
        sizes += [math.prod(shapes[a.value].shape) for a in statement.operands if not a.local]
        if statement.kind in ("dot", "linear", "outer", "fsum") or max(sizes) > SMALL:
            return False
    return True


class Rows:
    """Emits the statements of one section, at a row.

    Args:
        group: the lanes, and where code goes.
        shapes: values in memory.
        written: values in memory that the kernel writes.
        add: how rows are added to memory: ``"add"`` (atomically) or ``"increase"``.
        cached: whether what the row leads to is looked up for all rows of a tile before, in ``rows_of[...][i]``.
        storing: whether statements of rows store; in repetitions of what another kernel has stored they need not.
    """

    def __init__(
        self,
        group: Group,
        shapes: Mapping[str, Variable],
        written: set[str],
        *,
        add: str = "add",
        cached: list[tuple[str, ...]] | None = None,
        storing: bool = True,
    ) -> None:
        self.group, self.code, self.shapes, self.written = group, group.code, shapes, written
        self.adding, self.cached, self.storing = add, cached, storing
        self.known: dict[str, Value] = {}
        self.inner: dict[str, Value] = {}
        self.fine: Domain | None = None
        self._at_row: dict[tuple[str, ...], str] = {(): "r"}
        self._at_inner: dict[tuple[str, ...], str] = {(): "e"}

    def emit(self, items: Items, known: Mapping[str, Value]) -> dict[str, Value]:
        """Everything at row ``r``; `known` are values of the row that are there already. Returns all of them."""
        self.known = dict(known)
        for number, item in enumerate(items):
            if isinstance(item, Statement):
                self.statement(item, self.known)
                continue
            self.loop(item)
            if number + 1 < len(items) and any(s.store is not None for s in item.body):
                self.group.sync()  # other lanes may read it now
        return self.known

    # ---- reading

    def read(self, access: Access) -> Value:
        if access.local:
            inner = access.level == "inner" and access.value in self.inner
            return (self.inner if inner else self.known)[access.value]
        return self.memory(access, self.shapes[access.value].shape)

    def memory(self, access: Access, shape: tuple[int, ...]) -> Memory:
        size = math.prod(shape)
        name = f"m_{access.value}"
        if not access.one:
            name = f"({name} + (long long){self.index(access)} * {size})"
        return Memory(shape, name, access.value not in self.written, vector(size))

    def index(self, access: Access) -> str:
        """The row that an access leads to."""
        known = self._at_inner if access.level == "inner" else self._at_row
        if access.level == "row" and self.cached is not None and access.tables:
            if access.tables not in self.cached:
                self.cached.append(access.tables)
            return f"rows_of[{self.cached.index(access.tables)}][i_row]"
        for count in range(1, len(access.tables) + 1):
            tables = access.tables[:count]
            if tables not in known:
                name = self.code.name(tables[-1])
                self.code.add(f"const int {name} = __ldg(t_{tables[-1]} + {known[tables[:-1]]});")
                known[tables] = name
        return known[access.tables]

    # ---- statements

    def statement(self, statement: Statement, known: dict[str, Value]) -> None:
        operands = [self.read(access) for access in statement.operands]
        name = statement.result.name
        if statement.add:
            assert statement.store is not None
            pointer = self.memory(statement.store, statement.result.shape).pointer
            self.group.store(pointer, operands[0], self.adding)
            return
        if statement.kind == "rows":
            of_inner = known is self.inner and statement.result.domain == self.fine
            row = "e" if of_inner else "r"
            table = f"t_{statement.attr('pointers')}"
            value: Value
            value = count = Same((), self.code.name("count"))
            self.code.add(
                f"const float {count.name}[1] = {{(float)(__ldg({table} + {row} + 1) - __ldg({table} + {row}))}};"
            )
        else:
            value = apply(self.group, statement, operands)
        if statement.store is not None and (self.storing or known is self.inner):
            value = self.stored(value)
            self.group.store(self.memory(statement.store, statement.result.shape).pointer, value)
        known[name] = value

    def stored(self, value: Value) -> Value:
        """The value in registers, which what reads it later reads too."""
        if value.size > SMALL:
            return self.group.spread(value)
        return self.group.each(value.shape, value.rule) if isinstance(value, Lazy) else value

    # ---- the inner loop

    def loop(self, loop: Loop) -> None:
        """A loop over all inner rows of the row."""
        pointers = f"t_{loop.pointers}"
        begin, end = self.code.name("begin"), self.code.name("end")
        self.code.add(f"const int {begin} = __ldg({pointers} + r), {end} = __ldg({pointers} + r + 1);")
        lanes = apart(loop, self.shapes)
        first, step = (f"{begin} + lane", "G") if lanes and self.group.lanes > 1 else (begin, "1")
        sums = self.walk(loop, first, end, step, lanes)
        for statement in loop.body:
            if statement.kind not in REDUCTIONS:
                continue
            name = statement.result.name
            self.known[name] = self.finished(statement.kind, sums[name], f"({end} - {begin})")
            if statement.store is not None and self.storing:
                pointer = self.memory(statement.store, statement.result.shape).pointer
                self.group.store(pointer, self.known[name])

    def walk(self, loop: Loop, first: str, end: str, step: str, lanes: bool) -> dict[str, Value]:
        """Inner rows `first`, `first + step`, ... below `end`: what is accumulated, for the whole group."""
        sums: dict[str, Value] = {}
        for statement in loop.body:
            if statement.kind in REDUCTIONS:
                start = _START.get(statement.kind, "0.0f")
                sums[statement.result.name] = self.group.each(statement.result.shape, lambda _, s=start: s)  # type: ignore[misc]
        self._hoist(loop)
        adds = any(s.add for s in loop.body)
        self.code.add("#pragma unroll 1" if adds or self.group.lanes > 32 else "#pragma unroll 4")
        with self.code.block(f"for (int p = {first}; p < {end}; p += {step})"):
            self.code.add(f"const int e = {f'__ldg(t_{loop.rows} + p)' if loop.rows else 'p'};")
            self.inner, self._at_inner, self.fine = {}, {(): "e"}, loop.fine
            self.group.enter()
            self.group.apart = lanes
            for statement in loop.body:
                if statement.kind in REDUCTIONS:
                    self._accumulate(statement, sums[statement.result.name])
                else:
                    self.statement(statement, self.inner)
            self.group.apart = False
            self.group.leave()
            self.inner = {}
        if lanes and self.group.lanes > 1:
            for statement in loop.body:
                if statement.kind in REDUCTIONS:
                    total = sums[statement.result.name]
                    assert isinstance(total, Same)
                    join = _JOIN.get(statement.kind, "Plus")
                    for c in range(total.size):
                        self.code.add(f"{total.name}[{c}] = join<{join}, G>({total.name}[{c}], mask);")
        return sums

    def _hoist(self, loop: Loop) -> None:
        """What the loop reads by the row is looked up before it begins."""
        for statement in loop.body:
            for access in (*statement.operands, *([statement.store] if statement.store else [])):
                if access.level == "row" and not access.local and not access.one:
                    self.index(access)

    def _accumulate(self, statement: Statement, total: Value) -> None:
        (x,) = (self.read(access) for access in statement.operands)
        rule: Callable[[str, str], str] = lambda a, b: f"{a} + {b}"  # noqa: E731
        if statement.kind in _JOIN:
            rule = lambda a, b: f"{_JOIN[statement.kind]}::of({a}, {b})"  # noqa: E731
        if isinstance(total, Spread):
            own = self.group.own(x, total.shape)
            with self.code.block(f"EACH({self.group.spread_type(total.size)})"):
                self.code.add(f"{total.name}[at] = {rule(f'{total.name}[at]', own)};")
            return
        assert isinstance(total, Same)
        for c in range(total.size):
            self.code.add(f"{total.name}[{c}] = {rule(f'{total.name}[{c}]', self.group.at(x, c))};")

    def finished(self, kind: str, total: Value, count: str) -> Value:
        """A reduction from what was accumulated over `count` rows."""
        if kind == "mean":
            return self.group.elementwise(total.shape, (total,), lambda x: f"{x} / (float)max({count}, 1)")
        if kind in _JOIN:
            return self.group.elementwise(total.shape, (total,), lambda x: f"({count} > 0 ? {x} : 0.0f)")
        return total
