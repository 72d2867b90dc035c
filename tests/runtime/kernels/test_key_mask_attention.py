"""planish::FlashAttentionKeyMask: its body, its kernel and its reference against each other, blind queries included."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.ops.key_mask_attention import KEY_MASK_ATTENTION
from planish.ir.target import Target
from planish.runtime.ort import compile_ort

pytest.importorskip("tvm")

LOWEST, LOW = float(np.finfo(np.float32).min), -3.3e38
HEADS = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3}


def model(is_causal: int, hidden: float) -> ir.Model:
    text = (
        '<ir_version: 10, opset_import: ["" : 23, "planish" : 1]> g (float[b, s, 32] q, float[b, t, 16] k, '
        "float[b, t, 16] v, bool[m, 1, 1, n] mask) => (float[b, s, 32] y) { y = planish.FlashAttentionKeyMask "
        f"<q_num_heads = 4, kv_num_heads = 2, scale = 0.3, is_causal = {is_causal}, hidden_score = {hidden!r}>"
        "(q, k, v, mask) }"
    )
    return ir.from_onnx_text(text)


@pytest.mark.parametrize("hidden", [LOWEST, LOW])
@pytest.mark.parametrize("is_causal", [0, 1])
def test_body_kernel_and_reference_agree(is_causal: int, hidden: float) -> None:
    random = np.random.default_rng(7)
    made = model(is_causal, hidden)
    runners = [compile_ort(made, Target.parse(target)) for target in ("ort-cpu", "ort-cpu:kernels")]
    assert [runner.library is not None for runner in runners] == [False, True]
    for batch, queries, keys in ((1, 1, 1), (3, 5, 5), (2, 70, 70), (2, 9, 33), (2, 33, 9), (1, 0, 4), (3, 200, 131)):
        q = random.normal(size=(batch, queries, 32)).astype("f4")
        k, v = (random.normal(size=(batch, keys, 16)).astype("f4") for _ in range(2))
        padded = np.arange(keys) >= random.integers(0, keys + 1, (batch, 1))  # on the left, up to all of them
        for mask in (padded, ~padded, random.random((batch, keys)) < 0.5, padded[:1], np.array([[False]])):
            feeds = {"q": q, "k": k, "v": v, "mask": mask[:, None, None, :]}
            (expected,) = KEY_MASK_ATTENTION.reference(
                q, k, v, feeds["mask"], **HEADS, is_causal=is_causal, hidden_score=hidden
            )
            for runner in runners:
                assert np.allclose(runner.run(feeds)["y"], expected, rtol=1e-5, atol=2e-6)


def test_a_mask_of_another_form_is_refused() -> None:
    runner = compile_ort(model(0, LOW), Target.parse("ort-cpu:kernels"))
    ones = np.ones((2, 3, 32), np.float32)
    feeds = {"q": ones, "k": ones[..., :16], "v": ones[..., :16], "mask": np.ones((2, 1, 1, 4), bool)}
    with pytest.raises(Exception, match="axis 3 of 4 of the mask has size 4; it must be 1 or 3"):
        runner.run(feeds)
