"""Finds where weights and caches are under a memory budget, before anything runs.

What does not fit is left to the host by what each costs. Weights on the host are copied through a ring of buffers
once for every step. The cache of a layer on the host is attended to there, or copied through a ring of its own: by
the rule of FastAttention (arXiv 2410.16663, CPU-GPU cooperative strategy) the first if T_host(kv) + T_link(q, k, v, o)
is less than kv / BW_link, at rates that were measured. A prompt goes through layer by layer, in chunks, so its weights
are copied once, and a cache that will stay on the host is on the device only while its layer runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
    cooperative: bool | None = None,
    budget: int | None = None,
) -> Plan:
    """A plan by what is where, whether or not it fits.

    Args:
        cooperative: None: by the rule.
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
    moved = [_kv(facts, ask, k) for k in host]
    if cooperative is None:
        cooperative = _rule(rates, sum(streamed), sum(moved), len(host))
    read = sum(facts.units) + sum(_kv(facts, ask, k) for k in (range(len(facts.kv)) if not cooperative else kv_device))
    device = max(read / rates.device, len(facts.units) * rates.launch)
    times = _times(rates, sum(streamed), moved, device, cooperative, (slots, kv_slots))
    return Plan(
        ask, budget, chunk, frozenset(resident), slots, slot, frozenset(kv_device), kv_slots, cooperative, space,
        facts, rates, tuple((what, size) for what, size in rows if size), times,
    )  # fmt: skip


def _rule(rates: Rates, streamed: int, kv: int, layers: int) -> bool:
    """Whether caches on the host are attended to there."""
    _, attention = rates.both(streamed, kv)
    return bool(layers) and attention + layers * rates.latency < kv / rates.link


def _times(
    rates: Rates, streamed: int, moved: list[int], device: float, cooperative: bool, slots: tuple[int, int]
) -> Times:
    """Of a step; copies go on beside the rest where there is more than one buffer."""
    if cooperative:
        copies, attention = rates.both(streamed, sum(moved))
        attention += len(moved) * rates.latency
        ahead = slots[0] != 1
        if not ahead:
            copies, attention = streamed / rates.link, sum(moved) / rates.host + len(moved) * rates.latency
    else:
        copies, attention = (streamed + sum(moved)) / rates.link, 0.0
        ahead = 1 not in slots
    step = max(copies, attention + device) if ahead else copies + attention + device
    return Times(copies, attention, device, step)


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

    def fitting(resident: Collection[int]) -> Plan | None:
        plan = place(
            facts, request, rates, chunk=chunk, resident=resident, kv_device=kv_device, slots=slots,
            kv_slots=kv_slots, budget=budget,
        )  # fmt: skip
        return plan if plan.total <= budget else None

    if not slots:
        return fitting(order)
    resident: set[int] = set()
    plan = fitting(resident)
    if plan is None:
        # A unit that is larger than all others makes the buffers large: it stays where it is, if that is less.
        resident = {order[0]}
        plan = fitting(resident)
    if plan is None:
        return None
    for k in order:
        if k in resident or len(resident) + 1 + slots > len(order):
            continue
        more = fitting(resident | {k})
        if more is not None:
            resident.add(k)
            plan = more
    return plan


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
