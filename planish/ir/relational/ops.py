"""The operators of the inter-operator IR: arity, options and shape rules. `inter` says what each computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from planish.ir.errors import InputError
from planish.ir.relational.domains import NODE, Domain, ends, node_of, only_end, reaches
from planish.ir.relational.inter import Op, Shape

UNARY = frozenset(
    "copy neg exp log sqrt recip abs relu leaky_relu tanh sigmoid erf step".split()  # noqa: SIM905
)
BINARY = frozenset(("add", "sub", "mul", "div", "max", "min", "greater", "equal"))
ROW_REDUCTIONS = frozenset(("sum", "mean", "max_rows", "min_rows"))
#: Reductions over rows: the loop's domain is finer than (or that of) the result.
REDUCTIONS = ROW_REDUCTIONS | {"outer", "count"}
#: Nothing is computed but where elements lie, or how often.
VIEWS = frozenset(("reshape", "transpose", "slice", "concat", "expand"))
#: Elementwise in rows and features.
ELEMENTWISE = UNARY | BINARY


class Mismatch(InputError):
    """Operands do not fit an operator; the message has no position yet."""


def broadcast(kind: str, *shapes: Shape) -> Shape:
    """The shape that `shapes` broadcast to."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    result = []
    for sizes in zip(*padded, strict=True):
        wide = {s for s in sizes if s != 1}
        if len(wide) > 1:
            raise Mismatch(f"{kind}: shapes {' and '.join(map(str, shapes))} do not broadcast")
        result.append(wide.pop() if wide else 1)
    return tuple(result)


def _axis(kind: str, axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise Mismatch(f"{kind}: axis {axis} of a value with {rank} trailing axes")
    return axis % rank


def _linear(x: Shape, w: Shape, transpose: bool) -> Shape:
    if len(w) not in (2, 3):
        raise Mismatch(f"linear: a weight of shape {w}; it is (in, out) or (heads, in, out)")
    heads, (rows, columns) = w[:-2], w[:-3:-1][::-1]
    given, out = (columns, rows) if transpose else (rows, columns)
    if len(x) < 1 + len(heads) or x[-1] != given or (heads and x[-2] != heads[0]):
        wanted = f"(*, {heads[0]}, {given})" if heads else f"(*, {given})"
        turned = ", transposed" if transpose else ""
        raise Mismatch(f"linear: x of shape {x} and a weight of shape {w}{turned}: x must be {wanted}")
    return (*x[:-1], out)


def _outer(x: Shape, y: Shape, heads: bool) -> Shape:
    if len(x) != len(y) or len(x) < 1 + heads or x[:-1] != y[:-1]:
        raise Mismatch(f"outer: shapes {x} and {y} may differ in the last axis only")
    return (*x[-2:-1], x[-1], y[-1]) if heads else (x[-1], y[-1])


def _dot(a: Shape, b: Shape) -> Shape:
    if not a or not b or a[-1] != b[-1]:
        raise Mismatch(f"dot: shapes {a} and {b} have different last sizes")
    return broadcast("dot", a, b)[:-1]


def _fsum(x: Shape, axes: Sequence[int]) -> Shape:
    gone = {_axis("fsum", axis, len(x)) for axis in axes}
    return tuple(size for i, size in enumerate(x) if i not in gone)


def _expand(x: Shape, shape: Shape) -> Shape:
    if broadcast("expand", x, shape) != tuple(shape):
        raise Mismatch(f"expand: shape {x} does not broadcast to {tuple(shape)}")
    return tuple(shape)


def _reshape(x: Shape, shape: Shape) -> Shape:
    if math.prod(x) != math.prod(shape):
        raise Mismatch(f"reshape: {x} has {math.prod(x)} elements and {tuple(shape)} has {math.prod(shape)}")
    return tuple(shape)


def _transpose(x: Shape, perm: Sequence[int]) -> Shape:
    if sorted(perm) != list(range(len(x))):
        raise Mismatch(f"transpose: perm {tuple(perm)} of a value of shape {x}")
    return tuple(x[p] for p in perm)


def _slice(x: Shape, axis: int, start: int, stop: int) -> Shape:
    axis = _axis("slice", axis, len(x))
    if not 0 <= start < stop <= x[axis]:
        raise Mismatch(f"slice: {start}:{stop} of an axis of size {x[axis]}")
    return (*x[:axis], stop - start, *x[axis + 1 :])


def _concat(*shapes: Shape, axis: int) -> Shape:
    axis = _axis("concat", axis, len(shapes[0]))
    for other in shapes[1:]:
        if len(other) != len(shapes[0]) or any(i != axis and a != b for i, (a, b) in enumerate(zip(shapes[0], other))):  # noqa: B905
            raise Mismatch(f"concat: shapes {shapes[0]} and {other} differ beside axis {axis}")
    return (*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :])


def _join(*shapes: Shape) -> Shape:
    for other in shapes[1:]:
        if other != shapes[0]:
            raise Mismatch(f"join: node types have features of shapes {shapes[0]} and {other}")
    return shapes[0]


def _same(x: Shape, **_: Any) -> Shape:
    return x


