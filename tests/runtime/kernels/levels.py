"""Levels of instructions that kernels are tested on."""

from __future__ import annotations

import platform

import pytest

from planish.runtime.kernels.cpu import LEVELS, Cpu, missing

VECTORS = ("avx2", "avx512", "neon")


def level(name: str) -> Cpu:
    """The level, or a skipped test where this processor lacks it."""
    found = LEVELS[name]
    if found.machine != platform.machine() or missing(found.features):
        pytest.skip(f"this processor lacks {name}")
    return found
