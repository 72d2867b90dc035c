"""Products with weights in 4 and 8 bits on GPUs: our kernel for few rows, else weights are restored and multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from planish.runtime.cuda.quantized_gemv import kernel_macros
from planish.runtime.relax.cuda.assemble import Code
from planish.runtime.relax.operand import Lazy, Operand
from planish.runtime.relax.translator import Translator, attribute, emits

if TYPE_CHECKING:
    from planish.runtime.relax.cuda.device import CudaDevice

#: Rows up to which the kernel reads the weight once for each eight of them.
MOST_ROWS = 16
_DIALECT = [
    f"QuantizedLinear{bits}{zeros}{bias}" for bits in (4, 8) for zeros in ("", "Zeros") for bias in ("", "Bias")
]


@emits("MatMulNBits", domain="com.microsoft")
def _nbits(t: Translator, node: ir.Node) -> Operand:
    x, codes, scales, zeros, order, bias = [*t.inputs(node), *[None] * 3][:6]
    if order is not None:
        t.refuse(node, "its columns have an order of their own")
    return _product(t, node, (x, codes, scales, zeros, bias), int(attribute(node, "bits", 4)))


@emits(*_DIALECT, domain="planish")
def _linear(t: Translator, node: ir.Node) -> Operand:
    x, codes, scales, *rest = t.inputs(node)
    zeros = rest.pop(0) if "Zeros" in node.op_type else None
    bias = rest.pop(0) if node.op_type.endswith("Bias") else None
    return _product(t, node, (x, codes, scales, zeros, bias), int(node.op_type[len("QuantizedLinear")]))


def _product(t: Translator, node: ir.Node, inputs: Sequence[Operand | None], bits: int) -> Operand:
    from planish.runtime.relax.cuda.device import CudaDevice

    x, codes, scales, zeros, bias = inputs
    device, block = t.device, int(attribute(node, "block_size"))
    if not isinstance(device, CudaDevice) or x is None or codes is None or scales is None:
        t.refuse(node, "there is no code for it")
    t.require_float(node, x, scales, *([] if bias is None else [bias]))
    depth = x.dims[-1]
    if (
        bits not in (4, 8)
        or block & (block - 1)
        or not isinstance(depth, int)
        or any(o.array is None for o in (codes, scales))
    ):
        t.refuse(node, f"codes of {bits} bits in blocks of {block}, which have to be constants")
    if zeros is not None and (zeros.array is None or zeros.dtype != "uint8"):
        t.refuse(node, "its zeros are no constant codes")
    columns, blocks = int(codes.dims[0]), -(-depth // block)
    dims = [*x.dims[:-1], columns]
    scales = _shaped(scales, (columns, blocks))
    zeros = None if zeros is None else _shaped(zeros, (columns, -(-blocks * bits // 8)))
    fine = x.dtype == "float16" and block >= 16 and depth % 8 == 0 and blocks * block * bits % 128 == 0
    if fine and _few(t, x):
        made = _gemv(t, device, (t.rows(x), codes, scales, zeros, bias), (bits, block, columns))
        return Operand(x.dtype, dims, t.reshape(made, dims))
    weight = t.force(_restored(t, (codes, scales, zeros), (bits, block, columns, depth), x.dtype))
    rows = t.rows(x)
    from planish.runtime.relax.cuda.device import TRANSPOSED

    count = rows.ty.shape[0]
    three = t.reshape(rows, [1, count, depth])
    made = device.batched(
        t, three, t.reshape(weight, [1, columns, depth]), [1, count, columns], x.dtype, 1.0, TRANSPOSED
    )
    flat = t.reshape(made, [count, columns])
    if bias is None:
        return Operand(x.dtype, dims, t.reshape(flat, dims))
    added = t.compute("bias", [flat, t.tensor(bias)], lambda i, a, b: a(*i) + b(i[1]), [count, columns], x.dtype)
    return Operand(x.dtype, dims, t.reshape(t.force(added), dims))


def _shaped(item: Operand, shape: tuple[int, int]) -> Operand:
    """A constant, which may be given flat, as a matrix."""
    assert item.array is not None
    if item.array.shape == shape:
        return item
    return Operand.constant(np.ascontiguousarray(item.array).reshape(shape), f"{item.name}.rows" if item.name else "")


def _few(t: Translator, x: Operand) -> bool:
    """Whether there are few rows: of a step one for each row of the batch, which is small."""
    known = t.product(x.dims[:-1])
    if isinstance(known, int):
        return known <= MOST_ROWS
    return x.rank > 2 and all(isinstance(size, int) and size == 1 for size in x.dims[1:-1])


def _gemv(t: Translator, device: CudaDevice, inputs: Sequence[Any], how: tuple[int, int, int]) -> Any:
    (rows, *weights, bias), (bits, block, columns) = inputs, how
    has_zeros = weights[2] is not None
    for few in (True, False):
        defines = kernel_macros(bits, few, zeros=has_zeros)
        form = int(few) + 2 * has_zeros
        device.ours.add(Code("gemv", 0, bits, form, "quantized_gemv.cu", tuple(sorted(defines.items()))))
    tensors = [t.tensor(item) for item in (*weights, bias) if item is not None]
    numbers = [bits, block, int(has_zeros), int(bias is not None)]
    out = t.type([rows.ty.shape[0], columns], str(rows.ty.dtype))
    return device.packed(t, "planish_quantized_gemv", [rows, *tensors, *numbers], [out])


def _restored(t: Translator, parts: Sequence[Operand | None], sizes: tuple[int, int, int, int], dtype: str) -> Lazy:
    """The weight (N, K) in float; computed in float32."""
    (codes, scales, zeros), (bits, block, columns, depth) = parts, sizes
    tir = t.tir
    inputs = [t.tensor(item) for item in (codes, scales, zeros) if item is not None]

    def code(byte: Any, place: Any) -> Any:
        wide = byte.astype("int32")
        if bits == 8:
            return wide
        return tir.bitwise_and(tir.shift_right(wide, tir.floormod(place, 2).astype("int32") * 4), 15)

    def element(i: Any, c: Any, s: Any, *z: Any) -> Any:
        at, within = tir.floordiv(i[1], block), tir.floormod(i[1], block)
        number = code(c(i[0], at, tir.floordiv(within * bits, 8)), within)
        middle = code(z[0](i[0], tir.floordiv(at * bits, 8)), at) if z else tir.IntImm("int32", 1 << (bits - 1))
        return (number - middle).astype("float32") * s(i[0], at).astype("float32")

    return t.compute("restore", inputs, element, [columns, depth], dtype)


@emits("GatherBlockQuantized", domain="com.microsoft")
def _gather(t: Translator, node: ir.Node) -> Operand:
    """Rows of a table (rows, …, codes), whose last axis is scaled by blocks."""
    from planish.runtime.relax.gathers import checked

    data, indices, scales, *rest = t.inputs(node)
    assert data is not None and indices is not None and scales is not None
    bits, block = int(attribute(node, "bits", 4)), int(attribute(node, "block_size", 128))
    last = data.rank - 1
    odd = attribute(node, "gather_axis", 0) or attribute(node, "quantize_axis", 1) != last or data.dtype != "uint8"
    if odd or bits not in (4, 8) or any(item is not None for item in rest):
        t.refuse(node, "codes of other bits or axes, or with zeros")
    t.require_float(node, scales)
    tir, rank = t.tir, indices.rank
    each = 8 // bits
    inner = [*data.dims[1:last], data.dims[last] * each]
    dims = [*indices.dims, *inner]
    rows = t.reshape(checked(t, node, indices, [data.dims[0]]), indices.dims or [1])

    def element(i: Any, at: Any, codes: Any, factors: Any) -> Any:
        row, middle, place = at(*(i[:rank] or [0])), i[rank:-1], i[-1]
        number = codes(row, *middle, tir.floordiv(place, each)).astype("int32")
        if bits == 4:
            number = tir.bitwise_and(tir.shift_right(number, tir.floormod(place, 2).astype("int32") * 4), 15)
        factor = factors(row, *middle, tir.floordiv(place, block)).astype("float32")
        return (number - (1 << (bits - 1))).astype("float32") * factor

    inputs = [rows, t.tensor(data), t.tensor(scales)]
    return Operand(scales.dtype, dims, t.compute("gather_blocks", inputs, element, dims, scales.dtype))
