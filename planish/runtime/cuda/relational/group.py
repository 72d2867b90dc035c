"""A group of lanes that works on a row: how values are read, computed, stored and moved between lanes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from planish.runtime.cuda.relational.values import (
    SMALL,
    Code,
    Index,
    Lazy,
    Memory,
    Same,
    Shape,
    Spread,
    Value,
    broadcast,
    vector,
)


class Group:
    """Emits code for `lanes` lanes; the names ``lane``, ``mask`` and ``scratch`` are those of the kernel.

    Attributes:
        code: what is emitted.
        lanes: of a group: a power of two up to 32, or the threads of a block.
        apart: lanes are at rows of their own: a value of each lane is its own, and few numbers.
        spilled: numbers of shared memory that the group needs.
        types: names of C++ types by size of rows.
    """

    def __init__(self, code: Code, lanes: int) -> None:
        self.code, self.lanes, self.apart = code, lanes, False
        self.spilled = 0
        self.types: dict[int, str] = {}
        self._loaded: list[dict[tuple[str, int], str]] = [{}]
        self._spills: list[dict[str, Memory]] = [{}]

    # ---- scopes: what was loaded within a loop is not there after it

    def enter(self) -> None:
        self._loaded.append({})
        self._spills.append({})

    def leave(self) -> None:
        self._loaded.pop()
        self._spills.pop()

    def spread_type(self, size: int) -> str:
        return self.types.setdefault(size, f"S{size}")

    def declarations(self) -> list[str]:
        return [f"using {name} = Spread<G, {vector(size)}, {size}>;" for size, name in self.types.items()]

    # ---- reading

    def at(self, value: Value, index: Index) -> str:
        """Number `index` of an addressable value."""
        if isinstance(value, Memory):
            return f"__ldg({value.pointer} + {index})" if value.constant else f"{value.pointer}[{index}]"
        if isinstance(value, Same):
            if value.size == 1:
                return f"{value.name}[0]"
            return f"{value.name}[{index}]" if isinstance(index, int) else f"pick({value.name}, {index})"
        assert isinstance(value, Lazy), "values spread over lanes are read through shared memory"
        return value.rule(index)

    def addressable(self, value: Value) -> Value:
        """The value, where every lane can read all of it."""
        if not isinstance(value, Spread):
            return value
        for known in self._spills:
            if value.name in known:
                return Memory(value.shape, known[value.name].pointer, False, 4)
        place = f"(scratch + {self.spilled})"
        self.spilled += -(-value.size // 4) * 4
        self.sync()
        self.code.add(f"{self.spread_type(value.size)}::store({place}, {value.name}, lane);")
        self.sync()
        self._spills[-1][value.name] = Memory(value.shape, place, False, 4)
        return Memory(value.shape, place, False, 4)

    def own(self, value: Value, shape: Shape) -> str:
        """What a lane reads of a value, broadcast to `shape`, within EACH."""
        if value.size == math.prod(shape) > SMALL:
            return f"{self.spread(value).name}[at]"
        return self.at(self.addressable(value), broadcast("i", shape, value.shape))

    def spread(self, value: Value) -> Spread:
        """A value of more than `SMALL` numbers in registers."""
        if isinstance(value, Spread):
            return value
        kind = self.spread_type(value.size)
        if isinstance(value, Memory):
            key = (value.pointer, value.size)
            for known in self._loaded:
                if key in known:
                    return Spread(value.shape, known[key])
            name = self.code.name("row")
            self.code.add(f"float {name}[{kind}::COUNT];")
            self.code.add(f"{kind}::load<{str(value.constant).lower()}>({name}, {value.pointer}, lane);")
            if value.constant:
                self._loaded[-1][key] = name
            return Spread(value.shape, name)
        found = self.each(value.shape, lambda i: self.at(value, i))
        assert isinstance(found, Spread)
        return found

    def settled(self, value: Lazy) -> Value:
        """A few numbers are computed at once; more where they are read."""
        return value if value.size > SMALL else self.each(value.shape, value.rule)

    # ---- computing

    def each(self, shape: Shape, element: Callable[[Index], str]) -> Value:
        """A value by an expression for each number, for which code may be emitted."""
        size = math.prod(shape)
        name = self.code.name("value")
        if size <= SMALL:
            self.code.add(f"float {name}[{max(size, 1)}];")
            for c in range(size):
                with self.code.block():
                    self.code.add(f"{name}[{c}] = {element(c)};")
            return Same(shape, name)
        kind = self.spread_type(size)
        self.code.add(f"float {name}[{kind}::COUNT] = {{}};")
        with self.code.block(f"EACH({kind})"):
            self.code.add(f"{name}[at] = {element('i')};")
        return Spread(shape, name)

    def elementwise(self, shape: Shape, operands: Sequence[Value], rule: Callable[..., str]) -> Value:
        """A value by a rule on the numbers of its operands, which broadcast."""
        if math.prod(shape) > SMALL:
            reads = [self.own(o, shape) for o in operands]
            return self.each(shape, lambda _: rule(*reads))
        places = [self.addressable(o) for o in operands]
        return self.each(shape, lambda i: rule(*(self.at(p, broadcast(i, shape, p.shape)) for p in places)))

    # ---- storing

    def store(self, pointer: str, value: Value, how: str = "store") -> None:
        """Writes a value to memory; `how`: ``store``, ``add`` (atomically) or ``increase`` (not)."""
        if value.size > SMALL:
            own = self.spread(value)
            self.code.add(f"{self.spread_type(value.size)}::{how}({pointer}, {own.name}, lane);")
            return
        form = {
            "store": "{p}[{c}] = {v};",
            "add": "atomicAdd({p} + {c}, {v});",
            "increase": "{p}[{c}] += {v};",
        }[how]
        place = self.addressable(value)
        with self.code.block("" if self.apart or self.lanes == 1 else "if (lane == 0)"):
            for c in range(value.size):
                self.code.add(form.format(p=pointer, c=c, v=self.at(place, c)))

    def sync(self) -> None:
        if self.lanes > 1:
            self.code.add("sync_group<G>(mask);")
