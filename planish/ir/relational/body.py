"""The ONNX function of a relational program, so that any ONNX runtime runs it.

Sums over edges are ScatterElements with a reduction, a typed linear is a Loop over types that multiplies the rows of
one type by its matrix: nothing of the size edges times inputs times outputs is ever made. ScatterND would need no
index of the size of the data, but ONNX Runtime's adds on several threads at once and loses updates.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from planish.ir.errors import UnsupportedError
from planish.ir.relational.body_rows import ONLY, Level, Rows
from planish.ir.relational.domains import EDGE, NODE, NONE, PAIRS, TYPES, Domain
from planish.ir.relational.inter import Op, Operand, Program, Variable
from planish.ir.relational.ops import full_end

_FLOAT = int(ir.DataType.FLOAT)
_UNARY = {
    "copy": "Identity",
    "neg": "Neg",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "recip": "Reciprocal",
    "abs": "Abs",
    "relu": "Relu",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "erf": "Erf",
}
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"}
_REDUCED = {"sum": "add", "mean": "add", "max_rows": "max", "min_rows": "min", "count": "add"}


def body_of(program: Program, domain: str, name: str, opset: int) -> ir.Function:
    """The function ``domain::name(edge_index, edge_type, *inputs, *weights) -> outputs``, float32, opset 18 or later.

    Its attribute ``program`` is not read.

    Raises:
        UnsupportedError: the program has an operator that only backward programs have, takes or gives values over
            pairs of node and type, or reads node types of nodes that come as one input.
    """
    return _Body(program, opset).function(domain, name)


class _Body(Rows):
    def function(self, domain: str, name: str) -> ir.Function:
        for op in self.program.ops:
            self.known[op.name] = self._op(op)
        results = []
        for output in self.program.outputs:
            variable, value = self.variables[output], self.known[output]
            if variable.domain in PAIRS:
                raise UnsupportedError(f"output '{variable}': values over pairs have no ONNX form; {ONLY}.")
            # An Identity besides: an output must not be an input, nor two of them one value.
            value = self.add("Squeeze", value, self.ints(0)) if variable.domain == NONE else self.add("Identity", value)
            results.append(value)
        inputs = [self.edge_index, self.edge_type, *self.arguments.values()]
        graph = ir.Graph(inputs, results, nodes=self.nodes, opset_imports={"": self.opset}, name=name)
        attribute = ir.Attr("program", ir.AttributeType.STRING, "")
        return ir.Function(domain, name, graph=graph, attributes=[attribute])

    # ---- operators

    def operand(self, op: Op, position: int, rank: int | None = None) -> ir.Value:
        """An operand with a row for each row of the loop (or 1), its trailing shape padded on the left to `rank`."""
        operand = op.operands[position]
        variable = self.variables[operand.name]
        x = self.read(operand, op.over)
        missing = 0 if rank is None else rank - len(variable.shape)
        return self.unsqueeze(x, *range(1, 1 + missing))

    def read(self, operand: Operand, over: Domain) -> ir.Value:
        domain = self.variables[operand.name].domain
        rows = self.map(over, domain, operand.end)
        if rows is None:
            return self.known[operand.name]
        key = ("read", operand.name, over, full_end(over, domain, operand.end))
        return self.once(key, lambda: self.add("Gather", self.known[operand.name], rows, axis=0))

    def _op(self, op: Op) -> ir.Value:
        kind = op.kind
        if kind in _REDUCED:
            return self._reduce(op)
        if kind == "linear":
            return self._linear(op)
        if kind in _BINARY or kind in ("greater", "equal", "dot"):
            return self._binary(op)
        if kind == "edge_softmax":
            return self._softmax(op)
        if kind == "join":
            return self.add("Concat", *(self.known[name] for name in op.reads), axis=0)
        if kind == "constant":
            shape = self.ints(1, *op.attr("shape"))
            return self.add("Expand", self.number(op.attr("value")), shape)
        if kind == "pick":
            return self._pick(op)
        if kind == "outer":
            raise UnsupportedError(f"'{op.name}': outer products have no ONNX form; {ONLY}.")
        if kind == "concat":
            same = [self._full(op, i) for i in range(len(op.operands))]
            return self.add("Concat", *same, axis=op.attr("axis") + 1)
        return self._unary(op, self.operand(op, 0))

    def _unary(self, op: Op, x: ir.Value) -> ir.Value:
        kind = op.kind
        if kind in _UNARY:
            return self.add(_UNARY[kind], x)
        if kind == "leaky_relu":
            return self.add("LeakyRelu", x, alpha=float(op.attr("slope")))
        if kind == "step":
            return self.add("Cast", self.add("Greater", x, self.number(0.0)), to=_FLOAT)
        if kind == "fsum":
            axes = self.ints(*(axis + 1 for axis in op.attr("axes")))
            return self.add("ReduceSum", x, axes, keepdims=0)
        if kind == "transpose":
            return self.add("Transpose", x, perm=[0, *(p + 1 for p in op.attr("perm"))])
        if kind == "slice":
            bounds = [self.ints(n) for n in (op.attr("start"), op.attr("stop"), op.attr("axis") + 1)]
            return self.add("Slice", x, *bounds)
        if kind == "reshape":
            # 0 keeps the number of rows, which -1 could not tell where there are none.
            return self.add("Reshape", x, self.ints(0, *op.attr("shape")))
        if kind == "expand":
            shape = op.attr("shape")
            missing = len(shape) - len(self.variables[op.reads[0]].shape)
            x = self.unsqueeze(x, *range(1, 1 + missing))
            return self.add("Expand", x, self.ints(1, *shape))
        raise UnsupportedError(f"'{op.name}': operator '{kind}' has no ONNX form.")

    def _full(self, op: Op, position: int) -> ir.Value:
        """An operand with all its rows, also where one serves for all."""
        x, variable = self.operand(op, position), self.variables[op.reads[position]]
        if variable.domain != NONE or op.over == NONE:
            return x
        shape = self.add("Concat", self.rows(op.over), self.ints(*variable.shape), axis=0)
        return self.add("Expand", x, shape)

    def _binary(self, op: Op) -> ir.Value:
        rank = max(len(self.variables[name].shape) for name in op.reads)
        a, b = (self.operand(op, i, rank) for i in range(2))
        if all(self.variables[name].domain == NONE for name in op.reads) and op.over != NONE:
            a = self.add("Expand", a, self.add("Concat", self.rows(op.over), self.ints(*[1] * rank), axis=0))
        if op.kind == "dot":
            return self.add("ReduceSum", self.add("Mul", a, b), self.ints(rank), keepdims=0)
        if op.kind in _BINARY:
            return self.add(_BINARY[op.kind], a, b)
        test = self.add("Greater" if op.kind == "greater" else "Equal", a, b)
        return self.add("Cast", test, to=_FLOAT)

    def _pick(self, op: Op) -> ir.Value:
        index = int(op.attr("index"))
        start = self.ints(0)
        for part in self._parts():
            if (part.index or 0) < index:
                start = self.add("Add", start, self.rows(part))
        stop = self.add("Add", start, self.rows(op.result.domain))
        return self.add("Slice", self.known[op.reads[0]], start, stop, self.ints(0))

    # ---- reductions

    def _reduce(self, op: Op) -> ir.Value:
        shape, target = op.result.shape, op.result.domain
        x = self.add("Expand", self.number(1.0), self.rows(op.over)) if op.kind == "count" else self._full(op, 0)
        return self._grouped(op.kind, x, shape, op.over, target, op.by)

    def _grouped(
        self, kind: str, x: ir.Value, shape: tuple[int, ...], over: Domain, target: Domain, by: str
    ) -> ir.Value:
        """Rows of `x` over one domain reduced to those of another; 0 for a row without rows."""
        index = self.map(over, target, by)
        if over == target:
            return x
        if index is None:  # to one row
            index = self.add("Expand", self.ints(0), self.rows(over))
        if kind in ("sum", "count"):
            return self._scatter(x, index, self.rows(target), shape, 0.0, "add")
        count = self._counts(over, target, by, index)
        count = self.unsqueeze(count, *range(1, 1 + len(shape)))
        if kind == "mean":
            total = self._scatter(x, index, self.rows(target), shape, 0.0, "add")
            return self.add("Div", total, self.add("Max", count, self.number(1.0)))
        worst = -math.inf if kind == "max_rows" else math.inf
        found = self._scatter(x, index, self.rows(target), shape, worst, _REDUCED[kind])
        return self.add("Where", self.add("Greater", count, self.number(0.0)), found, self.number(0.0))

    def _counts(self, over: Domain, target: Domain, by: str, index: ir.Value) -> ir.Value:
        """How many rows go to each row, as floats."""

        def make() -> ir.Value:
            ones = self.add("Expand", self.number(1.0), self.rows(over))
            return self._scatter(ones, index, self.rows(target), (), 0.0, "add")

        return self.once(("counts", over, target, by), make)

    def _scatter(
        self, x: ir.Value, index: ir.Value, rows: ir.Value, shape: tuple[int, ...], initial: float, reduction: str
    ) -> ir.Value:
        """Row index[i] of the result is the reduction of the rows x[i]; `initial` without any."""
        flat = math.prod(shape)
        start = self.add("Expand", self.number(initial), self.add("Concat", rows, self.ints(flat), axis=0))
        wide = self.add("Reshape", x, self.ints(0, flat)) if len(shape) != 1 else x
        target = self.unsqueeze(index, 1)
        if flat != 1:
            size = self.add("Concat", self._first_size(index), self.ints(flat), axis=0)
            target = self.add("Expand", target, size)
        found = self.add("ScatterElements", start, target, wide, axis=0, reduction=reduction)
        return self.add("Reshape", found, self.ints(0, *shape)) if len(shape) != 1 else found

    def _softmax(self, op: Op) -> ir.Value:
        x, shape = self._full(op, 0), op.result.shape
        index = self._need(self.map(EDGE, NODE, op.by))
        most = self._scatter(x, index, self.rows(NODE), shape, -math.inf, "max")
        part = self.add("Exp", self.add("Sub", x, self.add("Gather", most, index, axis=0)))
        total = self._scatter(part, index, self.rows(NODE), shape, 0.0, "add")
        return self.add("Div", part, self.add("Gather", total, index, axis=0))

    # ---- products

    def _linear(self, op: Op) -> ir.Value:
        x, w = (self.variables[name] for name in op.reads)
        if w.domain == NONE or op.over in TYPES:
            weight = self.operand(op, 1)
            given = self._full(op, 0) if x.domain == NONE and w.domain == NONE else self.operand(op, 0)
            return self._product(self, given, weight, x, w, bool(op.attr("transpose")), rows=True)
        return self._typed(op, x, w)

    def _product(
        self, at: Level, x: ir.Value, weight: ir.Value, of_x: Variable, of_w: Variable, turned: bool, *, rows: bool
    ) -> ir.Value:
        """x (rows, *, [heads,] i) times weight ([1 or rows,] [heads,] i, o); `rows` says that weight has a row axis."""
        heads, lead = len(of_w.shape) == 3, len(of_x.shape)
        by_row = rows and of_w.domain != NONE
        if rows and not by_row:
            weight = at.add("Squeeze", weight, at.ints(0))
        if not heads and not by_row:
            weight = at.add("Transpose", weight, perm=[1, 0]) if turned else weight
            return at.add("MatMul", x, weight)
        # Not Transpose and MatMul: ONNX Runtime fuses them, and dies of a product without rows.
        head, free = "h" * heads, "abcdefg"[: lead - 1 - heads]
        matrix = "oi" if turned else "io"
        equation = f"n{free}{head}i,{'n' * by_row}{head}{matrix}->n{free}{head}o"
        return at.add("Einsum", x, weight, equation=equation)

    def _typed(self, op: Op, x: Variable, w: Variable) -> ir.Value:
        """A Loop over types: rows of the type are gathered, multiplied, and put in their places of the result."""
        of_type = self._need(self.map(op.over, w.domain, op.operands[1].end))
        place = self.map(op.over, x.domain, op.operands[0].end)
        source, weight, rows = self.known[op.reads[0]], self.known[op.reads[1]], self.rows(op.over)
        start = self.add("Expand", self.number(0.0), self.add("Concat", rows, self.ints(*op.result.shape), axis=0))
        inner = Level(f"{op.name}_")
        number, going, carried = (ir.Value(name=f"{op.name}_{part}") for part in ("number", "going", "carried"))
        found = inner.add("NonZero", inner.add("Equal", of_type, number))
        at = inner.add("Transpose", found, perm=[1, 0])
        line = inner.add("Squeeze", found, inner.ints(0))
        if x.domain == NONE:
            shape = inner.add("Concat", inner.add("Shape", line), inner.ints(*x.shape), axis=0)
            taken = inner.add("Expand", source, shape)
        else:
            where = line if place is None else inner.add("Gather", place, line, axis=0)
            taken = inner.add("Gather", source, where, axis=0)
        matrix = inner.add("Gather", weight, number, axis=0)
        product = self._product(inner, taken, matrix, x, w, bool(op.attr("transpose")), rows=False)
        result = inner.add("ScatterND", carried, at, product)
        go_on = inner.add("Identity", going)
        number.type = ir.TensorType(ir.DataType.INT64)
        going.type = ir.TensorType(ir.DataType.BOOL)
        carried.type = ir.TensorType(ir.DataType.FLOAT)
        number.shape = going.shape = ir.Shape([])
        carried.shape = ir.Shape([None, *op.result.shape])
        graph = ir.Graph([number, going, carried], [go_on, result], nodes=inner.nodes, name=f"{op.name}_types")
        types = self.add("Squeeze", self._first_size(weight))
        always = self.add("Constant", value=ir.tensor(np.array(True)))
        return self.add("Loop", types, always, start, body=graph)
