"""Reverse-mode differentiation of relational programs: the backward pass is a relational program too.

So it goes through the same passes and becomes the same kernels. The derivative of reading a value through a map is the
sum along that map: what an edge reads of its source is accumulated over outgoing edges, what it reads of its
destination over incoming ones, and what it reads of a weight by type over the edges of a type. No step scatters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planish.ir.errors import InputError
from planish.ir.relational.domains import Domain
from planish.ir.relational.gradients import RULES, Reduced, Tape
from planish.ir.relational.inter import Op, Operand, Program, Variable
from planish.ir.relational.ops import ELEMENTWISE, VIEWS, full_end
from planish.ir.relational.verify import verify

#: Operators that the backward pass does again where that takes less memory than to keep their results.
CHEAP = ELEMENTWISE | VIEWS | {"dot", "constant", "count", "fsum"}
#: Nominal numbers of rows, to compare sizes of values with.
_ROWS = {"edge": 16.0, "src_pair": 8.0, "dst_pair": 8.0, "node": 4.0}


@dataclass(frozen=True)
class Differentiated:
    """A layer and its derivative.

    Attributes:
        forward: the layer; its outputs, then what `backward` needs of it.
        backward: its arguments are arguments of the layer, kept values, and for each output ``y`` the gradient
            ``d_y``; its outputs are the gradients of `wrt`, in order.
        outputs: names of the layer's own outputs.
        gradients: for each of them the argument of `backward` that is its gradient.
        kept: names of values that go from `forward` to `backward`.
        wrt: names of the arguments that get gradients.
    """

    forward: Program
    backward: Program
    outputs: tuple[str, ...]
    gradients: tuple[str, ...]
    kept: tuple[str, ...]
    wrt: tuple[str, ...]


def differentiate(program: Program, wrt: Sequence[str] | None = None) -> Differentiated:
    """The layer with its backward pass.

    Subgradients are those of PyTorch: 0 at 0 for relu, `slope` for leaky_relu; equal maxima share evenly.

    Args:
        program: verified.
        wrt: names of arguments; by default all weights, then all inputs.

    Raises:
        InputError: `wrt` names something that is no argument.
    """
    known = [v.name for v in program.arguments]
    names = tuple(wrt) if wrt is not None else tuple(v.name for v in (*program.weights, *program.inputs))
    wrong = next((name for name in names if name not in known or names.count(name) > 1), None)
    if wrong is not None:
        raise InputError(
            f"gradients are for arguments of '{program.name}', each once ({', '.join(known)}); got '{wrong}'."
        )
    reverse = _Reverse(program, names)
    joint = reverse.run()
    kept, backward = _backward(program, joint, tuple(reverse.seeds.values()))
    forward = program.with_ops(program.ops, tuple(dict.fromkeys((*program.outputs, *kept))))
    gradients = tuple(reverse.seeds[name] for name in program.outputs)
    return Differentiated(forward, backward, program.outputs, gradients, kept, names)


class _Reverse:
    """Gradients of one program, written after it."""

    def __init__(self, program: Program, wrt: Sequence[str]) -> None:
        self.program, self.wrt = program, wrt
        self.tape = Tape(program.name)
        self.tape.inputs, self.tape.weights = list(program.inputs), list(program.weights)
        self.tape.ops, self.tape.known = list(program.ops), program.variables()
        self.variables = program.variables()
        #: Gradients so far, as a loop over the value's rows reads them.
        self.found: dict[str, Operand] = {}
        #: The argument that is the gradient of each output.
        self.seeds: dict[str, str] = {}

    def run(self) -> Program:
        """The program with gradients as its outputs, and the gradients of its outputs as further inputs."""
        active = self.active()
        for name in dict.fromkeys(self.program.outputs):
            variable = self.variables[name]
            seed = self.tape.input(self.tape.unique(f"d_{name}"), variable.domain, *variable.shape)
            self.seeds[name] = seed.name
            if name in active:
                self.add(variable, seed)
        for op in reversed(self.program.ops):
            if op.name in self.found and op.name in active:
                self.back(op, active)
        self.tape.location = None
        return self.tape.build(*[self.gradient(self.variables[name]) for name in self.wrt])

    def active(self) -> set[str]:
        """What depends on something that gets a gradient."""
        found = set(self.wrt)
        for op in self.program.ops:
            if found & set(op.reads):
                found.add(op.name)
        return found

    def back(self, op: Op, active: set[str]) -> None:
        self.tape.location = op.location
        for i, operand in enumerate(op.operands):
            if operand.name not in active:
                continue
            found = RULES[op.kind](self.tape, op, i, self.found[op.name])
            variable = self.variables[operand.name]
            if isinstance(found, Reduced):
                self.add(variable, found.value)
            elif found is not None:
                self.add(variable, self.pull(op, operand, variable, found))

    def pull(self, op: Op, operand: Operand, variable: Variable, found: Operand) -> Operand:
        """What the rows of the loop of `op` contribute, for the rows that they read."""
        if variable.domain == op.over:
            return found
        end = full_end(op.over, variable.domain, operand.end)
        return self.tape.emit("sum", found, over=op.over, domain=variable.domain, by=end, name=f"d_{variable.name}")

    def add(self, variable: Variable, gradient: Operand) -> None:
        before = self.found.get(variable.name)
        if before is not None:
            gradient = self.tape.emit("add", before, gradient, over=variable.domain, name=f"d_{variable.name}")
        self.found[variable.name] = gradient

    def gradient(self, variable: Variable) -> Operand:
        """The gradient as a value of its own: zeros where no output depends on the argument."""
        found = self.found.get(variable.name)
        name = f"d_{variable.name}"
        if found is None:
            zero = self.tape.constant(0.0)
            return self.tape.emit("expand", zero, over=variable.domain, shape=variable.shape, name=name)
        given = found.name in self.variables or found.name in self.seeds.values()
        if given or self.tape.known[found.name].domain != variable.domain:
            found = self.tape.emit("copy", found, over=variable.domain, name=name)
        return Operand(found.name)


def _backward(program: Program, joint: Program, seeds: tuple[str, ...]) -> tuple[tuple[str, ...], Program]:
    """(values to keep, the backward pass) of a program with its derivative written after it."""
    own = {op.name: op for op in program.ops}
    arguments = {v.name for v in program.arguments}
    rest = joint.ops[len(program.ops) :]
    live = _live(rest, joint.outputs)
    needed = {name for op in live for name in op.reads} | set(joint.outputs)
    again: list[Op] = []
    kept: list[str] = []
    for op in reversed(program.ops):
        if op.name not in needed:
            continue
        more = [name for name in op.reads if name not in needed and name not in arguments]
        if op.kind in CHEAP and sum(_size(own[name].result) for name in more) <= _size(op.result):
            again.append(op)
            needed |= set(op.reads)
        else:
            kept.append(op.name)
    kept.reverse()
    variables = joint.variables()
    inputs = tuple(v for v in program.inputs if v.name in needed)
    backward = Program(
        f"{program.name}_backward",
        (*inputs, *(variables[name] for name in (*kept, *seeds))),
        tuple(v for v in program.weights if v.name in needed),
        (*reversed(again), *live),
        joint.outputs,
    )
    verify(backward)
    return tuple(kept), backward


def _live(ops: Sequence[Op], outputs: Sequence[str]) -> list[Op]:
    needed, found = set(outputs), list[Op]()
    for op in reversed(ops):
        if op.name in needed:
            found.append(op)
            needed |= set(op.reads)
    return found[::-1]


def _size(variable: Variable) -> float:
    return _rows(variable.domain) * math.prod(variable.shape)


def _rows(domain: Domain) -> float:
    return _ROWS.get(domain.kind, 0.05)
