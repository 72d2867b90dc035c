"""What an operator of the dialect is made of.

An operator is added only where ONNX has none for the semantics. It brings its schema, its inference rule, a body
in ONNX operators (so that any ONNX runtime runs the model without planish), a float64 reference, and its cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.errors import PlanishError
from planish.ir.graphs import dims_of
from planish.ir.schemas import DIALECT_DOMAIN, OpRecord

#: Version of the opset ``planish``. It grows when the meaning of an operator changes.
DIALECT_VERSION = 1
Dim = int | str | None
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16})


class InferenceError(PlanishError):
    """The inputs of a dialect operator contradict its rule; the message names the inputs."""


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of a tensor as far as known: dims are sizes, symbol names, or None."""

    dtype: ir.DataType | None = None
    dims: tuple[Dim, ...] | None = None

    @classmethod
    def of(cls, value: ir.Value) -> TensorInfo:
        return cls(value.dtype, dims_of(value))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The dims when all are numbers.

        Raises:
            ValueError: a dim is symbolic or unknown.
        """
        if self.dims is None or not all(isinstance(d, int) for d in self.dims):
            raise ValueError(f"shape {self.dims} is not all numbers")
        return tuple(d for d in self.dims if isinstance(d, int))

    @property
    def elements(self) -> int:
        return int(np.prod(self.sizes, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        width = self.dtype.itemsize if self.dtype is not None and self.dtype != ir.DataType.STRING else 8
        return int(self.elements * width)


@dataclass(frozen=True)
class Operand:
    """An input or output. Operands with the same `type_var` have the same dtype, one of `dtypes`."""

    name: str
    dtypes: frozenset[ir.DataType] = FLOATS
    type_var: str = "T"
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """An attribute: its ONNX type, and its default when it may be left out."""

    name: str
    type: ir.AttributeType
    default: Any = None
    required: bool = False


@dataclass(frozen=True)
class Schema:
    """Name, operands and attributes of a dialect operator."""

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attributes: tuple[Attribute, ...] = ()
    doc: str = ""

    def record(self) -> OpRecord:
        """The schema in the form that the verifier reads."""
        needed = tuple(i for i, operand in enumerate(self.inputs) if not operand.optional)
        outputs = sum(not operand.optional for operand in self.outputs)
        return OpRecord(
            needed[-1] + 1 if needed else 0,
            len(self.inputs),
            outputs,
            len(self.outputs),
            {a.name: a.type for a in self.attributes},
            tuple(a.name for a in self.attributes if a.required),
            needed,
        )


@dataclass(frozen=True)
class OpCost:
    """Work of one node: floating point operations, and bytes read and written if nothing stays in cache."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class DialectOp:
    """One operator of the domain ``planish``.

    Attributes:
        schema: name, typed operands, typed attributes.
        infer: (inputs, attributes) → outputs; symbolic; raises InferenceError on a contradiction. Left-out
            optional inputs are None. Attributes come with their defaults filled in.
        body: opset → the ONNX function that defines the operator, for opsets from `min_opset` on.
        reference: (*float64 arrays, **attributes) → tuple of arrays; the definition that kernels are held to.
        flops: (inputs, outputs, attributes), with all sizes known → floating point operations.
    """

    schema: Schema
    infer: Callable[[Sequence[TensorInfo | None], Mapping[str, Any]], Sequence[TensorInfo]]
    body: Callable[[int], ir.Function]
    reference: Callable[..., tuple[np.ndarray, ...]]
    flops: Callable[[Sequence[TensorInfo | None], Sequence[TensorInfo], Mapping[str, Any]], int]
    min_opset: int = 18
    _records: dict[str, OpRecord] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.schema.name

    def record(self) -> OpRecord:
        if self.name not in self._records:
            self._records[self.name] = self.schema.record()
        return self._records[self.name]

    def function(self, opset: int = 23) -> ir.Function:
        """A new function object with the body of this operator at `opset` (at least `min_opset`)."""
        function = self.body(max(opset, self.min_opset))
        if function.domain != DIALECT_DOMAIN or function.name != self.name:
            raise PlanishError(f"the body of planish::{self.name} is named {function.domain}::{function.name}.")
        return function

    def function_of(self, node: ir.Node, opset: int = 23) -> ir.Function:
        """`function` for this node; all nodes of one operator have the same."""
        return self.function(opset)

    def attributes_of(self, node: ir.Node) -> dict[str, Any]:
        """Attribute values of a node by name, defaults filled in."""
        given = {name: attribute.value for name, attribute in node.attributes.items() if not attribute.is_ref()}
        return {a.name: given.get(a.name, a.default) for a in self.schema.attributes}

    def infer_node(self, node: ir.Node) -> Sequence[TensorInfo]:
        """Types and shapes of the outputs of `node`, after checking the dtypes of its inputs.

        Raises:
            InferenceError: dtypes that the schema does not allow, or shapes that the rule does not.
        """
        inputs = [None if v is None else TensorInfo.of(v) for v in node.inputs]
        inputs += [None] * (len(self.schema.inputs) - len(inputs))
        bound: dict[str, ir.DataType] = {}
        for operand, info in zip(self.schema.inputs, inputs, strict=True):
            if info is None or info.dtype is None:
                continue
            if info.dtype not in operand.dtypes:
                raise InferenceError(f"input '{operand.name}' is {info.dtype.name.lower()}, which it can not be")
            if bound.setdefault(operand.type_var, info.dtype) != info.dtype:
                want = bound[operand.type_var].name.lower()
                raise InferenceError(f"input '{operand.name}' is {info.dtype.name.lower()} and others are {want}")
        return self.infer(inputs, self.attributes_of(node))

    def cost(
        self, inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]
    ) -> OpCost:
        """Cost at known sizes: every input is read once and every output written once."""
        moved = sum(info.nbytes for info in (*inputs, *outputs) if info is not None)
        return OpCost(self.flops(inputs, outputs, attributes), moved)


def same_dim(a: Dim, b: Dim, where: str) -> Dim:
    """Two sizes that a definition says are equal: the more precise one.

    Raises:
        InferenceError: they are numbers that differ.
    """
    if isinstance(a, int) and isinstance(b, int) and a != b:
        raise InferenceError(f"{where}: sizes {a} and {b} must be equal")
    return b if a is None or (isinstance(b, int) and not isinstance(a, int)) else a


def broadcast_dims(a: Sequence[Dim], b: Sequence[Dim], where: str) -> tuple[Dim, ...]:
    """Shape of an elementwise result under ONNX's broadcasting, as far as symbols tell.

    Raises:
        InferenceError: two sizes that differ and are not 1.
    """
    rank = max(len(a), len(b))
    left, right = [1] * (rank - len(a)) + list(a), [1] * (rank - len(b)) + list(b)
    return tuple(_broadcast_dim(x, y, where) for x, y in zip(left, right, strict=True))


def _broadcast_dim(x: Dim, y: Dim, where: str) -> Dim:
    if x == y:
        return x
    if x == 1:
        return y
    if y == 1:
        return x
    if isinstance(x, int) and isinstance(y, int):
        raise InferenceError(f"{where}: sizes {x} and {y} do not broadcast")
    # A size above 1 decides: the other one is equal to it, or 1.
    if isinstance(x, int):
        return x
    if isinstance(y, int):
        return y
    return None
