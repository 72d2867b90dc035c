"""Steps over caches as the CUDA provider can run them: without sizes that the host must read, or in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import dims_of, is_op
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.precision.cache_sites import BIAS, GROUP_QUERY, KEY_SCALE, MICROSOFT
from planish.passes.registry import register
from planish.passes.sparsity.splice import Splicer

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_ALMOST_ALL = 1 << 62
#: Inputs of GroupQueryAttention.
_PAST_KEY, _HELD, _TOTAL = 3, 5, 6


@register
@dataclass(frozen=True)
class LowerCudaCache(ExactPass):
    """Gives each step of one token over a cache (com.microsoft's GroupQueryAttention) a form for the CUDA provider.

    In half precision the operator stays, and its kernels read the length of each row on the GPU; the length of the
    longest row, which it wants on the host and splits its work by, becomes the capacity of the cache. So nothing of a
    step waits for the host, and a CUDA graph holds for any lengths. In float32, and where a bias is added to scores,
    the provider has no kernel of it: the token is written with ScatterND, and attention is two products around a
    softmax over the whole capacity. Either writes in place where input and output are one buffer.
    """

    name: ClassVar[str] = "lower-cuda-cache"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        declined: list[Declined] = []
        splicer = Splicer(program, self.name)
        fired = 0
        for model in program.entries.values():
            steps = [n for n in model.graph if (n.domain, n.op_type) == (MICROSOFT, GROUP_QUERY)]
            for node in steps:
                try:
                    _check(node, ctx)
                    _lower(splicer, model, node)
                    fired += 1
                except Decline as decline:
                    declined.append(Declined(self.name, node.name or node.op_type, decline.reason))
        return PassResult(fired > 0, fired, declined)


def _check(node: ir.Node, ctx: PassContext) -> None:
    if ctx.target.name != "ort-cuda":
        raise Decline(f"target '{ctx.target}' has other kernels; this is for 'ort-cuda'")
    if len(node.inputs) <= _TOTAL or any(value is None for value in node.inputs[_PAST_KEY : _TOTAL + 1]):
        raise Decline("it reads no cache")
    dims: Any = dims_of(node.inputs[0]) if node.inputs[0] is not None else None
    if dims is None or len(dims) != 3 or dims[1] != 1:
        raise Decline("it reads more than one token a row")
    total = node.inputs[_TOTAL]
    assert total is not None
    if is_op(total.producer(), "Cast") and is_op(total.producer().inputs[0].producer(), "Shape"):  # type: ignore
        raise Decline("its length is the capacity already")


def _lower(splicer: Splicer, model: ir.Model, node: ir.Node) -> None:
    past = node.inputs[_PAST_KEY]
    bias = node.inputs[BIAS] if len(node.inputs) > BIAS else None
    assert past is not None and node.inputs[0] is not None
    if node.inputs[0].dtype in _HALF and bias is None:

        def capacity(op: Any) -> Sequence[ir.Value]:
            return [op.Cast(op.Shape(past, start=2, end=3), to=int(ir.DataType.INT32))]

        (size,) = splicer.build(model, node, capacity, [node])
        size.type, size.shape = ir.TensorType(ir.DataType.INT32), ir.Shape([1])
        node.replace_input_with(_TOTAL, size)
        return
    step = _Step.of(node)
    made = splicer.build(model, node, step.build, [node])
    for new, old in zip(made, node.outputs, strict=True):
        new.type = old.type
    splicer.replace(node, made)


@dataclass(frozen=True)
class _Step:
    """A step in operators of ONNX.

    Attributes:
        node: GroupQueryAttention.
        heads, groups, size: of queries, of keys and values, and the numbers of each.
        window: tokens that a token sees, its own included.
        slopes: (1, heads, 1, 1) of a bias that grows with the position of a key.
    """

    node: ir.Node
    heads: int
    groups: int
    size: int
    scale: float
    softcap: float
    window: int
    slopes: ir.Value | None

    @classmethod
    def of(cls, node: ir.Node) -> _Step:
        get = node.attributes.get_int
        if any(v is None for v in node.inputs[:3]):
            raise Decline("its queries, keys and values are one value")
        if get("do_rotary", 0) or get("smooth_softmax", 0) or any(v is not None for v in node.inputs[KEY_SCALE - 1 :]):
            raise Decline("it does more than attend over the cache")
        if len(node.inputs) > 7 and any(v is not None for v in node.inputs[7:BIAS]):
            raise Decline("it rotates positions")
        dims: Any = dims_of(node.inputs[_PAST_KEY])  # type: ignore[arg-type]
        if dims is None or not isinstance(dims[3], int):
            raise Decline("the sizes of its cache are unknown")
        bias = node.inputs[BIAS] if len(node.inputs) > BIAS else None
        return cls(
            node, get("num_heads", 0), get("kv_num_heads", 0), dims[3],
            node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(dims[3]),
            node.attributes.get_float("softcap", 0.0),
            get("local_window_size", -1) if get("local_window_size", -1) >= 0 else _ALMOST_ALL,
            None if bias is None else _slopes(bias),
        )  # fmt: skip

    def build(self, op: Any) -> Sequence[ir.Value]:
        q, k, v, past_key, past_value, held = self.node.inputs[:6]
        assert q is not None and past_key is not None
        dtype = q.dtype
        assert dtype is not None
        kind = dtype.numpy()
        held = op.Cast(held, to=int(ir.DataType.INT64))
        capacity = op.Squeeze(op.Shape(past_key, start=2, end=3), [0])
        at = op.Range(np.int64(0), capacity, np.int64(1))
        keys, values = (self._written(op, *pair, held) for pair in ((past_key, k), (past_value, v)))
        rows = op.Reshape(op.Mul(q, kind.type(self.scale)), [0, self.groups, self.heads // self.groups, self.size])
        scores = op.MatMul(rows, op.Transpose(keys, perm=[0, 1, 3, 2]))
        if self.softcap:
            cap = kind.type(self.softcap)
            scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
        if self.slopes is not None:
            shares = op.Reshape(self.slopes, [1, self.groups, self.heads // self.groups, 1])
            added = op.Mul(shares, op.Cast(at, to=int(self.slopes.dtype or dtype)))
            scores = op.Add(scores, added if self.slopes.dtype in (None, dtype) else op.Cast(added, to=int(dtype)))
        last = op.Unsqueeze(held, [1, 2, 3])
        seen = op.LessOrEqual(at, last)
        if self.window != _ALMOST_ALL:
            seen = op.And(seen, op.Greater(at, op.Sub(last, np.int64(self.window))))
        lowest = kind.type(-65504.0 if dtype == ir.DataType.FLOAT16 else -3e38)
        weights = op.Softmax(op.Where(seen, scores, lowest), axis=-1)
        y = op.Reshape(op.MatMul(weights, values), [0, 1, self.heads * self.size])
        return [y, keys, values]

    def _written(self, op: Any, past: ir.Value | None, new: ir.Value | None, held: Any) -> Any:
        """The cache with the token of each row where the row ends."""
        rows = op.Range(np.int64(0), op.Squeeze(op.Shape(held), [0]), np.int64(1))
        shape = op.Concat(op.Shape(held), np.array([self.groups, 1], np.int64), axis=0)
        groups = np.arange(self.groups)[None, :, None]
        places = [op.Expand(part, shape) for part in (op.Unsqueeze(rows, [1, 2]), groups, op.Unsqueeze(held, [1, 2]))]
        return op.ScatterND(past, op.Concat(*places, axis=2), op.Reshape(new, [0, self.groups, self.size]))


def _slopes(bias: ir.Value) -> ir.Value:
    """What positions 0, 1, 2, … are multiplied by in a bias.

    Raises:
        Decline: it is no such bias.
    """
    node = bias.producer()
    if is_op(node, "Cast") and node is not None and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if is_op(node, "Mul") and node is not None:
        for slopes, positions in (node.inputs, node.inputs[::-1]):
            if positions is None or slopes is None:
                continue
            source = positions.producer()
            while is_op(source, "Unsqueeze", "Reshape", "Cast") and source is not None and source.inputs[0] is not None:
                source = source.inputs[0].producer()
            if is_op(source, "Range"):
                return slopes
    raise Decline("a bias is added to its scores that is not one by position")
