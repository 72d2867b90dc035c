"""How two ranks of one process get each other's addends: by the copy engines, or as sums by NCCL.

A copy between GPUs takes no multiprocessor from what is computed beside it, which NCCL's kernels do. For two ranks the
bytes are the same: each sends what it has once. What is received is added by whatever reads the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from planish.ir.errors import InputError, UnsupportedError
from planish.runtime.parallel.rank import Received, Reducer

if TYPE_CHECKING:
    import torch

#: Names of :func:`exchange`.
KINDS = ("copy", "nccl")


class Exchange(Protocol):
    """The reducers of all ranks of one process, which one thread moves on in turn."""

    def reducer(self, rank: int) -> Reducer: ...

    def restart(self) -> None:
        """Called before a run: ranks are in step again, whatever became of the last one."""
        ...

    def forget(self) -> list[Any]:
        """Called where all that was begun is done, before and behind the capture of a graph.

        Returns:
            Memory that a graph uses and has to keep.
        """
        ...


def exchange(kind: str, devices: Sequence[str]) -> Exchange:
    """An exchange between devices by its name: ``"copy"`` or ``"nccl"``.

    Raises:
        InputError: another name.
        UnsupportedError: there is no NCCL, GPUs can not reach each other's memory, or copies are asked of other than 2.
    """
    if kind not in KINDS:
        raise InputError(f"exchange is {kind!r}; it is one of {', '.join(KINDS)}.")
    if kind == "copy":
        return CopyExchange(devices)
    return NcclExchange(devices)


@dataclass
class _Slot:
    """Memory of a rank that its peer writes.

    Attributes:
        read: event behind the last reading of what was in it; None if nothing has to be waited for.
    """

    tensor: torch.Tensor
    read: Any = None


@dataclass
class _Inbox:
    """The slots of one rank: free ones by shape and dtype, and what has been sent in the order of the sums.

    Attributes:
        used: shapes and dtypes of this run.
    """

    free: dict[tuple[Any, ...], list[_Slot]] = field(default_factory=dict)
    used: set[tuple[Any, ...]] = field(default_factory=set)
    sent: dict[int, tuple[_Slot, Any]] = field(default_factory=dict)
    begun: int = 0

    def take(self, like: torch.Tensor, device: str, lane: _Lane) -> _Slot:
        import torch

        kind = tuple(like.shape), like.dtype
        self.used.add(kind)
        free = self.free.setdefault(kind, [])
        if free:
            return free.pop(0)
        # Its memory may have been another tensor's, which the rank still reads.
        return _Slot(torch.empty(like.shape, dtype=like.dtype, device=device), lane.mark())


class CopyExchange:
    """Addends by copies from device to device, each on a stream of the sender.

    Raises:
        UnsupportedError: there are not two devices, or they are GPUs that can not reach each other's memory.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        if len(devices) != 2:
            raise UnsupportedError(f"copies are between 2 ranks, not {len(devices)}; take exchange='nccl'.")
        self.devices = list(devices)
        self._inboxes = [_Inbox() for _ in devices]
        self._lanes = [_lane(device) for device in devices]
        _let_in(devices)

    def reducer(self, rank: int) -> Reducer:
        return _Sender(self, rank)

    def restart(self) -> None:
        for inbox in self._inboxes:
            inbox.begun = 0
            inbox.sent.clear()
            # Slots for other lengths than the last run's are let go; what reads them is on the stream they are made on.
            inbox.free = {kind: slots for kind, slots in inbox.free.items() if kind in inbox.used}
            inbox.used.clear()

    def forget(self) -> list[Any]:
        slots = [slot for inbox in self._inboxes for free in inbox.free.values() for slot in free]
        for slot in slots:
            slot.read = None
        return [slot.tensor for slot in slots]

    def send(self, rank: int, tensor: torch.Tensor) -> Callable[[], Received]:
        """Begins to send an addend; returns what waits for the other's."""
        mine, theirs = self._inboxes[rank], self._inboxes[1 - rank]
        number = mine.begun
        mine.begun += 1
        slot = theirs.take(tensor, self.devices[1 - rank], self._lanes[1 - rank])
        sent = self._lanes[rank].copy(slot.tensor, tensor, slot.read)
        theirs.sent[number] = slot, sent

        def wait() -> Received:
            if number not in mine.sent:
                raise InputError(f"rank {rank} waits for sum {number}, which rank {1 - rank} has not begun.")
            got, arrived = mine.sent.pop(number)
            lane = self._lanes[rank]
            lane.wait(arrived)
            lane.wait(sent)  # then the addend may be written to again

            def release() -> None:
                got.read = lane.mark()
                mine.free.setdefault((tuple(got.tensor.shape), got.tensor.dtype), []).append(got)

            return Received(got.tensor, release)

        return wait


@dataclass
class _Sender:
    exchange: CopyExchange
    rank: int

    def begin(self, tensor: torch.Tensor) -> Callable[[], Received]:
        return self.exchange.send(self.rank, tensor)


