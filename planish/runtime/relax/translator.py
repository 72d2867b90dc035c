"""From one ONNX graph to one Relax function: each operator has an emitter, which asks the translator for tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import onnx_ir as ir

from planish.ir.errors import UnsupportedError
from planish.ir.graphs import constant_tensor, dims_of
from planish.runtime.kernels.template import Template, import_tvm
from planish.runtime.relax.device import Device
from planish.runtime.relax.needed import needed
from planish.runtime.relax.operand import Lazy, Operand, Parameter, digest, identifier, same_array, same_order, shown

if TYPE_CHECKING:
    from planish.ir.program import TensorSpec

#: (translator, node) → one operand for each output.
Emitter = Callable[["Translator", ir.Node], "Operand | Sequence[Operand]"]
EMITTERS: dict[tuple[str, str], Emitter] = {}
#: The function that checks sizes.
CHECK = "check_sizes"
#: The largest size that a symbol may have.
_LARGEST = 1 << 31


def emits(*op_types: str, domain: str = "") -> Callable[[Emitter], Emitter]:
    """Registers the emitter of operators."""

    def add(emitter: Emitter) -> Emitter:
        EMITTERS.update({(domain, op_type): emitter for op_type in op_types})
        return emitter

    return add


@dataclass
class Translator:
    """The state of a translation.

    Attributes:
        device: what code is made for.
        model: where the graph is in; its functions and opsets are looked up there.
        dtypes: of all tensors.
    """

    device: Device
    model: ir.Model
    kernels: dict[str, Template] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    symbols: dict[str, Any] = field(default_factory=dict)
    values: dict[ir.Value, Operand] = field(default_factory=dict)
    done: set[ir.Node] = field(default_factory=set)
    derived: dict[Any, Any] = field(default_factory=dict)
    bases: dict[Any, Any] = field(default_factory=dict)
    assumed: list[tuple[Any, Any]] = field(default_factory=list)
    dtypes: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        tvm = import_tvm()
        from tvm import relax, sym, te

        self.te = te
        self.tvm, self.tir, self.relax = tvm, tvm.tirx, relax
        self.builder = relax.BlockBuilder()
        self.analyzer = sym.Analyzer()

    # -- sizes ------------------------------------------------------------------------------------------------------

    def dim(self, size: Any) -> Any:
        """A size as an int64 expression."""
        return self.tir.IntImm("int64", int(size)) if isinstance(size, int | np.integer) else size

    def plain(self, size: Any) -> Any:
        """A size as a number, if it is one; simplified else."""
        if isinstance(size, int | np.integer):
            return int(size)
        size = self.analyzer.simplify(size)
        return int(size) if isinstance(size, self.tir.IntImm) else size

    def equal(self, a: Any, b: Any) -> bool:
        """Whether two sizes are the same for all inputs, as far as can be proved."""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return bool(self.analyzer.can_prove_equal(self.dim(a), self.dim(b)))

    def product(self, sizes: Iterable[Any]) -> Any:
        result: Any = 1
        for size in sizes:
            result = size * result if isinstance(result, int) and result == 1 else result * size
        return self.plain(result)

    def symbol(self, name: str) -> Any:
        """The variable of a symbolic size of an input."""
        if name not in self.symbols:
            var = self.tir.Var(identifier(name), "int64")
            self.analyzer.bind(var, self.tvm.ir.Range(1, _LARGEST))
            self.symbols[name] = var
        return self.symbols[name]

    # -- values -----------------------------------------------------------------------------------------------------

    def get(self, value: ir.Value | None) -> Operand:
        """What is known of a value that an emitter reads."""
        assert value is not None
        if value not in self.values:
            tensor = constant_tensor(value)
            if tensor is None:
                raise UnsupportedError(
                    f"target {self.device.name}: value '{value.name}' is defined outside of its graph."
                )
            self.values[value] = Operand.constant(tensor.numpy(), value.name or "")
        return self.values[value]

    def inputs(self, node: ir.Node) -> list[Operand | None]:
        return [None if v is None or v.name == "" else self.get(v) for v in node.inputs]

    def parameter(self, array: np.ndarray, name: str) -> Any:
        """The variable of a weight; equal weights under one name are one parameter."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        base, number = name or "constant", 1
        while name == "" or (name in self.parameters and not same_array(self.parameters[name].array, array)):
            name, number = f"{base}.{number}", number + 1
        if name not in self.parameters:
            var = self.relax.Var(f"p{len(self.parameters)}", self.type(array.shape, str(array.dtype)))
            self.parameters[name] = Parameter(name, array, var)
        return self.parameters[name].var

    def type(self, dims: Sequence[Any], dtype: str) -> Any:
        self.dtypes.add(dtype)
        return self.relax.TensorType([self.dim(d) for d in dims], dtype)

    def stored(self, operand: Operand) -> Any:
        """The variable of an operand, with its axes as they are stored."""
        if isinstance(operand.var, Lazy):
            operand.var = self.force(operand.var)
        if operand.var is None:
            if operand.array is not None:
                operand.var = self.parameter(operand.array, operand.name or digest(operand.array))
            else:
                assert operand.sizes is not None
                operand.var = self.force(self._of_sizes(operand.sizes, operand.dtype))
        return operand.var

    def tensor(self, operand: Operand) -> Any:
        """The variable of an operand, with its axes in their order."""
        if operand.order is None:
            return self.stored(operand)
        return self.force(self.arranged(operand, None))

    def arranged(self, operand: Operand, order: tuple[int, ...] | None) -> Any:
        """An operand with its axes stored in a given order (None: their own); it may not be emitted yet."""
        if operand.order == order:
            return operand.var if isinstance(operand.var, Lazy) else self.stored(operand)
        key = ("arranged", id(operand), order)
        if key not in self.derived:
            own = operand.order or tuple(range(operand.rank))
            wanted = order or tuple(range(operand.rank))
            source = [wanted.index(axis) for axis in own]
            dims = [operand.dims[axis] for axis in wanted]
            var = self.stored(operand)
            if same_order(operand.dims, own, wanted):
                made = self.reshape(var, dims)
            else:
                made = self.compute("transpose", [var], lambda i, x: x(*[i[a] for a in source]), dims, operand.dtype)
            self.derived[key] = (operand, made)  # holds the operand, so that its identity is not used twice
        return self.derived[key][1]

    def _of_sizes(self, sizes: np.ndarray, dtype: str) -> Any:
        tir = self.tir

        def element(indices: Sequence[Any]) -> Any:
            items = [self.dim(item).astype(dtype) for item in sizes.flat]
            result = items[-1]
            for position in range(len(items) - 2, -1, -1):
                result = tir.Select(indices[0] == position, items[position], result)
            return result

        return self.compute("sizes", [], lambda i: element(i), list(sizes.shape), dtype)

    # -- code -------------------------------------------------------------------------------------------------------

    def emit(self, expression: Any) -> Any:
        return self.builder.emit(expression)

    def compute(
        self, name: str, inputs: Sequence[Any], body: Callable[..., Any], dims: Sequence[Any], dtype: str
    ) -> Lazy:
        """A tensor whose element at `indices` is ``body(indices, *inputs)``, emitted when it is needed as such."""
        self.dtypes.add(dtype)
        return Lazy(name, list(inputs), body, [self.dim(d) for d in dims], dtype)

    def force(self, var: Any) -> Any:
        """A variable of what may not be emitted yet."""
        if not isinstance(var, Lazy):
            return var
        if var.var is None:
            var.var = self._emit_loops(var)
        return var.var

    def _emit_loops(self, lazy: Lazy) -> Any:
        te, shape = self.te, lazy.dims
        leaves: list[Any] = []
        body = lazy.reader(leaves, self.force)
        indices = [self.tir.Var(f"i{axis}", "int64") for axis in range(len(shape))]
        like = [te.placeholder([1] * len(var.ty.shape), var.ty.dtype) for var in leaves]
        symbols = self._symbols_in([*shape, body(indices, like)])

        def computed(tensors: Sequence[Any], own: Sequence[Any]) -> Any:
            # The function has symbols of its own.
            to = dict(zip(symbols, own, strict=True))
            return te.compute(
                [self._substitute(size, to) for size in shape],
                lambda *i: self._substitute(body(i, tensors), to),
                name=lazy.name,
            )

        return self.builder.emit_te(computed, leaves, symbols, primfunc_name_hint=lazy.name)

    def _substitute(self, expression: Any, to: Mapping[Any, Any]) -> Any:
        import tvm_ffi

        if not to:
            return expression
        return tvm_ffi.structural_map(expression, (self.tvm.ir.Var, lambda var: to.get(var, var)), order="post")

    def _symbols_in(self, expressions: Sequence[Any]) -> list[Any]:
        """The symbolic sizes that expressions use, in the order of the function's."""
        import tvm_ffi

        found: set[Any] = set()
        for expression in expressions:
            tvm_ffi.structural_walk(expression, (self.tvm.ir.Var, found.add), order="post")
        return [var for var in self.symbols.values() if var in found]

    def call(self, template: Template, inputs: Sequence[Any], *outputs: tuple[Sequence[Any], str]) -> Any:
        """Calls a kernel; gives a variable, or a list of them for several outputs."""
        types = [self.type(dims, dtype) for dims, dtype in outputs]
        made = self.device.call(self, template, [self.force(item) for item in inputs], types)
        if len(types) == 1:
            return made
        return [self.emit(self.relax.TupleGetItem(made, index)) for index in range(len(types))]

    def reshape(self, var: Any, dims: Sequence[Any]) -> Any:
        """A view with other sizes, of as many elements."""
        var, shape = self.force(var), [self.dim(d) for d in dims]
        have = list(var.ty.shape)
        if self._same_sizes(have, shape):
            return var
        base = self.bases.get(var, var)
        if self._same_sizes(list(base.ty.shape), shape):
            return base
        made = self.emit(self.relax.op.reshape(base, self.relax.ShapeExpr(shape)))
        self.bases[made] = base
        return made

    def _same_sizes(self, a: Sequence[Any], b: Sequence[Any]) -> bool:
        return len(a) == len(b) and all(self.equal(x, y) for x, y in zip(a, b, strict=True))

    def rows(self, operand: Operand, axes: int = 1) -> Any:
        """The variable of an operand as a matrix, its last `axes` axes joined."""
        key = ("rows", id(operand), axes)
        if key not in self.derived:
            dims = operand.dims
            split = len(dims) - axes
            made = self.reshape(self.tensor(operand), [self.product(dims[:split]), self.product(dims[split:])])
            self.derived[key] = (operand, made)
        return self.derived[key][1]

    def match(self, operand: Operand, dims: Sequence[Any]) -> Operand:
        """The operand with sizes that can not be proved to be its own: :attr:`assumed`, and checked before a run."""
        if all(self.equal(a, b) for a, b in zip(operand.dims, dims, strict=True)):
            return operand
        self.assumed += [(self.dim(a), self.dim(b)) for a, b in zip(operand.dims, dims, strict=True)]
        var = self.compute("assume", [self.tensor(operand)], lambda i, x: x(*i), dims, operand.dtype)
        return Operand(operand.dtype, list(dims), var)

    def check(self) -> Any:
        """A function of the symbols, in their order, that ends with an error where an assumption does not hold."""
        from planish.runtime.kernels.loops import prim_func, script

        T = script()
        with prim_func(CHECK) as built:
            own = {var: T.arg(var.name, T.int64()) for var in self.symbols.values()}
            for a, b in self.assumed:
                if not self.equal(a, b):
                    holds = self._substitute(a, own).equal(self._substitute(b, own))
                    with T.Assert(holds, f"{shown(a)} must be {shown(b)}"):
                        T.evaluate(0)
            T.evaluate(0)
        return built[0]

    # -- graphs -----------------------------------------------------------------------------------------------------

    def node(self, node: ir.Node) -> None:
        """Emits one node."""
        if node in self.done:
            return
        if node.op_type == "Constant" and not node.domain:
            self.get(node.outputs[0])
            return
        emitter = EMITTERS.get((node.domain, node.op_type))
        if emitter is None:
            self.refuse(node, "there is no code for it")
        made = emitter(self, node)
        operands = [made] if isinstance(made, Operand) else list(made)
        for value, operand in zip(node.outputs, operands, strict=False):
            self.values[value] = operand
            if len(value.uses()) > 1 or value.is_graph_output():
                self._settle(operand)
        for value in node.outputs[len(operands) :]:
            if value.uses() or value.is_graph_output():
                self.refuse(node, f"its output {value.name} has no code")

    def _settle(self, operand: Operand) -> None:
        """Emits what more than one node reads, so that it is computed once."""
        if isinstance(operand.var, Lazy):
            operand.var = self.force(operand.var)

    def refuse(self, node: ir.Node, why: str) -> NoReturn:
        """Raises UnsupportedError that names a node."""
        domain = f"{node.domain}::" if node.domain else ""
        raise UnsupportedError(
            f"target {self.device.name} does not take {domain}{node.op_type} (node '{node.name}'): {why}."
        )

    def require_float(self, node: ir.Node, *operands: Operand) -> None:
        """Refuses numbers of a dtype that the device's kernels do not take, and operands of several dtypes."""
        first = operands[0].dtype
        if first not in self.device.floats:
            self.refuse(node, f"its input is {first}; it takes {' and '.join(self.device.floats)}")
        if wrong := next((o.dtype for o in operands if o.dtype != first), None):
            self.refuse(node, f"its inputs are {first} and {wrong}")

    def function(self, graph: ir.Graph, inputs: Sequence[TensorSpec]) -> Any:
        """The module with the function ``main``: inputs first, then :attr:`parameters` in their order."""
        variables = []
        for spec in inputs:
            value = next(v for v in graph.inputs if v.name == spec.name)
            dims = dims_of(value)
            if value.dtype is None or dims is None:
                raise UnsupportedError(f"target {self.device.name}: input '{spec.name}' has no dtype or no rank.")
            own = [d if isinstance(d, int) else self.symbol(d or f"{spec.name}.{i}") for i, d in enumerate(dims)]
            dtype = str(value.dtype.numpy()) if value.dtype.is_integer() or value.dtype.is_floating_point() else "bool"
            var = self.relax.Var(identifier(spec.name), self.type(own, dtype))
            variables.append(var)
            self.values[value] = Operand(dtype, own, var)
        with self._function("main"):
            with self.builder.dataflow():
                for node in needed(graph):
                    self.node(node)
                outputs = [self._output(value, variables) for value in graph.outputs]
                outputs += self.device.more_outputs(self)
                result = self.builder.emit_output(self.relax.Tuple(outputs))
            every = [*variables, *(parameter.var for parameter in self.parameters.values())]
            self.builder.emit_func_output(result, every)
        module = self.builder.get()
        return module, every[: len(variables)]

    @contextmanager
    def _function(self, name: str) -> Iterator[None]:
        """A function of the builder, which warns on stderr of one that an exception has ended."""
        try:
            with self.builder.function(name):
                yield
        except Exception:
            self.builder._end_block()
            raise

    def _output(self, value: ir.Value, inputs: Sequence[Any]) -> Any:
        """An output; what may share memory with an input or a weight is copied."""
        operand = self.get(value)
        var = self.tensor(operand)
        producer = value.producer()
        views = ("Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Dropout", "Transpose")
        if operand.array is None and producer is not None and producer.op_type not in views:
            return var
        return self.force(self.compute("copy", [var], lambda i, x: x(*i), operand.dims, operand.dtype))


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute; lists come as lists."""
    found = node.attributes.get(name)
    if found is None:
        return default
    return list(found.value) if isinstance(found.value, tuple | list) else found.value


def axis_of(node: ir.Node, rank: int, default: int, name: str = "axis") -> int:
    """An axis, from 0 to rank - 1."""
    axis = int(attribute(node, name, default))
    return axis + rank if axis < 0 else axis
