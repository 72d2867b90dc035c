"""Folders for what a process builds and loads: there as long as it runs."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path


@functools.cache
def process_folder(prefix: str) -> Path:
    """One folder for each prefix, removed when this process ends, but not by those that were forked from it."""
    folder, owner = Path(tempfile.mkdtemp(prefix=prefix)), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
