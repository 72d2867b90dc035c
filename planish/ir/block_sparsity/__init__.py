"""Which blocks of keys a block of queries sees, as data: patterns by name, and the lists that operators read.

A :class:`Pattern` says what each head sees at any length; :meth:`Pattern.layout` gives the lists for a length, in the
form of ``planish::BlockSparseAttention``. Nothing here knows graphs.
"""

from planish.ir.block_sparsity.globals_ import BigBird, BlockMask, Longformer
from planish.ir.block_sparsity.layout import Layout, layout_from_masks
from planish.ir.block_sparsity.local import S2, Dense, LocalPattern, SinkWindow, SlidingWindow, Strided
from planish.ir.block_sparsity.pattern import PATTERNS, Heads, Pattern, make_pattern

__all__ = [
    "PATTERNS", "S2", "BigBird", "BlockMask", "Dense", "Heads", "Layout", "LocalPattern", "Longformer", "Pattern",
    "SinkWindow", "SlidingWindow", "Strided", "layout_from_masks", "make_pattern",
]  # fmt: skip
