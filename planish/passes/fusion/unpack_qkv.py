"""Products of which each part goes its own way, such as queries, keys and values from one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.passes.base import Decline
from planish.passes.fusion.sizes import contents, sizes
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass, Rule

_PARTS = (("a", "b"), ("a", "b", "c"))


@register
@dataclass(frozen=True)
class UnpackQkv(RewritePass):
    """Replaces ``Split(MatMul(x, W) + bias)`` over the columns by products with the columns of each part.

    The split copies what the product has just written. Queries, keys and values of 768 columns without it are, with
    their attention, 1.02 times as fast at 128 tokens and 1.07 times at 512; up to 32 tokens there is no difference
    beyond noise (`benchmarks/fused_kernels.py`). One row, where each node counts, stays if that is known. Gates that
    come with their other half (Phi-3) are unpacked too.

    Attributes:
        limit: largest weight that is cut, in bytes. One that several nodes read is left as it is.
    """

    name: ClassVar[str] = "unpack-qkv"
    min_opset: ClassVar[int] = 13

    limit: int = 1 << 28

    def rules(self) -> Sequence[Rule]:
        found = []
        for names in _PARTS:
            for biased in (True, False):
                kind = f"{len(names)}{'-bias' if biased else ''}"
                found.append(Rule(f"unpack-qkv-{kind}", _pattern(names, biased), self._rewrite, _check, self.min_opset))
        return found

    def _rewrite(self, op: Any, match: Match, x: ir.Value, w: ir.Value) -> list[ir.Value]:
        others = [u for u in w.consumers() if u not in match.nodes]
        if others:
            reader = f"{others[0].op_type} '{others[0].name}'"
            raise Decline(f"'{w.name}' is also read by {reader}, and would be stored twice")
        array = match.constant("w")
        bias = match.constant("bias") if "bias" in match.values else None
        assert array is not None
        if array.nbytes > self.limit:
            raise Decline(f"'{w.name}' has {array.nbytes} bytes, and the limit is {self.limit}")
        ends = np.cumsum([0, *_widths(match, array.shape[1])])
        results = []
        for output, start, stop in zip(match.outputs, ends[:-1], ends[1:], strict=True):
            part = op.MatMul(x, op.initializer(_columns(array, start, stop), name=f"{w.name}_part"))
            part.type, part.shape = output.type, None if output.shape is None else output.shape.copy()
            if bias is not None:
                part = op.Add(part, op.initializer(np.ascontiguousarray(bias[start:stop]), name="bias_part"))
            results.append(part)
        return results


def _pattern(names: tuple[str, ...], biased: bool) -> Any:
    def plain(op: Any, x: Any, w: Any) -> Any:
        return _split(op, op.MatMul(x, w), names)

    def with_bias(op: Any, x: Any, w: Any, bias: Any) -> Any:
        return _split(op, op.Add(op.MatMul(x, w), bias), names)

    return with_bias if biased else plain


def _split(op: Any, value: Any, names: tuple[str, ...]) -> Any:
    return op.Split(value, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=list(names))


def _check(match: Match) -> None:
    dims, weight = sizes(match["x"]), match.constant("w")
    if dims is None or weight is None or weight.ndim != 2:
        raise Decline("the second matrix is no weight, or the rank of the first is unknown")
    if all(d == 1 for d in dims[:-1]):
        raise Decline("it is one row, of which no copy is made")
    if match.root.attributes.get_int("axis", 0) not in (-1, len(dims) - 1):
        raise Decline("it is not split along its columns")
    if "bias" in match.values:
        bias = match.constant("bias")
        if bias is None or bias.shape != (weight.shape[1],):
            raise Decline(f"the summand is no constant bias of {weight.shape[1]} items")


def _widths(match: Match, columns: int) -> list[int]:
    node = match.root
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        found = contents(node.inputs[1])
        if found is None or not all(isinstance(w, int) for w in found):
            raise Decline("the widths of the parts are not constant")
        return [w for w in found if isinstance(w, int)]
    count = len(node.outputs)
    each = -(-columns // count)  # the last part is what is left
    return [min(each, columns - each * i) for i in range(count)]


def _columns(array: np.ndarray, start: int, stop: int) -> ir.TensorProtocol:
    """Some columns of a weight; without a copy if it is stored by columns, as torch's Linear does."""
    part = array[:, start:stop]
    return ir.tensor(part if part.T.flags.c_contiguous else np.ascontiguousarray(part))
