"""Generation on a device: caches stay there and are written in place, and where that is possible a step is one graph.

A step has fixed memory for a number of rows and a capacity. Capacities come in few sizes, so that the graph of one
generation serves the next ones; what a generation leaves is kept for them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from planish.ir.block_sparsity.slots import SlotPlan
from planish.ir.causal_lm import IDS, LENGTHS, LOGITS, cache_layer
from planish.ir.errors import UnsupportedError
from planish.runtime.device_memory import DeviceMemory
from planish.runtime.ort import one_line
from planish.runtime.ort_device import DeviceRunner, element_of
from planish.runtime.tensors import NATIVE, NUMPY

#: The least capacity of caches that a graph is made for, and at most this share of one is unused.
_LEAST, _SHARE = 256, 4
#: Where `lengths` begin behind `input_ids`, a multiple of this many bytes.
_ALIGNED = 256


def bucket(tokens: int, positions: int | None = None) -> int:
    """The capacity that caches for `tokens` get: the next multiple of 256, or of about a quarter of `tokens`.

    Args:
        positions: more than the model has is never needed.
    """
    step = max(_LEAST, 1 << max((tokens - 1).bit_length() - 1, 0) >> (_SHARE.bit_length() - 1))
    made = -(-tokens // step) * step
    return made if positions is None else max(min(made, positions), tokens)


class DeviceEntries:
    """`prefill` and `decode` of a program on a device; what `generate` reads tokens with.

    Args:
        slots: layer → where its caches keep what they have not let go.
        positions: how many tokens a row may have.
    """

    def __init__(
        self, prefill: DeviceRunner, decode: DeviceRunner, slots: Mapping[int, SlotPlan], positions: int | None
    ) -> None:
        self.prefill, self.decode, self.slots, self.positions = prefill, decode, slots, positions
        self._first: dict[str, ort.OrtValue] = {}
        self._step: DeviceStep | None = None

    @property
    def vocabulary(self) -> int | None:
        shape = next(spec.shape for spec in self.decode.outputs if spec.name == LOGITS)
        last = shape[-1] if shape else None
        return last if isinstance(last, int) else None

    def start(self, prompts: np.ndarray, lengths: np.ndarray, new: int) -> np.ndarray:
        """Reads prompts (batch, tokens), rows padded on the right; the logits of each row's last token."""
        self._first = self.prefill.run_there({IDS: prompts, LENGTHS: lengths})
        logits = self._first.pop(LOGITS).numpy()
        self._lengths, self._capacity = lengths, prompts.shape[1] + new - 1
        last: np.ndarray = logits if logits.ndim == 2 else logits[np.arange(len(lengths)), lengths - 1]
        return last

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Reads one token a row, (batch) int64; the logits of the next, in an array that the next step overwrites."""
        if self._step is None:
            capacity = self._capacity
            if self.decode.capture:
                capacity = bucket(capacity, self.positions)
            key = len(tokens), capacity
            self._step = self.decode.kept.pop(key, None)
            if self._step is None:
                self._keep(self._limit - 1)
                self._step = DeviceStep(self.decode, *key, self.slots)
            self._step.begin(self._first, self._lengths)
            self._first.clear()
        return self._step(tokens)

    def close(self) -> None:
        """Ends a generation; its memory is kept for the next one, in the place of what was kept before."""
        self._first.clear()
        if self._step is not None and self.decode.capture:
            self.decode.kept[self._step.key] = self._step
            self._keep(self._limit)
        self._step = None

    @property
    def _limit(self) -> int:
        return max(self.decode.graphs, 1)

    def _keep(self, count: int) -> None:
        """Lets go of what was kept longest, but for so many."""
        while len(self.decode.kept) > count:
            self.decode.kept.popitem(last=False)


class DeviceStep:
    """`decode` bound to memory of its device, where a cache is input and output at once.

    Args:
        rows: sequences.
        capacity: positions of caches that let go nothing.
        slots: layer → where its caches keep what they have not let go.
    """

    def __init__(self, decode: DeviceRunner, rows: int, capacity: int, slots: Mapping[int, SlotPlan]) -> None:
        self.key = rows, capacity
        self._decode, self._memory = decode, DeviceMemory(decode.device, decode.index)
        self._options = decode.graph()
        offset = -(-rows * 8 // _ALIGNED) * _ALIGNED
        self._given = self._memory.host((offset + rows * 8,), np.dtype(np.uint8))
        self._ids = self._given[: rows * 8].view(np.int64)
        self._held = self._given[offset:].view(np.int64)
        self._there = self._empty(np.uint8, self._given.shape)
        base = self._there.data_ptr()
        self._binding = decode.session.io_binding()
        bind = functools.partial(self._binding.bind_input, device_type=decode.device, device_id=decode.index)
        given = {IDS: ((rows, 1), base), LENGTHS: ((rows,), base + offset)}
        binds = {
            name: functools.partial(bind, name, element_type=np.int64, shape=shape, buffer_ptr=address)
            for name, (shape, address) in given.items()
        }
        self.caches: dict[str, ort.OrtValue] = {}
        for spec in decode.inputs:
            layer = cache_layer(spec.name)
            if layer is None:
                continue
            assert spec.shape is not None and spec.dtype is not None
            room = slots[layer].capacity(capacity) if layer in slots else capacity
            heads, size = (int(dim) for dim in (spec.shape[1], spec.shape[3]))  # type: ignore[arg-type]
            cache = self.caches[spec.name] = self._empty(element_of(spec.dtype), (rows, heads, room, size))
            binds[spec.name] = functools.partial(self._binding.bind_ortvalue_input, spec.name, cache)
        for call in binds.values():
            call()
        # What the host reads is copied when it is bound; that is no form that a step should have, but a right one.
        self._again = [call for name, call in binds.items() if name in decode.host]
        for spec in decode.outputs:
            if cache_layer(spec.name) is not None:
                self._binding.bind_ortvalue_output(spec.name, self.caches[spec.name.replace("present_", "past_", 1)])
        logits = next(spec for spec in decode.outputs if spec.name == LOGITS)
        assert logits.shape is not None and logits.dtype is not None
        dims, dtype = (rows, int(logits.shape[-1])), NATIVE[logits.dtype]  # type: ignore[arg-type]
        self.logits, self._result = self._memory.host(dims, dtype), self._empty(dtype.type, dims)
        self._binding.bind_ortvalue_output(LOGITS, self._result)

    def begin(self, present: Mapping[str, ort.OrtValue], lengths: np.ndarray) -> None:
        """Takes the caches of prompts.

        Args:
            present: caches as `prefill` gave them, on the device, by name; those that `decode` does not read are left.
            lengths: tokens of each row, (batch) int64.
        """
        self._held[:] = lengths - 1  # a step counts the token before it as held
        for name, cache in self.caches.items():
            prompt = present[name.replace("past_", "present_", 1)]
            (rows, heads, tokens, size), room = prompt.shape(), cache.shape()[2]
            width = size * NUMPY[cache.element_type()].itemsize
            # Zeros, since what was never written is multiplied by nothing but is read: it must be no NaN.
            self._memory.zero(cache.data_ptr(), rows * heads * room * width)
            shares = room * width, prompt.data_ptr(), tokens * width, min(tokens, room) * width
            self._memory.copy_rows(cache.data_ptr(), *shares, rows * heads)
        self._memory.settle()

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Reads one token a row; returns the logits of the next."""
        self._ids[:] = tokens
        self._held += 1
        self._memory.upload(self._there.data_ptr(), self._given)
        for bind in self._again:
            bind()
        self._decode.call(self._binding, self._options)
        self._memory.download(self.logits, self._result.data_ptr())
        return self.logits

    def _empty(self, element: Any, shape: tuple[int, ...]) -> ort.OrtValue:
        where = self._decode.device, self._decode.index
        try:
            return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), element, *where)
        except Exception as error:
            rows, capacity = self.key
            raise UnsupportedError(
                f"caches for {rows} rows of {capacity} tokens do not fit on the device ({one_line(error)}): give fewer "
                "rows or tokens, or a memory budget, as in 'ort-cuda:memory=16GiB'."
            ) from error
