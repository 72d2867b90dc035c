"""scaled_dot_product_attention as the ONNX exporter takes it: four dims, nothing that broadcasts, a positive scale.

ONNX Runtime's Attention broadcasts neither the batch and the heads of queries, keys and values nor the last two dims
of a mask, and takes no scale of zero or less; the exporter knows only four dims. Torch takes all of these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

_aten = torch.ops.aten
_NAME = "aten::scaled_dot_product_attention"
_KEPT = ("stack_trace", "nn_module_stack")


def write_out_attention(graph: torch.fx.Graph) -> None:
    """Rewrites the calls of scaled_dot_product_attention in `graph`, in place; layers share what is expanded."""
    masks: dict[tuple[Any, ...], Node] = {}
    for node in list(graph.nodes):
        if isinstance(node.target, torch._ops.OpOverload) and node.target.name() == _NAME:
            with graph.inserting_before(node):
                _Attention(graph, node, masks).rewrite()


class _Attention:
    def __init__(self, graph: torch.fx.Graph, node: Node, masks: dict[tuple[Any, ...], Node]) -> None:
        self.graph, self.node, self.masks = graph, node, masks

    def rewrite(self) -> None:
        ranks = {len(_shape(x)) for x in self.node.args[:3]}
        if len(ranks) > 1 or min(ranks) < 2:
            return
        _drop_equal_groups(self.node)
        self._scale()
        self._broadcast()
        rank = ranks.pop()
        if rank != 4 and (rank < 4 or len(_shape(self._mask())) < 4):
            self._in_four_dims(rank)
        self._expand_mask()

    def _mask(self) -> Any:
        return self.node.args[3] if len(self.node.args) > 3 else self.node.kwargs.get("attn_mask")

    def _call(self, op: Any, *args: Any) -> Node:
        new = self.graph.call_function(op, args)
        value = op(*torch.fx.node.map_arg(args, lambda n: n.meta["val"]))
        new.meta = {"val": value, **{key: self.node.meta[key] for key in _KEPT if key in self.node.meta}}
        return new

    def _size(self, x: Node, dim: int) -> Any:
        size = _shape(x)[dim]
        return size if isinstance(size, int) else self._call(_aten.sym_size.int, x, dim % len(_shape(x)))

    def _scale(self) -> None:
        scale = self.node.kwargs.get("scale")
        if isinstance(scale, int | float) and scale <= 0:
            self.node.update_arg(0, self._call(_aten.mul.Scalar, self.node.args[0], scale))
            self.node.update_kwarg("scale", 1.0)

    def _broadcast(self) -> None:
        """Expands the leading dims in which one of queries, keys and values has 1 and another more."""
        operands: list[Any] = list(self.node.args[:3])
        leading = len(_shape(operands[0])) - 2
        grouped = bool(self.node.kwargs.get("enable_gqa"))
        sizes: list[list[Any]] = [[-1] * leading for _ in operands]
        for dim in range(leading - grouped):
            wide = next((x for x in operands if not _is_one(_shape(x)[dim])), None)
            for x, size in zip(operands, sizes, strict=True):
                if wide is not None and _is_one(_shape(x)[dim]):
                    size[dim] = self._size(wide, dim)
        for position, (x, size) in enumerate(zip(operands, sizes, strict=True)):
            if any(s != -1 for s in size):
                self.node.update_arg(position, self._call(_aten.expand.default, x, [*size, -1, -1]))

    def _in_four_dims(self, rank: int) -> None:
        """Gives the call four dims and makes the node itself the way back, so that its name stays what it was."""
        query, value = self.node.args[0], self.node.args[2]
        shape = [self._size(query, dim) for dim in range(rank - 1)] + [self._size(value, -1)]
        operands = [self._four(x, rank) for x in self.node.args[:3]]
        mask = self._mask()
        if rank == 3 and mask is not None and len(_shape(mask)) == 3:
            mask = self._call(_aten.unsqueeze.default, mask, 1)
        kwargs = {k: v for k, v in self.node.kwargs.items() if k != "attn_mask"}
        inner = self.graph.call_function(self.node.target, (*operands, mask, *self.node.args[4:]), kwargs)
        inner.meta = dict(self.node.meta)
        inner.meta["val"] = operands[0].meta["val"].new_empty(*_shape(operands[0])[:3], _shape(value)[-1])
        self.node.target, self.node.args, self.node.kwargs = _aten.reshape.default, (inner, shape), {}
        self.node = inner

    def _four(self, x: Any, rank: int) -> Node:
        if rank > 4:
            return self._call(_aten.flatten.using_ints, x, 0, rank - 4)
        for _ in range(4 - rank):
            x = self._call(_aten.unsqueeze.default, x, rank - 2)
        return x  # type: ignore[no-any-return]

    def _expand_mask(self) -> None:
        mask, (query, key) = self._mask(), self.node.args[:2]
        if not isinstance(mask, Node):
            return
        shape, lengths = _shape(mask), (_shape(query)[-2], _shape(key)[-2])
        tail = ((1, 1, *shape)[-2], (1, 1, *shape)[-1])
        if len(shape) >= 2 and all(_is_one(n) or not _is_one(m) for m, n in zip(tail, lengths, strict=True)):
            return
        memo = (mask, *map(str, lengths))
        if memo not in self.masks:
            size = [-1] * (len(shape) - 2) + [self._size(query, -2), self._size(key, -2)]
            self.masks[memo] = self._call(_aten.expand.default, mask, size)
        if len(self.node.args) > 3:
            self.node.update_arg(3, self.masks[memo])
        else:
            self.node.update_kwarg("attn_mask", self.masks[memo])


def _drop_equal_groups(node: Node) -> None:
    """Groups of one head each are no groups; the exporter refuses them."""
    heads = [_shape(x)[-3] if len(_shape(x)) > 2 else 1 for x in node.args[:2]]
    if node.kwargs.get("enable_gqa") and isinstance(heads[0], int) and heads[0] == heads[1]:
        node.update_kwarg("enable_gqa", False)


def _shape(x: Any) -> tuple[Any, ...]:
    return tuple(x.meta["val"].shape) if isinstance(x, Node) else ()


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
