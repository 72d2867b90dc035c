"""Compiled kernels by their source and macros, in memory and in the user's cache folder."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile

from planish.runtime.cuda import toolchain
from planish.runtime.cuda.driver import Module
from planish.runtime.kernels.cache import cache_folder


@functools.cache
def binary(source: str, defines: tuple[tuple[str, int], ...]) -> bytes:
    """The fat binary of a kernel, compiled once on a machine.

    Raises:
        UnsupportedError: it is not in the cache, and there is no nvcc.
    """
    kept = cache_folder()
    architectures: tuple[str, ...] = toolchain.ARCHITECTURES
    if dict(defines).get("ELEMENT_BF16"):  # which Turing does not have
        architectures = tuple(arch for arch in architectures if arch != "sm_75")
    made_from = repr((source, defines, architectures, toolchain.fingerprint()))
    path = kept and kept / f"{source}-{hashlib.sha256(made_from.encode()).hexdigest()[:32]}.fatbin"
    if path is not None and path.is_file() and not path.is_symlink():
        return path.read_bytes()
    code = toolchain.fatbin(source, dict(defines), architectures=architectures)
    if path is not None:
        try:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            with os.fdopen(handle, "wb") as file:
                file.write(code)
            os.replace(name, path)
        except OSError:
            pass  # a full disk: it is compiled again next time
    return code


@functools.cache
def module(source: str, device: int, **defines: int) -> Module:
    """A kernel's module on a GPU, in the context that is current."""
    return Module(binary(source, tuple(sorted(defines.items()))))
