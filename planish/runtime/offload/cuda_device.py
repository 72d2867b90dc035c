"""A CUDA GPU as streaming asks for it: memory and streams of the driver, sessions on one of its streams."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from planish.ir.errors import InputError
from planish.ir.target import Target
from planish.runtime.cuda.driver import check, library
from planish.runtime.offload.account import Account, MemoryBudgetError, size_text
from planish.runtime.offload.device import COMPUTE, COPY, Event, Rows
from planish.runtime.offload.planned import LIBRARIES, arena

_HOST_MEMORY, _DEVICE_MEMORY = 1, 2  # CUmemorytype
_MEMORY_CLOCK, _BUS_WIDTH = 36, 37  # CUdevice_attribute
#: Of a T4, in bytes per second, where the driver does not say.
_LEAST_BANDWIDTH = 3e11
_NON_BLOCKING, _NO_TIMING, _PORTABLE = 1, 2, 1
_NOT_READY = 600  # CUresult
#: cuBLAS takes 32 MiB a handle on Hopper, and each session has a handle; this is what it takes before Hopper.
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_SMALL = ":4096:2:16:8"


class CudaDevice:
    """Memory, streams and sessions of one GPU.

    Args:
        limit: bytes that this process may take beside the CUDA context and the code of kernels; None: any number.
        target: options of the provider and the number of the GPU.

    Raises:
        UnsupportedError: there is no driver, or no such GPU.
    """

    kind = "cuda"
    concurrent = True

    def __init__(self, limit: int | None, target: Target) -> None:
        from planish.runtime.ort_cuda import device_index, load_libraries

        self.account, self.target = Account(limit), target
        os.environ.setdefault(_CUBLAS, _CUBLAS_SMALL)
        load_libraries()
        self.index = device_index(target)
        self._cuda = library()
        self._context = ctypes.c_void_p()
        handle = ctypes.c_int()
        check(self._cuda.cuDeviceGet(ctypes.byref(handle), self.index), f"GPU {self.index}")
        check(self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), handle), f"GPU {self.index}")
        self._here()
        self._streams = [ctypes.c_void_p(), ctypes.c_void_p()]
        for stream in self._streams:
            check(self._cuda.cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING), "a stream")
        self._blocks: dict[int, tuple[int, str]] = {}

    def memory(self) -> tuple[int, int]:
        """Bytes of the GPU that are free, and all, as the driver has it."""
        self._here()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        check(self._cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), "free memory")
        return free.value, total.value

    def allocate(self, nbytes: int, what: str) -> int:
        self.account.take(nbytes, what)
        self._here()
        address = ctypes.c_uint64()
        code = self._cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(max(nbytes, 1)))
        if code:
            self.account.give(nbytes, what)
        check(code, f"{nbytes} bytes of {what} on the GPU")
        self._blocks[address.value] = nbytes, what
        return address.value

    def free(self, address: int) -> None:
        self.account.give(*self._blocks.pop(address))
        check(self._cuda.cuMemFree_v2(ctypes.c_uint64(address)), "freeing memory of the GPU")

    def host(self, nbytes: int) -> np.ndarray:
        self._here()
        address = ctypes.c_void_p()
        size = ctypes.c_size_t(max(nbytes, 1))
        check(self._cuda.cuMemHostAlloc(ctypes.byref(address), size, _PORTABLE), f"{nbytes} bytes of pinned memory")
        assert address.value is not None
        block = (ctypes.c_uint8 * max(nbytes, 1)).from_address(address.value)
        weakref.finalize(block, _free_host, self._cuda, address.value)
        ctypes.memset(address.value, 0, nbytes)
        array: np.ndarray = np.ctypeslib.as_array(block)[:nbytes]
        return array

    def zero(self, address: int, nbytes: int) -> None:
        stream = self._streams[COMPUTE]
        code = self._cuda.cuMemsetD8Async(ctypes.c_uint64(address), ctypes.c_ubyte(0), ctypes.c_size_t(nbytes), stream)
        check(code, "writing zeros")

    def upload(self, target: int, source: int, rows: Rows, stream: int) -> None:
        self._copy(target, source, rows, stream, up=True)

    def download(self, target: int, source: int, rows: Rows, stream: int) -> None:
        self._copy(target, source, rows, stream, up=False)

    def record(self, stream: int) -> _CudaEvent:
        event = _CudaEvent(self._cuda)
        check(self._cuda.cuEventRecord(event.handle, self._streams[stream]), "an event")
        return event

    def wait(self, stream: int, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        check(self._cuda.cuStreamWaitEvent(self._streams[stream], event.handle, 0), "waiting for an event")

    def synchronize(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        check(self._cuda.cuEventSynchronize(event.handle), "a run on the GPU")

    def done(self, event: Event) -> bool:
        assert isinstance(event, _CudaEvent)
        code = self._cuda.cuEventQuery(event.handle)
        if code != _NOT_READY:
            check(code, "a run on the GPU")
        return bool(code != _NOT_READY)

    def launch(self, run: Callable[[], None]) -> None:
        try:
            run()
        except InputError as error:
            if "Available memory of" not in str(error):
                raise
            planned = size_text(self.account.by["sessions"])
            raise MemoryBudgetError(
                f"activations within a layer pass the {planned} that were planned: {error}"
            ) from error

    def room(self, nbytes: int) -> int:
        return arena(nbytes)

    def workspace(self, nbytes: int) -> None:
        self.account.give(self.account.by["sessions"], "sessions")
        self.account.take(nbytes, "sessions")

    @property
    def reserve(self) -> int:
        return LIBRARIES

    @property
    def bandwidth(self) -> float:
        clock, width = (self._attribute(name) for name in (_MEMORY_CLOCK, _BUS_WIDTH))
        return 2e3 * clock * width / 8 or _LEAST_BANDWIDTH  # two transfers a clock, which is in kHz; bits

    def _attribute(self, name: int) -> int:
        value = ctypes.c_int()
        check(self._cuda.cuDeviceGetAttribute(ctypes.byref(value), name, self.index), f"properties of GPU {self.index}")
        return value.value

    def session(self, model: bytes, options: Any, workspace: int) -> tuple[Any, Any]:
        import onnxruntime as ort

        from planish.runtime.ort import create_session
        from planish.runtime.ort_cuda import PROVIDER, check_provider, provider_options

        self._here()
        settings = provider_options(self.target) | {
            "gpu_mem_limit": str(workspace),
            "arena_extend_strategy": "kSameAsRequested",
            "user_compute_stream": str(self._streams[COMPUTE].value),
            "do_copy_in_default_stream": "1",
            "cudnn_conv_use_max_workspace": "0",
        }
        options.intra_op_num_threads = 1  # the host only launches
        options.enable_mem_pattern = False  # a pattern is one block for a whole run
        session = create_session(model, options, providers=[(PROVIDER, settings), "CPUExecutionProvider"])
        check_provider(session)
        run = ort.RunOptions()
        run.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return session, run

    def close(self) -> None:
        self._here()
        for stream in self._streams:
            check(self._cuda.cuStreamSynchronize(stream), "the end of a stream")
        for address in list(self._blocks):
            self.free(address)
        for stream in self._streams:
            check(self._cuda.cuStreamDestroy_v2(stream), "the end of a stream")

    def _here(self) -> None:
        check(self._cuda.cuCtxSetCurrent(self._context), f"GPU {self.index}")

    def _copy(self, target: int, source: int, rows: Rows, stream: int, *, up: bool) -> None:
        where = self._streams[stream]
        if rows.count == 1:
            call = self._cuda.cuMemcpyHtoDAsync_v2 if up else self._cuda.cuMemcpyDtoHAsync_v2
            code = call(ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(rows.width), where)
        elif rows.width:
            kinds = (_HOST_MEMORY, _DEVICE_MEMORY) if up else (_DEVICE_MEMORY, _HOST_MEMORY)
            made = _Copy2D(
                0, 0, kinds[0], source, source, None, rows.source_pitch,
                0, 0, kinds[1], target, target, None, rows.target_pitch, rows.width, rows.count,
            )  # fmt: skip
            code = self._cuda.cuMemcpy2DAsync_v2(ctypes.byref(made), where)
        else:
            return
        check(code, f"copying {rows.count} x {rows.width} bytes {'to' if up else 'from'} the GPU")


class _CudaEvent:
    """An event without time; it goes with its last reference, which the driver allows before it happened."""

    def __init__(self, cuda: ctypes.CDLL) -> None:
        self.handle = ctypes.c_void_p()
        check(cuda.cuEventCreate(ctypes.byref(self.handle), _NO_TIMING), "an event")
        weakref.finalize(self, cuda.cuEventDestroy_v2, self.handle)


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of the driver's API."""

    _fields_ = [
        ("srcXInBytes", ctypes.c_size_t), ("srcY", ctypes.c_size_t), ("srcMemoryType", ctypes.c_int),
        ("srcHost", ctypes.c_void_p), ("srcDevice", ctypes.c_uint64), ("srcArray", ctypes.c_void_p),
        ("srcPitch", ctypes.c_size_t),
        ("dstXInBytes", ctypes.c_size_t), ("dstY", ctypes.c_size_t), ("dstMemoryType", ctypes.c_int),
        ("dstHost", ctypes.c_void_p), ("dstDevice", ctypes.c_uint64), ("dstArray", ctypes.c_void_p),
        ("dstPitch", ctypes.c_size_t), ("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t),
    ]  # fmt: skip


def _free_host(cuda: ctypes.CDLL, address: int) -> None:
    cuda.cuMemFreeHost(ctypes.c_void_p(address))


__all__ = ["COPY", "CudaDevice"]
