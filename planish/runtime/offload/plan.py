"""What a memory budget is planned with: rates of a machine, sizes of a decoder, a request; and the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rates:
    """What was measured of a machine, in bytes and seconds.

    Attributes:
        link: bytes per second from the host to the device, pinned.
        device: bytes per second that the device reads from its own memory.
        host: bytes of cache per second that attention on the host reads.
        latency: seconds that a layer whose attention is on the host waits beside that, for both copies.
        launch: seconds that it takes to start a layer; not measured: of an H100 and its host.
        shared_link, shared_host: `link` and `host` while both go on, since both read main memory; 0: the same.
    """

    link: float = 20e9
    device: float = 1e12
    host: float = 10e9
    latency: float = 50e-6
    launch: float = 2.5e-4
    shared_link: float = 0.0
    shared_host: float = 0.0

    def both(self, copied: float, attended: float) -> tuple[float, float]:
        """Seconds that copying and attention take for so many bytes each, when they begin together."""
        link, host = self.shared_link or self.link, self.shared_host or self.host
        if not copied or not attended or (link, host) == (self.link, self.host):
            return copied / self.link, attended / self.host
        together = min(copied / link, attended / host)
        rest = copied - together * link, attended - together * host
        return together + rest[0] / self.link, together + rest[1] / self.host


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
class Times:
    """What a step is estimated to take, in seconds.

    Attributes:
        copies: of weights and caches to the device.
        attention: on the host, with the waiting for it.
        device: what the device computes and reads.
        step: all of it; what can go on at once does.
    """

    copies: float = 0.0
    attention: float = 0.0
    device: float = 0.0
    step: float = 0.0


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
        attended: layers whose attention is computed on the host in each step; other caches of the host are copied.
        rows: what takes how much on the device, in words.
        times: estimated, of a step.
        rates: that they were estimated with.
    """

    request: Request
    budget: int | None
    chunk: int
    resident: frozenset[int]
    slots: int
    slot_bytes: int
    kv_device: frozenset[int]
    kv_slots: int
    attended: frozenset[int]
    workspace: int
    facts: Facts = field(compare=False, repr=False)
    rates: Rates = field(compare=False, repr=False)
    rows: tuple[tuple[str, int], ...] = ()
    times: Times = Times()

    @property
    def total(self) -> int:
        return sum(size for _, size in self.rows)

    @property
    def seconds(self) -> float:
        """Estimated time of a step."""
        return self.times.step

    def streamed(self) -> list[int]:
        """Units whose weights are copied in each step, in order."""
        return [k for k in range(len(self.facts.units)) if k not in self.resident]

    def kv_host(self) -> list[int]:
        """Layers whose cache is on the host, in order."""
        return [k for k in range(len(self.facts.kv)) if k not in self.kv_device]

    def kv_bytes(self, layer: int) -> int:
        """The cache of a layer at its full length."""
        return self.request.batch * self.request.capacity * self.facts.kv[layer]

    def to_dict(self) -> dict[str, Any]:
        """For a report."""
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
            "attended": len(self.attended),
            "rows": dict(self.rows),
            "seconds_per_step": self.seconds,
            "times": asdict(self.times),
        }

    def table(self) -> str:
        """What is where, as lines of text."""
        from planish.runtime.offload.table import plan_table

        return plan_table(self)
