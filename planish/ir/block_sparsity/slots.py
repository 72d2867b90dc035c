"""Where a cache keeps the keys and values that a KV-efficient pattern still needs, and nothing else.

A cache of slots has, for each key-value head, a ring of the last `local` blocks, then the first `sinks` blocks, then
the blocks of its shards in order. Slot block s of the ring holds the newest block n with n mod local = s; a block of a
shard is kept in its own place from its first token on, also while it is inside the window. So a token is written once,
and what leaves the window is overwritten by what enters. Keys are cached with their positions applied, so that the
order of slots is of no consequence to attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from planish.ir.block_sparsity.local import S2, LocalPattern, SinkWindow, SlidingWindow, Strided
from planish.ir.block_sparsity.pattern import Heads, Pattern
from planish.ir.errors import InputError

#: Metadata of a cache input, and (with the layer) the key of a program's provenance: the plan as text.
SLOTS = "planish.cache_slots"


@dataclass(frozen=True)
class SlotPlan:
    """The slots of a cache.

    Attributes:
        block: tokens of a block.
        local: blocks of the window.
        sinks: first blocks that stay.
        stride: one block in `stride` stays, for each shift; 0: none.
        shifts: for each key-value head the shifts of its shards, ascending: block n stays if (n + shift) mod stride
            is 0. As many for every head.
    """

    block: int
    local: int
    sinks: int
    stride: int
    shifts: tuple[tuple[int, ...], ...]

    @property
    def shards(self) -> int:
        """Shards that each key-value head keeps."""
        return len(self.shifts[0]) if self.stride else 0

    @property
    def fixed(self) -> int:
        """Blocks of slots that every cache has, however few tokens it holds."""
        return self.local + self.sinks

    def capacity(self, tokens: int) -> int:
        """Slots for caches of up to so many tokens."""
        blocks = -(-tokens // self.block)
        grown = -(-blocks // self.stride) * self.shards if self.stride else 0
        return (self.fixed + grown) * self.block

    def stays(self, blocks: np.ndarray) -> np.ndarray:
        """(key-value heads, …) bool: whether blocks are kept at any distance."""
        kept = np.broadcast_to(blocks < self.sinks, (len(self.shifts), *blocks.shape)).copy()
        for head, shifts in enumerate(self.shifts):
            for shift in shifts if self.stride else ():
                kept[head] |= (blocks + shift) % self.stride == 0
        return kept

    def positions(self, lengths: np.ndarray, slots: int) -> np.ndarray:
        """(batch, key-value heads, slots) int64: the position that each slot holds, -1 for none.

        Args:
            lengths: (batch,) tokens that the cache has seen of each row.
            slots: as :meth:`capacity` gives them.
        """
        slot, inside = np.divmod(np.arange(slots), self.block)
        last = np.asarray(lengths)[:, None] - 1
        row = last // self.block
        ring = row - (row - slot) % self.local
        kept = np.broadcast_to(slot - self.local, (len(self.shifts), slots)).copy()
        for head, shifts in enumerate(self.shifts):
            if self.stride:
                index = slot - self.fixed
                first = (-np.array(shifts)) % self.stride
                beyond = first[index % self.shards] + index // self.shards * self.stride
                kept[head] = np.where(slot < self.fixed, kept[head], beyond)
        in_ring = slot < self.local
        block = np.where(in_ring, ring[:, None], kept[None])
        at = block * self.block + inside
        stays = np.stack([self.stays(block[:, h])[h] for h in range(len(self.shifts))], axis=1)
        there = (block >= 0) & (at <= last[:, None]) & (last[:, None] >= 0) & ~(in_ring & stays)
        return np.where(there, at, -1).astype(np.int64)

    def gather(self, cache: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The cache (batch, heads, slots, size) that stands for one of all positions (batch, heads, capacity, size)."""
        at = self.positions(lengths, self.capacity(cache.shape[2]))
        found = np.take_along_axis(cache, np.maximum(at, 0)[..., None], axis=2)
        return np.where(at[..., None] >= 0, found, np.zeros((), cache.dtype))

    def to_text(self) -> str:
        """The plan in one line, as :meth:`parse` reads it."""
        shifts = "|".join(",".join(map(str, group)) for group in self.shifts)
        return f"{self.block} {self.local} {self.sinks} {self.stride} {shifts}"

    @classmethod
    def parse(cls, text: str) -> SlotPlan:
        """Reads :meth:`to_text`.

        Raises:
            InputError: the text is something else.
        """
        try:
            *numbers, shifts = text.split(" ")
            block, local, sinks, stride = (int(n) for n in numbers)
            groups = tuple(tuple(int(s) for s in part.split(",") if s) for part in shifts.split("|"))
        except ValueError as error:
            raise InputError(f"the layout of a cache is damaged: '{text[:60]}'.") from error
        if min(block, local) < 1 or min(sinks, stride) < 0 or (stride and len({len(g) for g in groups}) > 1):
            raise InputError(f"the layout of a cache is damaged: '{text[:60]}'.")
        return cls(block, local, sinks, stride, groups)


