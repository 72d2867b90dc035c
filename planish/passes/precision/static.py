"""Products and convolutions in 8 bits with ranges that were calibrated: pairs of QuantizeLinear and DequantizeLinear.

ONNX Runtime makes integer kernels of what stands between such pairs. An activation has one pair, which all who read it
share; sums and pools between quantized activations are quantized too, so that a residual network stays in 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.ir.graphs import constant_tensor, is_op
from planish.passes.canonicalize.editing import Editor
from planish.passes.precision.products import Product
from planish.passes.precision.ranges import Range

#: Activations that ONNX Runtime takes into the convolution before them, since their range starts at zero.
_ACTIVATIONS = ("Relu",)
#: Operators that stay in 8 bits between quantized activations, and those whose codes are those of their input.
_BETWEEN, _SAME = ("Add", "GlobalAveragePool", "AveragePool"), ("MaxPool",)
Site = Product | ir.Node
Values = dict[ir.Value, None]


def is_convolution(node: ir.Node) -> bool:
    """Whether a node is a float32 Conv whose weight, and bias if any, are constants."""
    if not is_op(node, "Conv"):
        return False
    tensors = [constant_tensor(value) for value in node.inputs[1:] if value is not None]
    return all(tensor is not None and tensor.dtype == ir.DataType.FLOAT for tensor in tensors)


def activations(graph: ir.Graph, sites: list[Site]) -> tuple[Values, dict[ir.Value, ir.Value]]:
    """The values to quantize, in order; and those whose range is that of another value."""
    found: Values = {}
    same: dict[ir.Value, ir.Value] = {}
    for site in sites:
        if isinstance(site, Product):
            found[site.x] = None
        else:
            assert site.inputs[0] is not None
            found[site.inputs[0]] = None
            found[_behind(site)] = None
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if is_op(node, *_BETWEEN, *_SAME) and inputs and all(value in found for value in inputs):
            out = _behind(node)
            found[out] = None
            if is_op(node, *_SAME) and out is node.outputs[0]:
                same[out] = same.get(inputs[0], inputs[0])
    return found, same


def _behind(node: ir.Node) -> ir.Value:
    """The output of a node, or of the activation that alone reads it."""
    out = node.outputs[0]
    readers = list(out.consumers())
    if len(readers) == 1 and not out.is_graph_output() and is_op(readers[0], *_ACTIVATIONS):
        out = readers[0].outputs[0]
    return out


def put_pairs(editor: Editor, graph: ir.Graph, ranges: dict[ir.Value, Range]) -> dict[ir.Value, ir.Value]:
    """Value → itself as its codes stand for it; all that read a value read that."""
    made = {}
    for value, chosen in ranges.items():
        users = list(value.uses())
        scale = editor.constant(graph, np.array(chosen.scale, np.float32), f"{value.name}_scale")
        zero = editor.constant(graph, np.array(chosen.zero, np.uint8), f"{value.name}_zero")
        quantize = ir.node("QuantizeLinear", [value, scale, zero])
        restore = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
        for node, what in ((quantize, "codes"), (restore, "quantized")):
            node.name = node.outputs[0].name = editor.names.fresh(f"{value.name}_{what}")
            node.outputs[0].shape = value.shape
        quantize.outputs[0].type, restore.outputs[0].type = ir.TensorType(ir.DataType.UINT8), value.type
        producer = value.producer()
        if producer is None or producer.graph is not graph:
            graph.insert_before(graph[0], [quantize, restore])
        else:
            graph.insert_after(producer, [quantize, restore])
        for user, index in users:
            user.replace_input_with(index, restore.outputs[0])
        made[value] = restore.outputs[0]
    return made


def put_weight(
    editor: Editor, graph: ir.Graph, node: ir.Node, scale: float, codes: Callable[[npt.NDArray[np.float32], int], Codes]
) -> None:
    """The weight of a Conv as int8 with a scale for each output, and its bias as the int32 that it is added to."""
    weight = constant_tensor(node.inputs[1])
    assert weight is not None
    numbers, scales = codes(weight.numpy(), 0)
    stem = weight.name or "weight"
    node.replace_input_with(1, _restored(editor, graph, node, numbers, scales, stem))
    bias = constant_tensor(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        steps = (scales * np.float32(scale)).astype(np.float32)
        whole = np.clip(np.rint(bias.numpy().astype(np.float64) / steps), -(2.0**31), 2.0**31 - 1).astype(np.int32)
        node.replace_input_with(2, _restored(editor, graph, node, whole, steps, bias.name or "bias"))


Codes = tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]


def _restored(
    editor: Editor,
    graph: ir.Graph,
    node: ir.Node,
    numbers: npt.NDArray[np.generic],
    scales: npt.NDArray[np.float32],
    stem: str,
) -> ir.Value:
    inputs = [editor.constant(graph, numbers, f"{stem}_codes"), editor.constant(graph, scales, f"{stem}_scales")]
    restore = ir.node("DequantizeLinear", inputs, {"axis": 0})
    restore.name = restore.outputs[0].name = editor.names.fresh(f"{stem}_quantized")
    restore.outputs[0].type, restore.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(numbers.shape)
    graph.insert_before(node, restore)
    return restore.outputs[0]
