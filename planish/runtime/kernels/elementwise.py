"""Chains of elementwise operations in one pass over memory, described by an expression that prints and parses back."""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from planish.ir.errors import InputError
from planish.runtime.kernels import tir_math
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, const, local, prim_func, script, size, store
from planish.runtime.kernels.template import Template

Kind = Literal["full", "row", "column", "scalar"]
KINDS: tuple[Kind, ...] = ("full", "row", "column", "scalar")
#: Columns of a row that one task works on at most.
_CHUNK = 4096


def _root(x: Any) -> Any:
    return script().sqrt(x)


def _absolute(x: Any) -> Any:
    return script().max(x, -x)


#: Operation → TIR of its operands.
UNARY: dict[str, Callable[[Any], Any]] = {
    **tir_math.ACTIVATIONS,
    "abs": _absolute,
    "erf": tir_math.erf,
    "exp": tir_math.exp,
    "neg": lambda x: -x,
    "sqrt": _root,
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "div": lambda a, b: a / b,
    "max": lambda a, b: script().max(a, b),
    "min": lambda a, b: script().min(a, b),
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - b,
}
_EXACT: dict[str, Callable[..., np.ndarray]] = {
    **tir_math.REFERENCES,
    "abs": np.abs,
    "add": np.add,
    "div": np.divide,
    "erf": lambda x: np.vectorize(math.erf, otypes=[np.float64])(x),
    "exp": np.exp,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "sub": np.subtract,
}


@dataclass(frozen=True)
class Input:
    """An input by name, or with `number` a constant (of float32)."""

    name: str = ""
    number: float | None = None

    def __post_init__(self) -> None:
        if self.number is not None and not math.isfinite(self.number):
            raise InputError(f"the constant {self.number} is not finite; give it as an input.")

    def __str__(self) -> str:
        return self.name if self.number is None else repr(self.number)


@dataclass(frozen=True)
class Call:
    """An operation of :data:`UNARY` or :data:`BINARY` on terms."""

    op: str
    operands: tuple[Term, ...]

    def __post_init__(self) -> None:
        wanted = 1 if self.op in UNARY else 2 if self.op in BINARY else 0
        if not wanted:
            raise InputError(f"unknown operation '{self.op}'. Known: {', '.join(sorted([*UNARY, *BINARY]))}.")
        if len(self.operands) != wanted:
            raise InputError(f"'{self.op}' has {len(self.operands)} operands; it takes {wanted}.")

    def __str__(self) -> str:
        return f"{self.op}({', '.join(map(str, self.operands))})"


Term = Input | Call


@dataclass(frozen=True)
class Chain:
    """Outputs as expressions of inputs: ``x full, b column -> gelu(add(x, b)), mul(x, 0.5)``.

    Attributes:
        inputs: (name, kind): ``"full"`` (rows, width), ``"row"`` (rows,), ``"column"`` (width,), ``"scalar"`` (1,).
        outputs: expressions; each output is (rows, width).

    Raises:
        InputError: a name twice or unknown, an unknown kind, or no output.
    """

    inputs: tuple[tuple[str, Kind], ...]
    outputs: tuple[Term, ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.inputs]
        for name, kind in self.inputs:
            if kind not in KINDS:
                raise InputError(f"input '{name}' is of unknown kind '{kind}'. Known: {', '.join(KINDS)}.")
            if not name.isidentifier() or names.count(name) > 1:
                raise InputError(f"'{name}' is no name for an input, or one of two.")
        if not self.outputs:
            raise InputError("a chain without outputs.")
        for term in self.terms():
            if isinstance(term, Input) and term.number is None and term.name not in names:
                raise InputError(f"'{term.name}' is no input. Inputs: {', '.join(names)}.")

    def terms(self) -> list[Term]:
        """All distinct terms, operands before what they are used by."""
        found: dict[Term, None] = {}

        def visit(term: Term) -> None:
            if term not in found:
                for operand in term.operands if isinstance(term, Call) else ():
                    visit(operand)
                found[term] = None

        for output in self.outputs:
            visit(output)
        return list(found)

    def __str__(self) -> str:
        return f"{', '.join(f'{n} {k}' for n, k in self.inputs)} -> {', '.join(map(str, self.outputs))}"

    @classmethod
    def parse(cls, text: str) -> Chain:
        """The inverse of `str`.

        Raises:
            InputError: the text is no chain.
        """
        left, arrow, right = text.partition("->")
        try:
            if not arrow:
                raise ValueError("there is no '->'")
            inputs = [tuple(item.split()) for item in left.split(",")] if left.strip() else []
            if any(len(item) != 2 for item in inputs):
                raise ValueError("an input is a name and a kind")
            body = ast.parse(f"({right.strip()},)", mode="eval").body
            assert isinstance(body, ast.Tuple)
            return cls(tuple(inputs), tuple(map(_term, body.elts)))  # type: ignore[arg-type]
        except (SyntaxError, ValueError) as error:
            raise InputError(f"'{text}' is no chain of elementwise operations: {error}.") from error


