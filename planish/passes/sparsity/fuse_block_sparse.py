"""fuse-block-sparse: attention whose mask is block-sparse already, by a kernel that leaves out what it hides."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.ops import DIALECT_DOMAIN
from planish.ir.ops.window_attention import window_mask
from planish.passes.base import Decline
from planish.passes.fusion.index_vectors import Offset, offset_of
from planish.passes.fusion.sizes import Term, sizes
from planish.passes.lowering.lower_window_attention import limits
from planish.passes.lowering.mask_bands import Band
from planish.passes.lowering.mask_parts import MaskParts, mask_parts
from planish.passes.registry import register
from planish.passes.rewrite import DialectRewritePass, Match
from planish.passes.sparsity.mask_tiles import tiled


@register
@dataclass(frozen=True)
class FuseBlockSparse(DialectRewritePass):
    """Replaces Attention with a sliding window, or with a constant mask that hides blocks, by a block-sparse operator.

    A window that is computed from positions (Mistral's and Gemma's, ModernBERT's on both sides, with global positions
    or without) becomes planish::WindowAttention, for any length; a constant mask becomes lists of blocks, those that
    it hides in part with a tile. What is the same for all queries, as padding is, becomes a mask of keys. Nothing is
    approximated.

    Attributes:
        block_size: of constant masks: a multiple of 16.
        most: the largest share of blocks that a constant mask may keep.
    """

    name: ClassVar[str] = "fuse-block-sparse"
    min_opset: ClassVar[int] = 23

    block_size: int = 64
    most: float = 0.75

    def pattern(self, op: Any, q: Any, k: Any, v: Any) -> Any:
        return op.Attention(q, k, v, _allow_other_inputs=True, _allow_other_attributes=True)

    def check(self, match: Match) -> None:
        node = match.root
        if match.target.name != "ort-cpu":
            raise Decline(f"target '{match.target}' has no operators for it")
        if self.block_size < 16 or self.block_size % 16:
            raise Decline(f"block_size is {self.block_size}; kernels take multiples of 16")
        if len(node.inputs) < 4 or node.inputs[3] is None:
            raise Decline("it has no mask")
        if any(match.dtype(name) != ir.DataType.FLOAT for name in "qkv"):
            raise Decline("it is not float32, which alone has kernels")
        if any(value is not None for value in node.inputs[4:]) or len(node.outputs) > 1:
            raise Decline("it reads or writes a cache, or gives its scores")
        if node.attributes.get_float("softcap", 0.0):
            raise Decline("its scores are capped, which kernels do not do")
        if node.attributes.get_int("is_causal", 0):
            raise Decline("it is causal and has a mask too")
        if match.graph is not match.model.graph:
            raise Decline("it is inside of a branch, which chose it already")

    def rewrite(self, op: Any, match: Match) -> Any:
        place = _Place(op, match)
        if place.queries == 1:
            raise Decline("it has one query, and kernels take many at a time")
        mask = match.root.inputs[3]
        assert mask is not None
        parts = mask_parts(mask, place.queries, place.keys, windows=True)
        if parts.fixed:
            return place.give(self._lists(op, match, place, parts))
        if not parts.band.has_globals and parts.band.left is None and parts.band.right in (None, Offset()):
            raise Decline("its mask is no window")
        window = _window(place, parts.band)
        if not match.target.kernels:
            _require_blocks(place, window)
        return place.give(place.call("WindowAttention", [], _key_mask(op, parts), parts, **window))

    def _lists(self, op: Any, match: Match, place: _Place, parts: MaskParts) -> ir.Value:
        if not match.target.kernels:
            raise Decline(f"its mask is a constant, for which target '{match.target}' has no kernel")
        allowed = _whole(place, parts)
        found = tiled(allowed, place.heads, self.block_size)
        if found.density > self.most:
            raise Decline(f"its mask keeps {found.density:.0%} of the blocks of {self.block_size} keys")
        keys = _key_mask(op, parts)
        if found.blind and keys is None and parts.hidden > float(np.finfo(np.float32).min):
            keys = op.initializer(np.ones((1, 1, 1, 1), bool))  # a query without keys gives the mean of all values
        lists = [op.initializer(a) for a in (found.indptr, found.indices, found.head_layout)]
        name = "BlockSparseAttention"
        if len(found.tiles):
            name = "BlockSparseAttentionTiles"
            lists += [op.initializer(found.entry_tile), op.initializer(found.tiles)]
        return place.call(name, lists, keys, parts, block_size=self.block_size)


class _Place:
    """An Attention, its sizes, and its operands with the heads side by side."""

    def __init__(self, op: Any, match: Match) -> None:
        node = match.root
        shapes = [sizes(value) for value in node.inputs[:3]]
        if any(s is None or len(s) not in (3, 4) or len(s) != len(shapes[0] or ()) for s in shapes):
            raise Decline("the rank of queries, keys or values is unknown")
        q, k, v = (s or () for s in shapes)
        self._op, self._four = op, len(q) == 4
        named = [node.attributes.get_int(f"{role}_num_heads", 0) for role in ("q", "kv")]
        heads = [q[1], k[1]] if self._four else named
        widths = [s[3] if self._four else s[2] for s in (q, k, v)]
        if not all(isinstance(n, int) and n > 0 for n in (*heads, *widths)):
            raise Decline("the number or the size of its heads is unknown")
        self.heads, self.kv_heads = (int(n) for n in heads)  # type: ignore[arg-type]
        if widths[1] != widths[2] or (self._four and k[1] != v[1]):
            raise Decline("its heads of keys and of values differ in size")
        self.size = int(widths[0]) // (1 if self._four else self.heads)  # type: ignore[arg-type]
        self.queries: Term = q[-2]
        self.keys: Term = k[-2]
        self.scale = node.attributes.get_float("scale", 1 / math.sqrt(self.size))
        self._operands = [self._flat(match[name]) for name in "qkv"]

    def _flat(self, value: ir.Value) -> ir.Value:
        if not self._four:
            return value
        assert value.shape is not None
        batch, heads, length, size = value.shape
        turned = self._op.Transpose(value, perm=[0, 2, 1, 3])
        flat: ir.Value = self._op.Reshape(turned, np.array([0, 0, -1], dtype=np.int64))
        turned.type = flat.type = value.type
        turned.shape = ir.Shape([batch, length, heads, size])
        flat.shape = ir.Shape([batch, length, int(heads) * int(size)])  # type: ignore[arg-type]
        return flat

    def call(self, name: str, lists: list[ir.Value], keys: ir.Value | None, parts: MaskParts, **more: int) -> ir.Value:
        """The operator with its relative for a mask of keys, if there is one."""
        settings: dict[str, Any] = {"q_num_heads": self.heads, "kv_num_heads": self.kv_heads, "scale": self.scale}
        inputs = [*self._operands, *([] if keys is None else [keys]), *lists]
        if keys is not None:
            name, settings["hidden_score"] = name + "KeyMask", parts.hidden
        made: ir.Value = getattr(self._op, name)(*inputs, **settings, **more, _domain=DIALECT_DOMAIN)
        made.type, made.shape = self._operands[0].type, self._operands[0].shape
        return made

    def give(self, flat: ir.Value) -> ir.Value:
        """The result as the Attention gave it."""
        if not self._four:
            return flat
        apart = self._op.Reshape(flat, np.array([0, 0, self.heads, self.size], dtype=np.int64))
        turned: ir.Value = self._op.Transpose(apart, perm=[0, 2, 1, 3])
        return turned


def _key_mask(op: Any, parts: MaskParts) -> ir.Value | None:
    if not parts.keys:
        return None
    wide = []
    for value in parts.keys:
        missing = 4 - len(sizes(value) or ())
        wide.append(op.Unsqueeze(value, list(range(missing))) if missing else value)
    joined: ir.Value = functools.reduce(op.And, wide)
    return joined


def _window(place: _Place, band: Band) -> dict[str, int]:
    """The band by positions that end with the last key, as the operator counts them."""
    queries, keys = offset_of(place.queries), offset_of(place.keys)
    past = Offset() if place.queries == place.keys else None
    if past is None and queries is not None and keys is not None:
        past = keys.minus(queries)
    if past is None or not past.never_negative:
        raise Decline("it is not known how many more keys than queries it has")
    causal = band.last if band.has_globals else band.right
    is_causal = causal is not None and causal.minus(past) == Offset()
    if band.last is not None and not is_causal:
        raise Decline("its global positions end before a query or after it")
    right = None if is_causal and not band.has_globals else band.right
    limits = {"left": band.left and band.left.plus(past), "right": right and right.minus(past)}
    found = {"is_causal": int(is_causal), "global_keys": band.global_keys, "global_queries": band.global_queries}
    for name, limit in limits.items():
        if limit is not None and (limit.lengths or limit.number < 0):
            raise Decline("its window is of unknown size, or does not hold the query's own position")
        found[name] = -1 if limit is None else limit.number
    if band.global_queries and past != Offset():
        raise Decline("it has global queries behind a cache")
    return found


def _require_blocks(place: _Place, window: dict[str, int]) -> None:
    """What lower-window-attention asks for: without kernels, the operator by itself is slower than what it replaces."""
    limits(window.get)
    if place.queries != place.keys:
        raise Decline("its queries and keys are not as many, and without kernels that is no gain")


def _whole(place: _Place, parts: MaskParts) -> np.ndarray:
    """(1 or heads, queries, keys), bool: all parts of a mask that are fixed, together."""
    queries, keys = place.queries, place.keys
    if not isinstance(queries, int) or not isinstance(keys, int):
        raise Decline("its mask is a constant, and its lengths are not known")
    full = (1, place.heads, queries, keys)
    allowed = np.ones((1, 1, 1, 1), bool)
    for array in parts.fixed:
        allowed = allowed & array
    if allowed.shape[0] != 1 or any(n not in (1, m) for n, m in zip(allowed.shape, full, strict=True)):
        raise Decline(f"its constant mask has shape {allowed.shape}, and scores have {full}")
    if parts.band != Band():
        window = _window(place, parts.band)
        allowed = allowed & window_mask(queries, keys, **window)
    return np.broadcast_to(allowed[0], (allowed.shape[1], queries, keys))
