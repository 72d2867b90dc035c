"""OrtValues over memory that planish owns, on any device: ONNX Runtime takes an address through DLPack only."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import onnxruntime as ort

from planish.ir.spec import ElementType

_NAME = b"dltensor"  # a capsule points at its name
_DEVICES = {"cpu": 1, "cuda": 2}  # kDLCPU, kDLCUDA
#: Element type → DLPack's code (unsigned, float, bfloat) and bits: those that are tried, of all that it has.
TYPES = {
    ElementType.UINT8: (1, 8),
    ElementType.FLOAT16: (2, 16),
    ElementType.FLOAT: (2, 32),
    ElementType.BFLOAT16: (4, 16),
}


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


# Own prototypes: those of `pythonapi` belong to everybody.
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(("PyMem_RawMalloc", ctypes.pythonapi))
_DELETE = ctypes.cast(ctypes.pythonapi.PyMem_RawFree, ctypes.c_void_p).value


def value_at(address: int, element: int, shape: Sequence[int], device: str, index: int) -> ort.OrtValue:
    """An OrtValue over contiguous memory of a device; the caller keeps the memory as long as anything reads it.

    Args:
        element: one of :data:`TYPES`.
        device, index: ``"cuda"`` and the number of the GPU, or ``"cpu"`` and 0.
    """
    code, bits = TYPES[ElementType(element)]
    # What describes the tensor goes with the last session that has it, in whichever thread, and maybe after the
    # interpreter is gone: so it is one piece of memory that C frees, and nothing of Python's.
    size = ctypes.sizeof(_Managed)
    held = _allocate(size + 8 * len(shape))
    if not held:
        raise MemoryError
    (ctypes.c_int64 * len(shape)).from_address(held + size)[:] = list(shape)
    made = _Managed.from_address(held)
    made.tensor = Tensor(address, _DEVICES[device], index, len(shape), code, bits, 1, held + size, None, 0)
    made.context, made.deleter = None, _DELETE
    capsule: Any = _capsule(held, _NAME, None)
    return ort.OrtValue(ort.capi._pybind_state.OrtValue.from_dlpack(capsule, False))