def _term(node: ast.expr) -> Term:
    if isinstance(node, ast.Name):
        return Input(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return Call(node.func.id, tuple(map(_term, node.args)))
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    number = node.operand if isinstance(node, ast.UnaryOp) and negative else node
    if isinstance(number, ast.Constant) and type(number.value) in (int, float):
        value = float(ast.literal_eval(number))
        return Input(number=-value if negative else value)
    raise ValueError(f"'{ast.unparse(node)}' is neither a name, nor a number, nor an operation on such")


@dataclass(frozen=True)
class Elementwise(Template):
    """A chain in one pass: inputs in their order, then outputs in theirs; float32, compact, none overlapping another.

    Attributes:
        chain: what is computed.
    """

    chain: Chain

    @property
    def symbol(self) -> str:
        return f"elementwise_f32_{hashlib.sha256(str(self.chain).encode()).hexdigest()[:16]}"

    def build(self, cpu: Cpu) -> Any:
        T = script()
        with prim_func(self.symbol) as built:
            rows, width = size(), size()
            shapes = {"full": (rows, width), "row": (rows,), "column": (width,), "scalar": (1,)}
            inputs = {name: (argument(name, shapes[kind]), kind) for name, kind in self.chain.inputs}
            outputs = [argument(f"out_{i}", (rows, width)) for i in range(len(self.chain.outputs))]
            chunks = T.bind((width + _CHUNK - 1) // _CHUNK)
            with T.parallel(rows * chunks) as task:
                row, begin = T.bind(task // chunks), T.bind(task % chunks * _CHUNK)
                count = T.bind(T.min(width - begin, T.int64(_CHUNK)))
                with T.serial(count // cpu.lanes) as step:
                    self._emit(inputs, outputs, row, T.bind(begin + step * cpu.lanes), cpu.lanes)
                with T.serial(count % cpu.lanes) as rest:
                    self._emit(inputs, outputs, row, T.bind(begin + count // cpu.lanes * cpu.lanes + rest), 1)
        return built[0]

    def _emit(self, inputs: dict[str, Any], outputs: Sequence[Any], row: Any, column: Any, lanes: int) -> None:
        """The chain at `lanes` columns from `column` on."""
        import tvm.tirx as tx

        T = script()
        values: dict[Term, Any] = {}

        def spread(value: Any) -> Any:
            return value if lanes == 1 else tx.Broadcast(value, lanes)

        def load(term: Input) -> Any:
            if term.number is not None:
                return spread(const(term.number))
            buffer, kind = inputs[term.name]
            if kind in ("row", "scalar"):
                return spread(buffer[row if kind == "row" else 0])
            at = [row, column] if kind == "full" else [column]
            return buffer[tuple(at)] if lanes == 1 else buffer.vload(at, f"float32x{lanes}")

        table: dict[str, Any] = {**UNARY, **BINARY}
        for term in self.chain.terms():
            if isinstance(term, Input):
                values[term] = T.bind(load(term))
                continue
            # In a buffer: TVM's simplifier does not take the same definitions inside of two bound expressions.
            held = local(lanes)
            result = table[term.op](*(values[operand] for operand in term.operands))
            store(held, result, 0 if lanes == 1 else tx.Ramp(0, 1, lanes))
            values[term] = held[0] if lanes == 1 else held.vload([0], f"float32x{lanes}")
        for buffer, term in zip(outputs, self.chain.outputs, strict=True):
            store(buffer, values[term], row, column if lanes == 1 else tx.Ramp(column, 1, lanes))

    def reference(self, *arguments: np.ndarray) -> tuple[np.ndarray, ...]:
        """Takes shapes from a last argument (rows, width) if no input is full and two do not tell them."""
        given: dict[str, Any] = {}
        values: dict[Term, Any] = {}
        rows = width = 1
        for (name, kind), array in zip(self.chain.inputs, arguments, strict=False):
            rows = array.shape[0] if kind in ("full", "row") else rows
            width = array.shape[-1] if kind in ("full", "column") else width
            given[name] = np.asarray(array, np.float64)[:, None] if kind == "row" else np.asarray(array, np.float64)
        if len(arguments) > len(self.chain.inputs):
            rows, width = arguments[-1].shape
        with np.errstate(all="ignore"):
            for term in self.chain.terms():
                if isinstance(term, Call):
                    values[term] = _EXACT[term.op](*(values[operand] for operand in term.operands))
                else:
                    number = None if term.number is None else np.float64(np.float32(term.number))
                    values[term] = given[term.name] if number is None else number
        return tuple(np.broadcast_to(values[term], (rows, width)) for term in self.chain.outputs)
