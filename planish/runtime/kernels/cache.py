"""Compiled templates kept on disk, since compiling one takes seconds: ``$PLANISH_CACHE``, or a folder of the user's.

An object is kept under a hash of everything that it is made from: the template, the processor's level, TVM's version,
and the source of this package. What is loaded from here is native code, so the folder must be the user's own and
nobody else's to write; where it is not, or can not be, nothing is kept.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from planish.runtime.kernels.template import Template, import_tvm

#: The environment variable that names the folder; empty: nothing is kept.
VARIABLE = "PLANISH_CACHE"


def cached(template: Template, make: Callable[[Path], None], path: Path) -> None:
    """Puts the object of `template` at `path`: a copy of the one that is kept, or what `make` writes there."""
    folder = cache_folder()
    kept = None if folder is None else folder / f"{template.symbol}-{_key(template)}.o"
    if kept is not None and kept.is_file() and not kept.is_symlink():
        shutil.copyfile(kept, path)
        return
    make(path)
    if kept is None:
        return
    try:
        handle, name = tempfile.mkstemp(dir=kept.parent, prefix=".new-")
        os.close(handle)
        shutil.copyfile(path, name)
        os.replace(name, kept)
    except OSError:
        pass  # a full disk: it is compiled again next time


def cache_folder() -> Path | None:
    """The folder, made if need be; None if objects are not to be kept, or if others could write there."""
    chosen = os.environ.get(VARIABLE)
    if chosen == "":
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(chosen) if chosen else base / "planish" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    alone = not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if alone and found.st_uid == os.getuid() else None


def _key(template: Template) -> str:
    made_from = repr((template, template.cpu(), import_tvm().__version__, _sources()))
    return hashlib.sha256(made_from.encode()).hexdigest()[:32]


@functools.cache
def _sources() -> str:
    """A hash of the modules that templates are in."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