def slot_plan(pattern: Pattern, heads: Heads) -> SlotPlan:
    """The slots for a pattern's caches.

    Raises:
        InputError: the pattern is not KV-efficient, or a head keeps everything; names the rule.
    """
    rule = "a block that goes out of use must never come back (KV-efficiency)"
    if not isinstance(pattern, LocalPattern) or not pattern.causal:
        where = ""
        if pattern.causal and pattern.name != "mask":
            found = pattern.layout(64 * pattern.block, heads).kv_violation(heads.kv)
            where = f" (row {found[1]} sees block {found[2]}, and row {found[1] - 1} does not)" if found else ""
        raise InputError(f"evict: the caches of pattern '{pattern.name}' can not be evicted: {rule}{where}.")
    groups: list[set[int]] = [set() for _ in range(heads.kv)]
    stride, sinks = 0, 0
    if isinstance(pattern, SinkWindow):
        sinks = pattern.sinks
    elif isinstance(pattern, Strided):
        stride, groups = pattern.stride, [{1 % pattern.stride} for _ in groups]
    elif isinstance(pattern, S2):
        stride = pattern.stride
        for head in range(heads.query):
            shift = pattern.kind(head, heads)
            if shift is None:
                raise InputError(
                    f"evict: head {head} is dense and keeps every block; a cache of fewer needs dense_heads=0."
                )
            assert isinstance(shift, int)
            groups[heads.kv_of(head)].add(shift)
    elif not isinstance(pattern, SlidingWindow):
        raise InputError(f"evict: pattern '{pattern.name}' keeps every block.")
    counts = {len(group) for group in groups}
    if len(counts) > 1 or (stride and counts == {stride}):
        kept = ", ".join(str(len(group)) for group in groups)
        raise InputError(
            f"evict: the heads of keys keep {kept} of every {stride} blocks; they must keep as many each, and not all "
            "(share_kv=True gives each one shard)."
        )
    return SlotPlan(pattern.block, pattern.local, sinks, stride, tuple(tuple(sorted(g)) for g in groups))


def slots_of(provenance: Mapping[str, str]) -> dict[int, SlotPlan]:
    """Layer → plan, of the layers whose caches have slots.

    Raises:
        InputError: the provenance is damaged.
    """
    found = {}
    for key, text in provenance.items():
        if key.startswith(SLOTS + "."):
            layer = key.removeprefix(SLOTS + ".")
            if not layer.isdecimal():
                raise InputError(f"the program's provenance is damaged: '{key}'.")
            found[int(layer)] = SlotPlan.parse(text)
    return found


__all__ = ["SLOTS", "SlotPlan", "slot_plan", "slots_of"]
