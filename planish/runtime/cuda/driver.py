"""The CUDA driver, through ctypes: modules, functions and launches. Loading this module loads no driver."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from planish.ir.errors import InputError, UnsupportedError

# CUfunction_attribute, CUdevice_attribute
_MAX_DYNAMIC_SHARED = 8
_MAJOR, _MINOR, _PROCESSORS, _SHARED_OPTIN = 75, 76, 16, 97
_CLUSTER_DIMENSION, _PROGRAMMATIC_SERIALIZATION = 4, 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: its value is 64 bytes, 8 behind the start."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((f"{part}_{axis}", ctypes.c_uint) for part in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The driver's library, initialized.

    Raises:
        UnsupportedError: the machine has no NVIDIA driver, or the driver has no GPU.
    """
    for name in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        raise UnsupportedError("this machine has no NVIDIA driver (libcuda is not found).")
    driver.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    if code := driver.cuInit(0):
        raise UnsupportedError(f"the NVIDIA driver does not start: {_message(driver, code)}.")
    return driver


def available() -> bool:
    """Whether there is a driver with a GPU."""
    try:
        count = ctypes.c_int()
        check(library().cuDeviceGetCount(ctypes.byref(count)), "counting the GPUs")
    except UnsupportedError:
        return False
    return count.value > 0


