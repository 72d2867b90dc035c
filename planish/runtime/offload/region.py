"""Memory of sessions: blocks of one region, given out and taken back by calls from ONNX Runtime."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable

_ALIGN = 256


class Region:
    """Blocks of a range of addresses; first fit, neighbours that are free are joined.

    Work on one stream may use a block again as soon as it was given back, so nothing waits.

    Args:
        address, nbytes: of the range.

    Attributes:
        used, peak: bytes given out now, and the end of the highest block at most, from the beginning.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes
        self.used = self.peak = 0
        self._free: list[tuple[int, int]] = [(0, nbytes)] if nbytes else []  # (begin, end), sorted
        self._held: dict[int, int] = {}

    def take(self, nbytes: int) -> int | None:
        """The address of a block; None if there is no room in one piece."""
        size = max(nbytes + -nbytes % _ALIGN, _ALIGN)
        for at, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                if end - begin == size:
                    del self._free[at]
                else:
                    self._free[at] = begin + size, end
                self._held[begin] = size
                self.used += size
                self.peak = max(self.peak, begin + size)
                return self.address + begin
        return None

    def give(self, address: int) -> bool:
        """Takes a block back; false if it is not one of this region."""
        begin = address - self.address
        size = self._held.pop(begin, None)
        if size is None:
            return False
        self.used -= size
        end = begin + size
        at = bisect.bisect_left(self._free, (begin, end))
        if at < len(self._free) and self._free[at][0] == end:
            end = self._free.pop(at)[1]
        if at and self._free[at - 1][1] == begin:
            at -= 1
            begin = self._free.pop(at)[0]
        self._free.insert(at, (begin, end))
        return True


class Allocator:
    """What ONNX Runtime calls for memory of the device: of a region in runs, of the device itself for constants.

    Args:
        allocate, free: of the device.

    Attributes:
        region: where blocks of runs are.
        lacking: bytes of the last request that there was no room for; 0 if there was none.
    """

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], None]) -> None:
        self.region = Region(0, 0)
        self.lacking = 0
        self.constants = False  # what is asked for now lives as long as its session
        self._allocate, self._free = allocate, free
        self._kept: set[int] = set()
        self._calls = (
            ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(self._take),
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._give),
            ctypes.CFUNCTYPE(None)(lambda: None),
        )

    def options(self) -> dict[str, str]:
        """For ONNX Runtime's CUDA provider."""
        names = ("gpu_external_alloc", "gpu_external_free", "gpu_external_empty_cache")
        calls = (ctypes.cast(call, ctypes.c_void_p).value for call in self._calls)
        return {name: str(value) for name, value in zip(names, calls, strict=True)}

    def _take(self, nbytes: int) -> int | None:
        # Nothing may be raised through ONNX Runtime, which makes an error of its own of no address.
        if self.constants:
            try:
                address = self._allocate(nbytes)
            except Exception:
                self.lacking = nbytes
                return None
            self._kept.add(address)
            return address
        address_or_none = self.region.take(nbytes)
        if address_or_none is None:
            self.lacking = nbytes
        return address_or_none

    def _give(self, address: int | None) -> None:
        if address is None or self.region.give(address):
            return
        if address in self._kept:
            self._kept.discard(address)
            self._free(address)
