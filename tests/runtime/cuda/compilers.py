"""A stand-in for nvcc, for tests of what is asked of it; and nvcc that compiles for Turing alone, to PTX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planish.runtime.cuda import cache, driver, ort_library, toolchain


def stand_in_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While it is entered, nvcc is a program that writes what it was asked for, and nothing compiled is kept."""
    program = folder / "home" / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nto=$3\nshift 3\necho "FATBIN $*" > "$to"\n')
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder / "home"))
    monkeypatch.setenv("PLANISH_CACHE", "")
    kept = (toolchain.nvcc, cache.binary, ort_library._library)
    for cached in kept:
        cached.cache_clear()
    yield
    for cached in kept:
        cached.cache_clear()


def turing_alone(monkeypatch: pytest.MonkeyPatch, *kept: Any, chosen: bool) -> Iterator[None]:
    """While it is entered, kernels are PTX for Turing, which the GPU at hand translates.

    Args:
        kept: cached functions that give kernels.
        chosen: the GPU says that it is a Turing, so that kernels are chosen and launched as there.
    """
    kept = cache.binary, cache.module, *kept
    real = driver.device() if chosen else None
    for cached in kept:
        cached.cache_clear()
    monkeypatch.setenv("PLANISH_CACHE", "")
    monkeypatch.setattr(toolchain, "ARCHITECTURES", ())
    monkeypatch.setattr(toolchain.fatbin, "__kwdefaults__", toolchain.fatbin.__kwdefaults__ | {"ptx": "compute_75"})
    if real is not None:
        monkeypatch.setattr(driver, "device", lambda index=0: driver.Device(75, real.processors, 64 << 10))
    yield
    for cached in kept:
        cached.cache_clear()
