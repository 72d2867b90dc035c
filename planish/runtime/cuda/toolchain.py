"""nvcc: found, and asked for a binary that holds machine code of several architectures and PTX for later ones.

It is needed where kernels are compiled only, and no GPU is: ``pip install 'planish[cuda]'`` brings it as packages.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from planish.ir.errors import UnsupportedError

#: Machine code is made for these; a GPU runs that of its own generation, of the same or a lower minor version.
ARCHITECTURES = ("sm_75", "sm_80", "sm_90a")
#: Others translate this when the kernel is loaded.
PTX = "compute_80"
_SOURCE = Path(__file__).parent / "source"


@functools.cache
def nvcc() -> Path | None:
    """The compiler: that of ``$CUDA_HOME``, on the PATH, or of the package nvidia-cuda-nvcc; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    if found := shutil.which("nvcc"):
        places.append(Path(found))
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        places += sorted(Path(folder).glob("cu1*/bin/nvcc"), reverse=True)
    return next((place for place in places if os.access(place, os.X_OK)), None)


def fatbin(
    source: str,
    defines: Mapping[str, int | str] | None = None,
    *,
    architectures: tuple[str, ...] = ARCHITECTURES,
    ptx: str | None = PTX,
    folder: Path = _SOURCE,
) -> bytes:
    """A fat binary of `source`, the name of a file in `folder`.

    Args:
        defines: macros, which choose dtype, sizes and schedule.
        architectures: such as ``"sm_90a"``; machine code for each.
        ptx: the virtual architecture whose PTX is put in too, or None.

    Raises:
        UnsupportedError: there is no nvcc, or it refuses the source; the message has its first error.
    """
    compiler = nvcc()
    if compiler is None:
        raise UnsupportedError(
            "CUDA kernels are compiled by nvcc, and there is none: set CUDA_HOME, or pip install 'planish[cuda]'."
        )
    flags = ["-std=c++17", "-O3", *(f"-D{name}={value}" for name, value in sorted((defines or {}).items()))]
    codes = [(arch.replace("sm_", "compute_"), arch) for arch in architectures]
    if ptx is not None:
        codes.append((ptx, ptx))
    for virtual, real in codes:
        flags += ["-gencode", f"arch={virtual},code={real}"]
    with tempfile.TemporaryDirectory(prefix="planish-nvcc-") as scratch:
        made = Path(scratch) / "kernel.fatbin"
        command = [str(compiler), "-fatbin", "-o", str(made), *flags, str(folder / source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            first = next((line for line in said if "error" in line), said[0] if said else "no message")
            raise UnsupportedError(f"nvcc refuses {source} for {', '.join(architectures)}: {first}")
        return made.read_bytes()


def fingerprint() -> str:
    """A hash of all kernel sources and of the compiler's place and size, for caches of what is compiled."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCE.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    if (compiler := nvcc()) is not None:
        digest.update(f"{compiler} {compiler.stat().st_size}".encode())
    return digest.hexdigest()
