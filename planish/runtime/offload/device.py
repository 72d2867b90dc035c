"""What streaming asks of a device, and ordinary memory in the place of one.

A device has memory under an account, two streams (one computes, one copies) and events that order them, as in CUDA.
:class:`HostDevice` runs everything on the CPU, but late: work waits in its stream until something synchronizes, and
then runs in an order that is drawn among those that events allow. What forgets an event gives wrong numbers there.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from planish.runtime.offload.account import Account

COMPUTE, COPY = 0, 1


@dataclass(frozen=True)
class Rows:
    """Equal pieces of two regions: `count` rows of `width` bytes, whose beginnings lie a pitch apart."""

    count: int
    width: int
    target_pitch: int
    source_pitch: int


class Event(Protocol):
    """A point in a stream."""


class Device(Protocol):
    """Memory, streams and sessions. Addresses are integers; host arrays stay alive and unchanged until read."""

    kind: str  # of ONNX Runtime: "cpu" or "cuda"
    concurrent: bool  # copies go on while the host computes
    account: Account

    def allocate(self, nbytes: int, what: str) -> int: ...
    def free(self, address: int) -> None: ...
    def host(self, nbytes: int) -> np.ndarray:
        """Zeros in main memory that copies read and write directly, (nbytes,) uint8."""

    def zero(self, address: int, nbytes: int) -> None:
        """Puts the writing of zeros into the compute stream."""

    def upload(self, target: int, source: int, rows: Rows, stream: int) -> None: ...
    def download(self, target: int, source: int, rows: Rows, stream: int) -> None: ...
    def record(self, stream: int) -> Event: ...
    def wait(self, stream: int, event: Event) -> None:
        """What is put into `stream` from now on waits for the event."""

    def synchronize(self, event: Event) -> None:
        """Waits on the host."""

    def done(self, event: Event) -> bool:
        """Whether an event happened."""

    def launch(self, run: Callable[[], None]) -> None:
        """Runs something that puts its work into the compute stream."""

    def session(self, model: bytes, options: Any, workspace: int) -> tuple[Any, Any]:
        """An ONNX Runtime session that computes here in `workspace` bytes beside what is bound, and its run options."""

    def room(self, nbytes: int) -> int:
        """What a session with so many bytes of live values is given: allocators round, and kernels have scratch."""

    def workspace(self, nbytes: int) -> None:
        """Counts what all sessions together may take."""

    @property
    def reserve(self) -> int:
        """Bytes that libraries take for themselves."""

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the device reads from its own memory, at best."""

    def close(self) -> None: ...


def flat(nbytes: int) -> Rows:
    """One row."""
    return Rows(1, nbytes, nbytes, nbytes)


class _Ticket:
    """An event of :class:`HostDevice`."""

    done = False


class HostDevice:
    """Ordinary memory with the manners of a device.

    Args:
        limit: bytes that may be taken; None: any number.
        seed: of the order in which the streams run.
    """

    kind = "cpu"
    concurrent = False

    def __init__(self, limit: int | None = None, seed: int = 0) -> None:
        self.account = Account(limit)
        self._blocks: dict[int, tuple[np.ndarray, str]] = {}
        self._queues: tuple[deque[Any], deque[Any]] = (deque(), deque())
        self._random = np.random.default_rng(seed)

    def allocate(self, nbytes: int, what: str) -> int:
        self.account.take(nbytes, what)
        block = np.full(nbytes + 64, 0xFF, np.uint8)  # NaN in every float dtype
        address = block.ctypes.data + -block.ctypes.data % 64
        self._blocks[address] = block, what
        return address

    def free(self, address: int) -> None:
        block, what = self._blocks.pop(address)
        self.account.give(block.nbytes - 64, what)

    def host(self, nbytes: int) -> np.ndarray:
        return np.zeros(nbytes, np.uint8)

    def zero(self, address: int, nbytes: int) -> None:
        self._queues[COMPUTE].append(lambda: ctypes.memset(address, 0, nbytes))

    def upload(self, target: int, source: int, rows: Rows, stream: int) -> None:
        self._queues[stream].append(lambda: _copy(target, source, rows))

    download = upload

    def record(self, stream: int) -> _Ticket:
        ticket = _Ticket()
        self._queues[stream].append(lambda: setattr(ticket, "done", True))
        return ticket

    def wait(self, stream: int, event: Event) -> None:
        self._queues[stream].append(event)

    def synchronize(self, event: Event) -> None:
        while not event.done:  # type: ignore[attr-defined]
            ready = [queue for queue in self._queues if queue and (not isinstance(queue[0], _Ticket) or queue[0].done)]
            if not ready:
                raise RuntimeError("the streams wait for each other")
            item = ready[int(self._random.integers(len(ready)))].popleft()
            if not isinstance(item, _Ticket):
                item()

    def done(self, event: Event) -> bool:
        return bool(event.done)  # type: ignore[attr-defined]

    def launch(self, run: Callable[[], None]) -> None:
        self._queues[COMPUTE].append(run)

    def session(self, model: bytes, options: Any, workspace: int) -> tuple[Any, Any]:
        from planish.runtime.ort import create_session

        return create_session(model, options), None

    def room(self, nbytes: int) -> int:
        return nbytes

    def workspace(self, nbytes: int) -> None:
        # Counted only: the sessions of the CPU provider have arenas of their own.
        self.account.give(self.account.by["sessions"], "sessions")
        self.account.take(nbytes, "sessions")

    @property
    def reserve(self) -> int:
        return 0

    @property
    def bandwidth(self) -> float:
        return 1e10

    def close(self) -> None:
        for queue in self._queues:
            queue.clear()
        self._blocks.clear()


def _copy(target: int, source: int, rows: Rows) -> None:
    for k in range(rows.count):
        ctypes.memmove(target + k * rows.target_pitch, source + k * rows.source_pitch, rows.width)
