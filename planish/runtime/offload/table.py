"""A plan as text: what takes how much, which layer is where, and what a step is estimated to take."""

from __future__ import annotations

from planish.runtime.offload.account import size_text
from planish.runtime.offload.plan import Plan


def plan_table(plan: Plan) -> str:
    """What is where, as lines of text."""
    ask, facts = plan.request, plan.facts
    lines = [f"memory for {ask.batch} x ({ask.prompt} + {ask.new}) tokens, prompts in chunks of {plan.chunk}:"]
    lines += [f"  {what:<58}{size_text(size):>12}" for what, size in plan.rows]
    limit = f" of {size_text(plan.budget)}" if plan.budget is not None else ""
    lines.append(f"  {'on the device, planned' + limit:<58}{size_text(plan.total):>12}")
    streamed, host = plan.streamed(), plan.kv_host()
    if streamed:
        size = size_text(sum(facts.units[k] for k in streamed))
        lines.append(f"  on the host: weights of {len(streamed)} of {len(facts.units)} units, {size}, copied each step")
    ways = {"attended to there": plan.attended, "copied each step": [k for k in host if k not in plan.attended]}
    for way, found in ways.items():
        if found:
            size = size_text(sum(plan.kv_bytes(k) for k in found))
            lines.append(f"  on the host: caches of {len(found)} of {len(facts.kv)} layers, {size}, {way}")
    lines += [f"  {name:<20}{weights:<38}{cache}".rstrip() for name, weights, cache in _places(plan)]
    return "\n".join([*lines, f"  {_estimate(plan)}"])


def _places(plan: Plan) -> list[tuple[str, str, str]]:
    """(units, their weights, their caches), units that are alike together."""
    layers = len(plan.facts.kv)
    groups: dict[tuple[str, str], list[int]] = {}
    for k in range(layers):
        groups.setdefault((_weights(plan, k), _cache(plan, k)), []).append(k)
    rows = [(f"layer{'s' * (len(found) > 1)} {_numbers(found)}", *kind) for kind, found in groups.items()]
    return rows + [("logits", _weights(plan, k), "") for k in range(layers, len(plan.facts.units))]


def _numbers(found: list[int]) -> str:
    """``0 to 3`` or ``1, 4, ... 31``."""
    if len(found) == 1:
        return str(found[0])
    if found[-1] - found[0] == len(found) - 1:
        return f"{found[0]} to {found[-1]}"
    return ", ".join(map(str, found)) if len(found) < 4 else f"{found[0]}, {found[1]}, ... {found[-1]}"


def _weights(plan: Plan, unit: int) -> str:
    if unit in plan.resident:
        return "weights on the device"
    return f"weights streamed, {milliseconds(plan.facts.units[unit] / plan.rates.link)}"


def _cache(plan: Plan, layer: int) -> str:
    if layer in plan.kv_device:
        return "cache on the device"
    size = plan.kv_bytes(layer)
    if layer in plan.attended:
        return f"cache on the host, attended to there, {milliseconds(size / plan.rates.host + plan.rates.latency)}"
    return f"cache on the host, copied, {milliseconds(size / plan.rates.link)}"


def _estimate(plan: Plan) -> str:
    times = plan.times
    parts = [("copies", times.copies), ("attention on the host", times.attention), ("the device", times.device)]
    text = ", ".join(f"{what} {milliseconds(seconds)}" for what, seconds in parts if seconds)
    return f"a step is estimated at {milliseconds(times.step)}: {text}"


def milliseconds(seconds: float) -> str:
    """``"28.3 ms"``."""
    ms = seconds * 1e3
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 1 else f"{ms:.2g} ms"
