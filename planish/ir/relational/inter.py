"""The inter-operator IR of relational graph neural networks: typed values and operators, semantics only.

The upper of two levels (Hector, Wu, Hidayetoğlu et al. 2023, arXiv:2301.06284): what is computed for each edge, node
or type, with no word on layouts, gathers or kernels. A program is a straight line of operators in SSA form.

**Values** are ``[rows of a domain, *shape]`` (`Variable`; see `domains`); weights are values by edge type, by node
type, or by none. ``x: node(64)`` is a vector of 64 for each node, ``W: edge_type(64, 32)`` a matrix for each edge type.

**An operator** loops over the rows of a domain (`Op.over`). It reads an operand at the row that the loop's row maps to;
where there are two ways, the operand says which end: ``x@src`` in a loop over edges is x of the edge's source. So a
gather is never an operator of its own. A result has the loop's domain, but for a *reduction*, which accumulates all
loop rows that map to one row of the result; `Op.by` says by which end, if there are two. Changing the domain of a
result from ``edge`` to ``src_pair`` *is* compact materialization; nothing that reads it has to change.

**Operators** (shapes are trailing shapes; ``*`` stands for any leading sizes; binary ones broadcast as NumPy does):

===================  ==================================================================================================
copy neg exp log     elementwise: ``(*) -> (*)``. ``leaky_relu`` has ``slope``; ``step`` is 1 where x > 0 and else 0
sqrt recip abs       (the derivative of relu)
relu leaky_relu
tanh sigmoid erf
step
add sub mul div      elementwise with broadcasting. ``greater`` and ``equal`` give 1 and 0
max min greater
equal
constant             ``-> shape``, filled with ``value``; result and loop over ``none``
linear               ``x (*, i), W (i, o) -> (*, o)``; ``x (*, h, i), W (h, i, o) -> (*, h, o)``, one for each head.
                     ``transpose=True``: W is (o, i) or (h, o, i). W by edge type or node type makes it a typed linear;
                     in a loop over types it is the product of weights
dot                  ``(*, f), (*, f) -> (*)`` with broadcasting: the sum over the last axis of the product
outer                reduction: ``x (*, i), y (*, o) -> (i, o)``, or with ``heads=True``
                     ``x (*, h, i), y (*, h, o) -> (h, i, o)``: the sum of x' y over ``*`` and rows: gradients
sum mean max_rows    reductions over rows: ``(*) -> (*)``; 0 for a row without rows
min_rows
count                reduction without operands: how many rows, ``-> ()``
edge_softmax         loop over edges: softmax over the edges with the same ``by`` end (mostly dst), elementwise in ``*``
fsum                 sum over the trailing ``axes`` (which vanish)
expand               broadcast to ``shape``
reshape              to ``shape``, of the same size
transpose            trailing axes permuted: ``perm``
slice                ``axis``, ``start``, ``stop``
concat               along ``axis``, of two or more
join                 over nodes: one operand for each node type k, over ``node[k]``: features of all nodes
pick                 over ``node[index]``: the rows of one node type of a value over nodes
===================  ==================================================================================================

`edge_softmax` subtracts the largest logit first, so it does not overflow. What only depends on the graph (`count` and
what is computed from it) can be evaluated once for a graph: `Program.graph_constants`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from planish.ir.errors import InputError
from planish.ir.relational.domains import Domain

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Location:
    """Where in a user's source something was written."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Variable:
    """A value: an array [rows of `domain`, *shape] (no row axis for the domain ``none``)."""

    name: str
    domain: Domain
    shape: Shape = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.domain}({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Operand:
    """A value as an operator reads it: by which end of the edge, ``"src"`` or ``"dst"``, or ``""`` without a choice."""

    name: str
    end: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.end}" if self.end else self.name


@dataclass(frozen=True)
class Op:
    """One operator.

    Attributes:
        kind: which, of the table above.
        result: what it defines.
        operands: what it reads.
        attrs: static options, sorted by name.
        over: the domain of its loop; other than that of the result for reductions only.
        by: the end by which a reduction (or `edge_softmax`) groups rows, or ``""``.
        location: where the user wrote it.
    """

    kind: str
    result: Variable
    operands: tuple[Operand, ...] = ()
    attrs: tuple[tuple[str, Any], ...] = ()
    over: Domain = field(default=None)  # type: ignore[assignment]
    by: str = ""
    location: Location | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.over is None:
            object.__setattr__(self, "over", self.result.domain)

    @property
    def name(self) -> str:
        return self.result.name

    def attr(self, name: str, default: Any = None) -> Any:
        return dict(self.attrs).get(name, default)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(operand.name for operand in self.operands)

    def renamed(self, names: Mapping[str, str]) -> Op:
        """The same, with operands replaced by name."""
        if not any(operand.name in names for operand in self.operands):
            return self
        operands = tuple(replace(o, name=names.get(o.name, o.name)) for o in self.operands)
        return replace(self, operands=operands)


@dataclass(frozen=True)
class Program:
    """A relational layer, forward or backward.

    Attributes:
        name: of the layer.
        inputs: data: node or edge features, gradients.
        weights: what is trained.
        ops: in an order in which everything is defined before it is read.
        outputs: names of values.
    """

    name: str
    inputs: tuple[Variable, ...]
    weights: tuple[Variable, ...]
    ops: tuple[Op, ...]
    outputs: tuple[str, ...]

    @property
    def arguments(self) -> tuple[Variable, ...]:
        """Inputs, then weights: what a call is given."""
        return self.inputs + self.weights

    def variables(self) -> dict[str, Variable]:
        """Every value by its name."""
        return {v.name: v for v in (*self.arguments, *(op.result for op in self.ops))}

    def variable(self, name: str) -> Variable:
        found = self.variables().get(name)
        if found is None:
            raise InputError(f"relational program '{self.name}' has no value '{name}'.")
        return found

    def definitions(self) -> dict[str, Op]:
        return {op.name: op for op in self.ops}

    def users(self) -> dict[str, list[Op]]:
        """The operators that read each value; values that nothing reads have an empty list."""
        found: dict[str, list[Op]] = {name: [] for name in self.variables()}
        for op in self.ops:
            for name in dict.fromkeys(op.reads):
                found[name].append(op)
        return found

    def with_ops(self, ops: Sequence[Op], outputs: Sequence[str] | None = None) -> Program:
        return replace(self, ops=tuple(ops), outputs=self.outputs if outputs is None else tuple(outputs))

    def backward_slice(self, name: str) -> Iterator[Op]:
        """The operators that the value depends on, its own first."""
        known, todo, seen = self.definitions(), [name], set[str]()
        while todo:
            op = known.get(todo.pop())
            if op is not None and op.name not in seen:
                seen.add(op.name)
                yield op
                todo += op.reads

    def graph_constants(self) -> tuple[str, ...]:
        """Values that depend on the graph alone: degrees and what is computed from them."""
        found = dict.fromkeys(op.name for op in self.ops if op.kind in ("constant", "count"))
        for op in self.ops:
            if op.operands and all(name in found for name in op.reads):
                found[op.name] = None
        return tuple(found)

    def __str__(self) -> str:
        from planish.ir.relational.text import format_program

        return format_program(self)
