"""The GPUs of a machine, by the driver and its management library; makes no context, so takes no GPU memory."""

from __future__ import annotations

import ctypes
from typing import Any

from planish.ir.errors import UnsupportedError
from planish.ir.machine import Gpu, Version
from planish.runtime.cuda import driver

_NAME = 128
_BUS = 32


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def gpus() -> list[Gpu]:
    """All GPUs that CUDA shows to this process.

    Raises:
        UnsupportedError: there is no driver, or it has no GPU.
    """
    library = driver.library()
    count = ctypes.c_int()
    driver.check(library.cuDeviceGetCount(ctypes.byref(count)), "counting the GPUs")
    if not count.value:
        raise UnsupportedError("the NVIDIA driver has no GPU.")
    management = _management()
    try:
        return [_gpu(library, management, index) for index in range(count.value)]
    finally:
        if management is not None:
            management.nvmlShutdown()


def cuda_version() -> Version:
    """The latest version of CUDA that the driver takes.

    Raises:
        UnsupportedError: there is no driver.
    """
    found = ctypes.c_int()
    driver.check(driver.library().cuDriverGetVersion(ctypes.byref(found)), "the driver's version")
    return found.value // 1000, found.value % 1000 // 10


def driver_version() -> str:
    """The driver's own version, such as ``"580.82"``; empty where the management library is missing."""
    management = _management()
    if management is None:
        return ""
    text = ctypes.create_string_buffer(_NAME)
    failed = management.nvmlSystemGetDriverVersion(text, _NAME)
    management.nvmlShutdown()
    return "" if failed else text.value.decode(errors="replace")


def _gpu(library: Any, management: Any, index: int) -> Gpu:
    doing = f"properties of GPU {index}"
    handle, memory = ctypes.c_int(), ctypes.c_size_t()
    driver.check(library.cuDeviceGet(ctypes.byref(handle), index), doing)
    name, bus = ctypes.create_string_buffer(_NAME), ctypes.create_string_buffer(_BUS)
    driver.check(library.cuDeviceGetName(name, _NAME, handle), doing)
    driver.check(library.cuDeviceTotalMem_v2(ctypes.byref(memory), handle), doing)
    driver.check(library.cuDeviceGetPCIBusId(bus, _BUS, handle), doing)
    found = driver.device(index)
    free = _free(management, bus.value, memory.value)
    return Gpu(name.value.decode(errors="replace"), found.arch, memory.value, free, found.processors, found.shared)


def _free(management: Any, bus: bytes, total: int) -> int | None:
    """Free bytes; None if they are not known, as for a part of a GPU, whose bus is that of the whole."""
    if management is None:
        return None
    handle, memory = ctypes.c_void_p(), _Memory()
    if management.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle)):
        return None
    if management.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
        return None
    return memory.free if memory.total < total + (total >> 1) else None


def _management() -> Any:
    """NVML, started; None where it is missing."""
    for name in ("libnvidia-ml.so.1", "nvml.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return library if library.nvmlInit_v2() == 0 else None
    return None
