"""Random relational programs: everything that the operators allow, put together without sense."""

from __future__ import annotations

from typing import Any

import numpy as np

from planish.ir.errors import InputError
from planish.ir.relational.builder import Builder
from planish.ir.relational.domains import DST_PAIR, EDGE, EDGE_TYPE, NODE, NODE_TYPE, NONE, SRC_PAIR, Domain, ends
from planish.ir.relational.inter import Operand, Program

_WIDTH = 4
_LOOPS = (EDGE, EDGE, EDGE, NODE, SRC_PAIR, DST_PAIR, EDGE_TYPE)
_UNARY = ("relu", "tanh", "sigmoid", "neg", "leaky_relu", "erf", "step", "copy")
_BINARY = ("add", "sub", "mul", "max", "min")


def random_program(seed: int, steps: int = 12, canonical: bool = True) -> Program:
    """A program of up to `steps` operators that verifies; smooth enough to compare numbers."""
    random = np.random.default_rng(seed)
    b = Builder("random")
    b.input("x", NODE, _WIDTH)
    b.input("u", EDGE, _WIDTH)
    b.input("s", EDGE)
    b.weight("W", EDGE_TYPE, _WIDTH, _WIDTH)
    b.weight("V", NODE_TYPE, _WIDTH, _WIDTH)
    b.weight("U", NONE, _WIDTH, _WIDTH)
    b.weight("v", EDGE_TYPE, _WIDTH)
    b.weight("k", NODE_TYPE, _WIDTH)

    def operand(over: Domain, *ranks: int) -> Operand:
        found = [
            Operand(name, end)
            for name, variable in b.known.items()
            for end in ends(over, variable.domain)
            if len(variable.shape) in ranks
            and (canonical or variable.domain != NODE_TYPE or over in (NODE, EDGE) or over.kind.startswith(end))
        ]
        # Later values more often: deep programs.
        at = int(len(found) * (1 - random.random() ** 2))
        return found[min(at, len(found) - 1)]

    for _ in range(steps):
        over = _LOOPS[random.integers(len(_LOOPS))]
        try:
            _step(b, random, over, operand)
        except (InputError, IndexError, ValueError):
            continue  # what was drawn does not fit together
    made = [op.name for op in b.ops]
    count = min(len(made), 1 + int(random.integers(2)))
    chosen = [*made[-1:], *random.choice(made[:-1], count - 1, replace=False)] if count > 1 else made[-1:]
    return b.build(*map(str, chosen))


def _step(b: Builder, random: np.random.Generator, over: Domain, operand: Any) -> None:
    kind = str(
        random.choice(
            ["unary", "binary", "chain", "chain", "linear", "dot", "sum", "softmax", "concat", "view", "constant"]
        )
    )
    if kind == "unary":
        name = str(random.choice(_UNARY))
        b.emit(name, operand(over, 0, 1, 2), over=over, **({"slope": 0.3} if name == "leaky_relu" else {}))
    elif kind == "binary":
        b.emit(str(random.choice(_BINARY)), operand(over, 0, 1), operand(over, 0, 1), over=over)
    elif kind == "chain":
        _chain(b, random, over, operand)
    elif kind == "linear":
        options = {"transpose": True} if random.random() < 0.3 else {}
        b.emit("linear", operand(over, 1, 2), operand(over, 2), over=over, **options)
    elif kind == "dot":
        b.emit("dot", operand(over, 1, 2), operand(over, 1), over=over)
    elif kind == "sum":
        domain = [NODE, NODE, SRC_PAIR, DST_PAIR, EDGE_TYPE][random.integers(5)]
        by = str(random.choice(ends(over, domain)))
        how = str(random.choice(["sum", "sum", "mean", "max_rows", "outer"]))
        if how == "outer":
            b.emit(how, operand(over, 1), operand(over, 1), over=over, domain=domain, by=by)
        else:
            b.emit(how, operand(over, 0, 1), over=over, domain=domain, by=by)
    elif kind == "softmax":
        b.emit("edge_softmax", operand(EDGE, 0, 1), over=EDGE, by=str(random.choice(["src", "dst"])))
    elif kind == "concat":
        pair = b.emit("concat", operand(over, 1), operand(over, 1), over=over, axis=-1)
        if random.random() < 0.5:
            b.emit("slice", pair, over=over, axis=-1, start=int(random.integers(_WIDTH)), stop=_WIDTH + 1)
    elif kind == "view":
        value = operand(over, 1)
        wide = b.emit("reshape", value, over=over, shape=(1, *b.known[value.name].shape))
        if random.random() < 0.5:
            wide = b.emit("expand", wide, over=over, shape=(2, *b.known[value.name].shape))
        b.emit("fsum", wide, over=over, axes=(int(random.integers(2)),))
    else:
        name = str(random.choice([*_BINARY, "div"]))
        number = b.constant(float(random.choice([1.0, 2.0, 0.5] if name == "div" else [0.0, 1.0, 2.0, 0.5])))
        b.emit(name, operand(over, 0, 1), number, over=over)


def _chain(b: Builder, random: np.random.Generator, over: Domain, operand: Any) -> None:
    """What passes look for: a product, perhaps a bias and views, then another product, or a weighted sum."""
    value = b.emit("linear", operand(over, 1), operand(over, 2), over=over)
    if random.random() < 0.3:
        value = b.emit("add", value, operand(over, 1), over=over)
    if random.random() < 0.3:
        value = b.emit("reshape", value, over=over, shape=(1, _WIDTH))
    if random.random() < 0.5:
        b.emit(str(random.choice(["linear", "dot"])), value, operand(over, 1, 2), over=over)
        return
    if random.random() < 0.6:
        value = b.emit(
            str(random.choice(["mul", "mul", "div"])), value, b.emit("sigmoid", operand(over, 0), over=over), over=over
        )
    domain = [NODE, NODE, NODE, SRC_PAIR, DST_PAIR][random.integers(5)]
    b.emit("sum", value, over=over, domain=domain, by=str(random.choice(ends(over, domain))))
