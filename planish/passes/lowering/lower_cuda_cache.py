"""Steps over caches as the CUDA provider can run them: without sizes that the host must read, or in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from planish.ir.graphs import dims_of, is_op
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.lowering.cache_forms import Chunk, Step
from planish.passes.precision.cache_sites import BIAS, GROUP_QUERY, MICROSOFT
from planish.passes.registry import register
from planish.passes.sparsity.splice import Splicer

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
#: Inputs of GroupQueryAttention.
_PAST_KEY, _TOTAL = 3, 6


@register
@dataclass(frozen=True)
class LowerCudaCache(ExactPass):
    """Gives each step of one token over a cache (com.microsoft's GroupQueryAttention) a form for the CUDA provider.

    In half precision the operator stays, and its kernels read the length of each row on the GPU; the length of the
    longest row, which it wants on the host and splits its work by, becomes the capacity of the cache. So nothing of a
    step waits for the host, and a CUDA graph holds for any lengths. In float32, and where a bias is added to scores,
    the provider has no kernel of it: the token is written with ScatterND, and attention is two products around a
    softmax over the whole capacity. Either writes in place where input and output are one buffer.

    Options:
        chunks: what reads several tokens a row is lowered too. Each row must have all of them, as a chunk of a prompt
            has; the operator itself takes padded prompts too, whose tokens are elsewhere.
    """

    name: ClassVar[str] = "lower-cuda-cache"

    chunks: bool = False

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        declined: list[Declined] = []
        splicer = Splicer(program, self.name)
        fired = 0
        for model in program.entries.values():
            steps = [n for n in model.graph if (n.domain, n.op_type) == (MICROSOFT, GROUP_QUERY)]
            for node in steps:
                try:
                    _check(node, ctx, self.chunks)
                    _lower(splicer, model, node)
                    fired += 1
                except Decline as decline:
                    declined.append(Declined(self.name, node.name or node.op_type, decline.reason))
        return PassResult(fired > 0, fired, declined)


def _check(node: ir.Node, ctx: PassContext, chunks: bool) -> None:
    if ctx.target.name != "ort-cuda":
        raise Decline(f"target '{ctx.target}' has other kernels; this is for 'ort-cuda'")
    if len(node.inputs) <= _TOTAL or any(value is None for value in node.inputs[_PAST_KEY : _TOTAL + 1]):
        raise Decline("it reads no cache")
    dims: Any = dims_of(node.inputs[0]) if node.inputs[0] is not None else None
    if dims is None or len(dims) != 3 or (dims[1] != 1 and not chunks):
        raise Decline("it reads more than one token a row")
    total = node.inputs[_TOTAL]
    assert total is not None
    if is_op(total.producer(), "Cast") and is_op(total.producer().inputs[0].producer(), "Shape"):  # type: ignore
        raise Decline("its length is the capacity already")


def _lower(splicer: Splicer, model: ir.Model, node: ir.Node) -> None:
    past = node.inputs[_PAST_KEY]
    bias = node.inputs[BIAS] if len(node.inputs) > BIAS else None
    q = node.inputs[0]
    assert past is not None and q is not None
    dims: Any = dims_of(q)
    if q.dtype in _HALF and bias is None:
        if dims[1] != 1:
            raise Decline("a chunk in half precision has a kernel, which reads the longest row's length on the host")

        def capacity(op: Any) -> Sequence[ir.Value]:
            return [op.Cast(op.Shape(past, start=2, end=3), to=int(ir.DataType.INT32))]

        (size,) = splicer.build(model, node, capacity, [node])
        size.type, size.shape = ir.TensorType(ir.DataType.INT32), ir.Shape([1])
        node.replace_input_with(_TOTAL, size)
        return
    step = (Step if dims[1] == 1 else Chunk).of(node)
    made = splicer.build(model, node, step.build, [node])
    for new, old in zip(made, node.outputs, strict=True):
        new.type = old.type
    splicer.replace(node, made)
