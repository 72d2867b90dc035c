"""A GPU that is planned for and not there: what a plan must know of any, without a driver."""

from __future__ import annotations

from typing import Any

from planish.ir.errors import UnsupportedError
from planish.ir.target import Target
from planish.runtime.offload.account import Account
from planish.runtime.offload.plan import Rates

#: What libraries and the code of kernels take: 54 MiB with two sessions and 66 with four, on an H100 with CUDA 13.
LIBRARIES = 72 << 20
#: What a session's arena takes for what is live in its model: scratch of kernels, and fragments. Arenas keep what they
#: have: a chunk, the rest of a prompt and a step have blocks of their own sizes.
_ARENA_SHARE, _ARENA_LEAST = 2.5, 4 << 20


def arena(nbytes: int) -> int:
    """What a session with so many bytes of live values is given on a GPU."""
    return int(nbytes * _ARENA_SHARE) + _ARENA_LEAST


class PlannedDevice:
    """Sizes only: nothing can be allocated or run.

    Args:
        limit: bytes that may be taken; None: any number.
        target: that a program is made for.
    """

    kind = "cuda"
    concurrent = False
    reserve = LIBRARIES
    bandwidth = Rates.device

    def __init__(self, limit: int | None, target: Target) -> None:
        self.account, self.target = Account(limit), target

    def room(self, nbytes: int) -> int:
        return arena(nbytes)

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(f"this program is for '{self.target}', which this machine has not: export it.")
