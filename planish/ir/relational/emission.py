"""The last step of lowering: kernels as statements and loops, from what was decided about each operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planish.ir.relational import access as schemes
from planish.ir.relational.access import segments
from planish.ir.relational.building import Building, Item
from planish.ir.relational.domains import EDGE, NONE, only_end
from planish.ir.relational.inter import Variable
from planish.ir.relational.intra import Access, Gemm, Kernel, Loop, Lowered, Schedule, Statement, View
from planish.ir.relational.prepared import Prepared

#: Operators whose value is rather read from memory in a later loop over the same rows than computed again there.
_COSTLY = frozenset(("dot", "linear", "outer"))


def emit(
    prepared: Prepared,
    variables: Mapping[str, Variable],
    steps: Sequence[Building | View],
    memory: set[str],
    aliases: Mapping[str, str],
) -> Lowered:
    """The kernels; `memory` are the values that are kept, `aliases` those that are others in another shape."""
    program = prepared.program
    memory = set(memory)
    for step in steps:
        if isinstance(step, Building):
            memory |= _kept_between_loops(step)
    edges = {v.name for v in program.arguments if v.domain == EDGE}
    edges |= {o for o in program.outputs if variables[o].domain == EDGE}
    done: list[Kernel | View] = []
    start: dict[str, str | None] = {}
    stored: set[str] = set()
    for number, step in enumerate(steps):
        if isinstance(step, View):
            done.append(step)
            continue
        emitter = _Emitter(step, variables, memory, edges, stored)
        kernel = emitter.kernel(f"{program.name}_{number}")
        if not kernel.before and not kernel.after and kernel.gemm is None:
            continue  # everything in it was computed elsewhere
        done.append(kernel)
        for name, adds in kernel.writes().items():
            if adds:
                start[name] = prepared.start.get(name)
    kept = {name: variables[name] for name in (*(v.name for v in program.arguments), *sorted(memory), *aliases)}
    return Lowered(program.name, program.arguments, kept, tuple(done), start, program.outputs, dict(aliases))


def _kept_between_loops(step: Building) -> set[str]:
    """Values of an inner loop that a later one reads and that cost too much to compute twice."""
    first = {item.op.name: item for item in step.items if item.level == "inner" and not item.reduces}
    found: set[str] = set()

    def visit(item: Item, time: int) -> None:
        """What a loop at `time` needs for `item`, whose own sources it may have to compute again."""
        for source in item.sources:
            origin = first.get(source.value) if source.local else None
            if origin is None or origin.time >= time:
                continue
            if origin.op.kind in _COSTLY:
                found.add(source.value)
            else:
                visit(origin, time)

    for item in step.items:
        if item.level == "inner":
            visit(item, item.time)
    return found


class _Emitter:
    def __init__(
        self, step: Building, variables: Mapping[str, Variable], memory: set[str], edges: set[str], stored: set[str]
    ) -> None:
        self.step, self.variables, self.memory, self.edges, self.stored = step, variables, memory, edges, stored
        names = [item.op.name for item in step.items if not item.scatter]
        #: Sums that start from something: the sum itself gets a name of its own.
        self.sums = {name for name in names if names.count(name) > 1}

    def kernel(self, name: str) -> Kernel:
        gemm = self.gemm()
        needed = {a.value for a in (gemm.x, gemm.y) if a is not None and a.local} if gemm is not None else set()
        before, after = _alive(self.section(0), needed), _alive(self.section(1), set())
        return Kernel(name, self.step.rows, before, gemm, after, Schedule())

    def gemm(self) -> Gemm | None:
        op = self.step.product
        if op is None:
            return None
        assert self.step.x is not None
        if op.kind == "outer":
            table = segments(op.over, op.result.domain, op.by) or None
            heads = op.result.shape[0] if op.attr("heads") else 0
            return Gemm("outer", op.result, self.step.x, self.step.y, None, table, heads)
        weight = op.operands[1]
        shape = self.variables[weight.name].shape
        table = segments(op.over, self.variables[weight.name].domain, weight.end) or None
        store = self.target(op.name, "row") if op.name in self.memory else None
        heads = shape[0] if len(shape) == 3 else 0
        return Gemm("linear", op.result, self.step.x, None, weight.name, table, heads, store)

    def target(self, name: str, level: str) -> Access:
        self.stored.add(name)
        domain = self.variables[name].domain
        tables = ("order",) if name in self.edges and domain == EDGE else ()
        return Access(name, "row" if level == "row" else "inner", tables, one=domain == NONE)

    def section(self, section: int) -> tuple[Statement | Loop, ...]:
        items = [item for item in self.step.items if item.section == section]
        result: list[Statement | Loop] = []
        for time in sorted({item.time for item in items}):
            now = [item for item in items if item.time == time]
            if time % 2 == 0:
                result += [self.statement(item) for item in now]
                continue
            relation = self.step.relation
            assert relation is not None
            body = tuple(self.statement(item) for item in self.with_earlier(now, items))
            result.append(Loop(relation.fine, relation.pointers, relation.rows, body))
        return tuple(result)

    def with_earlier(self, now: list[Item], items: list[Item]) -> list[Item]:
        """These, with the items of earlier loops that they need, which are computed again."""
        inner = {item.op.name: item for item in items if item.level == "inner" and not (item.reduces or item.scatter)}
        chosen: dict[int, Item] = {}

        def need(item: Item) -> None:
            if id(item) in chosen:
                return
            sources = []
            for source in item.sources:
                origin = inner.get(source.value) if source.local and source.level == "inner" else None
                if origin is not None and origin.time < now[0].time:
                    if origin.op.kind in _COSTLY:
                        tables = ("order",) if source.value in self.edges else ()
                        sources.append(Access(source.value, "inner", tables))
                        continue
                    need(origin)
                sources.append(source)
            chosen[id(item)] = replace(item, sources=tuple(sources))

        for item in now:
            need(item)
        return list(chosen.values())

    def statement(self, item: Item) -> Statement:
        op, name = item.op, item.op.name
        operands = tuple(
            replace(s, value=f"{s.value}__sum") if s.local and s.value == name and name in self.sums else s
            for s in item.sources
        )
        if item.scatter:
            level = "row" if item.level == "row" else "inner"
            return Statement("copy", op.result, operands, (), self.scatter(item, level), add=True)
        attrs = tuple((key, value) for key, value in op.attrs)
        if item.reduces:
            inner_name = f"{name}__sum" if name in self.sums else name
            kept = (
                self.target(name, "row")
                if name in self.memory and name not in self.sums and name not in self.stored
                else None
            )
            return Statement(op.kind, replace(op.result, name=inner_name), operands, attrs, kept)
        store = None
        if name in self.memory and name not in self.stored and (op.kind != "constant" or self.step.rows == NONE):
            store = self.target(name, item.level)
        return Statement(op.kind, op.result, operands, attrs, store)

    def scatter(self, item: Item, level: str) -> Access:
        op = item.op
        self.stored.add(op.name)
        end = op.by
        one = op.result.domain == NONE
        if level == "inner":
            relation = self.step.relation
            assert relation is not None
            shared = schemes.from_row(
                relation, self.step.rows, op.result.domain, end or only_end(op.over, op.result.domain)
            )
            if shared is not None:
                return Access(op.name, "row", shared, one=one)
        return Access(
            op.name, "row" if level == "row" else "inner", schemes.tables(op.over, op.result.domain, end), one=one
        )


def _alive(items: tuple[Statement | Loop, ...], needed: set[str]) -> tuple[Statement | Loop, ...]:
    """Without statements that nothing needs: those that were tried and are computed elsewhere."""
    needed = set(needed)
    result: list[Statement | Loop] = []

    def keep(statement: Statement) -> bool:
        if statement.store is None and statement.result.name not in needed:
            return False
        needed.update(access.value for access in statement.operands if access.local)
        return True

    for item in reversed(items):
        if isinstance(item, Loop):
            body = tuple(reversed([s for s in reversed(item.body) if keep(s)]))
            if body:
                result.append(Loop(item.fine, item.pointers, item.rows, body))
        elif keep(item):
            result.append(item)
    return tuple(reversed(result))
