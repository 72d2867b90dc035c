"""Writing a folder, or a file, so that it is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from planish.ir.errors import InputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def whole_folder(target: Path, replace: bool) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place at the end, or vanishes if anything is raised.

    Args:
        target: does not exist, or is an empty folder; with `replace`, a folder that the new one takes over from.

    Raises:
        InputError: the parent does not exist, can not be written, or the disk is full.
    """
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        yield temporary
        _sync(temporary)
        os.chmod(temporary, 0o777 & ~_umask())
        _publish(temporary, target, replace)
    except OSError as error:
        raise write_error(error, target) from error
    finally:
        # After a swap this is the old folder; after a rename it is nothing.
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside `target` that takes its place at the end, or vanishes if anything is raised.

    Raises:
        InputError: the folder does not exist, can not be written, or the disk is full.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = file.name
            yield file
        os.chmod(temporary, 0o666 & ~_umask())  # temporary files are for their owner only
        os.replace(temporary, target)
    except OSError as error:
        raise write_error(error, target) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):  # it was renamed
                os.unlink(temporary)


def write_error(error: OSError, target: Path) -> InputError:
    """The one line for a failure to write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"can not write '{target}': the disk is full. Nothing was left behind; free some space.")
    return InputError(f"can not write '{target}': {error.strerror or error}. Nothing was left behind.")


def require_space(target: Path, nbytes: int) -> None:
    """Raises InputError if the disk of `target` has less than `nbytes` free."""
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise InputError(
            f"can not write '{target}': needs {nbytes / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} MiB left."
        )


def _publish(temporary: Path, target: Path, replace: bool) -> None:
    if replace and target.exists() and not _exchange(temporary, target):
        # Without an atomic exchange: there is a moment without a target, and the old one comes back on failure.
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    elif not replace or not target.exists():
        os.rename(temporary, target)  # onto an empty folder too; onto anything else it fails
    _sync_folder(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one step (Linux renameat2); False where that is not possible."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return bool(rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


def _sync(folder: Path) -> None:
    """Hands the files to the disk, so that a power cut after the rename does not leave an empty artifact."""
    for path in sorted(folder.rglob("*")):
        if stat.S_ISREG(path.lstat().st_mode):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Windows has no such thing
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
