"""Kernels of a lowered program as a shared library, called through ctypes: TVM compiles it and is not needed then."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from planish.ir.errors import PlanishError
from planish.runtime.dlpack import Tensor
from planish.runtime.kernels.cache import cached
from planish.runtime.kernels.cpu import Cpu, host
from planish.runtime.kernels.linker import link
from planish.runtime.kernels.template import compile_module
from planish.runtime.relational.kernel import RelationalKernel

_NATIVE = Path(__file__).with_name("native")


class Any(ctypes.Structure):
    """An argument in TVM's packed calling convention: here a tensor."""

    _fields_ = (("type", ctypes.c_int32), ("padding", ctypes.c_uint32), ("pointer", ctypes.c_void_p))


class Step(ctypes.Structure):
    """As in native/runner.c."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("index", ctypes.c_int64),
        ("arguments", ctypes.POINTER(Any)),
        ("count", ctypes.c_int64),
        ("to", ctypes.POINTER(Tensor)),
        ("from_", ctypes.POINTER(Tensor)),
        ("to_offset", ctypes.c_int64),
        ("from_offset", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
    )


CALL, CLEAR, COPY = range(3)


class Library:
    """Compiled kernels.

    Attributes:
        path: of the ``.so``.
        index: of each kernel by its symbol.
    """

    def __init__(self, path: Path, symbols: Sequence[str]) -> None:
        self.path = path
        self.index = {symbol: i for i, symbol in enumerate(symbols)}
        self._run = ctypes.CDLL(str(path)).planish_relational_run
        self._run.restype = ctypes.c_char_p
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)

    def run(self, steps: ctypes.Array[Step], threads: int) -> None:
        """Runs steps in order; arrays must be as the kernels' arguments say."""
        failure = self._run(ctypes.addressof(steps), len(steps), threads)
        if failure is not None:
            raise PlanishError(f"a relational kernel failed: {failure.decode(errors='replace')}")


def build(templates: Sequence[RelationalKernel], cpu: Cpu | None = None) -> Library:
    """Compiles kernels; the same ones are compiled once in a process.

    Raises:
        UnsupportedError: TVM or a C compiler is missing, or the processor has no level that kernels are made for.
        PlanishError: compiling or linking failed.
    """
    return _build(tuple(dict.fromkeys(templates)), cpu or host())


@functools.cache
def _build(templates: tuple[RelationalKernel, ...], cpu: Cpu) -> Library:
    folder = _folder()
    symbols = [template.symbol for template in templates]
    name = hashlib.sha256(" ".join([cpu.name, *symbols]).encode()).hexdigest()[:20]
    objects = [_object(template, cpu) for template in templates]
    table = folder / f"{name}.c"
    table.write_text(_table(symbols), encoding="utf-8")
    path = folder / f"{name}.so"
    link([_NATIVE / "runner.c", table], objects, path, [_NATIVE], [])
    return Library(path, symbols)


@functools.cache
def _object(template: RelationalKernel, cpu: Cpu) -> Path:
    path = _folder() / f"{cpu.name}-{template.symbol}.o"

    def make(to: Path) -> None:
        compile_module([template], cpu).write_to_file(str(to), "o")

    if cpu == template.cpu():
        cached(template, make, path)
    else:
        make(path)
    return path


@functools.cache
def _folder() -> Path:
    """A folder of this process, removed at its end."""
    kept = tempfile.TemporaryDirectory(prefix="planish-relational-", ignore_cleanup_errors=True)
    _folders.append(kept)
    return Path(kept.name)


_folders: list[tempfile.TemporaryDirectory[str]] = []


def _table(symbols: Sequence[str]) -> str:
    lines = ["/* Generated: the kernels of this library. */", "#include <stdint.h>"]
    lines += [f"extern int __tvm_ffi_{s}(void *, const void *, int32_t, void *);" for s in symbols]
    lines.append("typedef int (*function)(void *, const void *, int32_t, void *);")
    lines.append("const function planish_relational_functions[] = {")
    lines += [f"  __tvm_ffi_{s}," for s in symbols]
    lines += ["  0};"]
    return "\n".join(lines) + "\n"
