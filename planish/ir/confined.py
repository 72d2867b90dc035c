"""Files that a model or an artifact names: opened so that nothing outside its folder can be read or written.

A name found in a file is data from a stranger. Every name goes through :func:`parse_location` (no absolute
paths, no ``..``, no drive letters) and is opened component by component relative to an open folder without
following links, and what was opened, not what was named, is checked: a regular file with one hard link.
Imports no onnx_ir: artifacts load through here, and quickly.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat

from planish.ir.errors import InputError, UnsafeModelError, did_you_mean

MAX_LOCATION = 1024  #: longest relative path accepted, in characters
_DIR_FD = os.open in os.supports_dir_fd
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)
_READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
# Without O_NONBLOCK, opening a fifo would wait for a writer that never comes.
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?$", re.IGNORECASE)
_LINKS = (errno.ELOOP, getattr(errno, "EMLINK", -1), getattr(errno, "EFTYPE", -1))


def parse_location(location: str | os.PathLike[str]) -> tuple[str, ...]:
    """Splits a relative path as found in a model or manifest into its components.

    Raises:
        UnsafeModelError: empty, absolute, with ``..``, a drive letter, a backslash, a NUL byte, or too long.
    """
    text = os.fspath(location)
    shown = repr(text if len(text) <= 80 else text[:77] + "...")
    if not text:
        raise UnsafeModelError("external data has an empty location; it must name a file in the model's folder.")
    if len(text) > MAX_LOCATION:
        raise UnsafeModelError(f"external data location {shown} has {len(text)} characters; limit {MAX_LOCATION}.")
    if any(ord(c) < 32 or 0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise UnsafeModelError(f"external data location {shown} holds a control character.")
    if "\\" in text or re.match(r"[A-Za-z]:", text):
        raise UnsafeModelError(f"external data location {shown} is a Windows path; use a relative path with '/'.")
    if text.startswith(("/", "~")):
        raise UnsafeModelError(f"external data location {shown} is an absolute path; only files in the model's folder.")
    parts = tuple(p for p in text.split("/") if p not in ("", "."))
    if ".." in parts:
        raise UnsafeModelError(f"external data location {shown} leaves the model's folder by '..'; refused.")
    if not parts or text.endswith("/"):
        raise UnsafeModelError(f"external data location {shown} names a folder, not a file.")
    if any(_RESERVED.match(p) or ":" in p for p in parts):
        raise UnsafeModelError(f"external data location {shown} names a device or a stream; refused.")
    return parts


class ConfinedFile:
    """A regular file inside a folder, opened for reading and checked; close it, or use it as a context manager.

    Attributes:
        path: where it was opened, for messages.
        size: size in bytes when it was opened.
    """

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self.path = path
        self.size = os.fstat(fd).st_size
        self._map: mmap.mmap | None = None

    def fileno(self) -> int:
        return self._fd

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Reads `length` bytes at `offset` (to the end without a length).

        Raises:
            InputError: the range is not inside the file.
        """
        length = self.size - offset if length is None else length
        self.check_range(offset, length)
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` (of bytes) from `offset`."""
        done = 0
        os.lseek(self._fd, offset, os.SEEK_SET)
        with os.fdopen(os.dup(self._fd), "rb", buffering=0) as raw:
            while done < len(buffer):
                count = raw.readinto(buffer[done:])
                if not count:
                    raise InputError(f"'{self.path}' became shorter while it was read.")
                done += count

    def check_range(self, offset: int, length: int) -> None:
        """Raises InputError unless bytes `offset` to `offset + length` exist."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise InputError(
                f"'{self.path}' has {self.size} bytes; bytes {offset} to {offset + length} are needed. It is truncated "
                "or belongs to another model."
            )

    def map(self) -> mmap.mmap:
        """A read-only memory map of the whole file, made once; it lives on after `close`."""
        if self._map is None:
            self._map = mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
        return self._map

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> ConfinedFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def open_confined(base_dir: str | os.PathLike[str], relative_path: str | os.PathLike[str]) -> ConfinedFile:
    """Opens a file named by a model or a manifest for reading.

    `base_dir` is the caller's own folder and may itself be reached through a link; nothing below it may.

    Raises:
        UnsafeModelError: the name is not a plain relative path, or what it names is a link, has several hard
            links, or is not a regular file.
        InputError: the file or folder does not exist or can not be read.
    """
    parts = parse_location(relative_path)
    base = _base(base_dir)
    shown = os.path.join(base, *parts)
    try:
        fd = _open_at(base, parts) if _DIR_FD else _open_portable(base, parts)
    except OSError as error:
        raise _explain(error, base, parts) from None
    try:
        _check_regular(os.fstat(fd), shown)
        return ConfinedFile(fd, shown)
    except BaseException:
        os.close(fd)
        raise


def resolve(
    base_dir: str | os.PathLike[str], location: str | os.PathLike[str], offset: int = 0, length: int | None = None
) -> str:
    """Checks that a range of a file inside `base_dir` can be read safely, and returns the file's path.

    The path is for messages and for readers that check again; to read, prefer :func:`open_confined`, which
    leaves no time between the check and the use.
    """
    with open_confined(base_dir, location) as file:
        file.check_range(offset, file.size - offset if length is None else length)
        return file.path


def checked_write_path(base_dir: str | os.PathLike[str], location: str | os.PathLike[str]) -> str:
    """The path to write to inside `base_dir`: never outside it, never through a link, never onto a special file.

    The folders on the way must exist.
    """
    parts = parse_location(location)
    base = _base(base_dir)
    path = base
    for index, part in enumerate(parts):
        path = os.path.join(path, part)
        last = index == len(parts) - 1
        try:
            info = os.lstat(path)
        except FileNotFoundError:
            if last:
                return path
            raise InputError(f"can not write '{os.path.join(base, *parts)}': folder '{path}' does not exist.") from None
        except OSError as error:
            raise InputError(f"can not write '{path}': {error.strerror}.") from None
        if stat.S_ISLNK(info.st_mode):
            raise UnsafeModelError(f"can not write through the symbolic link '{path}'; remove it or name another file.")
        if last:
            _check_regular(info, path)
        elif not stat.S_ISDIR(info.st_mode):
            raise InputError(f"can not write '{os.path.join(base, *parts)}': '{path}' is not a folder.")
    return path


def _base(base_dir: str | os.PathLike[str]) -> str:
    base = os.fspath(base_dir)
    if not base:
        # An empty base would silently mean the current folder, and every containment check against it is a no-op.
        raise UnsafeModelError("external data has no base folder; give the folder of the model file.")
    return os.path.abspath(base)


def _open_at(base: str, parts: tuple[str, ...]) -> int:
    folder = os.open(base, _READ | _DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, _READ | _DIRECTORY | _NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(parts[-1], _READ | _NOFOLLOW | _NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)


def _open_portable(base: str, parts: tuple[str, ...]) -> int:
    # Where there is no openat: look at each component, open, and compare what was opened with what was looked at.
    path = base
    for part in parts:
        path = os.path.join(path, part)
        info = os.lstat(path)
        if stat.S_ISLNK(info.st_mode):
            raise OSError(errno.ELOOP, "symbolic link", path)
    fd = os.open(path, _READ | _NONBLOCK)
    opened = os.fstat(fd)
    if (opened.st_dev, opened.st_ino) != (info.st_dev, info.st_ino):
        os.close(fd)
        raise OSError(errno.ELOOP, "changed while it was opened", path)
    return fd


def _check_regular(info: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(info.st_mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
        raise UnsafeModelError(f"'{path}' is {kinds.get(stat.S_IFMT(info.st_mode), 'a device')}, not a regular file.")
    if info.st_nlink > 1:
        raise UnsafeModelError(
            f"'{path}' has {info.st_nlink} hard links, so it may be a file from outside the model's folder; copy it."
        )


def _explain(error: OSError, base: str, parts: tuple[str, ...]) -> InputError:
    shown = os.path.join(base, *parts)
    path = base
    for part in parts:
        path = os.path.join(path, part)
        if os.path.islink(path):
            return UnsafeModelError(f"'{path}' is a symbolic link, which is refused; copy the real file there.")
    if error.errno in _LINKS:
        return UnsafeModelError(f"'{shown}' is reached through a symbolic link; links are refused.")
    if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):
        return UnsafeModelError(f"'{shown}' is a socket or a device, not a regular file.")
    if isinstance(error, FileNotFoundError):
        folder = os.path.dirname(shown)
        near = os.listdir(folder) if os.path.isdir(folder) else []
        return InputError(f"'{shown}' does not exist; the model needs it.{did_you_mean(parts[-1], near)}")
    return InputError(f"can not read '{shown}': {error.strerror}.")
