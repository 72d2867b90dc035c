"""What the channels of keys and values range over, on the calibration inputs, and the scales that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.ir.causal_lm import LENGTHS, PREFILL
from planish.ir.graphs import is_op
from planish.ir.program import Program
from planish.passes.base import PassContext

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
#: What may lie between a rotary embedding and the cache.
_VIEWS = ("Reshape", "Transpose", "Pad", "Squeeze", "Unsqueeze", "Identity")
#: A channel counts as at least this much of the root mean square of its head: what calibration did not see may come.
_FLOOR = 0.1


@dataclass(frozen=True)
class Ranges:
    """Of the keys or values of a layer, each (heads, size): root mean square, and largest magnitude."""

    rms: Floats
    largest: Floats

    def channels(self) -> Floats:
        """What keys are divided by, (heads, size): 1 in the mean square.

        Half of what makes all channels alike, as in SmoothQuant (arXiv:2211.10438): a channel that is large for every
        token would take the steps of all others, and one that is large for some would, divided out, be coarse for all.
        """
        head = np.sqrt(np.square(self.rms).mean(1, keepdims=True))
        floored = np.maximum(self.rms, _FLOOR * head)
        found = np.where(head > 0, np.sqrt(floored / np.maximum(head, np.finfo(np.float32).tiny)), 1)
        return np.ascontiguousarray(found / np.sqrt(np.square(found).mean(1, keepdims=True)), np.float32)

    def scales(self, margin: float, by_head: bool) -> Floats:
        """Fixed scales (1, heads, 1, size) for codes up to 127.

        Args:
            margin: how many times what was seen fits.
            by_head: one for all channels of a head.
        """
        # Small channels get the scale of the middle one: what is clipped costs more than what is rounded coarsely.
        middle = np.median(self.largest, 1, keepdims=True)
        largest = self.largest.max(1, keepdims=True) if by_head else np.maximum(self.largest, middle)
        found = largest * (margin / 127)
        found = np.broadcast_to(np.where(found > 0, found, 1), self.largest.shape)
        return np.ascontiguousarray(found[None, :, None], np.float32)


#: Cache → the channel that each of its channels is turned into, or None: any of the head.
Partners = Mapping[str, Integers | None]


def measure(program: Program, ctx: PassContext, caches: Partners) -> dict[str, Ranges]:
    """The ranges of caches that `prefill` gives, by name; empty where there is nothing to run with.

    Channels that a rotary embedding turns into each other are coordinates of a vector: at other positions than those of
    the calibration inputs each of them can become as large as the vector is long.
    """
    if ctx.run is None:
        return {}
    parts = program.calibration.parts if program.calibration is not None else []
    lengths = [batch.get(LENGTHS) for part in parts if part.entry == PREFILL for batch in part.batches]
    squares: dict[str, Any] = dict.fromkeys(caches, 0.0)
    largest: dict[str, Any] = dict.fromkeys(caches, 0.0)
    counts = dict.fromkeys(caches, 0)
    for number, batch in enumerate(ctx.run(program, PREFILL)):
        held = lengths[number] if number < len(lengths) else None
        for name, pairs in caches.items():
            cache = np.asarray(batch[name], np.float64)
            at = np.arange(cache.shape[2])
            seen = np.ones(cache.shape[::2], bool) if held is None else at < np.asarray(held)[:, None]
            square = np.square(cache.transpose(0, 2, 1, 3)[seen])  # (tokens, heads, size), without padding
            mean, peak = _turned(square, pairs)
            squares[name] = squares[name] + mean.sum(0)
            largest[name] = np.maximum(largest[name], np.sqrt(peak.max(0, initial=0)))
            counts[name] += len(square)
    rms = {name: np.sqrt(total / max(counts[name], 1)) for name, total in squares.items()}
    return {name: Ranges(rms[name].astype("f4"), largest[name].astype("f4")) for name in caches}


def _turned(square: Any, pairs: Integers | None) -> tuple[Any, Any]:
    """Squares in the mean over what turns them into each other, and at most."""
    if pairs is None:
        mean, peak = square.mean(-1, keepdims=True), 2 * square.max(-1, keepdims=True)
        return np.broadcast_to(mean, square.shape), np.broadcast_to(peak, square.shape)
    other = square[..., pairs]
    alone = pairs == np.arange(len(pairs))
    return (square + other) / 2, np.where(alone, square, square + other)


def partners(keys: ir.Value, size: int) -> Integers | None:
    """The channel that each channel of a step's keys is turned into, by a rotary embedding before the cache.

    None where positions are applied in a way that is not recognised: then any two channels may be a pair.
    """
    node = keys.producer()
    while node is not None and node.op_type in _VIEWS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    itself = np.arange(size)
    if node is not None and node.op_type == "RotaryEmbedding":
        width = node.attributes.get_int("rotary_embedding_dim", 0) or _head_size(node) or size
        if node.attributes.get_int("interleaved", 0):
            return np.where(itself < width, itself ^ 1, itself)
        return np.where(itself < width, (itself + width // 2) % max(width, 1), itself)
    graph = keys.graph
    if graph is None or any(is_op(other, "Sin") for other in graph.all_nodes()):
        return None
    return itself


def _head_size(node: ir.Node) -> int | None:
    """Of what a rotary embedding turns, before heads are filled up; None if unknown."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
        return None
    return shape[3]
