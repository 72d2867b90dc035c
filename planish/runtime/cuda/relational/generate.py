"""CUDA C++ of a lowered relational program."""

from __future__ import annotations

from planish.ir.relational.intra import Kernel, Lowered
from planish.runtime.cuda.relational.products import product
from planish.runtime.cuda.relational.text import Generated, context
from planish.runtime.cuda.relational.traversals import traversal


def generate(kernel: Kernel, lowered: Lowered, deterministic: bool = False) -> Generated:
    """The text of one kernel, and how it is launched.

    Args:
        deterministic: sums are made in the same order in every run; the program was lowered without scatter.

    Raises:
        UnsupportedError: rows that do not fit into shared memory.
    """
    c = context(kernel, lowered, deterministic)
    return product(c) if kernel.gemm is not None else traversal(c)
