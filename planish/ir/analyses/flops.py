"""Floating point operations of one node, by operator. A multiply and an add are two.

Figures per element of transcendental functions are those of usual polynomial implementations; they only order
operators by weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from planish.ir.analyses.sizes import Sizes
from planish.ir.blocks import op_name


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


Rule = Callable[[ir.Node, Sizes], int]

#: Operations for each element of output 0.
_PER_OUTPUT = {
    1: "Add Sub Mul Div Neg Abs Min Max Relu Sqrt Reciprocal Ceil Floor Round Sign Clip Mod Not And Or Xor Equal "
    "Greater GreaterOrEqual Less LessOrEqual Where IsNaN IsInf BitShift BitwiseAnd BitwiseOr BitwiseXor BitwiseNot "
    "PRelu LeakyRelu ThresholdedRelu Sum Mean CumSum Trilu Shrink com.microsoft::AllReduce",
    4: "Exp Log Pow HardSigmoid HardSwish BatchNormalization QuantizeLinear DequantizeLinear Sin Cos "
    "DynamicQuantizeLinear FusedConvAdd",
    6: "Sigmoid Softplus Softsign Elu Selu Celu Tan RotaryEmbedding com.microsoft::RotaryEmbedding",
    8: "Tanh Erf Swish Mish Softmax LogSoftmax Hardmax Asin Acos Atan Sinh Cosh Asinh Acosh Atanh "
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization com.microsoft::SimplifiedLayerNormalization "
    "InstanceNormalization GroupNormalization MeanVarianceNormalization LpNormalization com.microsoft::QuickGelu",
    10: "Gelu com.microsoft::Gelu com.microsoft::FastGelu com.microsoft::BiasGelu "
    "com.microsoft::SkipLayerNormalization "
    "com.microsoft::SkipSimplifiedLayerNormalization com.microsoft::BiasSplitGelu com.microsoft::BiasSoftmax",
}
#: Operations for each element of input 0.
_PER_INPUT = {
    1: "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ArgMax ArgMin GlobalAveragePool GlobalMaxPool "
    "NonZero Unique",
    2: "ReduceL2 ReduceSumSquare LpPool GlobalLpPool",
    5: "ReduceLogSum ReduceLogSumExp TopK",
}
#: Only move or describe data.
MOVES = _words(
    "Cast CastLike Transpose Concat Slice Gather GatherElements GatherND ScatterElements ScatterND Scatter "
    "Expand Tile Pad Split Dropout ConstantOfShape Range OneHot EyeLike DepthToSpace SpaceToDepth "
    "ReverseSequence Compress Resize Upsample If Loop Scan SequenceAt SequenceConstruct SequenceInsert "
    "SequenceErase SequenceEmpty SequenceLength SplitToSequence ConcatFromSequence Optional OptionalGetElement "
    "OptionalHasElement RandomNormal RandomUniform RandomNormalLike RandomUniformLike Bernoulli BitCast "
    "TensorScatter"
)
#: Views: nothing is read or written.
VIEWS = _words("Reshape Squeeze Unsqueeze Flatten Identity Shape Size Constant")


class Unknown(Exception):
    """The operations of this node can not be told."""


def node_flops(node: ir.Node, sizes: Sizes) -> int:
    """Floating point operations of `node`.

    Raises:
        Unknown: no rule for the operator, or a size that the rule needs is not known.
    """
    name = op_name(node)
    if name in VIEWS or name in MOVES:
        return 0
    rule = _RULES.get(name)
    if rule is None:
        raise Unknown(name)
    return rule(node, sizes)


def _shape(sizes: Sizes, node: ir.Node, index: int, *, output: bool = False) -> tuple[int, ...]:
    operands = node.outputs if output else node.inputs
    shape = sizes.shape(operands[index]) if index < len(operands) else None
    if shape is None:
        raise Unknown(f"{node.op_type}: {'output' if output else 'input'} {index} has no known size")
    return shape


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else int(attribute.value)


def _per_output(count: int) -> Rule:
    return lambda node, sizes: count * math.prod(_shape(sizes, node, 0, output=True))


def _per_input(count: int) -> Rule:
    return lambda node, sizes: count * math.prod(_shape(sizes, node, 0))


def _matmul(node: ir.Node, sizes: Sizes) -> int:
    left = _shape(sizes, node, 0)
    inner = left[-1]
    if _int(node, "transA", 0) and len(left) > 1:
        inner = left[-2]
    return 2 * inner * math.prod(_shape(sizes, node, 0, output=True))


def _gemm(node: ir.Node, sizes: Sizes) -> int:
    left, out = _shape(sizes, node, 0), math.prod(_shape(sizes, node, 0, output=True))
    inner = left[0] if _int(node, "transA", 0) else left[-1]
    bias = out if len(node.inputs) > 2 and node.inputs[2] is not None else 0
    return 2 * inner * out + bias


def _conv(weight: int, bias: int) -> Rule:
    def rule(node: ir.Node, sizes: Sizes) -> int:
        kernel, out = _shape(sizes, node, weight), math.prod(_shape(sizes, node, 0, output=True))
        has_bias = len(node.inputs) > bias and node.inputs[bias] is not None
        return 2 * out * math.prod(kernel[1:]) + (out if has_bias else 0)

    return rule


def _conv_transpose(node: ir.Node, sizes: Sizes) -> int:
    kernel = _shape(sizes, node, 1)
    return 2 * math.prod(_shape(sizes, node, 0)) * math.prod(kernel[1:])


def _pool(node: ir.Node, sizes: Sizes) -> int:
    kernel = node.attributes.get("kernel_shape")
    return math.prod(kernel.value if kernel is not None else ()) * math.prod(_shape(sizes, node, 0, output=True))


def _rnn(gates: int) -> Rule:
    def rule(node: ir.Node, sizes: Sizes) -> int:
        steps, batch, inputs = _shape(sizes, node, 0)
        directions, _, hidden = _shape(sizes, node, 2)
        return 2 * steps * batch * directions * gates * hidden * (inputs + hidden)

    return rule


def _einsum(node: ir.Node, sizes: Sizes) -> int:
    equation = node.attributes["equation"].value.replace(" ", "")
    if "." in equation:
        raise Unknown("Einsum with an ellipsis")
    letters: dict[str, int] = {}
    for index, term in enumerate(equation.split("->")[0].split(",")):
        letters |= dict(zip(term, _shape(sizes, node, index), strict=True))
    return max(len(node.inputs), 1) * math.prod(letters.values())


def _scores(batch: int, heads: int, queries: int, keys: int, width: int, value_width: int) -> int:
    """QKᵀ, softmax, and the product with V."""
    return batch * heads * queries * keys * (2 * width + 8 + 2 * value_width)


def _attention(node: ir.Node, sizes: Sizes) -> int:
    """The standard operator: [batch, heads, length, width], or [batch, length, heads * width] with head counts."""
    q, k, v = (_shape(sizes, node, i) for i in range(3))
    if len(q) == 3:
        heads, kv_heads = _int(node, "q_num_heads", 1), _int(node, "kv_num_heads", 1)
        q = (q[0], heads, q[1], q[2] // heads)
        k = (k[0], kv_heads, k[1], k[2] // kv_heads)
        v = (v[0], kv_heads, v[1], v[2] // kv_heads)
    past = _shape(sizes, node, 4)[2] if len(node.inputs) > 4 and node.inputs[4] is not None else 0
    return _scores(q[0], q[1], q[2], k[2] + past, q[3], v[3])


def _multi_head(key: int, heads_name: str = "num_heads") -> Rule:
    def rule(node: ir.Node, sizes: Sizes) -> int:
        query, heads = _shape(sizes, node, 0), _int(node, heads_name, 1)
        if len(query) != 3 or len(node.inputs) <= key or node.inputs[key] is None:
            raise Unknown(f"{node.op_type} with packed inputs")
        keys = _shape(sizes, node, key)
        width = query[2] // heads
        return _scores(query[0], heads, query[1], keys[-2], width, width)

    return rule


def _packed_attention(node: ir.Node, sizes: Sizes) -> int:
    """com.microsoft::Attention: the projection of Q, K and V is part of the operator."""
    batch, length, hidden = _shape(sizes, node, 0)
    columns, heads = _shape(sizes, node, 1)[1], _int(node, "num_heads", 1)
    width = columns // 3 // heads
    return 2 * batch * length * hidden * columns + _scores(batch, heads, length, length, width, width)


def _nbits(node: ir.Node, sizes: Sizes) -> int:
    return 2 * _int(node, "K", 1) * math.prod(_shape(sizes, node, 0, output=True))


_RULES: dict[str, Rule] = {
    **{op: _per_output(count) for count, names in _PER_OUTPUT.items() for op in names.split()},
    **{op: _per_input(count) for count, names in _PER_INPUT.items() for op in names.split()},
    **dict.fromkeys(
        (
            "MatMul",
            "MatMulInteger",
            "QLinearMatMul",
            "com.microsoft::FusedMatMul",
            "com.microsoft::MatMulIntegerToFloat",
        ),
        _matmul,
    ),
    "com.microsoft::DynamicQuantizeMatMul": _matmul,
    "com.microsoft::MatMulNBits": _nbits,
    "Gemm": _gemm,
    "com.microsoft::FusedGemm": _gemm,
    "Conv": _conv(1, 2),
    "ConvInteger": _conv(1, 99),
    "QLinearConv": _conv(3, 8),
    "com.microsoft::FusedConv": _conv(1, 2),
    "ConvTranspose": _conv_transpose,
    "AveragePool": _pool,
    "MaxPool": _pool,
    "RNN": _rnn(1),
    "GRU": _rnn(3),
    "LSTM": _rnn(4),
    "Einsum": _einsum,
    "Attention": _attention,
    "com.microsoft::Attention": _packed_attention,
    "com.microsoft::MultiHeadAttention": _multi_head(1),
    "com.microsoft::GroupQueryAttention": _multi_head(1),
}
