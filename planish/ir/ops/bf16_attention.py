"""planish::FlashAttentionBf16 and FlashAttentionKeyMaskBf16: attention with operands of its products in bfloat16.

They are FlashAttention and FlashAttentionKeyMask but for precision: q, k and v are rounded to bfloat16, scores, softmax
and sums stay float32. A kernel may round the weights of the softmax too, which adds up to 2**-8 of each of them; the
body does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.ops.base import DialectOp
from planish.ir.ops.flash_attention import FLASH_ATTENTION, Body
from planish.ir.ops.key_mask_attention import KEY_MASK_ATTENTION, body_over

#: Operator → the one that it is in bfloat16.
IN_BF16 = {name: f"{name}Bf16" for name in ("FlashAttention", KEY_MASK_ATTENTION.name)}


def _of(op: DialectOp) -> DialectOp:
    schema = replace(
        op.schema, name=IN_BF16[op.name], doc=f"{op.schema.doc} q, k and v are rounded to bfloat16, sums are float32."
    )

    def body(opset: int) -> ir.Function:
        made = Body(schema, opset)
        q, k, v = (made.rounded(value) for value in list(made.values.values())[:3])
        return body_over(made, q, k, v) if "key_mask" in made.values else made.function(made.attend(q, k, v))

    def reference(
        q: np.ndarray, k: np.ndarray, v: np.ndarray, *more: np.ndarray, **settings: Any
    ) -> tuple[np.ndarray, ...]:
        import ml_dtypes

        operands = [np.asarray(a, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32) for a in (q, k, v)]
        return op.reference(*operands, *more, **settings)

    return DialectOp(schema, op.infer, body, reference, op.flops, min_opset=op.min_opset)


#: The family, by name.
BF16_ATTENTION: dict[str, DialectOp] = {
    made.name: made for made in map(_of, (FLASH_ATTENTION["FlashAttention"], KEY_MASK_ATTENTION))
}
