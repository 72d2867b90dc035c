"""Giving memory back that making a session has used."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterable
from typing import Any


def trim() -> None:
    """Returns free memory of the C heap to the system, some milliseconds; does nothing where there is no glibc.

    Packing weights frees and allocates blocks of megabytes, and glibc keeps what it gets back: without this, a
    process that made two sessions after each other holds the memory of both.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def drop_pages(tensors: Iterable[Any]) -> None:
    """Lets go of the resident pages of tensors that are mapped from files; they come back when they are read.

    A session has read each weight once, to pack it; what it still reads later is only a part of them.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    maps = {id(t.file): t.file for t in tensors if hasattr(getattr(t, "file", None), "map")}
    for file in maps.values():
        with contextlib.suppress(OSError, ValueError):
            file.map().madvise(mmap.MADV_DONTNEED)
