"""Products with a constant weight, as passes of low precision look for them; and what is multiplied with each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.ir.graphs import constant_tensor, dims_of, is_op
from planish.ir.ops import DIALECT_DOMAIN
from planish.ir.program import Program
from planish.passes.base import Decline

MICROSOFT = "com.microsoft"
FLOAT32_ONLY = (ir.DataType.FLOAT,)
#: Of weights that operators of few bits take beside activations of the same type.
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
#: Operators whose weights are in few bits already.
QUANTIZED = (
    "MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger",
    "ConvInteger", "QLinearMatMul", "QLinearConv", "QGemm", "QMoE", "DequantizeLinear",
)  # fmt: skip


@dataclass(frozen=True)
class Product:
    """x · weight + bias.

    Attributes:
        node: a MatMul or a Gemm.
        x: (…, k).
        tensor: the weight, with two axes.
        rows: whether the tensor is (n, k), a row for each output, and not (k, n).
        bias: (n,) constant that Gemm adds, or None.
        transpose: the Transpose that the weight goes through, or None.
    """

    node: ir.Node
    x: ir.Value
    tensor: ir.TensorProtocol
    rows: bool
    bias: ir.Value | None = None
    transpose: ir.Node | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """(n, k): outputs and summed inputs."""
        a, b = (int(n) for n in self.tensor.shape.numpy())
        return (a, b) if self.rows else (b, a)

    def weight(self) -> npt.NDArray[np.float32]:
        """(n, k)."""
        array: npt.NDArray[np.float32] = np.asarray(self.tensor.numpy(), np.float32)
        return array if self.rows else array.T


def named_entries(program: Program, names: Sequence[str] | None) -> list[str]:
    """The entries that an option names; None: all.

    Raises:
        InputError: the program has no such entry.
    """
    if names is None:
        return list(program.entries)
    for name in names:
        program.entry(name)  # raises for an unknown one
    return list(names)


def products(graph: ir.Graph, dtypes: Sequence[ir.DataType] = FLOAT32_ONLY) -> Iterator[Product | tuple[ir.Node, str]]:
    """The products of a graph that have a constant weight of two axes; for others that might, the reason."""
    for node in list(graph.all_nodes()):
        try:
            found = product(node, dtypes)
        except Decline as decline:
            yield node, decline.reason
            continue
        if found is not None:
            yield found


def product(node: ir.Node, dtypes: Sequence[ir.DataType] = FLOATS) -> Product | None:
    """`node` as a product with a weight of one of `dtypes`; None if it is none.

    Raises:
        Decline: it is one, of a form or dtype that is left alone.
    """
    if node.domain == DIALECT_DOMAIN and node.op_type.startswith("Linear"):
        raise Decline(f"{node.op_type} is a generated kernel; put the pass in front of lower-linear")
    if not is_op(node, "MatMul", "Gemm"):
        return None
    x, right = node.inputs[0], node.inputs[1]
    source = right.producer() if right is not None else None
    transpose = source if is_op(source, "Transpose") else None
    if transpose is not None and list(transpose.attributes.get_ints("perm", [1, 0])) != [1, 0]:
        transpose = None
    tensor = constant_tensor(transpose.inputs[0] if transpose is not None else right)
    if x is None or tensor is None or len(tensor.shape) != 2:
        return None
    if tensor.dtype not in dtypes:
        raise Decline(f"its weight is {tensor.dtype.name.lower()}; float32 ones are quantized")
    if node.op_type == "MatMul":
        if len(dims_of(x) or ()) < 2:
            raise Decline("its input is a vector, or its rank is not known")
        return Product(node, x, tensor, transpose is not None, None, transpose)
    return _gemm(node, x, tensor, transpose)


def _gemm(node: ir.Node, x: ir.Value, tensor: ir.TensorProtocol, transpose: ir.Node | None) -> Product:
    attributes = node.attributes
    if attributes.get_int("transA", 0) or attributes.get_float("alpha", 1.0) != 1:
        raise Decline("this Gemm transposes or scales its input")
    rows = bool(attributes.get_int("transB", 0)) != (transpose is not None)
    outputs = int(tensor.shape.numpy()[0 if rows else 1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        added = constant_tensor(bias)
        if attributes.get_float("beta", 1.0) != 1 or added is None or list(added.shape.numpy()) != [outputs]:
            raise Decline("this Gemm adds what is not a constant for each output")
    return Product(node, x, tensor, rows, bias, transpose)
