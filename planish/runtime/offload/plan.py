"""Where weights and caches are under a memory budget: found before anything runs, and printed as a table.

What does not fit is left to the host by what each costs. Weights on the host are copied through a ring of buffers
once for every step. The cache of a layer on the host is attended to there, or copied through a ring of its own: by
the rule of FastAttention (arXiv 2410.16663, CPU-GPU cooperative strategy) the first if T_host(kv) + T_link(q, k, v, o)
is less than kv / BW_link, at rates that were measured. A prompt goes through layer by layer, in chunks, so its weights
are copied once, and a cache that will stay on the host is on the device only while its layer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from planish.runtime.offload.account import MemoryBudgetError, size_text

#: Tokens of a prompt that go through a layer at once, at most and at least.
_CHUNKS = (8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Rates:
    """What was measured of a machine, in bytes and seconds.

    Attributes:
        link: bytes per second from the host to the device, pinned.
        device: bytes per second that the device reads from its own memory.
        host: bytes of cache per second that attention on the host reads.
        latency: seconds that a layer whose attention is on the host waits beside that, for both copies.
        launch: seconds that it takes to start a layer.
        shared_link, shared_host: `link` and `host` while both go on, since both read main memory; 0: the same.
    """

    link: float = 20e9
    device: float = 1e12
    host: float = 10e9
    latency: float = 50e-6
    launch: float = 1e-4
    shared_link: float = 0.0
    shared_host: float = 0.0


@dataclass(frozen=True)
class Request:
    """What shall fit: rows, tokens of the longest prompt, and new tokens."""

    batch: int = 1
    prompt: int = 1
    new: int = 1

    @property
    def capacity(self) -> int:
        """Positions of each cache."""
        return self.prompt + max(self.new - 1, 1)


@dataclass(frozen=True)
class Facts:
    """Sizes of a decoder, in bytes.

    Attributes:
        units: weights of each layer, and of what is after the last one.
        kv: keys and values of one token, by layer.
        carried: values that go from layer to layer, for one token.
        sides: values that all layers read, for one token.
        logits: of one row.
        splits: layers whose attention can be on the host.
        workspace: (batch, tokens, capacity, split) → what sessions take beside that, together.
        reserve: what libraries take whatever runs.
    """

    units: tuple[int, ...]
    kv: tuple[int, ...]
    carried: int
    sides: int
    logits: int
    splits: frozenset[int]
    workspace: Callable[[int, int, int, bool], int]
    reserve: int = 0

    @property
    def weights(self) -> int:
        """Of all units."""
        return sum(self.units)


@dataclass(frozen=True)
class Plan:
    """A placement that fits.

    Attributes:
        budget: bytes allowed; None: any number.
        chunk: tokens of a prompt that go through a layer at once.
        resident: units whose weights stay on the device.
        slots: buffers that the weights of the others go through.
        kv_device: layers whose cache is on the device.
        kv_slots: buffers that caches of the host go through, in the prompt or in each step.
        cooperative: attention of steps over caches on the host is computed there.
        rows: what takes how much on the device, in words.
        seconds: estimated time of a step.
    """

    request: Request
    budget: int | None
    chunk: int
    resident: frozenset[int]
    slots: int
    slot_bytes: int
    kv_device: frozenset[int]
    kv_slots: int
    cooperative: bool
    workspace: int
    rows: tuple[tuple[str, int], ...] = ()
    seconds: float = 0.0
    facts: Facts | None = field(default=None, compare=False, repr=False)

    @property
    def total(self) -> int:
        return sum(size for _, size in self.rows)

    def streamed(self) -> list[int]:
        """Units whose weights are copied in each step, in order."""
        assert self.facts is not None
        return [k for k in range(len(self.facts.units)) if k not in self.resident]

    def kv_host(self) -> list[int]:
        """Layers whose cache is on the host, in order."""
        assert self.facts is not None
        return [k for k in range(len(self.facts.kv)) if k not in self.kv_device]

    def to_dict(self) -> dict[str, Any]:
        """For a report."""
        assert self.facts is not None
        return {
            "budget": self.budget,
            "total": self.total,
            "batch": self.request.batch,
            "prompt": self.request.prompt,
            "new_tokens": self.request.new,
            "chunk": self.chunk,
            "resident": len(self.resident),
            "streamed": len(self.streamed()),
            "kv_device": len(self.kv_device),
            "kv_host": len(self.kv_host()),
            "cooperative": self.cooperative and bool(self.kv_host()),
            "rows": dict(self.rows),
            "seconds_per_step": self.seconds,
        }

    def table(self) -> str:
        """What is where, as lines of text."""
        assert self.facts is not None
        ask, facts = self.request, self.facts
        lines = [f"memory for {ask.batch} x ({ask.prompt} + {ask.new}) tokens, prompts in chunks of {self.chunk}:"]
        lines += [f"  {what:<58}{size_text(size):>12}" for what, size in self.rows]
        limit = f" of {size_text(self.budget)}" if self.budget is not None else ""
        lines.append(f"  {'on the device, planned' + limit:<58}{size_text(self.total):>12}")
        streamed, host = self.streamed(), self.kv_host()
        if streamed:
            size = size_text(sum(facts.units[k] for k in streamed))
            lines.append(
                f"  on the host: weights of {len(streamed)} of {len(facts.units)} units, {size}, copied each step"
            )
        if host:
            size = size_text(sum(_kv(facts, ask, k) for k in host))
            way = "attended to there" if self.cooperative else "copied each step"
            lines.append(f"  on the host: caches of {len(host)} of {len(facts.kv)} layers, {size}, {way}")
        return "\n".join(lines)


def make_plan(facts: Facts, request: Request, budget: int | None, rates: Rates | None = None) -> Plan:
    """The placement with the least estimated time.

    Raises:
        MemoryBudgetError: none fits; the message says by how much, and what would.
    """
    rates = rates or Rates()
    best: tuple[float, Plan] | None = None
    for plan in _candidates(facts, request, budget, rates):
        cost = _prompt_seconds(plan, rates) + max(request.new - 1, 0) * plan.seconds
        if best is None or cost < best[0]:
            best = cost, plan
    if best is not None:
        return best[1]
    raise MemoryBudgetError(_refusal(facts, request, budget or 0, rates))


def _candidates(facts: Facts, request: Request, budget: int | None, rates: Rates) -> Iterator[Plan]:
    layers, units = len(facts.kv), len(facts.units)
    chunks = sorted({min(chunk, request.prompt) for chunk in _CHUNKS}, reverse=True)
    everything = frozenset(range(units)), frozenset(range(layers))
    for chunk in chunks:
        whole = _finish(facts, request, budget, rates, chunk, *everything, slots=0, kv_slots=0)
        if budget is None or whole.total <= budget:
            yield whole
            return  # smaller chunks only cost time then
        for on_device in range(layers, -1, -1):
            if on_device < layers and not facts.splits:
                break
            # Layers of one structure are alike: the last ones go to the host, whose caches are brought down while
            # earlier ones would have to wait.
            kv_device = frozenset(range(on_device))
            for kv_slots in (2, 1) if on_device < layers else (0,):
                for slots in (2, 3, 1, 0):
                    found = _fill(facts, request, budget, rates, chunk, kv_device, slots, kv_slots)
                    if found is not None:
                        yield found
                        break


def _fill(
    facts: Facts,
    request: Request,
    budget: int,
    rates: Rates,
    chunk: int,
    kv_device: frozenset[int],
    slots: int,
    kv_slots: int,
) -> Plan | None:
    """As many units on the device as fit, from the last one back: the head of the next step is prepared meanwhile."""
    order = sorted(range(len(facts.units)), key=lambda k: facts.units[k], reverse=True)
    if not slots:
        plan = _finish(facts, request, budget, rates, chunk, frozenset(order), kv_device, slots=0, kv_slots=kv_slots)
        return plan if plan.total <= budget else None
    resident: set[int] = set()
    plan = _finish(facts, request, budget, rates, chunk, frozenset(), kv_device, slots=slots, kv_slots=kv_slots)
    if plan.total > budget:
        # A unit that is larger than all others makes the buffers large: it stays where it is, if that is less.
        resident = {order[0]}
        plan = _finish(
            facts, request, budget, rates, chunk, frozenset(resident), kv_device, slots=slots, kv_slots=kv_slots
        )
        if plan.total > budget:
            return None
    for k in order:
        if k in resident or len(resident) + 1 + slots > len(order):
            continue
        more = _finish(
            facts, request, budget, rates, chunk, frozenset(resident | {k}), kv_device, slots=slots, kv_slots=kv_slots
        )
        if more.total <= budget:
            resident.add(k)
            plan = more
    return plan


def _finish(
    facts: Facts,
    request: Request,
    budget: int | None,
    rates: Rates,
    chunk: int,
    resident: frozenset[int],
    kv_device: frozenset[int],
    *,
    slots: int,
    kv_slots: int,
) -> Plan:
    streamed = [size for k, size in enumerate(facts.units) if k not in resident]
    slots = min(slots, len(streamed))
    slot = max(streamed, default=0)
    host = [k for k in range(len(facts.kv)) if k not in kv_device]
    stage = max((_kv(facts, request, k) for k in host), default=0)
    ask = request
    pieces = ask.batch * -(-ask.prompt // chunk)
    hidden = max((pieces + 1) * chunk, ask.batch * 2) * facts.carried
    sides = max(pieces * chunk, ask.batch) * facts.sides
    space = facts.workspace(ask.batch, chunk, ask.capacity, bool(host))
    rows = [
        (f"weights of {len(resident)} of {len(facts.units)} units", sum(facts.units[k] for k in resident)),
        (f"{slots} buffers for weights that stream", slots * slot),
        (f"caches of {len(kv_device)} of {len(facts.kv)} layers", sum(_kv(facts, ask, k) for k in kv_device)),
        (f"{kv_slots} buffers for caches of the host", kv_slots * stage),
        ("activations between layers, logits", hidden + sides + ask.batch * facts.logits),
        ("activations within a layer", space),
        ("libraries", facts.reserve),
    ]
    link = sum(streamed)
    moved = [_kv(facts, ask, k) for k in host]
    slow_host = sum(size / rates.host + rates.latency for size in moved)
    cooperative = bool(host) and slow_host < sum(moved) / rates.link
    device = (sum(facts.units) + sum(_kv(facts, ask, k) for k in kv_device)) / rates.device
    device = max(device, len(facts.units) * rates.launch)
    copied, computed = link / rates.link, device + (slow_host if cooperative else sum(moved) / rates.device)
    if not cooperative:
        copied += sum(moved) / rates.link
    ahead = slots != 1 and (cooperative or kv_slots != 1)  # or nothing is copied while something computes
    seconds = max(copied, computed) if ahead else copied + computed
    return Plan(
        ask, budget, chunk, resident, slots, slot, kv_device, kv_slots, cooperative, space,
        tuple((what, size) for what, size in rows if size), seconds, facts,
    )  # fmt: skip


def _kv(facts: Facts, request: Request, layer: int) -> int:
    return request.batch * request.capacity * facts.kv[layer]


def _prompt_seconds(plan: Plan, rates: Rates) -> float:
    """Reading weights once for each chunk, beside copying them once."""
    assert plan.facts is not None
    facts, ask = plan.facts, plan.request
    pieces = ask.batch * -(-ask.prompt // plan.chunk)
    copies = (
        sum(facts.units[k] for k in plan.streamed()) + sum(_kv(facts, ask, k) for k in plan.kv_host())
    ) / rates.link
    return max(copies, pieces * (facts.weights / rates.device + len(facts.units) * rates.launch))


def _refusal(facts: Facts, request: Request, budget: int, rates: Rates) -> str:
    least = least_bytes(facts, request)
    parts = [
        f"{request.batch} x ({request.prompt} + {request.new}) tokens take at least {size_text(least)} on the device, "
        f"{size_text(least - budget)} more than the budget of {size_text(budget)}."
    ]
    fits = [n for n in _halving(request.prompt) if least_bytes(facts, replace(request, prompt=n)) <= budget]
    if fits:
        low, high = fits[0], request.prompt
        while high - low > max(1, low // 64):
            middle = (low + high) // 2
            fit = least_bytes(facts, replace(request, prompt=middle)) <= budget
            low, high = (middle, high) if fit else (low, middle)
        parts.append(f"A prompt of {low} tokens fits")
    if request.batch > 1 and least_bytes(facts, replace(request, batch=1)) <= budget:
        parts.append(f"{'one row fits' if fits else 'One row fits'}")
    parts.append(f"memory={-(-least // (1 << 20))}MiB is the least for all of it")
    if facts.units and max(facts.units) * 2 > budget:
        parts.append(f"or weights in fewer bits (quantize-weights): the largest unit has {size_text(max(facts.units))}")
    return f"{parts[0]} {'; '.join(parts[1:])}."


def _halving(prompt: int) -> Iterator[int]:
    while prompt > 1:
        prompt //= 2
        yield prompt


def least_bytes(facts: Facts, request: Request) -> int:
    """The least that a request takes on the device."""
    chunk, rates = min(_CHUNKS[-1], request.prompt), Rates()
    kv = frozenset(range(len(facts.kv))) - facts.splits
    largest = max(range(len(facts.units)), key=lambda k: facts.units[k])
    found = []
    for resident in (frozenset[int](), frozenset((largest,)), frozenset(range(len(facts.units)))):
        for kept in (kv, frozenset(range(len(facts.kv)))):
            kv_slots = 1 if len(kept) < len(facts.kv) else 0
            plan = _finish(facts, request, None, rates, chunk, resident, kept, slots=1, kv_slots=kv_slots)
            found.append(plan.total)
    return min(found)
