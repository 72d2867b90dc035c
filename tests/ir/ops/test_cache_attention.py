"""planish::QuantizeCache and CacheAttention: definitions against plain arithmetic, bodies, inference."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.infer import infer_shapes
from planish.ir.ops import QUANTIZE_CACHE, InferenceError, TensorInfo, import_functions
from planish.ir.ops.cache_attention import CACHE_ATTENTION, CACHE_ATTENTION_FLOAT16, UNLIMITED, quantize, step_over
from planish.ir.printer import parse_model
from planish.ir.verify import verify_model

PROMPT = """
<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
g (float[B, 2, S, 5] x, float[2, 5] c) => (int8[B, 2, S, 5] y, float[B, 2, S, 1] s) {
  y, s = planish.QuantizeCache (x, c)
}
"""


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(0, 3), tokens=st.integers(0, 9), size=st.sampled_from([1e-3, 1, 1e4]), seed=st.integers(0, 99))
def test_codes_are_within_half_a_step(batch: int, tokens: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (size * rng.standard_normal((batch, 2, tokens, 5))).astype("f4")
    channels = rng.uniform(0.1, 9, (2, 5)).astype("f4")
    codes, scales = quantize(x, channels)
    assert codes.dtype == np.int8 and scales.shape == (batch, 2, tokens, 1)
    divided = x.astype(np.float64) / channels[:, None]
    assert (np.abs(codes * scales.astype(np.float64) - divided) <= 0.5001 * scales).all()
    assert not codes.size or np.abs(codes).max(-1).min() == 127


def test_the_body_of_a_prompt() -> None:
    model = parse_model(PROMPT)
    infer_shapes(model)
    verify_model(model, full=True)
    import_functions(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for batch, tokens in ((1, 1), (3, 17), (2, 2)):
        x, c = rng.standard_normal((batch, 2, tokens, 5)).astype("f4"), rng.uniform(0.1, 9, (2, 5)).astype("f4")
        if tokens > 1:
            x[0, 0, 1] = 0
        for have, want in zip(session.run(None, {"x": x, "c": c}), QUANTIZE_CACHE.reference(x, c), strict=True):
            assert have.dtype == want.dtype
            np.testing.assert_array_equal(have, want)


def test_a_step_is_attention() -> None:
    """Against a plain loop over heads, with the numbers that the codes stand for."""
    rng = np.random.default_rng(1)
    q, channels = rng.standard_normal((2, 2, 3, 8)), rng.uniform(0.5, 2, (2, 8))
    codes = [rng.integers(-127, 128, (2, 2, 6, 8)).astype(np.int8) for _ in "kv"]
    scales = [rng.uniform(0.01, 0.03, (2, 2, 6, 1)) for _ in "kv"]
    lengths = np.array([5, 2])
    for window in (UNLIMITED, 2):
        found = step_over(q, (*codes, *scales), lengths, channels, 0.3, window)
        for b in range(2):
            seen = slice(max(0, lengths[b] + 1 - window), lengths[b] + 1)
            for h in range(2):
                k = (codes[0] * scales[0])[b, h, seen] * channels[h]
                v = (codes[1] * scales[1])[b, h, seen]
                weights = np.exp(0.3 * q[b, h] @ k.T)
                np.testing.assert_allclose(found[b, h], weights / weights.sum(-1, keepdims=True) @ v, rtol=1e-12)


def infer(**changed: tuple[int | str, ...]) -> list[tuple[object, ...] | None]:
    shapes: dict[str, tuple[int | str, ...]] = {
        "q": ("B", 1, 32), "k": ("B", 1, 16), "v": ("B", 1, 16), "key": ("B", 2, "C", 8), "value": ("B", 2, "C", 8),
        "key_scale": ("B", 2, "C", 1), "value_scale": ("B", 2, "C", 1), "lengths": ("B",), "channels": (2, 8),
    }  # fmt: skip
    inputs = [TensorInfo(None, dims) for dims in (shapes | changed).values()]
    attributes = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 1.0, "window": UNLIMITED}
    return [info.dims for info in CACHE_ATTENTION.infer(inputs, attributes)]


def test_shapes() -> None:
    cache, scales = ("B", 2, "C", 8), ("B", 2, "C", 1)
    assert infer() == [("B", 1, 32), cache, cache, scales, scales]
    half = [TensorInfo(None, d) for d in (("B", 1, 32), ("B", 1, 16), None, None, ("B", 2, "C", 8), ("B",))]
    attributes = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 1.0, "window": 5}
    assert [info.dims for info in CACHE_ATTENTION_FLOAT16.infer(half, attributes)] == [("B", 1, 32), cache, cache]
    with pytest.raises(InferenceError, match="window is 0"):
        CACHE_ATTENTION_FLOAT16.infer(half, attributes | {"window": 0})
    for changed, message in (
        ({"q": ("B", 2, 32)}, "q: tokens"),
        ({"q": ("B", 1, 40)}, "its last axis, 4 heads of size 8"),
        ({"value": ("B", 3, "C", 8)}, "past_value, axis 1"),
        ({"key_scale": ("B", 2, "C", 8)}, "past_key_scale, axis 3"),
        ({"key_scale": ("B", 2, "C")}, "past_key_scale has rank 3"),
        ({"channels": (2, 9)}, "channels and size of a head"),
    ):
        with pytest.raises(InferenceError, match=message):
            infer(**changed)
