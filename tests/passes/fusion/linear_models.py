"""Models with one product with weights and something behind it, at random weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper


def model(
    nodes: Sequence[str],
    weights: dict[str, np.ndarray],
    x: Sequence[str | int],
    outputs: Sequence[str] = ("y",),
    opset: int = 20,
    dtype: int = TensorProto.FLOAT,
    inputs: dict[str, Sequence[str | int]] | None = None,
) -> ir.Model:
    """A model from lines such as ``y = Conv<group=2>(x, w)``; attributes are Python literals."""
    import onnx

    lines = "\n".join(nodes)
    header = f'<ir_version: 10, opset_import: ["" : {opset}]> g () => () {{ {lines} }}'
    parsed = onnx.parser.parse_model(header)
    graph = parsed.graph
    for name, dims in {"x": x, **(inputs or {})}.items():
        graph.input.append(helper.make_tensor_value_info(name, dtype, list(dims)))
    graph.output.extend(helper.make_tensor_value_info(name, dtype, None) for name in outputs)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    graph.initializer.extend(
        numpy_helper.from_array(a.astype(kind) if a.dtype.kind == "f" else a, n) for n, a in weights.items()
    )
    inferred = onnx.shape_inference.infer_shapes(parsed, strict_mode=True)
    return ir.from_proto(inferred)


def normal(*dims: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(dims)).standard_normal(dims).astype(np.float32)


def statistics(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters of a BatchNormalization: scale, shift, mean, variance."""
    rng = np.random.default_rng(seed)
    names = ("g", "s", "m", "v")
    arrays = (1 + 0.3 * normal(count), normal(count), normal(count, seed=3), rng.uniform(0.2, 2, count))
    return {n: np.asarray(a, np.float32) for n, a in zip(names, arrays, strict=True)}