def _message(driver: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {code}"


def check(code: int, doing: str) -> None:
    """Raises UnsupportedError if the driver answers an error, with what it says."""
    if code:
        raise UnsupportedError(f"{doing}: the CUDA driver says '{_message(library(), code)}' (error {code}).")


@dataclass(frozen=True)
class Device:
    """What kernels are chosen by.

    Attributes:
        arch: 10 · major + minor of the compute capability.
        processors: streaming multiprocessors.
        shared: bytes of shared memory that one block may ask for.
    """

    arch: int
    processors: int
    shared: int


@functools.cache
def device(index: int = 0) -> Device:
    """The properties of a GPU.

    Raises:
        UnsupportedError: there is no such GPU.
    """
    handle = ctypes.c_int()
    check(library().cuDeviceGet(ctypes.byref(handle), index), f"GPU {index}")

    def attribute(name: int) -> int:
        value = ctypes.c_int()
        check(library().cuDeviceGetAttribute(ctypes.byref(value), name, handle), f"properties of GPU {index}")
        return value.value

    return Device(10 * attribute(_MAJOR) + attribute(_MINOR), attribute(_PROCESSORS), attribute(_SHARED_OPTIN))


@functools.cache
def _primary(index: int) -> ctypes.c_void_p:
    """The context that torch, and the CUDA runtime, use on a GPU."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    check(library().cuDeviceGet(ctypes.byref(handle), index), f"GPU {index}")
    check(library().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"the context of GPU {index}")
    return context


def enter(index: int) -> None:
    """Makes a context current in a thread that has none yet, such as those of torch's backward passes."""
    context = ctypes.c_void_p()
    check(library().cuCtxGetCurrent(ctypes.byref(context)), "asking for the context")
    if not context.value:
        check(library().cuCtxSetCurrent(_primary(index)), f"entering the context of GPU {index}")


@contextlib.contextmanager
def current(index: int) -> Iterator[None]:
    """The context of a GPU for a while, whichever this thread has otherwise."""
    check(library().cuCtxPushCurrent_v2(_primary(index)), f"entering the context of GPU {index}")
    try:
        yield
    finally:
        library().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


class Module:
    """Loaded kernels, in the context that is current when this is made (torch makes that of its device current)."""

    def __init__(self, code: bytes) -> None:
        self._code = code  # the driver reads it while it loads
        self._handle = ctypes.c_void_p()
        check(library().cuModuleLoadData(ctypes.byref(self._handle), code), "loading a kernel")

    def function(self, name: str, shared: int = 0) -> Function:
        """A kernel that asks for `shared` bytes of dynamic shared memory."""
        handle = ctypes.c_void_p()
        check(library().cuModuleGetFunction(ctypes.byref(handle), self._handle, name.encode()), f"kernel '{name}'")
        if shared > 48 << 10:
            doing = f"{shared} bytes of shared memory for kernel '{name}'"
            check(library().cuFuncSetAttribute(handle, _MAX_DYNAMIC_SHARED, shared), doing)
        return Function(self, handle, name, shared)


@dataclass(frozen=True)
class Function:
    """A kernel, to be launched."""

    module: Module
    handle: ctypes.c_void_p
    name: str
    shared: int

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        stream: int,
        *arguments: Any,
        cluster: int = 1,
        early: bool = False,
    ) -> None:
        """Starts the kernel on a stream (its address; 0: the default one).

        Args:
            arguments: ctypes values or structures, as the kernel has them.
            cluster: blocks, neighbours along the grid's first axis, that run at once and can wait for each other; more
                than 1 from Hopper on.
            early: the kernel waits by itself for what is in front of it on the stream (griddepcontrol, on Hopper),
                and may start before that is over.

        Raises:
            InputError: the grid is outside of what GPUs have.
            UnsupportedError: what the driver refuses.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(item) for item in arguments))
        self.launch_prepared(grid, threads, stream, pointers, cluster, early)

    def launch_prepared(
        self,
        grid: tuple[int, int, int],
        threads: int,
        stream: int,
        pointers: ctypes.Array[ctypes.c_void_p],
        cluster: int = 1,
        early: bool = False,
    ) -> None:
        """As :meth:`launch`, with the addresses of the arguments."""
        if not (0 < grid[0] < 1 << 31 and 0 < grid[1] < 1 << 16 and 0 < grid[2] < 1 << 16):
            raise InputError(
                f"kernel '{self.name}': a grid of {grid} blocks; the limits are 2^31 - 1, 65535 and 65535."
            )
        if cluster > 1 or early:
            kind = _CLUSTER_DIMENSION if cluster > 1 else _PROGRAMMATIC_SERIALIZATION
            attribute = _Attribute(kind, 0, (ctypes.c_uint * 16)(cluster, 1, 1))
            settings = _Launch(*grid, threads, 1, 1, self.shared, stream, ctypes.pointer(attribute), 1)
            code = library().cuLaunchKernelEx(ctypes.byref(settings), self.handle, pointers, None)
        else:
            code = library().cuLaunchKernel(
                self.handle, *grid, threads, 1, 1, self.shared, ctypes.c_void_p(stream), pointers, None
            )
        check(code, f"launching kernel '{self.name}'")


def clear(address: int, size: int, stream: int) -> None:
    """Zeros over `size` bytes, a multiple of 4."""
    code = library().cuMemsetD32Async(
        ctypes.c_uint64(address), ctypes.c_uint(0), ctypes.c_size_t(size // 4), ctypes.c_void_p(stream)
    )
    check(code, f"clearing {size} bytes")


def copy(to: int, origin: int, size: int, stream: int) -> None:
    """Copies `size` bytes within a GPU."""
    code = library().cuMemcpyDtoDAsync_v2(
        ctypes.c_uint64(to), ctypes.c_uint64(origin), ctypes.c_size_t(size), ctypes.c_void_p(stream)
    )
    check(code, f"copying {size} bytes")


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of the driver's API."""

    _fields_ = [
        (f"{end}{name}", kind)
        for end in ("src", "dst")
        for name, kind in (
            ("XInBytes", ctypes.c_size_t), ("Y", ctypes.c_size_t), ("MemoryType", ctypes.c_int),
            ("Host", ctypes.c_void_p), ("Device", ctypes.c_uint64), ("Array", ctypes.c_void_p),
            ("Pitch", ctypes.c_size_t),
        )
    ] + [("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t)]  # fmt: skip


def copy_rows(to: int, to_pitch: int, origin: int, pitch: int, width: int, count: int, stream: int) -> None:
    """Copies `count` rows of `width` bytes within a GPU, from rows that are `pitch` bytes apart to `to_pitch`."""
    on_device = 2  # CU_MEMORYTYPE_DEVICE
    made = _Copy2D(0, 0, on_device, None, origin, None, pitch, 0, 0, on_device, None, to, None, to_pitch, width, count)
    code = library().cuMemcpy2DAsync_v2(ctypes.byref(made), ctypes.c_void_p(stream))
    check(code, f"copying {count} rows of {width} bytes")


def tensor_map(address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> TensorMap:
    """The description of a tensor of 16-bit elements, for Hopper's copies of boxes with the 128-byte swizzle.

    Args:
        sizes: innermost first; strides: of all but the innermost, in bytes, multiples of 16.
        box: elements of a copy by axis.
    """
    rank = len(sizes)
    made = TensorMap()
    aligned = ctypes.addressof(made) + -ctypes.addressof(made) % 64
    code = library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned), 6, rank, ctypes.c_void_p(address),  # 6: float16, and any other 16 bits
        (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*(1,) * rank),
        0, 3, 2, 0,  # not interleaved, 128-byte swizzle, L2 sectors of 128 bytes, zeros outside
    )  # fmt: skip
    check(code, f"describing a tensor of sizes {sizes}")
    return TensorMap.from_buffer_copy(ctypes.string_at(aligned, 128) + bytes(64))


class TensorMap(ctypes.Structure):
    """A CUtensorMap in its first 128 bytes; the rest leaves room to align one."""

    _fields_ = [("data", ctypes.c_char * 192)]
