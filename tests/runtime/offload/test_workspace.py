"""What a piece takes while it runs: its inner values, and what nodes need inside."""

from __future__ import annotations

import pytest

from planish.ir.printer import parse_model
from planish.runtime.offload.workspace import workspace

MODEL = """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
g (float16[tokens, 40] x, uint8[64, 2, 16] codes, float16[64, 2] scales) => (float16[tokens, 64] y)
<float16[tokens, 64] b> {{
  a = Relu (x)
  b = {product}
  c = Sigmoid (b)
  y = Mul (c, c)
}}"""
PRODUCT = "com.microsoft.MatMulNBits <K = 40, N = 64, bits = 4, block_size = 32> (a, codes, scales)"


@pytest.mark.parametrize(
    ("tokens", "bytes"),
    [
        (5, 5 * (40 + 64) * 2 + 64 * 64 * 2),  # a, b, and the weight with its 40 columns in two blocks of 32
        (1, (40 + 64) * 2),  # one row reads the codes
    ],
)
def test_a_weight_is_restored(tokens, bytes):
    assert workspace(parse_model(MODEL.format(product=PRODUCT)), {"tokens": tokens}) == bytes


def test_inner_values_that_are_live_at_once():
    model = parse_model(MODEL.format(product="Concat <axis = 1> (a, a)").replace("[tokens, 64]", "[tokens, 80]"))
    assert workspace(model, {"tokens": 3}) == 3 * (40 + 80) * 2
