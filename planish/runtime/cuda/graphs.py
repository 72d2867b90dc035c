"""Streams, copies between host and GPU, and CUDA graphs, through the driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from planish.runtime.cuda import driver

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_DEVICE = 2  # CU_MEMORYTYPE_DEVICE


class Stream:
    """A stream of a GPU, which does not wait for the default one; made in the context that torch and TVM use."""

    def __init__(self, index: int = 0) -> None:
        driver.enter(index)
        self._handle = ctypes.c_void_p()
        driver.check(driver.library().cuStreamCreate(ctypes.byref(self._handle), _NON_BLOCKING), "making a stream")

    @property
    def address(self) -> int:
        return int(self._handle.value or 0)

    def wait(self) -> None:
        driver.check(driver.library().cuStreamSynchronize(self._handle), "waiting for the GPU")

    def to_device(self, address: int, array: np.ndarray) -> None:
        """Copies a contiguous array; it may be changed after this."""
        code = driver.library().cuMemcpyHtoDAsync_v2(
            ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), self._handle
        )
        driver.check(code, f"copying {array.nbytes} bytes to the GPU")

    def to_host(self, array: np.ndarray, address: int) -> None:
        """Copies into a contiguous array, and waits for it."""
        code = driver.library().cuMemcpyDtoHAsync_v2(
            ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes), self._handle
        )
        driver.check(code, f"copying {array.nbytes} bytes from the GPU")
        self.wait()

    def copy_rows(self, to: int, to_pitch: int, origin: int, pitch: int, width: int, rows: int) -> None:
        """Copies `rows` times `width` bytes within the GPU, between rows that begin a pitch apart."""
        settings = _Copy2D(
            source_kind=_DEVICE, source=origin, source_pitch=pitch,
            target_kind=_DEVICE, target=to, target_pitch=to_pitch, width=width, height=rows,
        )  # fmt: skip
        code = driver.library().cuMemcpy2DAsync_v2(ctypes.byref(settings), self._handle)
        driver.check(code, f"copying {rows} rows of {width} bytes")

    def clear(self, address: int, size: int) -> None:
        code = driver.library().cuMemsetD8Async(
            ctypes.c_uint64(address), ctypes.c_ubyte(0), ctypes.c_size_t(size), self._handle
        )
        driver.check(code, f"clearing {size} bytes")

    def capture(self, work: Callable[[], Any]) -> tuple[Graph, Any]:
        """What `work` puts on this stream as a graph, which is not run; and what it returns.

        `work` must have been done before with the same shapes, so that nothing is loaded and no memory is asked of the
        driver in it; the memory that it uses must stay as long as the graph.
        """
        library = driver.library()
        driver.check(library.cuStreamBeginCapture_v2(self._handle, _RELAXED), "starting a CUDA graph")
        made = ctypes.c_void_p()
        try:
            result = work()
        finally:
            code = library.cuStreamEndCapture(self._handle, ctypes.byref(made))
        driver.check(code, "making a CUDA graph")
        return Graph(made), result

    def close(self) -> None:
        """Gives the stream back, when what is on it has run."""
        if self._handle.value:
            driver.library().cuStreamSynchronize(self._handle)
            driver.library().cuStreamDestroy_v2(self._handle)
            self._handle = ctypes.c_void_p()


class Graph:
    """A CUDA graph that can be run."""

    def __init__(self, graph: ctypes.c_void_p) -> None:
        library = driver.library()
        self._executable = ctypes.c_void_p()
        code = library.cuGraphInstantiateWithFlags(ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        library.cuGraphDestroy(graph)
        driver.check(code, "instantiating a CUDA graph")

    def launch(self, stream: Stream) -> None:
        code = driver.library().cuGraphLaunch(self._executable, ctypes.c_void_p(stream.address))
        driver.check(code, "running a CUDA graph")

    def close(self) -> None:
        if self._executable.value:
            driver.library().cuGraphExecDestroy(self._executable)
            self._executable = ctypes.c_void_p()


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [
        ("source_x", ctypes.c_size_t),
        ("source_y", ctypes.c_size_t),
        ("source_kind", ctypes.c_uint),
        ("source_host", ctypes.c_void_p),
        ("source", ctypes.c_uint64),
        ("source_array", ctypes.c_void_p),
        ("source_pitch", ctypes.c_size_t),
        ("target_x", ctypes.c_size_t),
        ("target_y", ctypes.c_size_t),
        ("target_kind", ctypes.c_uint),
        ("target_host", ctypes.c_void_p),
        ("target", ctypes.c_uint64),
        ("target_array", ctypes.c_void_p),
        ("target_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    ]
