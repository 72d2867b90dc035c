"""How fast a machine copies, and attends on its host: what a plan is weighed with, measured in some milliseconds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np

from planish.runtime.offload.bound import Place, address_of
from planish.runtime.offload.device import COMPUTE, COPY, Device, flat
from planish.runtime.offload.parts import Part, Parts
from planish.runtime.offload.plan import Rates
from planish.runtime.offload.weights import value_bytes

_BLOCK = 64 << 20
_TOKENS = 8192
#: Caches that attention is measured on are together more than a processor keeps, in bytes, where there are as many.
_BEYOND_CACHES = 768 << 20


def measure_rates(parts: Parts, device: Device, *, seconds: float = 0.2) -> Rates:
    """Rates of the machine for one row; the host's is that of the attention that will run there.

    Args:
        seconds: spent on each, at least.
    """
    limit = device.account.limit
    room = _BLOCK if limit is None else min(_BLOCK, max((limit - device.account.used) // 2, 1 << 10))
    block, address = device.host(room), device.allocate(room, "measuring")

    def copy(nbytes: int, stream: int = COMPUTE) -> None:
        device.upload(address, address_of(block), flat(nbytes), stream)

    def waited(nbytes: int) -> Callable[[], None]:
        def run() -> None:
            copy(nbytes)
            device.synchronize(device.record(COMPUTE))

        return run

    try:
        long, short = _median(waited(room), seconds), _median(waited(256), seconds / 4)
        link = room / max(long - short, 1e-9)
        rates = Rates(link, max(device.bandwidth, link), latency=2 * short, shared_link=link)
        attention = _attention(parts, device)
        if attention is None:
            return rates
        run, nbytes = attention
        host = nbytes / _median(run, seconds)
        together = (link, host)
        if device.concurrent:
            count = max(int(seconds * link / room), 2)
            together = _together(device, lambda: copy(room, COPY), count, room, run, nbytes)
        return Rates(link, rates.device, host, rates.latency, shared_link=together[0], shared_host=together[1])
    finally:
        device.free(address)


def _together(
    device: Device, copy: Callable[[], None], count: int, room: int, run: Callable[[], None], nbytes: int
) -> tuple[float, float]:
    """Bytes per second of copies and of attention while both go on: they read the same memory."""
    device.synchronize(device.record(COPY))
    started = time.perf_counter()
    for _ in range(count):
        copy()
    event, runs = device.record(COPY), 0
    while not device.done(event):  # a thread that waits would take a core from those that attend
        run()
        runs += 1
    seconds = time.perf_counter() - started
    return count * room / seconds, runs * nbytes / seconds


def _attention(parts: Parts, device: Device) -> tuple[Callable[[], None], int] | None:
    """Attention on the host over long caches, another one at each call, and the bytes of one; None: none can be."""
    number = next((k for k, layer in enumerate(parts.layers) if layer.attention is not None), None)
    if number is None:
        return None
    part = parts.layers[number].attention
    assert part is not None
    sizes = {"batch": 1, "tokens": 1, "capacity": _TOKENS}
    one = sum(value_bytes(v, sizes) for v in parts.cache_values[number])
    count = max(min(-(-_BEYOND_CACHES // one), sum(layer.attention is not None for layer in parts.layers)), 1)
    turns = itertools.cycle([_bound(parts, part, sizes, device) for _ in range(count)])
    return lambda: next(turns)(), one


def _bound(parts: Parts, part: Part, sizes: dict[str, int], device: Device) -> Callable[[], None]:
    """One run of attention, on memory as caches have it."""
    graph = part.piece.model.graph
    arrays: list[np.ndarray] = []
    for name, value in zip(part.inputs, graph.inputs, strict=False):
        assert value.dtype is not None
        dtype = np.dtype(value.dtype.numpy())
        array = device.host(value_bytes(value, sizes)).view(dtype)
        if dtype.kind in "iu":  # the longest row counts its new token, which the rows themselves do not
            array[:] = _TOKENS if parts.is_total(name) else _TOKENS - 1
        else:
            array[:] = 0.5
        arrays.append(array)
    out = device.host(value_bytes(next(iter(graph.outputs)), sizes))
    places = [Place(address_of(a), True) for a in arrays]
    run = parts.bind(part, places, [], [Place(address_of(out), True), *places[-2:]], sizes)

    def kept(held: object = (arrays, out)) -> None:
        run()

    return kept


def _median(run: Callable[[], None], seconds: float) -> float:
    run()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return float(np.median(times))
