"""A lowered program on one graph: where values lie in memory, lists of tiles, and the steps that a call runs.

Values that are neither arguments nor outputs share one block of memory: a value takes the place of others that no later
step reads. The size of that block is known before anything runs (`Plan.arena_bytes`).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from planish.ir.relational.domains import NONE
from planish.ir.relational.graph import Graph
from planish.ir.relational.intra import Kernel, Lowered, View
from planish.runtime.dlpack import Tensor
from planish.runtime.relational.kernel import RelationalKernel
from planish.runtime.relational.library import CALL, CLEAR, COPY, Any, Library, Step

_ALIGN = 64


@dataclass
class Place:
    """Where a value is: `offset` bytes into what has the name `base`: an argument, an output, or ``""``, the block."""

    base: str
    offset: int = 0


@dataclass
class Plan:
    """A program, ready for one graph.

    Attributes:
        library: its kernels.
        steps: of a call.
        tensors: by value; the data of arguments and outputs are set at each call.
        places: of all values.
        arena_bytes: what values in between take.
        sum_bytes: what they would take without sharing.
        table_bytes: of index tables and lists of tiles.
    """

    library: Library
    steps: ctypes.Array[Step]
    tensors: dict[str, Tensor]
    places: dict[str, Place]
    arena_bytes: int
    sum_bytes: int
    table_bytes: int
    bound: dict[str, list[tuple[Tensor, int]]]
    kept: list[object] = field(repr=False)

    def bind(self, base: str, address: int) -> None:
        """Says where an argument, an output, or the block ``""`` is."""
        for tensor, offset in self.bound.get(base, ()):
            tensor.data = address + offset


def elements(lowered: Lowered, graph: Graph, name: str) -> int:
    variable = lowered.values[name]
    rows = 1 if variable.domain == NONE else graph.rows(variable.domain)
    return rows * math.prod(variable.shape)


def make_plan(lowered: Lowered, templates: Mapping[str, RelationalKernel], library: Library, graph: Graph) -> Plan:
    """Places values and builds the steps."""
    places, arena, total = place_values(lowered, graph)
    builder = _Steps(lowered, templates, library, graph, places)
    for number, step in enumerate(lowered.steps):
        builder.start(number, step)
        if isinstance(step, View):
            builder.view(step)
        else:
            builder.call(step)
    steps = (Step * len(builder.steps))(*builder.steps)
    tables = sum(array.nbytes for array in builder.tables.values())
    return Plan(library, steps, builder.tensors, places, arena, total, tables, builder.bound, builder.kept)


# ---- memory


def place_values(lowered: Lowered, graph: Graph) -> tuple[dict[str, Place], int, int]:
    """Places of all values, the size of the block, and the sum of the sizes of what is in it."""
    owner = _owners(lowered, graph)
    fixed = {v.name for v in lowered.arguments} | set(lowered.outputs)
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for number, step in enumerate(lowered.steps):
        for name in touched(lowered, step):
            root = owner[name].base
            first.setdefault(root, number)
            last[root] = number
    sizes = {root: _rounded(4 * elements(lowered, graph, root)) for root in first if root not in fixed}
    offsets, arena = _pack(sizes, first, last)
    places = {}
    for name, place in owner.items():
        if place.base in fixed:
            places[name] = place
        else:
            places[name] = Place("", offsets.get(place.base, 0) + place.offset)
    return places, arena, sum(sizes.values())


def _owners(lowered: Lowered, graph: Graph) -> dict[str, Place]:
    """For each value the one whose memory it is in: itself, what it is an alias of, or what a sum started in it."""
    fixed = {v.name for v in lowered.arguments} | set(lowered.outputs)
    owner: dict[str, Place] = {name: Place(name) for name in lowered.values}
    for name, source in lowered.aliases.items():
        owner[name] = Place(source)
    for step in lowered.steps:
        if isinstance(step, View) and step.kind == "pick" and step.result.name not in fixed:
            variable = lowered.values[step.parts[0]]
            begin = int(graph.node_offsets[step.result.domain.index or 0])
            owner[step.result.name] = Place(step.parts[0], 4 * begin * math.prod(variable.shape))
    for name in merged_starts(lowered):
        start = lowered.start[name]
        assert start is not None
        owner[start] = Place(name)

    def resolve(name: str) -> Place:
        place = owner[name]
        if place.base == name:
            return place
        below = resolve(place.base)
        return Place(below.base, below.offset + place.offset)

    return {name: resolve(name) for name in owner}


def merged_starts(lowered: Lowered) -> set[str]:
    """Sums that are made in the memory of what they start from: nothing else reads that later."""
    fixed = {v.name for v in lowered.arguments} | set(lowered.outputs)
    views = {part for step in lowered.steps if isinstance(step, View) for part in (*step.parts, step.result.name)}
    shared = set(lowered.aliases) | set(lowered.aliases.values()) | views
    found: set[str] = set()
    for name, start in lowered.start.items():
        if start is None or start in fixed or start in shared or list(lowered.start.values()).count(start) > 1:
            continue
        writes = [i for i, step in enumerate(lowered.steps) if name in _written(step)]
        reads = [i for i, step in enumerate(lowered.steps) if isinstance(step, Kernel) and start in step.reads()]
        if writes and all(i < writes[0] for i in reads):
            found.add(name)
    return found


def _written(step: Kernel | View) -> Sequence[str]:
    return tuple(step.writes()) if isinstance(step, Kernel) else (step.result.name,)


def touched(lowered: Lowered, step: Kernel | View) -> list[str]:
    """Values that a step reads, writes, or begins with."""
    names = [*step.reads(), *step.writes()] if isinstance(step, Kernel) else [*step.parts, step.result.name]
    starts = [start for name in _written(step) if (start := lowered.start.get(name)) is not None]
    return names + starts


def _rounded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _pack(sizes: Mapping[str, int], first: Mapping[str, int], last: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offsets so that values alive at the same time do not overlap: largest first, each at the lowest gap."""
    placed: list[tuple[int, int, str]] = []
    offsets: dict[str, int] = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        at = 0
        for begin, end, other in sorted(placed):
            if last[other] < first[name] or last[name] < first[other]:
                continue
            if begin - at >= sizes[name]:
                break
            at = max(at, end)
        offsets[name] = at
        placed.append((at, at + sizes[name], name))
    return offsets, max((end for _, end, _ in placed), default=0)


