"""What is allocated on a device, by what it is for, and a limit that it may not pass."""

from __future__ import annotations

from collections import Counter

from planish.ir.errors import InputError


class MemoryBudgetError(InputError):
    """A memory budget can not be kept; the message says by how much, and what would fit."""


def size_text(nbytes: float) -> str:
    """``"1.50 GiB"``, ``"12.0 MiB"``, ``"3 KiB"``."""
    if nbytes >= 1 << 30:
        return f"{nbytes / (1 << 30):.2f} GiB"
    return f"{nbytes / (1 << 20):.1f} MiB" if nbytes >= 1 << 20 else f"{nbytes / (1 << 10):.0f} KiB"


class Account:
    """Bytes of one device.

    Args:
        limit: bytes that may be taken at once; None: any number.

    Attributes:
        used, peak: bytes taken now, and at most.
        by: bytes taken now by what they are for.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.used = self.peak = 0
        self.by: Counter[str] = Counter()

    def take(self, nbytes: int, what: str) -> None:
        """Counts an allocation before it is made.

        Raises:
            MemoryBudgetError: it would pass the limit.
        """
        if self.limit is not None and self.used + nbytes > self.limit:
            over = self.used + nbytes - self.limit
            held = ", ".join(f"{size_text(n)} of {name}" for name, n in self.by.most_common() if n)
            raise MemoryBudgetError(
                f"{size_text(nbytes)} of {what} pass the memory budget of {size_text(self.limit)} by "
                f"{size_text(over)}; taken: {held or 'nothing'}."
            )
        self.used += nbytes
        self.by[what] += nbytes
        self.peak = max(self.peak, self.used)

    def give(self, nbytes: int, what: str) -> None:
        """Counts what is given back."""
        self.used -= nbytes
        self.by[what] -= nbytes
