"""Finds a C compiler, which turns kernels and their glue into a shared library. Needed to optimize, never to load."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from planish.ir.errors import InputError, PlanishError, UnsupportedError

_NAMES = ("cc", "gcc", "clang")
_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-s,-Bsymbolic")
_SECONDS = 120
_ERROR = re.compile(r"\berror:|undefined (reference|symbol)")


def compiler(chosen: str | None = None) -> tuple[str, ...]:
    """The command of a C compiler: `chosen`, else ``$CC``, ``cc``, ``gcc``, ``clang``, or that of the package ziglang.

    Raises:
        InputError: ``$CC`` names nothing that can be run.
        UnsupportedError: there is none; the message says what to install.
    """
    chosen = (chosen or os.environ.get("CC", "")).strip()
    if chosen:
        try:
            command = shlex.split(chosen) or [chosen]
        except ValueError:  # a quote is missing
            command = [chosen]
        if not shutil.which(command[0]):
            raise InputError(f"CC is '{chosen}', which is not a command; unset it, or name a C compiler.")
        return tuple(command)
    for name in _NAMES:
        if found := shutil.which(name):
            return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "cc")
    raise UnsupportedError(
        "generated kernels need a C compiler to link them, and none was found (cc, gcc, clang): install one, or "
        "pip install 'planish[native]', which brings a compiler as the package ziglang. Or leave 'kernels' out of the "
        "target."
    )


def link(
    sources: Sequence[Path], objects: Sequence[Path], output: Path, includes: Sequence[Path], defines: Sequence[str]
) -> None:
    """Compiles C files and links them with object files to the shared library `output`.

    Raises:
        PlanishError: the compiler failed; the message has its first error.
    """
    command = [
        *compiler(),
        *_FLAGS,
        *(f"-I{folder}" for folder in includes),
        *(f"-D{name}" for name in defines),
        *map(str, sources),
        *map(str, objects),
        "-o",
        str(output),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PlanishError(f"linking kernels failed: {error}.") from error
    if done.returncode:
        lines = done.stderr.splitlines()
        lines = [line for line in lines if _ERROR.search(line)] or lines
        raise PlanishError(f"linking kernels with {command[0]} failed: {(lines or ['no message'])[0].strip()}")
    if not output.is_file():
        raise PlanishError(f"linking kernels with {command[0]} failed: it wrote no library.")
