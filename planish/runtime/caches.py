"""Calibration inputs for a program whose caches are not those of the model any more."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from planish.ir.block_sparsity.slots import SLOTS, SlotPlan
from planish.ir.causal_lm import KEPT_HEADS, LENGTHS, cache_layer


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
    return found


def shorter_cache(present: np.ndarray, whole: np.ndarray, dropped: int) -> np.ndarray:
    """A cache that `prefill` gave, with as much free room as the calibrated one that holds `dropped` tokens more.

    Both are (batch, heads, capacity, size).
    """
    batch, heads, tokens, size = present.shape
    cache = np.zeros((batch, heads, whole.shape[2] - dropped, size), present.dtype)
    cache[:, :, :tokens] = present
    return cache