class _Lane(Protocol):
    """How a rank sends; events are the lane's own."""

    def copy(self, to: torch.Tensor, origin: torch.Tensor, read: Any) -> Any: ...
    def wait(self, event: Any) -> None: ...
    def mark(self) -> Any: ...


class _HostLane:
    """Copies at once, on a CPU."""

    def copy(self, to: torch.Tensor, origin: torch.Tensor, read: Any) -> Any:
        to.copy_(origin)
        return None

    def wait(self, event: Any) -> None: ...

    def mark(self) -> Any:
        return None


class _CudaLane:
    """Copies on a second stream of a GPU. What the rank computes is on the device's current stream."""

    def __init__(self, device: str) -> None:
        import torch

        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device, priority=-1)

    def copy(self, to: torch.Tensor, origin: torch.Tensor, read: Any) -> Any:
        """Behind what the current stream holds and behind `read`; returns the event of its end."""
        import torch

        from planish.runtime.cuda import driver

        if not origin.is_contiguous():
            raise InputError(f"an addend of shape {tuple(origin.shape)} is not one piece of memory.")
        self.stream.wait_event(self.mark())
        if read is not None:
            self.stream.wait_event(read)
        with torch.cuda.device(self.device):
            size = origin.numel() * origin.element_size()
            if size:
                driver.copy(to.data_ptr(), origin.data_ptr(), size, self.stream.cuda_stream)
            done = torch.cuda.Event()
            done.record(self.stream)
        return done

    def wait(self, event: Any) -> None:
        import torch

        torch.cuda.current_stream(self.device).wait_event(event)

    def mark(self) -> Any:
        import torch

        with torch.cuda.device(self.device):
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream())
        return event


def _lane(device: str) -> _Lane:
    return _CudaLane(device) if device.startswith("cuda") else _HostLane()


def _let_in(devices: Sequence[str]) -> None:
    """Lets each GPU reach the other's memory.

    Raises:
        UnsupportedError: they are not linked: a copy would go through the host.
    """
    import torch

    gpus = {torch.device(device) for device in devices if device.startswith("cuda")}
    for there in gpus:
        for here in gpus - {there}:
            if not torch.cuda.can_device_access_peer(here, there):
                raise UnsupportedError(f"{here} can not reach the memory of {there}; take exchange='nccl'.")
            torch.zeros(1, device=here).copy_(torch.zeros(1, device=there))  # torch enables it in this direction


class NcclExchange:
    """Sums by NCCL, for any number of GPUs. The last rank to begin a sum begins it for all.

    Raises:
        UnsupportedError: there is no NCCL, or a device is not a GPU.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        import torch

        from planish.runtime.parallel import nccl

        self.devices = [torch.device(device) for device in devices]
        if any(device.type != "cuda" for device in self.devices):
            raise UnsupportedError(f"NCCL makes sums between GPUs; the devices are {', '.join(devices)}.")
        self.communicators = nccl.all_of_one_process([device.index or 0 for device in self.devices])
        self.streams = [torch.cuda.Stream(device, priority=-1) for device in self.devices]
        self._begun = [0 for _ in devices]
        self._pending: dict[int, dict[int, torch.Tensor]] = {}
        self._done: dict[tuple[int, int], Any] = {}

    def reducer(self, rank: int) -> Reducer:
        return _Adder(self, rank)

    def restart(self) -> None:
        self._begun = [0 for _ in self.devices]
        self._pending.clear()
        self._done.clear()

    def forget(self) -> list[Any]:
        return []

    def begin(self, rank: int, tensor: torch.Tensor) -> Callable[[], None]:
        import torch

        number = self._begun[rank]
        self._begun[rank] += 1
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.devices[rank]))
        self.streams[rank].wait_event(ready)
        waiting = self._pending.setdefault(number, {})
        waiting[rank] = tensor
        if len(waiting) == len(self.devices):
            self._sum(number, self._pending.pop(number))

        def wait() -> None:
            if (rank, number) not in self._done:
                raise InputError(f"rank {rank} waits for sum {number}, which not all ranks have begun.")
            torch.cuda.current_stream(self.devices[rank]).wait_event(self._done.pop((rank, number)))

        return wait

    def _sum(self, number: int, addends: dict[int, torch.Tensor]) -> None:
        import torch

        from planish.runtime.parallel import nccl

        with nccl.together():
            for rank, tensor in addends.items():
                with torch.cuda.device(self.devices[rank]):
                    self.communicators[rank].all_reduce(tensor, self.streams[rank].cuda_stream)
        for rank in addends:
            done = torch.cuda.Event()
            done.record(self.streams[rank])
            self._done[rank, number] = done


@dataclass
class _Adder:
    exchange: NcclExchange
    rank: int

    def begin(self, tensor: torch.Tensor) -> Callable[[], None]:
        return self.exchange.begin(self.rank, tensor)
