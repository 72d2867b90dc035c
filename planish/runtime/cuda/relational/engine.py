"""Compiled relational programs on a GPU, called with torch tensors: on torch's current stream, without a wait."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.ir.relational.graph import Graph
from planish.ir.relational.intra import Kernel, Lowered, View
from planish.runtime.cuda import cache, driver
from planish.runtime.cuda.relational.generate import generate
from planish.runtime.cuda.relational.text import LONG, THREADS, Generated, header
from planish.runtime.cuda.relational.work import LONG_UNIT, MOST_ROWS, cut, items
from planish.runtime.relational.engine import Memory, full_shape
from planish.runtime.relational.plan import Place, elements, merged_starts, place_values

if TYPE_CHECKING:
    import torch


@dataclass
class Call:
    """A launch with its arguments; those that change with a call are written into `slots` before it."""

    function: driver.Function
    grid: tuple[int, int, int]
    slots: ctypes.Array[ctypes.c_uint64]
    pointers: ctypes.Array[ctypes.c_void_p]
    bound: list[tuple[int, str, int]]

    def run(self, addresses: Mapping[str, int], stream: int) -> None:
        for slot, base, offset in self.bound:
            self.slots[slot] = addresses[base] + offset
        self.function.launch_prepared(self.grid, THREADS, stream, self.pointers)


@dataclass
class _Work:
    """Items of work on the GPU, how many, of how many segments, and which rows these are if not all."""

    items: torch.Tensor
    starts: torch.Tensor
    count: int
    segments: int
    listed: torch.Tensor | None = None


@dataclass
class Move:
    """Zeros, or a copy, of `size` bytes."""

    to: Place
    origin: Place | None
    size: int

    def run(self, addresses: Mapping[str, int], stream: int) -> None:
        to = addresses[self.to.base] + self.to.offset
        if self.origin is None:
            driver.clear(to, self.size, stream)
        else:
            driver.copy(to, addresses[self.origin.base] + self.origin.offset, self.size, stream)


@dataclass
class Plan:
    """A program, ready for one graph on one GPU.

    Attributes:
        steps: of a call.
        arena: bytes of values in between, which share memory; behind them lies the workspace.
        values: their sum; `tables`: bytes of index tables on the GPU.
    """

    steps: list[Call | Move]
    arena: int
    workspace: int
    values: int
    tables: int
    kept: list[Any] = field(repr=False, default_factory=list)


class CudaEngine:
    """A lowered program as CUDA kernels, which are compiled for a GPU when it is first used.

    Args:
        lowered: without scatter if it is to be deterministic.
        deterministic: sums are made in the same order in every run.

    Raises:
        UnsupportedError: a kernel that does not fit into shared memory.
    """

    def __init__(self, lowered: Lowered, deterministic: bool = False) -> None:
        self.lowered, self.deterministic = lowered, deterministic
        self.kernels = {kernel.name: generate(kernel, lowered, deterministic) for kernel in lowered.kernels}
        self._plans: weakref.WeakKeyDictionary[Graph, dict[int, Plan]] = weakref.WeakKeyDictionary()
        #: Calls write the addresses of their arguments into the slots of a plan.
        self._lock = threading.Lock()

    def shape(self, name: str, graph: Graph) -> tuple[int, ...]:
        """The shape of the tensor of a value."""
        return full_shape(self.lowered.values[name], graph)

    def plan(self, graph: Graph, device: Any) -> Plan:
        """The plan for a graph on a device; made at its first call."""
        plans = self._plans.setdefault(graph, {})
        index = device.index or 0
        if index not in plans:
            plans[index] = _Planner(self, graph, device).plan()
        return plans[index]

    def memory(self, graph: Graph) -> Memory:
        """What a call on this graph allocates on torch's current GPU."""
        import torch

        plan = self.plan(graph, torch.device("cuda", torch.cuda.current_device()))
        outputs = sum(int(np.prod(self.shape(name, graph))) * 4 for name in self.lowered.outputs)
        inside = plan.arena + plan.workspace
        return Memory(inside + outputs, inside, plan.values + plan.workspace, outputs, plan.tables)

    def call(self, graph: Graph, arguments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs, for float32 tensors of the right shapes on one GPU: nothing checks that here."""
        import torch

        device = next(iter(arguments.values())).device
        with torch.cuda.device(device):
            driver.enter(device.index or 0)
            given = {name: _aligned(tensor.detach()) for name, tensor in arguments.items()}
            plan = self.plan(graph, device)
            made = [name for name in self.lowered.outputs if name not in given]
            outputs = {name: torch.empty(self.shape(name, graph), device=device) for name in made}
            block = torch.empty(plan.arena + plan.workspace, dtype=torch.uint8, device=device)
            addresses = {name: tensor.data_ptr() for name, tensor in (given | outputs).items()}
            addresses[""] = block.data_ptr()
            stream = int(torch.cuda.current_stream(device).cuda_stream)
            with self._lock:
                for step in plan.steps:
                    step.run(addresses, stream)
        # An output may be an argument as it is.
        return {name: outputs[name] if name in outputs else given[name].clone() for name in self.lowered.outputs}


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Compact, at a multiple of the longest vector that kernels read."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


class _Tables:
    """Index tables of a graph on a device, shared by all programs."""

    def __init__(self) -> None:
        self.made: dict[str, torch.Tensor] = {}

    def get(self, name: str, array: np.ndarray, device: Any) -> torch.Tensor:
        import torch

        if name not in self.made:
            compact = np.ascontiguousarray(array, np.int32).reshape(-1)
            self.made[name] = torch.tensor(compact, dtype=torch.int32, device=device)
        return self.made[name]


_tables: weakref.WeakKeyDictionary[Graph, dict[str, _Tables]] = weakref.WeakKeyDictionary()


class _Planner:
    def __init__(self, engine: CudaEngine, graph: Graph, device: Any) -> None:
        self.lowered, self.graph, self.device = engine.lowered, graph, device
        self.index = device.index or 0
        self.processors = driver.device(self.index).processors
        self.kernels = engine.kernels
        self.places, self.arena, self.values = place_values(engine.lowered, graph)
        self.shared = _tables.setdefault(graph, {}).setdefault(str(device), _Tables())
        self.steps: list[Call | Move] = []
        self.used: dict[str, torch.Tensor] = {}
        self.workspace = 0
        self.begun: set[str] = set()
        self.merged = merged_starts(engine.lowered)

    def plan(self) -> Plan:
        texts = {g.symbol: header() + g.text for g in self.kernels.values()}
        modules = cache.generated(texts, self.index)
        for step in self.lowered.steps:
            if isinstance(step, View):
                self._view(step)
            else:
                self._start(step)
                self._call(self.kernels[step.name], modules[self.kernels[step.name].symbol])
        tables = sum(t.numel() * 4 for t in self.used.values())
        return Plan(self.steps, self.arena, self.workspace, self.values, tables, list(self.used.values()))

    def _start(self, kernel: Kernel) -> None:
        """Clears or copies what this kernel is the first to add to."""
        for name, adds in kernel.writes().items():
            outer = kernel.gemm is not None and kernel.gemm.kind == "outer" and kernel.gemm.result.name == name
            if not adds or outer or name in self.begun:
                continue
            self.begun.add(name)
            origin = self.lowered.start.get(name)
            size = 4 * elements(self.lowered, self.graph, name)
            if origin is None:
                self._move(self.places[name], None, size)
            elif name not in self.merged:
                self._move(self.places[name], self.places[origin], size)

    def _move(self, to: Place, origin: Place | None, size: int) -> None:
        if size:
            self.steps.append(Move(to, origin, size))

    def _view(self, step: View) -> None:
        width = 4 * int(np.prod(step.result.shape))
        offsets = [int(v) * width for v in self.graph.node_ptr]
        own = self.places[step.result.name]
        if step.kind == "join":
            for kind, part in enumerate(step.parts):
                to = Place(own.base, own.offset + offsets[kind])
                self._move(to, self.places[part], offsets[kind + 1] - offsets[kind])
        elif own.base == step.result.name:  # an output: it can not be part of another
            kind = step.result.domain.index or 0
            part_of = self.places[step.parts[0]]
            self._move(own, Place(part_of.base, part_of.offset + offsets[kind]), offsets[kind + 1] - offsets[kind])

    def _table(self, name: str, array: np.ndarray | None = None) -> torch.Tensor:
        found = self.shared.get(name, self.graph.table(name) if array is None else array, self.device)
        self.used[name] = found
        return found

    def _work(self, g: Generated) -> _Work | None:
        """The items of a kernel."""
        if g.segments is None:
            return None
        rows = self.graph.rows(g.kernel.rows)
        pointers = np.array([0, rows]) if g.segments == "" else self.graph.table(g.segments)
        unit, most = cut(g)
        key = f"{g.segments or g.kernel.rows} by {unit} up to {most}"
        work, starts = items(pointers, unit, self.processors, most)
        if g.kernel.rows.kind in ("src_pair", "dst_pair"):
            # Items of all types whose rows are of the same nodes run at the same time: these stay in the cache.
            node = self.graph.table(f"{g.kernel.rows.kind}_node")
            work = work[np.argsort(node[work[:, 1]], kind="stable")]
            key += " by node"
        return _Work(self._table(f"work {key}", work), self._table(f"items {key}", starts), len(work), len(starts) - 1)

    def _long(self, table: str | None) -> _Work | None:
        """Rows with many inner rows, and the parts that these are cut into."""
        if table is None:
            return None
        pointers = self.graph.table(table)
        rows = np.flatnonzero(np.diff(pointers) > LONG)
        if not len(rows):
            return None
        work, starts = items(pointers, LONG_UNIT, self.processors, MOST_ROWS // LONG_UNIT, rows)
        made = [self._table(f"{name} {table}", a) for name, a in (("long", work), ("parts", starts), ("rows", rows))]
        return _Work(made[0], made[1], len(work), len(rows), made[2])

    def _call(self, g: Generated, module: driver.Module) -> None:
        rows = self.graph.rows(g.kernel.rows)
        work, long = self._work(g), self._long(g.long)
        count = work.count if work is not None else 0
        parts, listed = (long.count, long.segments) if long is not None else (0, 0)
        self.workspace = max(self.workspace, 4 * count * g.room, 4 * (parts * g.long_room + listed * g.long_rows))
        for launch in g.launches:
            x = {
                "groups": -(-rows // launch.per),
                "rows": work.segments if work is not None else rows,
                "listed": listed,
                "parts": parts,
                "one": min(rows, 1),
                "items": count,
            }[launch.grid]
            if not x:
                continue
            function = module.function(g.symbol + launch.function, launch.shared)
            slots = (ctypes.c_uint64 * (len(g.values) + len(g.tables) + 5))()
            bound = []
            for slot, name in enumerate(g.values):
                bound.append((slot, self.places[name].base, self.places[name].offset))
            tail = len(g.values)
            for slot, name in enumerate(g.tables, tail):
                slots[slot] = self._table(name).data_ptr()
            tail += len(g.tables)
            own = work if launch.grid == "items" else long
            if own is not None:
                slots[tail] = own.items.data_ptr()
            if (starts := long or work) is not None:
                slots[tail + 1] = starts.starts.data_ptr()
            if long is not None and long.listed is not None:
                slots[tail + 2] = long.listed.data_ptr()
            bound.append((tail + 3, "", self.arena))
            slots[tail + 4] = listed if g.segments is not None and g.long is not None else rows
            pointers = _addresses(slots)
            self.steps.append(Call(function, (x, launch.columns, 1), slots, pointers, bound))


def _addresses(slots: ctypes.Array[ctypes.c_uint64]) -> ctypes.Array[ctypes.c_void_p]:
    first = ctypes.addressof(slots)
    return (ctypes.c_void_p * len(slots))(*(first + 8 * i for i in range(len(slots))))


__all__ = ["CudaEngine", "Sequence"]
