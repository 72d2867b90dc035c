"""All ranks of a tensor-parallel program in one process: one thread moves them on in turn, node by node."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from planish.ir.causal_lm import KEPT_HEADS
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.ledger import Ratio
from planish.ir.parallel import rank_of, shard_axis
from planish.ir.program import Program
from planish.runtime.parallel import exchange as exchanges
from planish.runtime.parallel.rank import Rank
from planish.runtime.parallel.torch_ops import Attend, contiguous_attention

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


class Group:
    """Programs that compute one model together, each on its device.

    Args:
        programs: by rank, as `tensor_parallel` made them; the same passes must have run on all.
        devices: of torch, by rank; by default the first GPUs.
        exchange: how the ranks' sums are made: ``"copy"`` (two ranks: by the GPUs' copy engines, beside what is
            computed) or ``"nccl"``. Which is faster is the machine's to say: see :func:`fastest`.
        dtype, attend: as those of `Rank`.
        like: a group on the same devices, whose weights are used where the programs have the same.

    Raises:
        InputError: the programs are not all ranks of one program, or differ in their nodes.
        UnsupportedError: an operator that `Rank` does not have, too few GPUs, or no NCCL.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        devices: Sequence[str] | None = None,
        exchange: str = "copy",
        *,
        entry: str | None = None,
        dtype: str | None = None,
        attend: Attend = contiguous_attention,
        like: Group | None = None,
    ) -> None:
        known = [rank_of(program) for program in programs]
        if known != [(rank, len(programs)) for rank in range(len(programs))]:
            raise InputError(f"these are the ranks {known}, not 0 to {len(programs) - 1} of {len(programs)}.")
        self.devices = list(devices) if devices is not None else _gpus(len(programs))
        if len(self.devices) != len(programs):
            raise InputError(f"{len(programs)} ranks on {len(self.devices)} devices; give each its own.")
        self.exchange = exchanges.exchange(exchange, self.devices)
        self.ranks: list[Rank] = [
            Rank(program, self.exchange.reducer(r), entry, device, dtype, attend, like.ranks[r] if like else None)
            for r, (program, device) in enumerate(zip(programs, self.devices, strict=True))
        ]
        orders = [[(node.domain, node.op_type) for node in rank.graph] for rank in self.ranks]
        if any(order != orders[0] for order in orders):
            raise InputError("the ranks differ in their nodes; run the same passes on all of them.")
        self._streams = [_stream(device) for device in self.devices]

    def place(self, feeds: Mapping[str, Any]) -> list[Tensors]:
        """Inputs of the whole program as the ranks read them, each on its device, for `run`.

        Raises:
            InputError: an input is missing.
        """
        return [self._part(rank, feeds) for rank in range(len(self.ranks))]

    def run(self, feeds: Mapping[str, Any] | Sequence[Tensors]) -> Tensors:
        """Inputs of the whole program, or what `place` made of them → its outputs by name, on the first device.

        Nothing is waited for on the host: outputs are as any result of torch's current streams.

        Raises:
            InputError: an input is missing.
        """
        import torch

        with contextlib.ExitStack() as stack:
            for device, stream in self._cuda():
                stream.wait_stream(torch.cuda.current_stream(device))
            for _, stream in self._cuda():
                stack.enter_context(torch.cuda.stream(stream))
            found = self._all(self.place(feeds) if isinstance(feeds, Mapping) else feeds)
        for device, stream in self._cuda():
            torch.cuda.current_stream(device).wait_stream(stream)
        return found

    def graph(self, feeds: Mapping[str, Any]) -> Graph:
        """The run as one CUDA graph over all devices, for inputs of these shapes.

        Raises:
            InputError: a device is not a GPU, or an input is missing.
        """
        if len(list(self._cuda())) < len(self.devices):
            raise InputError(f"CUDA graphs are for GPUs; the devices are {', '.join(self.devices)}.")
        return Graph(self, feeds)

    def synchronize(self) -> None:
        """Waits for all devices."""
        import torch

        for device, _ in self._cuda():
            torch.cuda.synchronize(device)

    def _cuda(self) -> list[tuple[str, Any]]:
        return [(d, s) for d, s in zip(self.devices, self._streams, strict=True) if s is not None]

    def _part(self, rank: int, feeds: Mapping[str, Any]) -> Tensors:
        """What one rank is given of the inputs of the whole, on its device."""
        import torch

        found = {}
        for value in self.ranks[rank].graph.inputs:
            name = value.name or ""
            if name not in feeds:
                raise InputError(f"input '{name}' is not given.")
            item = torch.as_tensor(feeds[name])
            heads, axis = value.metadata_props.get(KEPT_HEADS), shard_axis(value)
            if axis is not None and heads is not None:
                kept = torch.tensor([int(head) for head in heads.split()], device=item.device)
                item = item.index_select(axis, kept)
            found[name] = item.to(self.devices[rank], non_blocking=True)
        return found

    def _all(self, feeds: Sequence[Mapping[str, Any]]) -> Tensors:
        """The ranks' nodes in turn, on the current streams: all have begun a sum before one waits for it."""
        self.exchange.restart()
        outputs: list[Tensors] = [{} for _ in self.ranks]
        moving = [r.steps(given, out) for r, given, out in zip(self.ranks, feeds, outputs, strict=True)]
        while moving:
            for device, steps in zip(self.devices, list(moving), strict=False):
                with _on(device):
                    if next(steps, _END) is _END:
                        moving.remove(steps)
        return {value.name or "": self._joined(value, outputs) for value in self.ranks[0].graph.outputs}

    def _joined(self, value: ir.Value, outputs: Sequence[Tensors]) -> torch.Tensor:
        import torch

        name, axis = value.name or "", shard_axis(value)
        if axis is None:
            return outputs[0][name]
        return torch.cat([own[name].to(self.devices[0]) for own in outputs], dim=axis)


