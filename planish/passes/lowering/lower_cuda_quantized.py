"""Products of a few rows with weights in 4 or 8 bits as operators for which there are CUDA kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.ir.graphs import constant_tensor
from planish.ir.ops import DIALECT_DOMAIN
from planish.ir.ops.quantized_linear import BLOCK, quantized_linear
from planish.ir.ops.quantized_swiglu import quantized_swiglu
from planish.passes.base import Decline
from planish.passes.registry import register
from planish.passes.rewrite import DialectRewritePass, Match, Rule

_X, _CODES, _SCALES, _ZEROS, _ORDER, _BIAS = range(6)


@register
@dataclass(frozen=True)
class LowerCudaQuantized(DialectRewritePass):
    """Replaces com.microsoft's MatMulNBits in float16 by planish::QuantizedLinear4 and relatives, for few rows.

    A step of decoding reads every weight for the rows of a batch, and the kernel is near the time that takes: on an
    H100 1.2 to 1.5 times as fast as MatMulNBits for one row, 2 to 5 times for eight. For many rows, as prompts have,
    that restores the weight in float16 and multiplies, and stays; the two operators read the same initializers, so that
    a weight is stored once. Sums are float32 here, and for few rows float16 there.

    Attributes:
        rows: the most that are worth it. The kernel reads the weight once for each eight of them. Where the batch is
            known only when the model runs, that of the calibration inputs is asked.
    """

    rows: int = 16

    name: ClassVar[str] = "lower-cuda-quantized"
    min_opset: ClassVar[int] = 18

    def rules(self) -> Sequence[Rule]:
        """Products, and then two of one value with the gate behind them."""
        gates = [Rule(f"gate-{bits}", _gate(bits), _rewrite_gate, _check_gate, self.min_opset) for bits in (4, 8)]
        return [Rule("product", _product, _rewrite, self._check, self.min_opset), *gates]

    def _check(self, match: Match) -> None:
        if match.target.name != "ort-cuda" or not match.target.kernels:
            raise Decline(f"target '{match.target}' has no kernel for it; 'ort-cuda:kernels' has")
        if match.dtype("x") != ir.DataType.FLOAT16:
            raise Decline("it is not in float16")
        inputs = _inputs(match)
        if inputs[_ORDER] is not None:
            raise Decline("its columns are in an order of their own (g_idx)")
        for index, value in enumerate(inputs[1:], 1):
            if value is not None and not match.is_constant(value):
                raise Decline(f"its input {index} is computed when the model runs")
        zeros = constant_tensor(inputs[_ZEROS])
        if zeros is not None and zeros.dtype != ir.DataType.UINT8:
            raise Decline("its zeros are numbers of float16")
        bits, block, depth = _settings(match)
        if bits not in (4, 8):
            raise Decline(f"its codes have {bits} bits; there are kernels for 4 and 8")
        if block < 16 or block & (block - 1) or depth % 8 or -(-depth // block) * block * bits % 128:
            raise Decline(f"{depth} columns in blocks of {block}: kernels read 16 bytes at a time")
        self._check_rows(match)

    def _check_rows(self, match: Match) -> None:
        shape = match.shape("x")
        if not shape:
            raise Decline("the shape of its input is unknown")
        batch, *others = shape[:-1] or (1,)
        if not all(isinstance(n, int) for n in others) or (not isinstance(batch, int) and not others):
            raise Decline("how many rows it has is known only when the model runs, and prompts have many")
        if not isinstance(batch, int):
            batch = match.program.sizes().get(batch or "", 1)
        rows = batch * math.prod(n for n in others if isinstance(n, int))
        if rows > self.rows:
            raise Decline(f"it has {rows} rows, and the kernel pays for {self.rows} at most")


def _product(op: Any, x: Any) -> Any:
    return op.MatMulNBits(x, _domain="com.microsoft", _allow_other_inputs=True, _allow_other_attributes=True)


def _rewrite(op: Any, match: Match, x: ir.Value) -> Any:
    inputs = _inputs(match)
    zeros, bias = inputs[_ZEROS], inputs[_BIAS]
    bits, block, _ = _settings(match)
    name = quantized_linear(bits, zeros is not None, bias is not None)
    given = [value for value in (x, inputs[_CODES], inputs[_SCALES], zeros, bias) if value is not None]
    return getattr(op, name)(*given, _domain=DIALECT_DOMAIN, **{BLOCK: block})


def _gate(bits: int) -> Callable[..., Any]:
    name = quantized_linear(bits, False, False)

    def pattern(op: Any, x: Any, gate_codes: Any, gate_scales: Any, up_codes: Any, up_scales: Any) -> Any:
        gate, up = (
            getattr(op, name)(x, *weight, _domain=DIALECT_DOMAIN, _allow_other_attributes=True)
            for weight in ((gate_codes, gate_scales), (up_codes, up_scales))
        )
        return op.SwiGLU(gate, up, _domain=DIALECT_DOMAIN)

    return pattern


def _check_gate(match: Match) -> None:
    if match.target.name != "ort-cuda":
        raise Decline(f"target '{match.target}' has no kernel for it; 'ort-cuda:kernels' has")
    blocks = {node.attributes.get_int(BLOCK, 0) for node in _products(match)}
    if len(blocks) > 1 or match.shape("gate_codes") != match.shape("up_codes"):
        raise Decline("the weights of the gate and of what it scales differ in blocks or in size")


def _rewrite_gate(op: Any, match: Match) -> Any:
    names = ("x", "gate_codes", "gate_scales", "up_codes", "up_scales")
    node = _products(match)[0]
    made = getattr(op, quantized_swiglu(4 if "4" in node.op_type else 8))
    block = node.attributes.get_int(BLOCK, 0)
    return made(*(match[name] for name in names), _domain=DIALECT_DOMAIN, **{BLOCK: block})


def _products(match: Match) -> list[ir.Node]:
    return [node for value in match.root.inputs if value is not None and (node := value.producer()) is not None]


def _inputs(match: Match) -> list[ir.Value | None]:
    inputs = list(match.root.inputs)
    return inputs + [None] * (_BIAS + 1 - len(inputs))


def _settings(match: Match) -> tuple[int, int, int]:
    """Bits, numbers of a block, columns."""
    attributes = match.root.attributes
    return attributes.get_int("bits", 4), attributes.get_int(BLOCK, 0), attributes.get_int("K", 0)
