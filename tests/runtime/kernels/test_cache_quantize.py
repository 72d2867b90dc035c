"""The caches of prompts in 8 bits: kernel, operator inside ONNX Runtime and definition give the same codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

pytest.importorskip("tvm")

from planish.ir.errors import UnsupportedError
from planish.ir.ops import import_functions
from planish.ir.ops.cache_attention import quantize
from planish.ir.printer import parse_model
from planish.runtime.kernels.cache_attention_ops import QuantizeCacheKernel
from planish.runtime.kernels.cache_quantize import QuantizeCache
from planish.runtime.kernels.cpu import LEVELS, detect
from planish.runtime.kernels.library import library_for
from planish.runtime.kernels.template import aligned, function


def arrays(batch: int, tokens: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([tokens, size])
    x = rng.standard_normal((batch, 3, tokens, size)).astype("f4") * rng.exponential(size=size).astype("f4")
    if tokens > 1:
        x[0, 0, 1] = 0
    return x, rng.uniform(0.1, 9, (3, size)).astype("f4")


@pytest.mark.parametrize("level", ["avx512", "avx2"])
@pytest.mark.parametrize("size", [8, 40])
def test_kernel(size: int, level: str) -> None:
    if detect(level) is None:
        pytest.skip(f"the processor lacks {level}")
    kernel = QuantizeCache(size)
    run = function(kernel, LEVELS[level])
    for batch, tokens in ((1, 1), (2, 37)):
        given = [aligned(a) for a in arrays(batch, tokens, size)]
        codes = aligned(np.full(given[0].shape, 99, np.int8))
        scales = aligned(np.full(given[0].shape[:3], np.nan, np.float32))
        run(*given, codes, scales)
        for found, want in zip((codes, scales), kernel.reference(*given), strict=True):
            np.testing.assert_array_equal(found, want)


def model_of(size: int | str) -> ir.Model:
    model = parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g (float[B, 3, S, {size}] x, float[3, {size}] c) => (int8[B, 3, S, {size}] y, float[B, 3, S, 1] s) {{
          y, s = planish.QuantizeCache (x, c)
        }}
        """
    )
    import_functions(model)
    return model


def test_operator() -> None:
    model = model_of(24)
    try:
        library = library_for([model])
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert library is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(library.path))
    for value in model.graph.inputs:
        value.shape = ir.Shape([None] * len(value.shape or ()))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    for batch, tokens in ((1, 1), (2, 300), (2, 0)):
        x, c = arrays(batch, tokens, 24)
        for found, want in zip(session.run(None, {"x": x, "c": c}), quantize(x, c), strict=True):
            np.testing.assert_array_equal(found, want)
    with pytest.raises(Exception, match="channels are 2 by 24; x has 3 heads of size 24"):
        session.run(None, {"x": x, "c": c[:2]})


def test_no_kernel_where_there_is_none() -> None:
    for size in ("D", 12):
        assert QuantizeCacheKernel.of("QuantizeCache", [next(iter(model_of(size).graph))]) is None
    with pytest.raises(ValueError, match="multiple of 8"):
        QuantizeCache(12)
