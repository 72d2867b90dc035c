"""Keys and values of all layers: on the device, or on the host and brought there when they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from planish.runtime.offload.bound import Place, address_of
from planish.runtime.offload.device import COPY, Device, Rows, flat
from planish.runtime.offload.plan import Plan
from planish.runtime.offload.ring import Ring
from planish.runtime.offload.weights import itemsize, shape_of


class Caches:
    """The caches of one generation.

    Args:
        values: for each layer, key and value as its model takes them: (batch, heads, capacity, size).
        lengths: tokens that the caches hold of each row, (batch) int64; the caller counts them up.
    """

    def __init__(self, device: Device, plan: Plan, values: Sequence[Sequence[ir.Value]], lengths: np.ndarray) -> None:
        self.device, self.plan, self.lengths = device, plan, lengths
        sizes = {"batch": plan.request.batch, "capacity": plan.request.capacity}
        self._shapes = [[(*shape_of(v, sizes), itemsize(v)) for v in pair] for pair in values]
        self._device: dict[int, list[int]] = {}
        self.host: dict[int, list[np.ndarray]] = {}
        for layer, shapes in enumerate(self._shapes):
            if layer in plan.kv_device:
                self._device[layer] = [self._zeros(_nbytes(shape), "caches") for shape in shapes]
            else:
                self.host[layer] = [device.host(_nbytes(shape)) for shape in shapes]
        stage = max((sum(map(_nbytes, self._shapes[k])) for k in self.host), default=0)
        self._buffers = [self._zeros(stage, "buffers for caches") for _ in range(plan.kv_slots if self.host else 0)]
        self._ring: Ring | None = None
        self._stepping = False
        #: Addresses that the ring has given out, by layer.
        self._now: dict[int, int] = {}

    def begin_prompt(self) -> None:
        """Layers will be asked for once each, in order; caches of the host come down after their layer."""
        if self.host:
            self._ring = Ring(self.device, self._buffers, unload=self._bring_prompt)
            self._ring.begin(sorted(self.host))

    def begin_step(self) -> None:
        """Layers will be asked for once each, in order, to write one token; caches that are copied go up and down."""
        if self.host and not self._stepping:
            self._ring = Ring(self.device, self._buffers, load=self._send, unload=self._bring_token)
            if self.plan.attended:  # on the host, which waits for no event of a stream: the prompt's must be there
                self.device.synchronize(self.device.record(COPY))
            self._stepping = True
        if self._ring is not None:
            self._ring.begin(sorted(self.host.keys() - self.plan.attended))

    def acquire(self, layer: int, row: int | None = None) -> list[Place]:
        """Key and value of a layer on the device, of one row or all; the compute stream waits for them."""
        if layer in self._device:
            starts = self._device[layer]
        else:
            if layer not in self._now:
                assert self._ring is not None
                self._now[layer] = self._ring.acquire(layer)
            starts = self._split(layer, self._now[layer])
        batch = self.plan.request.batch
        sizes = [_nbytes(shape) // batch for shape in self._shapes[layer]]
        return [Place(start + (row or 0) * size) for start, size in zip(starts, sizes, strict=True)]

    def release(self, layer: int) -> None:
        """The compute stream is done with a layer."""
        if layer in self.host:
            assert self._ring is not None
            self._ring.release(layer)
            del self._now[layer]

    def on_host(self, layer: int) -> list[Place]:
        """Key and value of a layer that is on the host, where they are."""
        return [Place(address_of(array), True) for array in self.host[layer]]

    def close(self) -> None:
        """Gives the memory back."""
        for address in (*(a for pair in self._device.values() for a in pair), *self._buffers):
            self.device.free(address)
        self._device.clear()
        self._buffers.clear()
        self.host.clear()

    def _zeros(self, nbytes: int, what: str) -> int:
        # What was never written is multiplied by nothing, but is read: it must be no NaN.
        address = self.device.allocate(nbytes, what)
        self.device.zero(address, nbytes)
        return address

    def _split(self, layer: int, address: int) -> list[int]:
        return [address, address + _nbytes(self._shapes[layer][0])]

    def _pairs(self, layer: int, address: int) -> list[tuple[int, int, tuple[int, ...]]]:
        """(address on the host, address on the device, shape) of key and value."""
        starts = self._split(layer, address)
        hosts = [address_of(array) for array in self.host[layer]]
        return list(zip(hosts, starts, self._shapes[layer], strict=True))

    def _held(self, shape: tuple[int, ...]) -> Rows:
        """What the longest row holds, of all heads."""
        batch, heads, capacity, size, item = shape
        pitch = capacity * size * item
        held = min(int(self.lengths.max()), capacity)
        return (
            flat(batch * heads * pitch) if held == capacity else Rows(batch * heads, held * size * item, pitch, pitch)
        )

    def _bring_prompt(self, layer: int, address: int) -> None:
        for host, start, shape in self._pairs(layer, address):
            self.device.download(host, start, self._held(shape), COPY)

    def _send(self, layer: int, address: int) -> None:
        for host, start, shape in self._pairs(layer, address):
            self.device.upload(start, host, self._held(shape), COPY)

    def _bring_token(self, layer: int, address: int) -> None:
        for host, start, (_, heads, capacity, size, item) in self._pairs(layer, address):
            pitch = capacity * size * item
            for row, held in enumerate(self.lengths):
                offset = row * heads * pitch + int(held) * size * item
                self.device.download(host + offset, start + offset, Rows(heads, size * item, pitch, pitch), COPY)


def _nbytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
