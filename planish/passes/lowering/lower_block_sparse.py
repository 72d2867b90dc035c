"""Block-sparse attention from standard operators, where the lists have a form that allows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array
from planish.ir.ops import DIALECT_DOMAIN
from planish.ir.ops.block_sparse_attention import BLOCK, CAUSAL, KV_HEADS
from planish.ir.ops.key_mask_attention import HIDDEN
from planish.passes.base import Decline
from planish.passes.fusion.sizes import size_vector, sizes
from planish.passes.lowering.block_shards import Operands, causal_scan, shards
from planish.passes.lowering.causal_buckets import Bound, like
from planish.passes.lowering.layout_forms import lists_of, local_form, runs, uniform
from planish.passes.registry import register
from planish.passes.rewrite import Match, RewritePass
from planish.passes.rule import Rule

_LOWEST = float(np.finfo(np.float32).min)


@register
@dataclass(frozen=True)
class LowerBlockSparse(RewritePass):
    """Replaces planish::BlockSparseAttention by attention over gathered keys, for targets without generated kernels.

    Where all rows of a layout are alike (strided shards of S2-Attention that are not causal), each group of heads
    attends to the keys of its own shard, in ONNX Runtime's flash kernel. Where a causal layout has local blocks and
    blocks that all later rows see (S2-Attention, sliding windows, sinks), a Scan over blocks of queries attends to
    the last keys and to a prefix of the fixed ones. Other lists have no fast form in standard operators.

    Attributes:
        rows: blocks of queries that a step of the Scan takes; 0: an eighth of the local blocks.
    """

    name: ClassVar[str] = "lower-block-sparse"
    min_opset: ClassVar[int] = 23

    rows: int = 0

    def rules(self) -> tuple[Rule, ...]:
        return tuple(self._rule(name) for name in ("BlockSparseAttention", "BlockSparseAttentionKeyMask"))

    def _rule(self, name: str) -> Rule:
        def pattern(op: Any, q: Any, k: Any, v: Any) -> Any:
            options = {"_allow_other_inputs": True, "_allow_other_attributes": True}
            return getattr(op, name)(q, k, v, _domain=DIALECT_DOMAIN, **options)

        return Rule(self.name, pattern, self.rewrite, self.check, self.min_opset, self.remove_nodes)

    def check(self, match: Match) -> None:
        if match.target.name != "ort-cpu" or match.target.kernels:
            raise Decline(f"target '{match.target}' has a kernel for it, or none of these operators")

    def rewrite(self, op: Any, match: Match, q: ir.Value, k: ir.Value) -> ir.Value:
        node = match.root
        dims, keys = sizes(q), sizes(k)
        if dims is None or keys is None or not all(isinstance(d[2], int) for d in (dims, keys)):
            raise Decline("the size of its heads is unknown")
        if dims[1] != keys[1]:
            raise Decline("its queries and keys are not known to be as many")
        masked = len(node.inputs) == 7
        arrays = [constant_array(value, 1 << 28) for value in node.inputs[3 + masked :]]
        if any(array is None for array in arrays):
            raise Decline("its lists are not constants")
        indptr, indices, head_layout = (array for array in arrays if array is not None)
        block = node.attributes.get_int(BLOCK, 64)
        covered = (indptr.shape[1] - 1) * block
        if isinstance(dims[1], int) and dims[1] > covered:
            raise Decline(f"its lists cover {covered} positions of {dims[1]}")
        length: Bound = dims[1] if isinstance(dims[1], int) else size_vector(op, dims[1], q, 1, match.graph)
        hidden = max(node.attributes.get_float(HIDDEN, _LOWEST), _LOWEST)
        groups = runs(head_layout, node.attributes.get_int(KV_HEADS))
        operands = Operands(op, node, length, block, groups, node.inputs[3] if masked else None, hidden, covered)
        lists = lists_of(indptr, indices)
        if node.attributes.get_int(CAUSAL, 0):
            forms = {group.layout: local_form(lists[group.layout]) for group in groups}
            made = causal_scan(operands, forms, self.rows)
        else:
            found = {group.layout: uniform(lists[group.layout]) for group in groups}
            if any(columns is None or not len(columns) for columns in found.values()):
                raise Decline("its rows differ, for which standard operators have no fast form")
            if masked or not isinstance(dims[1], int):
                raise Decline("it has padding or an unknown length, for which standard operators have no fast form")
            made = shards(operands, {layout: c for layout, c in found.items() if c is not None})
        return like(made, match.output, {})