_END = object()


def _gpus(count: int) -> list[str]:
    import torch

    if torch.cuda.device_count() < count:
        raise UnsupportedError(f"{count} ranks take {count} GPUs; torch sees {torch.cuda.device_count()}.")
    return [f"cuda:{index}" for index in range(count)]


def _stream(device: str) -> Any:
    import torch

    return torch.cuda.Stream(torch.device(device)) if device.startswith("cuda") else None


def _on(device: str) -> contextlib.AbstractContextManager[Any]:
    import torch

    return torch.cuda.device(device) if device.startswith("cuda") else contextlib.nullcontext()


def _pool(device: str) -> Any:
    """Memory of a GPU that lasts as long as this; it belongs to the GPU that is current when it is made."""
    import torch

    with _on(device):
        return torch.cuda.MemPool()


class Graph:
    """A captured run. Its outputs are the same tensors at every call; see `Group.graph`."""

    def __init__(self, group: Group, feeds: Mapping[str, Any]) -> None:
        import torch

        self._group = group
        self._feeds = [{name: item.clone() for name, item in mine.items()} for mine in group.place(feeds)]
        self._pools = [_pool(device) for device in group.devices[1:]]
        for _ in range(2):  # what is made once, by libraries too, is made outside of the graph
            group.run(feeds)
        group.synchronize()
        group.exchange.forget()
        first, *others = (stream for _, stream in group._cuda())
        self._graph = torch.cuda.CUDAGraph()
        for device in group.devices[1:]:  # attention asks for one, though it draws nothing
            if device != group.devices[0] and hasattr(self._graph, "register_generator_state"):
                self._graph.register_generator_state(torch.cuda.default_generators[torch.device(device).index or 0])
        with contextlib.ExitStack() as stack:
            for device, pool in zip(group.devices[1:], self._pools, strict=True):
                stack.enter_context(torch.cuda.use_mem_pool(pool, device=torch.device(device)))
            stack.enter_context(torch.cuda.device(group.devices[0]))
            stack.enter_context(torch.cuda.graph(self._graph, stream=first, capture_error_mode="relaxed"))
            for stream in others:
                stream.wait_stream(first)
            with contextlib.ExitStack() as inner:
                for stream in (*others, first):
                    inner.enter_context(torch.cuda.stream(stream))
                self.outputs = group._all(self._feeds)
            for stream in others:
                first.wait_stream(stream)
        self._kept = group.exchange.forget()

    def __call__(self, feeds: Mapping[str, Any] | None = None) -> Tensors:
        """Runs on the current stream of the first device, with new inputs of the same shapes if they are given."""
        import torch

        devices = self._group.devices
        here = [torch.cuda.current_stream(device) for device in devices]
        if feeds is not None:
            for mine, given in zip(self._feeds, self._group.place(feeds), strict=True):
                for name, item in given.items():
                    mine[name].copy_(item, non_blocking=True)
        for stream in here[1:]:
            here[0].wait_stream(stream)
        with torch.cuda.device(devices[0]):
            self._graph.replay()
        for stream in here[1:]:
            stream.wait_stream(here[0])
        return self.outputs


@dataclass(frozen=True)
class Choice:
    """What :func:`fastest` found.

    Attributes:
        name, group: the way that is taken.
        ratios: speed of each other way relative to the first one.
    """

    name: str
    group: Group
    ratios: dict[str, Ratio]


def fastest(
    groups: Mapping[str, Group],
    feeds: Mapping[str, Any],
    *,
    gain: float = 1.02,
    seconds: float = 5.0,
    interleave: Callable[..., dict[str, list[float]]] | None = None,
) -> Choice:
    """Times ways to run one program against each other on this machine, and takes the best.

    The first is what is left as it is where nothing is better: another is taken only if its whole interval of
    confidence is above 1 and its median is at least `gain`.

    Args:
        seconds: at most, for all.
        interleave: what times; `planish.runtime.measure.interleave`.

    Raises:
        InputError: there are no groups.
    """
    import numpy as np

    from planish.runtime import measure

    if not groups:
        raise InputError("there is nothing to choose from; give at least one group.")

    def call(group: Group) -> Callable[[], None]:
        placed = group.place(feeds)

        def run() -> None:
            group.run(placed)
            group.synchronize()

        return run

    times = (interleave or measure.interleave)({n: call(g) for n, g in groups.items()}, seconds=seconds)
    first, *others = groups
    ratios, base = {}, np.asarray(times[first], np.float64)
    for name in others:
        mine = np.asarray(times[name], np.float64)
        low, high = measure.bootstrap(base / mine)
        medians = float(np.median(base)) * 1e3, float(np.median(mine)) * 1e3
        ratios[name] = Ratio(float(np.median(base / mine)), low, high, len(mine), measure.FINAL_LEVEL, False, *medians)
    better = {name: r for name, r in ratios.items() if r.faster and r.median >= gain}
    name = max(better, key=lambda n: better[n].median, default=first)
    return Choice(name, groups[name], ratios)
