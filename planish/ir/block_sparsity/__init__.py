"""Which blocks of keys a block of queries sees, as data: patterns by name, and the lists that operators read.

A :class:`Pattern` says what each head sees at any length; :meth:`Pattern.layout` gives the lists for a length, in the
form of ``planish::BlockSparseAttention``; :func:`slot_plan` says what a cache must keep. Nothing here knows graphs.
"""

from planish.ir.block_sparsity.layout import Layout, layout_from_masks, layout_from_sparse_attention
from planish.ir.block_sparsity.local import S2, Dense, LocalPattern, SinkWindow, SlidingWindow, Strided
from planish.ir.block_sparsity.masked import BigBird, BlockMask, Longformer
from planish.ir.block_sparsity.mixed import Mixed
from planish.ir.block_sparsity.pattern import PATTERNS, Heads, Pattern, make_pattern
from planish.ir.block_sparsity.slots import SLOTS, SlotPlan, slot_plan, slots_of

__all__ = [
    "PATTERNS", "S2", "SLOTS", "BigBird", "BlockMask", "Dense", "Heads", "Layout", "LocalPattern", "Longformer",
    "Mixed", "Pattern", "SinkWindow", "SlidingWindow", "SlotPlan", "Strided", "layout_from_masks",
    "layout_from_sparse_attention", "make_pattern", "slot_plan", "slots_of",
]  # fmt: skip
