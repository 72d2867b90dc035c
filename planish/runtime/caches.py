"""Calibration inputs for a program whose caches are not those of the model any more."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from planish.ir.block_sparsity.slots import SLOTS, SlotPlan
from planish.ir.causal_lm import KEPT_HEADS, LENGTHS, cache_layer, scale_name
from planish.ir.graphs import constant_tensor
from planish.ir.ops.cache_attention import CACHE_ATTENTION, quantize

#: Inputs of a step over caches: the keys, and of com.microsoft's GroupQueryAttention the scales of keys and of values.
_PAST_KEY, _KEY_SCALE = 3, 12


def fitting(graph: ir.Graph, names: Collection[str], batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch without what an entry no longer reads: caches of layers and of heads, positions of caches.

    Args:
        graph: of the entry; its inputs say what their caches hold.
        names: the inputs that it reads.
    """
    found = {name: value for name, value in batch.items() if name in names or cache_layer(name) is None}
    for value in graph.inputs:
        if value.name not in found:
            continue
        kept, slots = (value.metadata_props.get(key) for key in (KEPT_HEADS, SLOTS))
        if kept is not None:
            found[value.name] = np.take(found[value.name], [int(head) for head in kept.split()], axis=1)
        if slots is not None:
            found[value.name] = SlotPlan.parse(slots).gather(found[value.name], found[LENGTHS])
    stored = [item for value in graph.inputs if value.name in found for item in _stored(value, found)]
    return found | dict(stored)


def _stored(value: ir.Value, batch: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """What an input gets of a batch: of a cache in fewer bits its codes, and scales if they are an input too."""
    name = value.name or ""
    array = batch[name]
    if cache_layer(name) is None or array.dtype != np.float32 or value.dtype in (None, ir.DataType.FLOAT):
        return [(name, array)]
    if value.dtype != ir.DataType.INT8:
        largest = np.finfo(value.dtype.numpy()).max
        return [(name, np.clip(array, -largest, largest).astype(value.dtype.numpy()))]
    node, index = next(iter(value.uses()))
    keys = index == _PAST_KEY
    if node.op_type != CACHE_ATTENTION.name:
        scales = _constant(node, _KEY_SCALE if keys else _KEY_SCALE + 1)
        return [(name, np.clip(np.rint(array * (1 / scales)), -128, 127).astype(np.int8))]
    channels = _constant(node, len(node.inputs) - 1)
    codes, scales = quantize(array, channels if keys else np.ones_like(channels))
    return [(name, codes), (scale_name(name), scales)]


def _constant(node: ir.Node, index: int) -> np.ndarray:
    tensor = constant_tensor(node.inputs[index])
    assert tensor is not None
    return tensor.numpy()


def shorter_cache(present: np.ndarray, whole: np.ndarray, dropped: int) -> np.ndarray:
    """A cache that `prefill` gave, with as much free room as the calibrated one that holds `dropped` tokens more.

    Both are (batch, heads, capacity, size).
    """
    batch, heads, tokens, size = present.shape
    cache = np.zeros((batch, heads, whole.shape[2] - dropped, size), present.dtype)
    cache[:, :, :tokens] = present
    return cache