@dataclass(frozen=True)
class Spec:
    """What an operator takes.

    Attributes:
        arity: number of operands; None for two or more.
        shape: the shape of the result from those of the operands, and the options; raises `Mismatch`.
        required: names of options without a default.
        optional: names of options with one.
    """

    arity: int | None
    shape: Callable[..., Shape]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def _binary(kind: str) -> Callable[..., Shape]:
    return lambda a, b: broadcast(kind, a, b)


SPECS: dict[str, Spec] = {
    **{kind: Spec(1, _same) for kind in UNARY},
    **{kind: Spec(2, _binary(kind)) for kind in BINARY},
    **{kind: Spec(1, _same) for kind in ROW_REDUCTIONS},
    "leaky_relu": Spec(1, _same, ("slope",)),
    "constant": Spec(0, lambda value, shape: tuple(shape), ("value", "shape")),
    "count": Spec(0, lambda: ()),
    "linear": Spec(2, lambda x, w, transpose=False: _linear(x, w, transpose), (), ("transpose",)),
    "dot": Spec(2, _dot),
    "outer": Spec(2, lambda x, y, heads=False: _outer(x, y, heads), (), ("heads",)),
    "edge_softmax": Spec(1, _same),
    "fsum": Spec(1, lambda x, axes: _fsum(x, axes), ("axes",)),
    "expand": Spec(1, lambda x, shape: _expand(x, shape), ("shape",)),
    "reshape": Spec(1, lambda x, shape: _reshape(x, shape), ("shape",)),
    "transpose": Spec(1, lambda x, perm: _transpose(x, perm), ("perm",)),
    "slice": Spec(1, lambda x, axis, start, stop: _slice(x, axis, start, stop), ("axis", "start", "stop")),
    "concat": Spec(None, _concat, ("axis",)),
    "join": Spec(None, _join),
    "pick": Spec(1, lambda x, index: x, ("index",)),
}


def infer(kind: str, shapes: Sequence[Shape], attrs: dict[str, Any]) -> Shape:
    """The shape of the result of an operator; raises `Mismatch` if its operands or options do not fit."""
    spec = SPECS.get(kind)
    if spec is None:
        raise Mismatch(f"there is no operator '{kind}'")
    least = 1 if kind == "join" else 2
    if (len(shapes) < least) if spec.arity is None else (len(shapes) != spec.arity):
        wanted = f"{least} or more" if spec.arity is None else str(spec.arity)
        raise Mismatch(f"{kind} takes {wanted} operands, not {len(shapes)}")
    missing = [name for name in spec.required if name not in attrs]
    extra = [name for name in attrs if name not in spec.required + spec.optional]
    if missing or extra:
        raise Mismatch(f"{kind}: " + (f"option '{missing[0]}' is missing" if missing else f"no option '{extra[0]}'"))
    return spec.shape(*shapes, **attrs)


def check_domains(op: Op, domains: Sequence[Domain]) -> None:
    """Raises `Mismatch` unless maps lead from the loop of `op` to its operands, and to its result."""
    domain = op.result.domain
    if op.kind in ("join", "pick"):
        _check_parts(op, domains)
        return
    for operand, given in zip(op.operands, domains, strict=True):
        if not reaches(op.over, given, operand.end):
            raise Mismatch(_unreachable(op, str(operand), given, operand.end))
    if op.kind in REDUCTIONS:
        if not reaches(op.over, domain, op.by):
            choice = ends(op.over, domain)
            hint = f"; say by {' or '.join(choice)}" if len(choice) > 1 else ""
            raise Mismatch(f"{op.kind} over {op.over} by '{op.by}' does not lead to {domain}{hint}")
    elif op.over != domain:
        raise Mismatch(f"{op.kind} over {op.over} has a result by {domain}; only reductions change the domain")
    elif op.kind == "edge_softmax":
        if op.over.kind != "edge" or op.by not in ("src", "dst"):
            raise Mismatch(f"edge_softmax loops over edges by src or dst, not over {op.over} by '{op.by}'")
    elif op.by:
        raise Mismatch(f"{op.kind} is no reduction and groups nothing by '{op.by}'")


def _unreachable(op: Op, operand: str, given: Domain, end: str) -> str:
    choice = ends(op.over, given)
    if choice:
        allowed = " or ".join(f"@{c}" for c in choice if c) or "no end"
        return f"{op.kind} over {op.over} reads '{operand}' by {given} at end '{end}'; it takes {allowed}"
    return (
        f"{op.kind} over {op.over} reads '{operand}', which is by {given}: "
        f"{op.over} has many rows of it or none; accumulate it first"
    )


def _check_parts(op: Op, domains: Sequence[Domain]) -> None:
    if op.kind == "join":
        wanted = [node_of(k) for k in range(len(domains))]
        if op.result.domain != NODE or list(domains) != wanted:
            given = ", ".join(map(str, domains))
            raise Mismatch(f"join takes node[0], node[1], ... in order, one for each node type, not {given}")
    elif domains[0] != NODE or op.result.domain != node_of(op.attr("index")):
        raise Mismatch(f"pick reads a value over nodes, not over {domains[0]}, and is over node[index]")


def full_end(fine: Domain, coarse: Domain, end: str) -> str:
    """`end`, or the one that there is where none was said."""
    return end or only_end(fine, coarse)
