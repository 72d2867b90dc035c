"""Flush-to-zero for the calling thread.

ONNX Runtime applies ``session.set_denormal_as_zero`` to its worker threads, and to the thread that calls ``run``
only if that thread made the first session of the process; there it then stays on, for NumPy too. Here the mode is
set around each run and restored, so that it holds whoever made the first session and leaks to nobody.

The floating-point environment is read and written through the C library's ``fegetenv`` and ``fesetenv``: the
control word lies at byte 28 of ``fenv_t`` on x86-64 glibc (MXCSR: FTZ 0x8000, DAZ 0x0040) and at byte 0 on
AArch64 glibc (FPCR: FZ 0x01000000). Elsewhere :data:`SUPPORTED` is False and nothing is done.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

_LAYOUT = {"x86_64": (7, 0x8040), "aarch64": (0, 0x01000000)}


def _functions() -> tuple[Callable[[int], int], Callable[[int], int]] | None:
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or platform.machine() not in _LAYOUT:
        return None
    try:
        # PyDLL keeps the interpreter lock: releasing it costs more than the two instructions behind the call.
        library = ctypes.PyDLL("libm.so.6")
        get, put = library.fegetenv, library.fesetenv
    except (OSError, AttributeError):
        return None
    get.argtypes = put.argtypes = [ctypes.c_void_p]
    return get, put


_FUNCTIONS = _functions()
_WORD, _BITS = _LAYOUT.get(platform.machine(), (0, 0))
SUPPORTED = _FUNCTIONS is not None


class _State(threading.local):
    """Per thread: room for the caller's environment, and an environment with the bits set."""

    def __init__(self) -> None:
        self.saved = (ctypes.c_uint32 * 16)()
        self.flushed = (ctypes.c_uint32 * 16)()
        self.saved_at = ctypes.addressof(self.saved)
        self.flushed_at = ctypes.addressof(self.flushed)
        self.depth = 0
        if _FUNCTIONS is not None:
            _FUNCTIONS[0](self.flushed_at)
            self.flushed[_WORD] |= _BITS


_state = _State()


def begin() -> None:
    """From here on this thread treats denormal numbers as zero, until the matching :func:`end`; may be nested."""
    if _FUNCTIONS is None:
        return
    state = _state
    state.depth += 1
    if state.depth == 1:
        get, put = _FUNCTIONS
        get(state.saved_at)
        put(state.flushed_at)


def end() -> None:
    """Restores what held before the matching :func:`begin`."""
    if _FUNCTIONS is None:
        return
    state = _state
    state.depth -= 1
    if state.depth == 0:
        _FUNCTIONS[1](state.saved_at)


class KeepEnvironment:
    """Context that restores this thread's floating-point environment, whatever is done to it inside."""

    def __enter__(self) -> None:
        self._saved: Any = None
        if _FUNCTIONS is not None:
            self._saved = (ctypes.c_uint32 * 16)()
            _FUNCTIONS[0](ctypes.addressof(self._saved))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _FUNCTIONS is not None:
            _FUNCTIONS[1](ctypes.addressof(self._saved))


def is_flushing() -> bool:
    """Whether this thread treats denormal numbers as zero now."""
    import numpy as np

    return float((np.full(4, 1e-39, np.float32) * np.float32(1)).sum()) == 0.0
