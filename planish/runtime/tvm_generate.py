"""Generation on tvm-cuda: prompts and caches on the GPU, a step of `decode` as a CUDA graph over buffers that stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from planish.ir.block_sparsity.slots import SlotPlan
from planish.ir.causal_lm import IDS, LENGTHS, LOGITS, cache_layer
from planish.runtime.cuda.graphs import Graph, Stream
from planish.runtime.tvm import import_runtime
from planish.runtime.tvm_cuda import TvmCudaRunner


class TvmCudaEntries:
    """`prefill` and `decode` of a program on a GPU; what :mod:`planish.runtime.generate` draws tokens from."""

    def __init__(self, prefill: TvmCudaRunner, decode: TvmCudaRunner, slots: Mapping[int, SlotPlan]) -> None:
        self.prefill, self.decode, self.slots = prefill, decode, slots
        self._stream: Stream | None = None
        self._step: DeviceStep | None = None

    @property
    def vocabulary(self) -> int | None:
        shape = next(spec.shape for spec in self.decode.outputs if spec.name == LOGITS)
        last = shape[-1] if shape else None
        return last if isinstance(last, int) else None

    def start(self, prompts: np.ndarray, lengths: np.ndarray, new: int) -> np.ndarray:
        """Reads the prompts; gives the logits of each row's last token, (batch, vocabulary)."""
        self.prefill.check({IDS: prompts, LENGTHS: lengths})
        self._stream = stream = Stream()
        given = {IDS: _upload(stream, prompts), LENGTHS: _upload(stream, lengths)}
        present, _ = self.prefill.on_stream(given, stream.address)
        logits = _download(stream, present.pop(LOGITS))
        self._present, self._lengths, self._capacity = present, lengths, prompts.shape[1] + new - 1
        return logits if logits.ndim == 2 else logits[np.arange(len(lengths)), lengths - 1]

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Reads a token a row; gives the logits of the next."""
        if self._step is None:
            assert self._stream is not None
            arguments = self._present, self._lengths, self._capacity
            self._step = DeviceStep(self.decode, self._stream, *arguments, self.slots)
        return self._step(tokens)

    def close(self) -> None:
        if self._step is not None:
            self._step.close()
        if self._stream is not None:
            self._stream.close()
        self._present, self._step, self._stream = {}, None, None


class DeviceStep:
    """`decode` over its caches on the GPU.

    The first step runs as it is, which loads kernels and gets memory; those behind it are one CUDA graph.

    Args:
        decode: the entry, which updates its caches in place.
        stream: everything runs on it.
        present: caches as `prefill` gave them, by name; they are let go.
        lengths: tokens of each row, (batch) int64.
        capacity: positions to allocate.
        slots: layer → where its caches keep what they have not let go.
    """

    def __init__(
        self,
        decode: TvmCudaRunner,
        stream: Stream,
        present: dict[str, Any],
        lengths: np.ndarray,
        capacity: int,
        slots: Mapping[int, SlotPlan],
    ) -> None:
        self.decode, self.stream = decode, stream
        self.ids = np.zeros((len(lengths), 1), np.int64)
        self.lengths = lengths - 1  # a step counts the token before it as held
        self.inputs = {IDS: _upload(stream, self.ids), LENGTHS: _upload(stream, self.lengths)}
        for spec in decode.inputs:
            layer = cache_layer(spec.name)
            if layer is not None:
                prompt = present.pop(spec.name.replace("past_", "present_", 1))
                room = slots[layer].capacity(capacity) if layer in slots else capacity
                self.inputs[spec.name] = _roomier(stream, prompt, room)
        present.clear()
        shapes = {name: np.broadcast_to(np.empty((), str(x.dtype)), x.shape) for name, x in self.inputs.items()}
        decode.check(shapes)
        self._graph: Graph | None = None
        self._memory: Any = None
        self._steps = 0

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Reads one token a row; gives the logits of the next, (batch, vocabulary)."""
        self.ids[:, 0] = tokens
        self.lengths += 1
        self.stream.to_device(self.inputs[IDS].data_ptr(), self.ids)
        self.stream.to_device(self.inputs[LENGTHS].data_ptr(), self.lengths)
        self.advance()
        return _download(self.stream, self.logits)

    def advance(self) -> None:
        """Runs the step on what the buffers hold, without waiting for it; `logits` is then on the GPU."""
        self._steps += 1
        if self._steps == 1:
            self.logits = self._run()[0][LOGITS]
            return
        if self._graph is None:
            self.stream.wait()
            del self.logits  # so that a step finds memory without asking the driver
            self._graph, (found, self._memory) = self.stream.capture(self._run)
            self.logits = found[LOGITS]
        self._graph.launch(self.stream)

    def _run(self) -> tuple[dict[str, Any], Any]:
        return self.decode.on_stream(self.inputs, self.stream.address)

    def close(self) -> None:
        """Lets go of the caches, when the GPU has done with them."""
        self.stream.wait()
        if self._graph is not None:
            self._graph.close()
        self._graph = self._memory = None
        self.inputs = {}


def _upload(stream: Stream, array: np.ndarray) -> Any:
    tvm = import_runtime()
    made = tvm.runtime.empty(array.shape, str(array.dtype), tvm.runtime.device("cuda", 0))
    stream.to_device(made.data_ptr(), np.ascontiguousarray(array))
    stream.wait()
    return made


def _download(stream: Stream, tensor: Any) -> np.ndarray:
    array = np.empty(tuple(int(size) for size in tensor.shape), str(tensor.dtype))
    stream.to_host(array, tensor.data_ptr())
    return array


def _roomier(stream: Stream, prompt: Any, room: int) -> Any:
    """A cache (batch, heads, room, size) that begins with (batch, heads, tokens, size); zeros behind it."""
    tvm = import_runtime()
    batch, heads, tokens, size = (int(n) for n in prompt.shape)
    cache = tvm.runtime.empty((batch, heads, room, size), str(prompt.dtype), tvm.runtime.device("cuda", 0))
    row = size * np.dtype(str(prompt.dtype)).itemsize
    stream.clear(cache.data_ptr(), batch * heads * room * row)
    width = min(tokens, room) * row
    stream.copy_rows(cache.data_ptr(), room * row, prompt.data_ptr(), tokens * row, width, batch * heads)
    return cache
