"""How fast a machine copies, and attends on its host: what a plan is weighed with, measured in some milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from planish.runtime.offload.bound import Place, address_of
from planish.runtime.offload.device import COMPUTE, Device, flat
from planish.runtime.offload.parts import Parts
from planish.runtime.offload.plan import Rates
from planish.runtime.offload.weights import value_bytes

_BLOCK = 64 << 20
_TOKENS = 8192


def measure_rates(parts: Parts, device: Device, *, seconds: float = 0.2) -> Rates:
    """Rates of the machine for one row; the host's is that of the attention that will run there.

    Args:
        seconds: spent on each, at least.
    """
    link, latency = _link(device, seconds)
    host = next((k for k, layer in enumerate(parts.layers) if layer.attention is not None), None)
    rate = _host(parts, host, seconds) if host is not None else Rates.host
    return Rates(link, max(device.bandwidth, link), rate, 2 * latency)


def _link(device: Device, seconds: float) -> tuple[float, float]:
    """Bytes per second to the device, and the seconds of a copy of almost nothing with its synchronization."""
    limit = device.account.limit
    room = _BLOCK if limit is None else min(_BLOCK, max((limit - device.account.used) // 2, 1 << 10))
    block, address = device.host(room), device.allocate(room, "measuring")

    def copy(nbytes: int) -> Callable[[], None]:
        def run() -> None:
            device.upload(address, address_of(block), flat(nbytes), COMPUTE)
            device.synchronize(device.record(COMPUTE))

        return run

    try:
        long, short = _median(copy(room), seconds), _median(copy(256), seconds / 4)
    finally:
        device.free(address)
    return room / max(long - short, 1e-9), short


def _host(parts: Parts, layer: int, seconds: float) -> float:
    """Bytes of cache per second that attention on the host reads, for one row."""
    unit = parts.layers[layer]
    assert unit.attention is not None
    sizes = {"batch": 1, "tokens": 1, "capacity": _TOKENS}
    random = np.random.default_rng(0)
    graph = unit.attention.piece.model.graph
    arrays: list[np.ndarray] = []
    for value in list(graph.inputs):
        assert value.dtype is not None
        dtype = np.dtype(value.dtype.numpy())
        count = value_bytes(value, sizes) // dtype.itemsize
        whole = (
            np.full(count, _TOKENS - 1, dtype) if dtype.kind in "iu" else random.standard_normal(count).astype(dtype)
        )
        arrays.append(whole)
    # The longest row counts its new token, which the rows themselves do not.
    for name, array in zip(unit.attention.inputs, arrays, strict=True):
        if array.dtype.kind in "iu" and parts.is_total(name):
            array[:] = _TOKENS
    caches = [Place(address_of(a), True) for a in arrays[-2:]]
    out = np.zeros(value_bytes(next(iter(graph.outputs)), sizes), np.uint8)
    places = [Place(address_of(a), True) for a in arrays]
    run = parts.bind(unit.attention, places, [], [Place(address_of(out), True), *caches], sizes)
    return sum(a.nbytes for a in arrays[-2:]) / _median(run, seconds)


def _median(run: Callable[[], None], seconds: float) -> float:
    run()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return float(np.median(times))
