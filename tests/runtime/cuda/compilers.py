"""A stand-in for nvcc, for tests of what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from planish.runtime.cuda import cache, ort_library, toolchain


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
