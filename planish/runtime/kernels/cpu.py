"""What processors kernels are compiled for, and what this one has. Imports no compiler: artifacts check it at load."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass, field

from planish.ir.errors import UnsupportedError
from planish.ir.processor import AMX_BF16, features, missing

__all__ = ["LEVELS", "Cpu", "detect", "features", "host", "missing", "permit_tiles"]

_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AMX = _V4 | AMX_BF16


@dataclass(frozen=True)
class Cpu:
    """A level of instructions that a kernel may use.

    Attributes:
        name: ``"avx2"``, ``"avx512"``, ``"amx"`` or ``"neon"``.
        machine: of `platform.machine()`.
        mcpu: LLVM's name; one that has no more instructions than `features` says.
        features: names as in Linux's ``/proc/cpuinfo``; a processor needs all of them.
        lanes: float32 numbers in a vector register.
        registers: vector registers.
        attributes: LLVM's target attributes.
    """

    name: str
    machine: str
    mcpu: str
    features: frozenset[str]
    lanes: int
    registers: int
    attributes: tuple[str, ...] = field(default=())


# LLVM prefers vectors of 256 bits on x86-64-v4; the templates' tiles are made for 512.
_WIDE = ("-prefer-256-bit",)
LEVELS = {
    level.name: level
    for level in (
        Cpu("avx2", "x86_64", "x86-64-v3", _V3, 8, 16),
        Cpu("avx512", "x86_64", "x86-64-v4", _V4, 16, 32, _WIDE),
        Cpu("amx", "x86_64", "x86-64-v4", _AMX, 16, 32, (*_WIDE, "+amx-tile", "+amx-bf16", "+avx512bf16")),
        Cpu("neon", "aarch64", "generic", frozenset({"asimd"}), 4, 32),
    )
}


def detect(*levels: str) -> Cpu | None:
    """The first of these levels that this processor has; None if it has none of them."""
    for name in levels:
        level = LEVELS[name]
        if level.machine == platform.machine() and not missing(level.features):
            return level
    return None


@functools.cache
def permit_tiles() -> bool:
    """Asks Linux, once for this process, for the use of AMX's tile registers; false if it refuses.

    Without it, the first instruction on a tile ends the process ("Using XSTATE features in user space applications",
    Linux kernel documentation: ARCH_REQ_XCOMP_PERM for XTILEDATA).
    """
    if missing(LEVELS["amx"].features):
        return False
    import ctypes

    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def host() -> Cpu:
    """The widest level of vector instructions of this processor (AMX is asked for by name: `detect`).

    Raises:
        UnsupportedError: none that kernels can be compiled for.
    """
    found = detect("avx512", "avx2", "neon")
    if found is None:
        raise UnsupportedError(
            f"kernels are generated for processors with AVX2, AVX-512 or NEON; this one ({platform.machine()}) "
            "has none of them. Leave 'kernels' out of the target."
        )
    return found
