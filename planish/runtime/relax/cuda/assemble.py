"""What turns generated CUDA code into machine code and links it, on machines that have nvcc and need no GPU."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planish.ir.errors import UnsupportedError
from planish.runtime.cuda import toolchain
from planish.runtime.cuda.cache import binary
from planish.runtime.cuda.tvm_libraries import load_runtime, run
from planish.runtime.kernels.linker import compiler
from planish.runtime.kernels.template import import_tvm

#: Machine code is made for these, and PTX for what comes later.
ARCHITECTURES, PTX = ("sm_75", "sm_80", "sm_90"), "compute_80"
#: Tiles that attention has on their way on Hopper: decides about its shared memory, which the caller asks for.
AHEAD = 2
_NATIVE = Path(__file__).parent / "native"
#: How kernels are launched, for whatever launches them.
_LAUNCHES = Path(toolchain.__file__).parent / "native"
_CALLBACK = "tvm_callback_cuda_compile"
_lock = threading.Lock()


#: The first architecture with bfloat16.
_BFLOAT16 = 80


def _number(arch: str) -> int:
    return int("".join(c for c in arch if c.isdigit()))


@dataclass(frozen=True)
class Codes:
    """For what GPUs machine code is made.

    Attributes:
        architectures: such as ``"sm_80"``.
        ptx: the virtual architecture of the PTX beside it.
    """

    architectures: tuple[str, ...] = ARCHITECTURES
    ptx: str = PTX

    @classmethod
    def of(cls, arch: str | None) -> Codes:
        """All that are made by default, or one architecture and its PTX."""
        return cls() if arch is None else cls((arch,), arch.rstrip("af").replace("sm_", "compute_"))

    def with_bfloat16(self) -> Codes:
        """Without architectures that have no bfloat16.

        Raises:
            UnsupportedError: none is left.
        """
        left = tuple(arch for arch in self.architectures if _number(arch) >= _BFLOAT16)
        if not left:
            raise UnsupportedError(
                f"target tvm-cuda:{self.architectures[0]}: bfloat16 takes sm_{_BFLOAT16} or later; use float16."
            )
        return Codes(left, self.ptx)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.architectures, self.ptx)

    def fatbin(self, source: str, folder: Path, **defines: int) -> bytes:
        return toolchain.fatbin(source, defines, architectures=self.architectures, ptx=self.ptx, folder=folder)


@contextmanager
def assembling(codes: Codes) -> Iterator[None]:
    """Within it, TVM's CUDA code becomes fat binaries; one thread at a time.

    Raises:
        UnsupportedError: there is no nvcc, or the CUDA part of TVM's runtime does not load.
    """
    import tvm_ffi

    tvm = import_tvm()

    def assemble(code: str, *_: Any) -> bytes:
        with tempfile.TemporaryDirectory(prefix="planish-cuda-") as scratch:
            (Path(scratch) / "generated.cu").write_text(code)
            return codes.fatbin("generated.cu", Path(scratch))

    if toolchain.nvcc() is None:
        raise UnsupportedError(
            "target tvm-cuda needs nvcc to compile, and there is none: set CUDA_HOME, or pip install 'planish[cuda]'."
        )
    with _lock:
        load_runtime(stand_in=True)
        before = tvm.get_global_func(_CALLBACK, allow_missing=True)
        tvm_ffi.register_global_func(_CALLBACK, assemble, override=True)
        try:
            yield
        finally:
            if before is not None:
                tvm_ffi.register_global_func(_CALLBACK, before, override=True)


@dataclass(frozen=True, order=True)
class Code:
    """A source of ours, compiled for a size and a form, as the packed functions of a family look for it.

    Attributes:
        family: the C file in ``native/`` that launches it.
        number: of the source in that file.
        size, form: what a call asks for.
        source: the file in ``runtime/cuda/source``.
        defines: macros, sorted by name.
    """

    family: str
    number: int
    size: int
    form: int
    source: str
    defines: tuple[tuple[str, int], ...]


def native_objects(folder: Path, codes: Codes, calls: set[str], ours: set[Code]) -> list[Path]:
    """Compiles the packed functions that a program calls, with the kernels that they launch inside.

    Raises:
        UnsupportedError: there is no C compiler, or no nvcc.
    """
    made = []
    if calls & {"planish_linear", "planish_batched"}:
        made.append(_compile("products", folder))
    lines: dict[str, list[str]] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        binaries = list(pool.map(lambda code: _binary(codes, code), sorted(ours)))
    for number, code in enumerate(sorted(ours)):
        (folder / f"code{number}.fatbin").write_bytes(binaries[number])
        line = f"BINARY({number}, {code.number}, {code.size}, {code.form})\n"
        lines.setdefault(code.family, []).append(line)
    for family, own in lines.items():
        (folder / f"{family}_binaries.h").write_text("".join(own))
        made.append(_compile(family, folder))
    return made


def _binary(codes: Codes, code: Code) -> bytes:
    bfloat16 = bool(dict(code.defines).get("ELEMENT_BF16"))  # which has fewer architectures by itself
    if codes == (Codes().with_bfloat16() if bfloat16 else Codes()):
        return binary(code.source, code.defines)  # which may be in the cache
    # Hopper's own instructions are in the code for sm_90a alone.
    architectures = tuple("sm_90a" if arch == "sm_90" else arch for arch in codes.architectures)
    return toolchain.fatbin(code.source, dict(code.defines), architectures=architectures, ptx=codes.ptx)


def _compile(name: str, folder: Path) -> Path:
    from tvm_ffi import libinfo

    includes = [folder, _NATIVE, _LAUNCHES, libinfo.find_include_path(), libinfo.find_dlpack_include_path()]
    output = folder / f"{name}.o"
    flags = ["-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", *(f"-I{path}" for path in includes)]
    flags.append(f"-DAHEAD={AHEAD}")
    assembler = f"-Wa,-I{folder}"  # where it finds the binaries
    run([*compiler(), *flags, assembler, "-c", str(_NATIVE / f"{name}.c"), "-o", str(output)])
    return output
