"""Feed-forward blocks as 1×1 convolutions, which ONNX Runtime keeps in its blocked layout from end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_tensor, is_op
from planish.passes.base import Decline
from planish.passes.fusion.sizes import rank
from planish.passes.lowering.weights import is_matrix, is_vector
from planish.passes.pattern import Var
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass, Rule

_BLOCK = 8  # channels; ONNX Runtime's blocks are 8 (AVX2) or 16 (AVX-512) and it pads what is no multiple
_MOST_NODES = 8  # between the two products
_UNARY = ("Gelu", "Relu", "Sigmoid", "Tanh", "Mul")
# Where the positions of a product's input go, by its rank: the axes to add in front of the channels. A batch of
# sequences is one image, since the kernels go through each weight once for each image.
_ADDED = {2: [0, 1], 3: [0], 4: []}
_TO_FIRST, _TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


@register
@dataclass(frozen=True)
class LowerFeedForward(RewritePass):
    """Writes ``MatMul, activation, MatMul`` with constant weights (a gate beside it too) as 1×1 convolutions.

    Pointwise convolutions are the same products. ONNX Runtime runs them in blocks of channels (NCHWc), with the
    biases inside, and activations in between without leaving the layout: on one thread 1.1 to 1.2 times as fast as
    MatMul with BiasGelu for blocks of 768 and 3072 channels, and up to 1.4 times for few tokens
    (`benchmarks/feed_forward.py`). Single products gain nothing, and stay.

    In nets of images with normalized last axes (ConvNeXt) the Transposes around the block then meet and go away.

    Attributes:
        min_channels: blocks with fewer input channels than this are left alone.
    """

    name: ClassVar[str] = "lower-feed-forward"
    min_opset: ClassVar[int] = 13
    remove_nodes: ClassVar[bool] = False

    min_channels: int = 64

    def rules(self) -> Sequence[Rule]:
        # With the second bias first: it goes into the convolution.
        return [
            Rule("feed-forward-bias", _with_bias, self._rewrite, _check, self.min_opset, False),
            Rule("feed-forward", _plain, self._rewrite, _check, self.min_opset, False),
        ]

    def _rewrite(self, op: Any, match: Match) -> Any:
        block = _Block.behind(match["h"])
        assert block is not None
        second = match["product"].producer()
        match.nodes = (match.root, *([second] if second is not match.root else []), *block.nodes())
        _require_alone(match)
        x = block.x
        if x is None:
            raise Decline("the first products of the block read different values")
        dims = rank(x)
        if dims not in _ADDED:
            raise Decline(f"its input has rank {dims}; a convolution over images takes up to 4")
        weights = [*(leaf.weight for leaf in block.leaves.values()), match["w"]]
        _require_channels([w.const_value.shape.numpy() for w in weights], self.min_channels)
        image = op.Unsqueeze(x, _ADDED[dims]) if _ADDED[dims] else x
        pixels = op.Transpose(image, perm=_TO_FIRST)
        if x.shape is not None:
            whole = list(x.shape)
            for axis in _ADDED[dims]:
                whole.insert(axis, 1)
            pixels.shape = ir.Shape([whole[axis] for axis in _TO_FIRST])
        inner = block.build(op, pixels, match["h"])
        bias = match["bias"] if "bias" in match.values else None
        result = op.Transpose(_convolution(op, inner, match["w"], bias), perm=_TO_LAST)
        return op.Squeeze(result, _ADDED[dims]) if _ADDED[dims] else result


@dataclass
class _Leaf:
    """A first product of a block: ``x @ weight + bias``."""

    matmul: ir.Node
    weight: ir.Value
    bias: ir.Value | None = None
    add: ir.Node | None = None


@dataclass
class _Block:
    """What is between the input of a block and its last product.

    Attributes:
        leaves: value → the product that it is.
        inner: the elementwise nodes, each behind those that it needs.
    """

    leaves: dict[ir.Value, _Leaf] = field(default_factory=dict)
    inner: dict[ir.Node, None] = field(default_factory=dict)

    @classmethod
    def behind(cls, value: ir.Value) -> _Block | None:
        """The block that computes `value`, or None: it is no activation of products with weights."""
        block = cls()
        return block if block._collect(value) and block.inner else None

    def _collect(self, value: ir.Value | None) -> bool:
        node = value.producer() if value is not None else None
        if value is None or node is None or value in self.leaves or node in self.inner:
            return node is not None
        leaf = _leaf(node)
        if leaf is not None:
            self.leaves[value] = leaf
            return True
        gate = node.domain == "planish" and node.op_type == "SwiGLU"
        if not (gate or is_op(node, *_UNARY)) or len(self.inner) + len(self.leaves) >= _MOST_NODES:
            return False
        if not all(_is_number(v) or self._collect(v) for v in node.inputs):
            return False
        self.inner[node] = None
        return True

    @property
    def x(self) -> ir.Value | None:
        """What all first products read."""
        found = {leaf.matmul.inputs[0] for leaf in self.leaves.values()}
        return found.pop() if len(found) == 1 else None

    def nodes(self) -> list[ir.Node]:
        products = [n for leaf in self.leaves.values() for n in (leaf.add, leaf.matmul) if n is not None]
        return [*reversed(self.inner), *products]

    def build(self, op: Any, image: ir.Value, result: ir.Value) -> ir.Value:
        """The block over images; returns what stands for `result`."""
        new: dict[ir.Value, ir.Value] = {}
        for value, leaf in self.leaves.items():
            new[value] = _convolution(op, image, leaf.weight, leaf.bias)
        for node in self.inner:
            inputs = [new.get(v, v) for v in node.inputs]  # type: ignore[arg-type]
            call = getattr(op, node.op_type)
            made = call(*inputs, _domain=node.domain, **dict(node.attributes))
            shape = next(new[v].shape for v in node.inputs if v in new)
            made.shape = None if shape is None else shape.copy()
            made.type = next(new[v].type for v in node.inputs if v in new)
            new[node.outputs[0]] = made
        return new[result]


def _plain(op: Any) -> Any:
    h = Var("h", check=lambda _, value: _Block.behind(value) is not None)
    return op.MatMul(h, Var("w", check=is_matrix), _outputs=["product"])


def _with_bias(op: Any) -> Any:
    return op.Add(_plain(op), Var("bias", check=is_vector))


def _is_number(value: ir.Value | None) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and tensor.size == 1 and len(tensor.shape) < 2


def _leaf(node: ir.Node) -> _Leaf | None:
    if is_op(node, "MatMul") and is_matrix(None, node.inputs[1]):
        return _Leaf(node, node.inputs[1])  # type: ignore[arg-type]
    if not is_op(node, "Add"):
        return None
    for product, bias in (node.inputs, reversed(node.inputs)):
        matmul = product.producer() if product is not None else None
        if matmul is not None and is_op(matmul, "MatMul") and is_matrix(None, matmul.inputs[1]):
            if not is_vector(None, bias):
                return None
            return _Leaf(matmul, matmul.inputs[1], bias, node)  # type: ignore[arg-type]
    return None


def _check(match: Match) -> None:
    if match.target.name != "ort-cpu":
        raise Decline(f"target {match.target.name} has no blocked layout for convolutions")
    if match.dtype("w") != ir.DataType.FLOAT:
        raise Decline("it is not float32, which alone has blocked kernels")


def _require_alone(match: Match) -> None:
    """Declines where an inner value is needed outside, or a weight by another product."""
    nodes = set(match.nodes)
    for node in match.nodes[1:]:
        for value in node.outputs:
            others = [u for u in value.consumers() if u not in nodes]
            if others or value.is_graph_output():
                reader = f"by {others[0].op_type} '{others[0].name}'" if others else "as an output"
                raise Decline(f"inner value '{value.name}' is also used {reader}")
    for node in match.nodes:
        weight = node.inputs[1] if is_op(node, "MatMul") else None
        readers = [u for u in weight.consumers() if u is not node] if weight is not None else []
        if readers:
            name = weight.name if weight is not None else ""
            raise Decline(
                f"'{name}' is also read by {readers[0].op_type} '{readers[0].name}', and would be stored twice"
            )


def _require_channels(shapes: Sequence[Sequence[int]], least: int) -> None:
    sizes = sorted({int(n) for shape in shapes for n in shape})
    odd = [n for n in sizes if n % _BLOCK]
    if odd:
        raise Decline(f"{odd[0]} channels are no multiple of {_BLOCK}, and the layout would pad them")
    if sizes[0] < least:
        raise Decline(f"{sizes[0]} channels are fewer than {least}: moving them costs what the layout gains")


def _convolution(op: Any, image: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    tensor = constant_tensor(weight)
    assert tensor is not None
    kernel = np.ascontiguousarray(tensor.numpy().T)[:, :, None, None]
    operands = [image, op.initializer(kernel, name=f"{weight.name}_pointwise"), *([] if bias is None else [bias])]
    result: ir.Value = op.Conv(*operands, kernel_shape=[1, 1])
    if image.shape is not None:
        # ONNX Runtime multiplies a gate inside of its layout only if both are seen to have one shape.
        result.shape = ir.Shape([image.shape[0], kernel.shape[0], *image.shape[2:]])
    return result
