"""Operators grouped into kernels: what fusion hands to lowering.

A group becomes one kernel of one of the two templates. Only what something outside of it reads (`outputs`) is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from planish.ir.relational.domains import Domain
from planish.ir.relational.inter import Op, Program
from planish.ir.relational.text import format_op

Kind = Literal["gemm", "traversal"]


@dataclass(frozen=True)
class Group:
    """One kernel.

    A ``gemm`` is one `linear` or `outer`, ``ops[0]``, and what is done to its rows before they are stored. Gathers are
    ends of operands.

    A ``traversal`` without a center is a loop over the rows of `over`, with no dependency between rows. With a center
    it is a loop over the rows of `center`, and inside of it loops over the rows of `over` that lead there by `by`:
    edges into a node. Operators over the center's rows and over `over`, and reductions from these to those, alternate
    in the order of `ops`; an operator of the inner loop reads what the group computes for the center, but never what it
    computes for another row.

    Attributes:
        kind: the template.
        ops: in order.
        outputs: results that are stored.
        over: the domain of the (inner) loop.
        center: that of the loop around it, or None.
        by: the end by which rows of `over` lead to the center.
    """

    kind: Kind
    ops: tuple[Op, ...]
    outputs: tuple[str, ...]
    over: Domain
    center: Domain | None = None
    by: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the group reads and does not compute itself."""
        own = {op.name for op in self.ops}
        return tuple(dict.fromkeys(name for op in self.ops for name in op.reads if name not in own))

    def __str__(self) -> str:
        end = f" by {self.by}" if self.by else ""
        around = f"{self.center}: {self.over}{end}" if self.center else str(self.over)
        lines = [f"{self.kind} ({around}) -> {', '.join(self.outputs)}"]
        return "\n".join([*lines, *(f"  {format_op(op)}" for op in self.ops)])


@dataclass(frozen=True)
class Plan:
    """A program as kernels.

    Attributes:
        program: what is computed.
        once: operators whose results depend on the graph alone (degrees): computed once for a graph, in order.
        groups: kernels in the order in which they run.
    """

    program: Program
    once: tuple[Op, ...]
    groups: tuple[Group, ...]

    def stored(self) -> tuple[str, ...]:
        """Values in memory: what each group stores, in order."""
        return tuple(name for group in self.groups for name in group.outputs)

    def __str__(self) -> str:
        once = [f"once -> {', '.join(op.name for op in self.once)}"] if self.once else []
        return "\n".join([*once, *map(str, self.groups)])


def outputs_of(program: Program, ops: Sequence[Op]) -> tuple[str, ...]:
    """Results of `ops` that are read elsewhere in `program`, or are its outputs."""
    own = {op.name for op in ops}
    read = {name for op in program.ops if op.name not in own for name in op.reads} | set(program.outputs)
    return tuple(op.name for op in ops if op.name in read)
