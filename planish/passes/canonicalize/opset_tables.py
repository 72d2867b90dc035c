"""Which standard operators keep their meaning from one opset to the next."""

from __future__ import annotations

# First version from which all versions to NEWEST keep the meaning: a later one merely widens types, or adds inputs or
# attributes whose default is the old behaviour.
_STABLE_FROM = {
    1: "Identity Transpose Shape Size Softplus Softsign LRN Conv ConvTranspose GlobalAveragePool GlobalMaxPool Gather "
    "DepthToSpace SpaceToDepth Constant If Loop ArgMax ArgMin Flatten MatMul MaxPool Not LpNormalization",
    4: "Concat",
    5: "Reshape",
    6: "Abs Ceil Exp Floor Neg Reciprocal Sqrt Tanh Sigmoid Log Elu Selu HardSigmoid LeakyRelu InstanceNormalization "
    "Relu Tile Max Min Sum Mean Cast",
    7: "Add Sub Mul Div Equal Greater Less And Or Xor Pow Sin Cos Tan Asin Acos Atan Gemm PRelu RNN GRU LSTM "
    "AveragePool",
    8: "Expand",
    9: "Erf IsNaN Sign NonZero Where EyeLike ConstantOfShape Scan MaxUnpool Sinh Cosh Asinh Acosh Atanh Shrink "
    "MeanVarianceNormalization TfIdfVectorizer StringNormalizer",
    10: "IsInf ThresholdedRelu Mod ReverseSequence Slice QLinearMatMul QLinearConv MatMulInteger ConvInteger "
    "NonMaxSuppression",
    11: "CumSum GatherElements ScatterElements ScatterND GatherND Round Det Range Unique Clip Pad OneHot Compress "
    "BitShift DynamicQuantizeLinear TopK LpPool SequenceAt SequenceConstruct SequenceEmpty "
    "SequenceErase SequenceInsert SequenceLength SplitToSequence ConcatFromSequence",
    12: "Celu Einsum GreaterOrEqual LessOrEqual Dropout NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    13: "Softmax LogSoftmax Hardmax Squeeze Unsqueeze ReduceSum QuantizeLinear DequantizeLinear Resize",
    14: "HardSwish Trilu BatchNormalization",
    15: "CastLike Optional OptionalGetElement OptionalHasElement",
    17: "LayerNormalization BlackmanWindow HammingWindow HannWindow MelWeightMatrix STFT SequenceMap",
    18: "Mish Split ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSumSquare BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Col2Im CenterCropPad",
    19: "DeformConv",
}
STABLE = {name: version for version, names in _STABLE_FROM.items() for name in names.split()}
REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
