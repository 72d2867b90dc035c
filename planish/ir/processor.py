"""What instructions this machine's processor has, for those who choose by it; nothing here runs any of them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

#: What products in bfloat16 on matrix units take, by Linux's names.
AMX_BF16 = frozenset({"amx_bf16", "amx_tile", "avx512_bf16"})


@functools.cache
def features() -> frozenset[str]:
    """The features of this processor, by Linux's names; those that NumPy knows where there is no ``/proc/cpuinfo``."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return frozenset(value.split())
    import importlib

    found = importlib.import_module("numpy._core._multiarray_umath").__cpu_features__
    names = {name.lower() for name, there in found.items() if there}
    # NumPy names FMA differently, and leaves out what comes with AVX2.
    if "fma3" in names:
        names.add("fma")
    if "avx2" in names:
        names |= {"bmi1", "bmi2", "movbe"}
    return frozenset(names)


def missing(needed: Iterable[str]) -> list[str]:
    """Features of `needed` that this processor lacks."""
    return sorted(set(needed) - features())