# ---- steps


class _Steps:
    def __init__(
        self,
        lowered: Lowered,
        templates: Mapping[str, RelationalKernel],
        library: Library,
        graph: Graph,
        places: dict[str, Place],
    ) -> None:
        self.lowered, self.templates, self.library, self.graph = lowered, templates, library, graph
        self.places = places
        self.steps: list[Step] = []
        self.tensors: dict[str, Tensor] = {}
        self.tables: dict[str, np.ndarray] = {}
        self.bound: dict[str, list[tuple[Tensor, int]]] = {}
        self.kept: list[object] = []
        self.begun: set[str] = set()
        self.merged = merged_starts(lowered)

    def start(self, number: int, step: Kernel | View) -> None:
        """Clears or copies what this step is the first to add to."""
        for name, adds in step.writes().items() if isinstance(step, Kernel) else ():
            if not adds or name in self.begun:
                continue
            self.begun.add(name)
            origin = self.lowered.start.get(name)
            size = 4 * elements(self.lowered, self.graph, name)
            if origin is None:
                self.steps.append(self._move(CLEAR, name, None, 0, 0, size))
            elif name not in self.merged:
                self.steps.append(self._move(COPY, name, origin, 0, 0, size))

    def view(self, step: View) -> None:
        width = 4 * math.prod(step.result.shape)
        offsets = [int(v) * width for v in self.graph.node_ptr]
        if step.kind == "join":
            for kind, part in enumerate(step.parts):
                size = offsets[kind + 1] - offsets[kind]
                self.steps.append(self._move(COPY, step.result.name, part, offsets[kind], 0, size))
        elif self.places[step.result.name].base == step.result.name:  # an output: it can not be part of another
            kind = step.result.domain.index or 0
            size = offsets[kind + 1] - offsets[kind]
            self.steps.append(self._move(COPY, step.result.name, step.parts[0], 0, offsets[kind], size))

    def call(self, kernel: Kernel) -> None:
        template = self.templates[kernel.name]
        tensors = [self.value(name) for name in template.memory]
        tensors += [self.table(name) for name in template.tables]
        work = self._work(kernel)
        if not work.size or (kernel.gemm is None and work[1] == work[0]):
            return
        tensors.append(self._array(f"work of {kernel.name}", work))
        arguments = (Any * len(tensors))(*(Any(7, 0, ctypes.addressof(t)) for t in tensors))
        self.kept.append(arguments)
        step = Step(CALL, self.library.index[template.symbol])
        step.arguments = ctypes.cast(arguments, ctypes.POINTER(Any))
        step.count = len(tensors)
        self.steps.append(step)

    def _work(self, kernel: Kernel) -> np.ndarray:
        rows = self.graph.rows(kernel.rows)
        if kernel.gemm is None:
            return np.array([0, rows], np.int32)
        from planish.runtime.kernels.segment_gemm import tile_list

        table = kernel.gemm.segments
        pointers = np.array([0, rows]) if table is None else self.graph.table(table)
        return tile_list(pointers, kernel.schedule.tile_rows).astype(np.int32).reshape(-1)

    def _move(self, kind: int, to: str, origin: str | None, to_offset: int, from_offset: int, size: int) -> Step:
        step = Step(kind, 0)
        step.to = ctypes.pointer(self.value(to))
        if origin is not None:
            step.from_ = ctypes.pointer(self.value(origin))
        step.to_offset, step.from_offset, step.bytes = to_offset, from_offset, size
        return step

    def value(self, name: str) -> Tensor:
        if name not in self.tensors:
            tensor = self._tensor(2, elements(self.lowered, self.graph, name))
            place = self.places[name]
            self.bound.setdefault(place.base, []).append((tensor, place.offset))
            self.tensors[name] = tensor
        return self.tensors[name]

    def table(self, name: str) -> Tensor:
        key = f"table {name}"
        return self.tensors[key] if key in self.tensors else self._array(key, self.graph.table(name))

    def _array(self, key: str, array: np.ndarray) -> Tensor:
        array = np.ascontiguousarray(array, np.int32).reshape(-1)
        self.tables[key] = array
        self.kept.append(array)
        tensor = self._tensor(0, array.size)
        tensor.data = array.ctypes.data if array.size else ctypes.addressof(tensor)
        self.tensors[key] = tensor
        return tensor

    def _tensor(self, code: int, count: int) -> Tensor:
        shape = (ctypes.c_int64 * 1)(count)
        tensor = Tensor(None, 1, 0, 1, code, 32, 1, ctypes.addressof(shape), None, 0)
        self.kept += [shape, tensor]
        return tensor
