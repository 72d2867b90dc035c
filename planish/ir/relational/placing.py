"""What is computed where while a program is lowered: how kernels read values, and undoing what did not fit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from planish.ir.relational import access as schemes
from planish.ir.relational.building import Building, Cannot
from planish.ir.relational.domains import EDGE, NONE, Domain, only_end
from planish.ir.relational.inter import Op, Operand, Variable
from planish.ir.relational.intra import Access, View
from planish.ir.relational.prepared import Prepared

REDUCTIONS = frozenset(("sum", "mean", "max_rows", "min_rows"))
ALIASES = frozenset(("reshape", "copy"))
#: Numbers of a value that is computed again rather than kept in memory.
CHEAP = 8
#: Operators on one long value that are computed again rather than kept in memory, where that is asked for.
_LIGHT = frozenset(("neg", "abs", "relu", "leaky_relu", "step", "add", "sub", "mul", "div"))


class Placement(ABC):
    """The state of a lowering.

    Attributes:
        steps: finished kernels and views, in order; `building` are the kernels under construction.
        home: the kernel or view in which a value is computed.
        memory: values that are kept in memory.
        aliases: values that are others in another shape.
        given_order: values by edge that are in the order of the given edges.
    """

    def __init__(self, prepared: Prepared, scatter: bool, recompute: bool = False) -> None:
        self.prepared, self.scatter, self.recompute = prepared, scatter, recompute
        self.program = prepared.program
        self.variables: dict[str, Variable] = self.program.variables()
        self.defs: dict[str, Op] = self.program.definitions()
        self.users: dict[str, list[Op]] = self.program.users()
        self.steps: list[Building | View] = []
        #: The kernel or view in which a value is computed.
        self.home: dict[str, Building | View] = {}
        self.memory: set[str] = {v.name for v in self.program.arguments}
        self.aliases: dict[str, str] = {}
        self.building: list[Building] = []
        edges = [v.name for v in self.program.arguments if v.domain == EDGE]
        self.given_order = {*edges, *(o for o in self.program.outputs if self.variables[o].domain == EDGE)}

    @abstractmethod
    def materialize(self, name: str) -> None:
        """Makes sure that a value is in memory when the kernel that is under construction runs."""

    @abstractmethod
    def _waits(self, op: Op) -> bool:
        """Whether an operator is left until something reads it."""

    @abstractmethod
    def _reduce(self, kernel: Building, op: Op, start: str | None) -> None: ...

    @abstractmethod
    def _place(self, kernel: Building, op: Op, level: str, section: int) -> None: ...

    # ---- how operands are read

    def _access(self, kernel: Building, operand: Operand, over: Domain, level: str, section: int) -> Access:
        name = operand.name
        domain = self.variables[name].domain
        end = operand.end or only_end(over, domain)
        local = self._local_level(kernel, domain, over, end, level)
        if local is not None and kernel.has(name, local, section):
            return Access(name, "row" if local == "row" else "inner", local=True)
        op = self.defs.get(name)
        if op is not None and op.kind == "constant":
            if not kernel.has(name, "row", section):
                kernel.add(op, "row", section, ())
                self.home.setdefault(name, kernel)
            return Access(name, "row", local=True)
        if (
            name in self.memory
            and self._readable(kernel, name)
            and (op is None or local is None or not self._again(op))
        ):
            return self._read(kernel, name, domain, over, end, level)
        if op is not None and local is not None and self._may_place(kernel, op, name):
            self._place_lazily(kernel, op, local, section)
            return Access(name, "row" if local == "row" else "inner", local=True)
        if kernel.limit is not None and not self._readable(kernel, name):
            raise Cannot
        self.materialize(name)
        if not self._readable(kernel, name):
            raise Cannot
        return self._read(kernel, name, domain, over, end, level)

    def _place_lazily(self, kernel: Building, op: Op, level: str, section: int) -> None:
        if op.kind in REDUCTIONS:
            self._reduce(kernel, op, self.prepared.start.get(op.name))
        else:
            self._place(kernel, op, level, section)

    def _may_place(self, kernel: Building, op: Op, name: str) -> bool:
        if not self._waits(op):
            return False
        if op.kind in REDUCTIONS and (kernel.relation is None or op.over != kernel.relation.fine or kernel.section):
            return False
        if (
            op.kind in ALIASES
            and op.reads[0] not in kernel.placed
            and (op.reads[0] in self.memory and self.variables[op.reads[0]].domain == op.over != EDGE)
        ):
            return False
        home = self.home.get(name)
        # Computed by a kernel that is not finished: again here. By one that is: again only if that is cheap.
        return home is None or home in self.building or self._again(op)

    def _again(self, op: Op) -> bool:
        """Whether a value is computed again rather than read from memory."""
        if op.kind == "count":
            return True
        if not self._waits(op) or op.kind in (*REDUCTIONS, "linear", "dot", "exp", "edge_softmax"):
            return False
        cheap = math.prod(op.result.shape) <= CHEAP or op.kind in ALIASES or self._light(op)
        return cheap and all(
            name in self.memory
            or name in self.aliases
            or (name in self.defs and self._again(self.defs[name]))
            or self.defs[name].kind == "constant"
            for name in op.reads
        )

    def _light(self, op: Op) -> bool:
        long = [name for name in op.reads if math.prod(self.variables[name].shape) > CHEAP]
        return self.recompute and op.kind in _LIGHT and len(long) <= 1

    def _local_level(self, kernel: Building, domain: Domain, over: Domain, end: str, level: str) -> str | None:
        """Where the kernel itself could compute a value that is read at `level`: "row", "inner", or not at all."""
        if level == "row":
            return "row" if domain == kernel.rows else None
        relation = kernel.relation
        assert relation is not None
        if domain == relation.fine:
            return "inner"
        if domain == kernel.rows and schemes.from_row(relation, kernel.rows, domain, end) == ():
            return "row"
        return None

    def _readable(self, kernel: Building, name: str) -> bool:
        """Whether a value in memory is there before the kernel runs."""
        name = self.aliases.get(name, name)
        home = self.home.get(name)
        if home is None:
            return name in self.memory
        if home in self.building or home not in self.steps:
            return False
        return kernel.limit is None or self.steps.index(home) < kernel.limit

    def _read(self, kernel: Building, name: str, domain: Domain, over: Domain, end: str, level: str) -> Access:
        first = ("order",) if name in self.given_order and domain == EDGE else ()
        one = domain == NONE
        if level == "inner":
            relation = kernel.relation
            assert relation is not None
            shared = None if domain == relation.fine else schemes.from_row(relation, kernel.rows, domain, end)
            if shared is not None:
                return Access(name, "row", shared, one=one)
        return Access(name, "inner" if level == "inner" else "row", schemes.tables(over, domain, end) + first, one=one)

    # ---- trying

    def _snapshot(self) -> Any:
        kernels = [k for k in (*self.steps, *self.building) if isinstance(k, Building)]
        return (
            list(self.steps), dict(self.home), set(self.memory), dict(self.aliases), list(self.building),
            [(k, k.save()) for k in kernels],
        )  # fmt: skip

    def _restore(self, state: Any) -> None:
        self.steps, self.home, self.memory, self.aliases, self.building, kernels = (
            list(state[0]), dict(state[1]), set(state[2]), dict(state[3]), list(state[4]), state[5]
        )  # fmt: skip
        for kernel, saved in kernels:
            kernel.load(saved)
