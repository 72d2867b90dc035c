"""Finds where weights and caches are under a memory budget, before anything runs.

What does not fit is left to the host by what each costs. Weights on the host are copied through a ring of buffers
once for every step. The cache of a layer on the host is attended to there, or copied through a ring of its own: by
the rule of FastAttention (arXiv 2410.16663, CPU-GPU cooperative strategy) the first if T_host(kv) + T_link(q, k, v, o)
is less than kv / BW_link, at rates that were measured. Where both ways read main memory faster together, some of these
caches are copied beside the attention to the others. A prompt goes through layer by layer, in chunks, so its weights
are copied once, and a cache that will stay on the host is on the device only while its layer runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from planish.runtime.offload.account import MemoryBudgetError, size_text
from planish.runtime.offload.plan import Facts, Plan, Rates, Request, Times

#: Tokens of a prompt that go through a layer at once, at most and at least.
_CHUNKS = (8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16)


def make_plan(facts: Facts, request: Request, budget: int | None, rates: Rates | None = None) -> Plan:
    """The placement with the least estimated time.

    Raises:
        MemoryBudgetError: none fits; the message says by how much, and what would.
    """
    rates = rates or Rates()
    best: tuple[float, Plan] | None = None
    for plan in _candidates(facts, request, budget, rates):
        cost = request_seconds(plan)
        if best is None or cost < best[0]:
            best = cost, plan
    if best is not None:
        return best[1]
    raise MemoryBudgetError(_refusal(facts, request, budget or 0))


def request_seconds(plan: Plan) -> float:
    """Estimated time of a whole request."""
    return _prompt_seconds(plan) + max(plan.request.new - 1, 0) * plan.seconds


def place(
    facts: Facts,
    request: Request,
    rates: Rates,
    *,
    chunk: int,
    resident: Collection[int] = (),
    kv_device: Collection[int] = (),
    slots: int = 2,
    kv_slots: int = 2,
    attended: Collection[int] | None = None,
    budget: int | None = None,
) -> Plan:
    """A plan by what is where, whether or not it fits.

    Args:
        attended: layers whose attention is on the host; None: by the rule, and by the least time where it says so.
    """
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

    def timed(there: Collection[int]) -> Times:
        copied = sum(_kv(facts, ask, k) for k in host if k not in there)
        read = sum(facts.units) + sum(_kv(facts, ask, k) for k in range(len(facts.kv)) if k not in there)
        # A layer that is attended to on the host is started twice: in front of its attention, and behind it.
        device = max(read / rates.device, (len(facts.units) + len(there)) * rates.launch)
        mixed = bool(there) and bool(copied)
        ahead = slots != 1 and (kv_slots != 1 or mixed or not copied)
        bytes_there = sum(_kv(facts, ask, k) for k in there)
        return _times(rates, sum(streamed) + copied, bytes_there, len(there), device, ahead)

    if attended is None:
        stays = _rule(rates, sum(_kv(facts, ask, k) for k in host), len(host))
        ways = [_spread(host, count) for count in range(len(host), 0, -1)] if stays else [()]
        attended = min(ways, key=lambda there: timed(there).step)
    return Plan(
        ask, budget, chunk, frozenset(resident), slots, slot, frozenset(kv_device), kv_slots, frozenset(attended),
        space, facts, rates, tuple((what, size) for what, size in rows if size), timed(attended),
    )  # fmt: skip


def _rule(rates: Rates, kv: int, layers: int) -> bool:
    """Whether caches on the host are attended to there, T_host(kv) + T_link(q, k, v, o) < kv / BW_link."""
    return bool(layers) and kv / rates.host + layers * rates.latency < kv / rates.link


def _spread(host: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of the layers to attend to on the host; the others lie evenly among them, to be copied meanwhile."""
    others = len(host) - count
    copied = {host[(2 * k + 1) * len(host) // (2 * others)] for k in range(others)}
    return tuple(k for k in host if k not in copied)


def _times(rates: Rates, copied: int, attended: int, layers: int, device: float, ahead: bool) -> Times:
    """Of a step; copies go on beside the rest if they can go `ahead` of it."""
    waits = layers * rates.latency
    if not ahead:
        copies, attention = copied / rates.link, attended / rates.host + waits
        return Times(copies, attention, device, copies + attention + device)
    copies, attention = rates.both(copied, attended)
    return Times(copies, attention + waits, device, max(copies, attention + waits + device))


def _candidates(facts: Facts, request: Request, budget: int | None, rates: Rates) -> Iterator[Plan]:
    layers, units = len(facts.kv), len(facts.units)
    chunks = sorted({min(chunk, request.prompt) for chunk in _CHUNKS}, reverse=True)
    for chunk in chunks:
        whole = place(
            facts, request, rates, chunk=chunk, resident=range(units), kv_device=range(layers), slots=0, kv_slots=0,
            budget=budget,
        )  # fmt: skip
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
                for slots in (0, 2, 3, 1):  # without any, all weights are on the device
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

    def placed(resident: Collection[int], attended: Collection[int] | None) -> Plan:
        return place(
            facts, request, rates, chunk=chunk, resident=resident, kv_device=kv_device, slots=slots,
            kv_slots=kv_slots, attended=attended, budget=budget,
        )  # fmt: skip

    def weights(resident: Collection[int]) -> int:
        streamed = [facts.units[k] for k in order if k not in resident]
        return sum(facts.units[k] for k in resident) + min(slots, len(streamed)) * max(streamed, default=0)

    resident: set[int] = set() if slots else set(order)
    room = budget - placed(resident, ()).total + weights(resident)
    if slots and weights(resident) > room:
        # A unit that is larger than all others makes the buffers large: it stays where it is, if that is less.
        resident = {order[0]}
    if weights(resident) > room:
        return None
    for k in order:
        if k not in resident and len(resident) + 1 + slots <= len(order) and weights(resident | {k}) <= room:
            resident.add(k)
    return placed(resident, None)


def _kv(facts: Facts, request: Request, layer: int) -> int:
    return request.batch * request.capacity * facts.kv[layer]


def _prompt_seconds(plan: Plan) -> float:
    """Reading weights once for each chunk, beside copying them once."""
    facts, ask, rates = plan.facts, plan.request, plan.rates
    pieces = ask.batch * -(-ask.prompt // plan.chunk)
    copies = (
        sum(facts.units[k] for k in plan.streamed()) + sum(_kv(facts, ask, k) for k in plan.kv_host())
    ) / rates.link
    return max(copies, pieces * (facts.weights / rates.device + len(facts.units) * rates.launch))


def _refusal(facts: Facts, request: Request, budget: int) -> str:
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
            plan = place(
                facts, request, rates, chunk=chunk, resident=resident, kv_device=kept, slots=1, kv_slots=kv_slots
            )
            found.append(plan.total)
    return min(found)
