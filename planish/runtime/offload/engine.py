"""Runs a decoder that was cut along its layers, by a plan: prompts layer by layer in chunks, then token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from planish.ir.causal_lm import LOGITS
from planish.ir.target import Target
from planish.runtime.offload.bound import Place, address_of
from planish.runtime.offload.caches import Caches
from planish.runtime.offload.device import COMPUTE, COPY, Device, flat
from planish.runtime.offload.parts import Part, Parts
from planish.runtime.offload.plan import Plan, Rates, Request
from planish.runtime.offload.planner import make_plan
from planish.runtime.offload.rates import measure_rates
from planish.runtime.offload.ring import Ring
from planish.runtime.offload.split import Split

#: After the name of a value: its copy on the host.
_HOST = "\0host"


@dataclass
class _Flow:
    """What goes through the layers together: one chunk of one row, or one token of each row.

    Attributes:
        sizes: of the symbols.
        row: of the caches; None: all.
        values: where values are, by name; on the host under the name with `_HOST`.
        carried: buffers of what goes from layer to layer.
        hosts: arrays that copies go through.
    """

    sizes: dict[str, int]
    row: int | None = None
    values: dict[str, Place] = field(default_factory=dict)
    carried: list[Place] = field(default_factory=list)
    hosts: dict[str, np.ndarray] = field(default_factory=dict)


class Engine:
    """A decoder on a device with little memory. One generation at a time: `prompt`, then `step`, then `close`.

    Args:
        split: the entry ``decode``, captured with chunks.
        device: where it runs; its account has the budget as a limit, if there is one.
        target: threads of the host.
        rates: of the machine; None: assumed, until they are measured.
    """

    def __init__(self, split: Split, device: Device, target: Target, rates: Rates | None = None) -> None:
        self.parts, self.split = Parts(split, device, target), split
        self.device, self.rates, self.measured = device, rates or Rates(), rates is not None
        self.current: Plan | None = None
        self._plans: dict[tuple[Request, int | None, Rates], Plan] = {}
        self.lengths = np.zeros(0, np.int64)
        self._weights: dict[int, int] = {}  # addresses of resident units
        self._slots: list[int] = []
        self._reserved = 0  # of libraries, as the account has it
        self._ring = Ring(device, ())
        self._caches: Caches | None = None
        self._blocks: list[int] = []  # of the generation that is going on
        self._step: _Flow | None = None
        self._bound: dict[tuple[object, ...], Callable[[], None]] = {}

    def measure(self) -> None:
        """Measures the rates of the machine at hand."""
        self.rates, self.measured = measure_rates(self.parts, self.device), True

    def plan(self, request: Request) -> Plan:
        """Where everything will be.

        Raises:
            MemoryBudgetError: the budget is too small.
        """
        key = request, self.device.account.limit, self.rates
        if key not in self._plans:
            self._plans[key] = make_plan(self.parts.facts(), *key)
        return self._plans[key]

    def prompt(self, rows: Sequence[np.ndarray], plan: Plan) -> np.ndarray:
        """Reads the prompts, rows of ids (tokens) int64; returns the logits of each row's last token."""
        self._open(plan)
        self.lengths = np.array([len(row) for row in rows], np.int64)
        caches = self._caches = Caches(self.device, plan, self.parts.cache_values, self.lengths)
        flows = [flow for row, ids in enumerate(rows) for flow in self._chunks(row, ids, plan.chunk)]
        spare = self._carried_buffers({"batch": 1, "tokens": plan.chunk})
        caches.begin_prompt()
        for layer in range(len(self.parts.layers)):
            address = self._acquire(layer)
            for flow in flows:
                made = dict(zip(self.parts.carried[layer + 1], spare, strict=False))
                self._whole(layer, address, flow, made)
                flow.values.update(made)
                flow.carried, spare = spare, flow.carried
            self._release(layer)
            caches.release(layer)
        last = {flow.row: flow for flow in flows}
        logits = self._logits([last[row] for row in range(len(rows))])
        self._give_back()
        return logits

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Reads one token a row, (batch) int64; returns the logits of the next, (batch, vocabulary)."""
        caches, plan = self._caches, self.current
        assert caches is not None and plan is not None
        flow = self._step = self._step or self._step_flow(len(ids))
        self._feed(flow, ids[:, None], self.lengths)
        caches.begin_step()
        for layer in range(len(self.parts.layers)):
            address = self._acquire(layer)
            made = self._places(flow, self.parts.carried[layer + 1])
            if layer in plan.attended:
                self._cooperative(layer, address, flow, made)
                self._release(layer)
            else:
                self._whole(layer, address, flow, made)
                self._release(layer)  # first, since the next weights are waited for before the next cache
                caches.release(layer)
        logits = self._logits([flow])
        self.lengths += 1
        return logits

    def close(self) -> None:
        """Gives back what one generation took; weights stay."""
        if self._caches is not None:
            self.finish()
            self._caches.close()
        self._give_back()
        self._bound.clear()
        self._caches = self._step = None

    def finish(self) -> None:
        """Waits until everything ran."""
        self.device.wait(COMPUTE, self.device.record(COPY))
        self.device.synchronize(self.device.record(COMPUTE))

    # --- units -------------------------------------------------------------------------------------------

    def _whole(self, layer: int, address: int, flow: _Flow, made: Mapping[str, Place]) -> None:
        assert self._caches is not None
        part = self.parts.layers[layer].whole
        caches = self._caches.acquire(layer, flow.row)
        inputs = [*self._inputs(part, flow, len(part.inputs) - 2), *caches]
        self._run(part, address, inputs, [*made.values(), *caches], flow)

    def _cooperative(self, layer: int, address: int, flow: _Flow, made: Mapping[str, Place]) -> None:
        """Attention of this layer on the host: queries, keys and values go there, what is attended to comes back."""
        assert self._caches is not None
        unit = self.parts.layers[layer]
        assert unit.before is not None and unit.after is not None and unit.attention is not None
        there = self._places(flow, unit.queries)
        self._run(unit.before, address, self._inputs(unit.before, flow), list(there.values()), flow)
        for name, place in there.items():
            size = flat(self.parts.nbytes(name, flow.sizes))
            self.device.download(flow.values[name + _HOST].address, place.address, size, COMPUTE)
        self.device.synchronize(self.device.record(COMPUTE))
        caches, mixed = self._caches.on_host(layer), flow.values[unit.mixed + _HOST]
        inputs = [*self._inputs(unit.attention, flow, len(unit.attention.inputs) - 2), *caches]
        self._binding(unit.attention, 0, inputs, [mixed, *caches], flow)()
        size = flat(self.parts.nbytes(unit.mixed, flow.sizes))
        self.device.upload(flow.values[unit.mixed].address, mixed.address, size, COMPUTE)
        self._run(unit.after, address, self._inputs(unit.after, flow), list(made.values()), flow)

    def _logits(self, flows: Sequence[_Flow]) -> np.ndarray:
        """Runs what is after the layers; returns (batch, vocabulary)."""
        tail, unit = self.parts.tail, len(self.parts.layers)
        address = self._acquire(unit)
        hosts = []
        for flow in flows:
            self._exchange(flow, LOGITS, LOGITS)
            place, host = flow.values[LOGITS], flow.hosts[LOGITS]
            self._run(tail, address, self._inputs(tail, flow), [place], flow)
            self.device.download(address_of(host), place.address, flat(host.nbytes), COMPUTE)
            hosts.append(host)
        self._release(unit)
        self.device.synchronize(self.device.record(COMPUTE))
        dtype = self.parts.value(LOGITS).dtype
        assert dtype is not None
        return np.concatenate([host.view(dtype.numpy()).reshape(-1, self.parts.vocabulary) for host in hosts])

    def _run(self, part: Part, address: int, inputs: list[Place], outputs: list[Place], flow: _Flow) -> None:
        self.device.launch(self._binding(part, address, inputs, outputs, flow))

    def _binding(
        self, part: Part, address: int, inputs: list[Place], outputs: list[Place], flow: _Flow
    ) -> Callable[[], None]:
        """A run of a session; those of steps are bound once for each address of the weights."""
        key = (id(part.piece.model), address, *inputs, *outputs)
        known = self._bound.get(key) if flow is self._step else None
        if known is None:
            weights = [address + offset for offset in part.offsets]
            known = self.parts.bind(part, inputs, weights, outputs, flow.sizes)
            if flow is self._step:
                self._bound[key] = known
        return known

    # --- weights -----------------------------------------------------------------------------------------

    def _acquire(self, unit: int) -> int:
        return self._weights[unit] if unit in self._weights else self._ring.acquire(unit)

    def _release(self, unit: int) -> None:
        if unit not in self._weights:
            self._ring.release(unit)

    def _open(self, plan: Plan) -> None:
        """Makes what a plan needs of sessions and weights; what is there already stays."""
        self.close()
        before, self.current = self.current, plan
        if before is not None and _weights_of(before) == _weights_of(plan):
            self._sessions(plan)
            return
        self.finish()
        for address in (*self._weights.values(), *self._slots):
            self.device.free(address)
        self._weights.clear()
        self._sessions(plan)
        for unit in sorted(plan.resident):
            packed = self.parts.packed[unit]
            self._weights[unit] = self.device.allocate(packed.nbytes, "weights")
            packed.load(self.device, self._weights[unit])
            self.finish()  # the block on the host can go then
            packed.forget()
        self._slots = [self.device.allocate(plan.slot_bytes, "buffers for weights") for _ in range(plan.slots)]
        packs, device = self.parts.packed, self.device
        self._ring = Ring(device, self._slots, load=lambda unit, at: packs[unit].load(device, at), cyclic=True)
        self._ring.begin(plan.streamed())

    def _sessions(self, plan: Plan) -> None:
        if not self._reserved:
            self._reserved = self.device.reserve
            self.device.account.take(self._reserved, "libraries")
        limit = self.device.account.limit
        if limit is not None and plan.total - plan.workspace + self.parts.held(plan) > limit:
            self.finish()  # sessions with more room than this plan has for them go
            self.parts.forget()
        self.device.workspace(self.parts.held(plan))
        self.parts.prepare(plan)

    # --- values ------------------------------------------------------------------------------------------

    def _inputs(self, part: Part, flow: _Flow, count: int | None = None) -> list[Place]:
        return [flow.values[n + _HOST if k in part.on_host else n] for k, n in enumerate(part.inputs[:count])]

    def _places(self, flow: _Flow, names: Sequence[str]) -> dict[str, Place]:
        return {name: flow.values[name] for name in names}

    def _chunks(self, row: int, ids: np.ndarray, chunk: int) -> list[_Flow]:
        """The chunks of a prompt, with what the head gives for them on the device."""
        assert self.current is not None
        flows = []
        for start in range(0, len(ids), chunk):
            piece = ids[None, start : start + chunk]
            flow = _Flow({"batch": 1, "tokens": piece.shape[1], "capacity": self.current.request.capacity}, row)
            flow.carried = self._carried_buffers({"batch": 1, "tokens": chunk})
            flow.values.update(zip(self.parts.carried[0], flow.carried, strict=False))
            self._feed(flow, piece, np.array([start], np.int64))
            flows.append(flow)
        return flows

    def _step_flow(self, batch: int) -> _Flow:
        """The buffers of steps; layers take turns in two sets of them."""
        assert self.current is not None and self._caches is not None
        flow = _Flow({"batch": batch, "tokens": 1, "capacity": self.current.request.capacity})
        sets = [self._carried_buffers(flow.sizes) for _ in range(2)]
        for boundary, names in enumerate(self.parts.carried):
            flow.values.update(zip(names, sets[boundary % 2], strict=False))
        for layer in sorted(self.current.attended):
            unit = self.parts.layers[layer]
            for at, name in enumerate((*unit.queries, unit.mixed)):
                self._exchange(flow, name, f"exchange {at}")
        return flow

    def _feed(self, flow: _Flow, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Runs the head on the host and puts what it gives where layers read it."""
        found = self.parts.head(ids, lengths)
        for name in dict.fromkeys((*self.parts.sides, *self.parts.carried[0])):
            array = np.ascontiguousarray(found[name])
            if name not in flow.values:
                self._exchange(flow, name, name)
            if name not in flow.hosts:
                flow.hosts[name] = self.device.host(array.nbytes)
            flow.hosts[name][: array.nbytes] = array.reshape(-1).view(np.uint8)
            source = address_of(flow.hosts[name])
            self.device.upload(flow.values[name].address, source, flat(array.nbytes), COMPUTE)

    def _exchange(self, flow: _Flow, name: str, buffer: str) -> None:
        """Memory for a value on both sides, under the name of a buffer that values may share."""
        if buffer not in flow.hosts:
            size = self.parts.nbytes(name, flow.sizes)
            flow.hosts[buffer] = self.device.host(size)
            flow.values[buffer] = self._allocate(size)
        flow.values[name] = flow.values[buffer]
        flow.values[name + _HOST] = Place(address_of(flow.hosts[buffer]), True)

    def _carried_buffers(self, sizes: Mapping[str, int]) -> list[Place]:
        """Buffers for what goes from one layer to the next."""
        return [self._allocate(size) for size in self.parts.carried_sizes(sizes)]

    def _give_back(self) -> None:
        for address in self._blocks:
            self.device.free(address)
        self._blocks.clear()

    def _allocate(self, nbytes: int) -> Place:
        address = self.device.allocate(nbytes, "activations")
        self._blocks.append(address)
        return Place(address)


def _weights_of(plan: Plan) -> tuple[object, ...]:
    return plan.resident, plan.slots, plan.slot_bytes
