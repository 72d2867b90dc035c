"""float16: a whole program in half precision, for GPUs, whose products and norms sum in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from planish.ir.causal_lm import DECODE, cache_layer
from planish.ir.graphs import constant_tensor, dims_of, is_op, subgraphs_of
from planish.ir.ledger import Declined
from planish.ir.ops import DIALECT_DOMAIN, dialect_op, import_functions
from planish.ir.program import Program
from planish.passes.base import ApproximatePass, PassContext, PassResult
from planish.passes.canonicalize.editing import Editor
from planish.passes.precision.cache_sites import GROUP_QUERY, MICROSOFT
from planish.passes.registry import register

_FLOAT = ir.DataType.FLOAT
#: Where half precision begins: from here on values flow on in it. In front of them are positions, masks and images.
_BEGIN = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum"))
#: What stays float32: sums and powers that leave the range of float16, angles of positions, and numbers with a type of
#: their own. Norms, softmax and attention are not among them, since their kernels compute in float32 inside.
_STAY = frozenset(
    (
        *("CumSum", "Exp", "Log", "Pow", "Range", "Reciprocal", "Sqrt", "Cos", "Sin", "Tan", "Resize", "Upsample"),
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum"),
        *("ReduceSumSquare", "LpNormalization", "MeanVarianceNormalization", "QuantizeLinear", "DequantizeLinear"),
        *("DynamicQuantizeLinear", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"),
        *("Bernoulli", "Multinomial", "DFT", "STFT", "MelWeightMatrix", "Det", "LSTM", "GRU", "RNN"),
    )
)


#: Inputs of com.microsoft's GroupQueryAttention: caches, and all that have its type (a bias and rotations too).
_PASTS = (3, 4)
_STEP_INPUTS = (0, 1, 2, *_PASTS, 7, 8, 10)
#: Inputs of com.microsoft's MatMulNBits that have its type: rows, scales and a bias; codes have none.
_BITS_INPUTS = (0, 2, 5)


@register
@dataclass(frozen=True)
class Float16(ApproximatePass):
    """Turns values and weights into float16 from the first product on; a target's ``dtype=float16`` asks for it.

    Inputs and outputs of the program keep their types, but for the caches of a causal language model,
    which become float16: their step then has a kernel there, and writes them in place. Products, attention and norms
    sum in float32 in the kernels of GPUs; sums and powers of the graph itself, angles of positions and what control
    flow carries stay float32. Finite constants beyond 65504, as masks have, become 65504.
    """

    name: ClassVar[str] = "float16"
    gives_up: ClassVar[str] = "Values keep 11 of the 24 bits of their mantissas, and end at 65504."
    order: ClassVar[int] = 58

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        if ctx.target.device != "cuda":
            reason = f"target '{ctx.target}' is no faster in float16; targets on CUDA are"
            return PassResult(False, 0, [Declined(self.name, program.default_entry, reason)], [reason])
        return halve(program, self.name, ir.DataType.FLOAT16, steps=ctx.target.device == "cuda")


def halve(
    program: Program, name: str, half: ir.DataType, *, steps: bool = False, only: frozenset[str] | None = None
) -> PassResult:
    """Turns a program into `half`, a type of 16 bits, but for its inputs and outputs and for what has to be exact.

    Args:
        name: of the pass that does it.
        steps: whether steps over caches become `half` with their caches.
        only: the standard operators that may be `half`; None: all but those that stay float32 in any case.
    """
    halving = _Halving(Editor(program, name), steps, half, only)
    # What decode has as caches decides what prefill gives.
    for _, model in sorted(program.entries.items(), key=lambda item: item[0] != DECODE):
        before, halving.opsets = halving.fired, model.graph.opset_imports
        halving.graph(model.graph)
        if halving.fired > before:
            _drop_unused(model.graph)
            import_functions(model)
    return PassResult(halving.fired > 0, halving.fired)


@dataclass
class _Halving:
    """One run over a program; `halved` are the values that are of type `half` now and were float32.

    Attributes:
        steps: whether steps over caches become `half` with their caches.
        half: a type of 16 bits.
        only: the standard operators that may be of it.
        presents: names of caches that are of type `half`, as outputs.
    """

    editor: Editor
    steps: bool = False
    half: ir.DataType = ir.DataType.FLOAT16
    only: frozenset[str] | None = None
    presents: set[str] = field(default_factory=set)
    opsets: dict[str, int] = field(default_factory=dict)
    fired: int = 0
    halved: set[ir.Value] = field(default_factory=set)
    tensors: dict[int, tuple[ir.TensorProtocol, ir.TensorProtocol, str]] = field(default_factory=dict)
    casts: dict[tuple[ir.Value, ir.DataType, ir.Graph], ir.Value] = field(default_factory=dict)

    def graph(self, graph: ir.Graph) -> None:
        for node in list(graph):
            inner = list(subgraphs_of(node))
            for body in inner:
                self.graph(body)
            types = {} if inner else self._types(node)
            self._caches(node, types)
            for index, value in enumerate(node.inputs):
                if value is None:
                    continue
                if types and types.get(index) and value.dtype == _FLOAT:
                    node.replace_input_with(index, self._as(value, self.half, node))
                elif not (types and types.get(index)) and value in self.halved and not _takes_both(node):
                    node.replace_input_with(index, self._as(value, _FLOAT, node))
            self._outputs(node, types)
        self._restore(graph)

    def _types(self, node: ir.Node) -> dict[int, str]:
        """The inputs that are to be half, each with its type variable; empty: the node stays as it is."""
        floats = [i for i, v in enumerate(node.inputs) if v is not None and (v.dtype == _FLOAT or v in self.halved)]
        apart = node.op_type.startswith(("Sequence", "Optional")) or is_op(node, *_STAY, "Cast", "CastLike")
        if not floats or apart or not (node.domain or self.only is None or node.op_type in self.only):
            return {}
        if not (_begins(node) or any(node.inputs[i] in self.halved for i in floats)):
            return {}
        named = self._variables(node)
        return {i: named[i] for i in floats if i in named}

    def _caches(self, node: ir.Node, types: dict[int, str]) -> None:
        """The caches that a step reads have its type from now on."""
        for index in _PASTS if types and _has_caches(node) else ():
            value = node.inputs[index]
            if value is not None and value.is_graph_input() and value.dtype == _FLOAT and len(value.uses()) == 1:
                value.type = ir.TensorType(self.half)
                self.presents.add((value.name or "").replace("past_", "present_", 1))

    def _variables(self, node: ir.Node) -> dict[int, str]:
        """Input → its type variable, for inputs that can be of 16 bits."""
        kind = f"tensor({self.half.name.lower()})"
        if _is_step(node):
            return dict.fromkeys(_STEP_INPUTS, "T") if self.steps else {}
        if _has_codes(node):
            return dict.fromkeys(_BITS_INPUTS, "T") if self.half == ir.DataType.FLOAT16 else {}
        if _has_caches(node) and not self.steps:
            return {}
        if node.domain == DIALECT_DOMAIN:
            operands = dialect_op(node.op_type).schema.inputs[: len(node.inputs)]  # relational layers have more inputs
            return {i: operand.type_var for i, operand in enumerate(operands) if self.half in operand.dtypes}
        schema = _schema(node, self.opsets)
        if schema is None:
            return {}
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        formals = [schema.inputs[min(i, len(schema.inputs) - 1)] for i in range(len(node.inputs))]
        return {i: f.type_str for i, f in enumerate(formals) if kind in allowed.get(f.type_str, ())}

    def _outputs(self, node: ir.Node, types: dict[int, str]) -> None:
        if not types:
            return
        self.fired += 1
        variables = set(types.values())
        formals: Any
        if _is_step(node) or _has_codes(node):
            formals = ["T"]
        elif node.domain == DIALECT_DOMAIN:
            formals = [operand.type_var for operand in dialect_op(node.op_type).schema.outputs]
        else:
            schema = _schema(node, self.opsets)
            formals = [output.type_str for output in schema.outputs]
        for index, value in enumerate(node.outputs):
            # Files need not say what an operator of com.microsoft gives.
            was_float = value.dtype == _FLOAT or (value.dtype is None and _has_codes(node))
            if formals[min(index, len(formals) - 1)] in variables and was_float:
                value.type = ir.TensorType(self.half)
                self.halved.add(value)

    def _as(self, value: ir.Value, dtype: ir.DataType, node: ir.Node) -> ir.Value:
        """`value` in another type, for a node that reads it."""
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        tensor = constant_tensor(value)
        if tensor is not None and dtype == self.half and value.producer() is None:
            assert value.graph is not None
            key = value, dtype, value.graph
            if key not in self.casts:
                self.casts[key] = self._constant(value.graph, value, tensor)
            return self.casts[key]
        key = value, dtype, graph
        if key not in self.casts:
            made = self.editor.node(node, "Cast", [value], {"to": int(dtype)}, like=value)
            made.type = ir.TensorType(dtype)
            self.casts[key] = made
        return self.casts[key]

    def _constant(self, graph: Any, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        known = self.tensors.get(id(tensor))
        if known is None:
            array = np.asarray(tensor.numpy())
            finite = np.isfinite(array)
            kind = self.half.numpy()
            largest = float(ml_dtypes.finfo(kind).max)  # type: ignore[no-untyped-call]
            limited = np.where(finite, np.clip(array, -largest, largest), array)
            halved = ir.tensor(np.ascontiguousarray(limited, dtype=kind).reshape(array.shape))
            known = tensor, halved, self.editor.names.fresh(f"{value.name}_{self.half.name.lower()}")
            self.tensors[id(tensor)] = known
        made = ir.Value(name=known[2], const_value=known[1])
        made.type, made.shape = ir.TensorType(self.half), ir.Shape(known[1].shape.numpy())
        graph.register_initializer(made)
        return made

    def _restore(self, graph: ir.Graph) -> None:
        """Gives the outputs of a graph back their type, and their names; caches that are float16 have that."""
        made: dict[ir.Value, ir.Value] = {}
        for index, value in enumerate(graph.outputs):
            cache = value.name in self.presents and cache_layer(value.name or "") is not None
            dtype = self.half if cache else _FLOAT
            if value.dtype == dtype or (not cache and value not in self.halved):
                continue
            if value not in made:
                cast = ir.node("Cast", [value], {"to": int(dtype)}, name=self.editor.names.fresh("Cast_planish"))
                producer = value.producer()
                self.editor.mark(cast, [producer] if producer is not None else [])
                name, cast.outputs[0].shape = value.name, value.shape
                value.name, cast.outputs[0].name = self.editor.names.fresh(f"{name}_{self.half.name.lower()}"), name
                cast.outputs[0].type = ir.TensorType(dtype)
                graph.append(cast)
                made[value] = cast.outputs[0]
            graph.outputs[index] = made[value]


def _is_step(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (MICROSOFT, GROUP_QUERY)


def _has_codes(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (MICROSOFT, "MatMulNBits")


def _has_caches(node: ir.Node) -> bool:
    """Whether a step has caches where GroupQueryAttention has them."""
    return _is_step(node) or (node.domain, node.op_type) == (DIALECT_DOMAIN, "BlockSparseStep")


def _begins(node: ir.Node) -> bool:
    if is_op(node, "Gather"):  # of an embedding
        tensor = constant_tensor(node.inputs[0])
        return tensor is not None and len(tensor.shape) > 1
    if is_op(node, "MatMul") and (dims_of(node.inputs[1]) or ())[-2:-1] == (1,):  # angles: positions times frequencies
        return False
    return is_op(node, *_BEGIN) or node.domain == DIALECT_DOMAIN or _has_codes(node)


def _takes_both(node: ir.Node) -> bool:
    """Whether a node that stays takes either type and gives none of them."""
    return is_op(node, "Cast", "Shape", "Size", "IsNaN", "IsInf")


def _schema(node: ir.Node, opsets: dict[str, int]) -> Any:
    try:
        return onnx.defs.get_schema(node.op_type, node.version or opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        return None


def _drop_unused(graph: ir.Graph) -> None:
    for inner in _graphs(graph):
        for name, value in list(inner.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del inner.initializers[name]


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    for node in graph:
        for inner in subgraphs_of(node):
            yield from _graphs(inner)
