"""Compiled kernels by their source and macros, in memory and in the user's cache folder."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from planish.runtime.cuda import driver, toolchain
from planish.runtime.cuda.driver import Module
from planish.runtime.kernels.cache import cache_folder


@functools.cache
def binary(source: str, defines: tuple[tuple[str, int], ...]) -> bytes:
    """The fat binary of a kernel, compiled once on a machine.

    Raises:
        UnsupportedError: it is not in the cache, and there is no nvcc.
    """
    architectures: tuple[str, ...] = toolchain.ARCHITECTURES
    if dict(defines).get("ELEMENT_BF16"):  # which Turing does not have
        architectures = tuple(arch for arch in architectures if arch != "sm_75")
    made_from = repr((source, defines, architectures, toolchain.fingerprint()))
    return _kept(source, made_from, lambda: toolchain.fatbin(source, dict(defines), architectures=architectures))


def _kept(name: str, made_from: str, make: Callable[[], bytes]) -> bytes:
    """What is kept under a hash of what it is made from; or what `make` gives, which is kept then."""
    kept = cache_folder()
    path = kept and kept / f"{name}-{hashlib.sha256(made_from.encode()).hexdigest()[:32]}.fatbin"
    if path is not None and path.is_file() and not path.is_symlink():
        return path.read_bytes()
    code = make()
    if path is not None:
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            with os.fdopen(handle, "wb") as file:
                file.write(code)
            os.replace(temporary, path)
        except OSError:
            pass  # a full disk: it is compiled again next time
    return code


@functools.cache
def module(source: str, device: int, **defines: int) -> Module:
    """A kernel's module on a GPU, in the context that is current."""
    return Module(binary(source, tuple(sorted(defines.items()))))


def generated(texts: Mapping[str, str], device: int) -> dict[str, Module]:
    """Modules of generated sources by name, on a GPU and for it alone, in the context that is current.

    Raises:
        UnsupportedError: one is not in the cache, and there is no nvcc.
    """
    arch = f"sm_{driver.device(device).arch}"
    missing = [name for name in texts if (name, device) not in _loaded]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        codes = list(pool.map(lambda name: compiled(name, texts[name], arch), missing))
    for name, code in zip(missing, codes, strict=True):
        _loaded[name, device] = Module(code)
    return {name: _loaded[name, device] for name in texts}


_loaded: dict[tuple[str, int], Module] = {}


def compiled(name: str, text: str, arch: str) -> bytes:
    """The code of a generated source for one architecture, such as ``"sm_90"``."""

    def make() -> bytes:
        with tempfile.TemporaryDirectory(prefix="planish-cuda-") as folder:
            (Path(folder) / f"{name}.cu").write_text(text)
            return toolchain.fatbin(f"{name}.cu", architectures=(arch,), ptx=None, folder=Path(folder))

    return _kept(name, repr((text, arch, str(toolchain.nvcc()))), make)


@functools.cache
def generated_binary(name: str, text: str) -> bytes:
    """The fat binary of a generated source, for all architectures, compiled once on a machine.

    Raises:
        UnsupportedError: it is not in the cache, and there is no nvcc.
    """

    def make() -> bytes:
        with tempfile.TemporaryDirectory(prefix="planish-cuda-") as folder:
            (Path(folder) / f"{name}.cu").write_text(text)
            return toolchain.fatbin(f"{name}.cu", folder=Path(folder))

    return _kept(name, repr((text, toolchain.ARCHITECTURES, toolchain.PTX, str(toolchain.nvcc()))), make)
