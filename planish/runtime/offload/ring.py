"""A ring of buffers on a device: what comes next is copied there while what came before is computed with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from planish.runtime.offload.device import COMPUTE, COPY, Device

#: Starts the copies between the host and a buffer: (item, address of the buffer).
Transfer = Callable[[int, int], None]


@dataclass
class _Slot:
    address: int
    item: int | None = None
    ready: Any = None


class Ring:
    """Items that take turns in a few buffers, in a fixed order.

    Args:
        device: whose streams and events are used.
        addresses: of the buffers, at least one.
        load: puts copies to a buffer into the copy stream, when it is free; None where nothing is to be copied.
        unload: puts copies from it into the copy stream, when the item is done with; None alike.
        cyclic: after the last item comes the first.
    """

    def __init__(
        self,
        device: Device,
        addresses: Sequence[int],
        *,
        load: Transfer | None = None,
        unload: Transfer | None = None,
        cyclic: bool = False,
    ) -> None:
        self.device, self.load, self.unload, self.cyclic = device, load, unload, cyclic
        self._free = deque(_Slot(address) for address in addresses)
        self._held: dict[int, _Slot] = {}
        self._order: list[int] = []
        self._next = 0

    def begin(self, order: Sequence[int]) -> None:
        """Says which items will be acquired, in this order; a cyclic ring goes on where it is in the same order."""
        if self.cyclic and list(order) == self._order:
            return
        for slot in self._held.values():
            self._free.append(slot)
        self._held.clear()
        self._order, self._next = list(order), 0
        self._fill()

    def acquire(self, item: int) -> int:
        """The address of an item's buffer; the compute stream waits until it is there."""
        slot = self._held[item]
        if slot.ready is not None:
            self.device.wait(COMPUTE, slot.ready)
        return slot.address

    def release(self, item: int) -> None:
        """The compute stream is done with an item: its buffer is emptied, and filled with the next one."""
        slot = self._held.pop(item)
        self.device.wait(COPY, self.device.record(COMPUTE))
        if self.unload is not None:
            self.unload(item, slot.address)
        slot.ready = self.device.record(COPY)
        self._free.append(slot)
        self._fill()

    def _fill(self) -> None:
        while self._free and self._order and (self.cyclic or self._next < len(self._order)):
            item = self._order[self._next % len(self._order)]
            if item in self._held:  # all of them have a buffer
                return
            slot = self._free.popleft()
            self._held[item] = slot
            self._next += 1
            if self.load is not None:
                self.load(item, slot.address)
                slot.ready = self.device.record(COPY)
