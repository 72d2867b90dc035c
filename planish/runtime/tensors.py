"""NumPy, torch and OrtValue views of one buffer. Never copies a contiguous array; never imports torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from planish.ir.errors import InputError
from planish.ir.spec import ElementType

#: Element types that NumPy has itself: the ones that `InferenceSession.run` takes and gives as arrays.
NATIVE: dict[int, np.dtype[Any]] = {
    ElementType.FLOAT: np.dtype(np.float32),
    ElementType.UINT8: np.dtype(np.uint8),
    ElementType.INT8: np.dtype(np.int8),
    ElementType.UINT16: np.dtype(np.uint16),
    ElementType.INT16: np.dtype(np.int16),
    ElementType.INT32: np.dtype(np.int32),
    ElementType.INT64: np.dtype(np.int64),
    ElementType.BOOL: np.dtype(np.bool_),
    ElementType.FLOAT16: np.dtype(np.float16),
    ElementType.DOUBLE: np.dtype(np.float64),
    ElementType.UINT32: np.dtype(np.uint32),
    ElementType.UINT64: np.dtype(np.uint64),
    ElementType.COMPLEX64: np.dtype(np.complex64),
    ElementType.COMPLEX128: np.dtype(np.complex128),
}
#: Element types of whole bytes that come from ml_dtypes; they cross into ONNX Runtime as OrtValues.
EXTENDED: dict[int, np.dtype[Any]] = {
    ElementType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    ElementType.FLOAT8E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
    ElementType.FLOAT8E4M3FNUZ: np.dtype(ml_dtypes.float8_e4m3fnuz),
    ElementType.FLOAT8E5M2: np.dtype(ml_dtypes.float8_e5m2),
    ElementType.FLOAT8E5M2FNUZ: np.dtype(ml_dtypes.float8_e5m2fnuz),
    ElementType.FLOAT8E8M0: np.dtype(ml_dtypes.float8_e8m0fnu),
}
#: Element types below one byte: ONNX Runtime packs two (or four) in a byte, ml_dtypes keeps one in each.
PACKED: dict[int, tuple[np.dtype[Any], int]] = {
    ElementType.UINT4: (np.dtype(ml_dtypes.uint4), 4),
    ElementType.INT4: (np.dtype(ml_dtypes.int4), 4),
    ElementType.FLOAT4E2M1: (np.dtype(ml_dtypes.float4_e2m1fn), 4),
    ElementType.UINT2: (np.dtype(ml_dtypes.uint2), 2),
    ElementType.INT2: (np.dtype(ml_dtypes.int2), 2),
}
NUMPY: dict[int, np.dtype[Any]] = {**NATIVE, **EXTENDED, **{k: v[0] for k, v in PACKED.items()}}
_BY_NAME = {dtype.name: ElementType(number) for number, dtype in NUMPY.items()}
# torch dtypes that NumPy lacks → an integer dtype of the same width, and the ml_dtypes dtype.
_TORCH_VIEWS = {
    "bfloat16": ("int16", EXTENDED[ElementType.BFLOAT16]),
    "float8_e4m3fn": ("uint8", EXTENDED[ElementType.FLOAT8E4M3FN]),
    "float8_e4m3fnuz": ("uint8", EXTENDED[ElementType.FLOAT8E4M3FNUZ]),
    "float8_e5m2": ("uint8", EXTENDED[ElementType.FLOAT8E5M2]),
    "float8_e5m2fnuz": ("uint8", EXTENDED[ElementType.FLOAT8E5M2FNUZ]),
    "float8_e8m0fnu": ("uint8", EXTENDED[ElementType.FLOAT8E8M0]),
}


def element_type(array: np.ndarray) -> ElementType | None:
    """The ONNX element type of an array; STRING for text and objects; None if ONNX has none."""
    if array.dtype.kind in "OSUT":
        return ElementType.STRING
    return _BY_NAME.get(array.dtype.name)


def is_torch(value: Any) -> bool:
    """Whether `value` is a torch tensor; False without importing torch when nobody has."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def from_torch(name: str, tensor: Any) -> np.ndarray:
    """A NumPy view of a CPU torch tensor (shares memory).

    Raises:
        InputError: the tensor is on another device, sparse, or of a dtype without a NumPy view.
    """
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        raise InputError(
            f"input '{name}' is on device '{tensor.device}'; this target runs on the CPU: call .cpu() first."
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    try:
        if dtype in _TORCH_VIEWS:
            carrier, extended = _TORCH_VIEWS[dtype]
            view: np.ndarray = tensor.view(getattr(sys.modules["torch"], carrier)).numpy().view(extended)
            return view
        array: np.ndarray = tensor.resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:
        raise InputError(f"input '{name}': a torch tensor of {dtype} has no NumPy view: {error}.") from error
    return array


def to_torch(array: Any) -> Any:
    """A torch tensor over the memory of `array`; what torch has no dtype for stays as it is."""
    torch = sys.modules["torch"]
    if isinstance(array, list):
        return [to_torch(item) for item in array]
    if not isinstance(array, np.ndarray) or array.dtype.kind in "OSUT":
        return array
    for name, (carrier, extended) in _TORCH_VIEWS.items():
        if array.dtype == extended:
            return torch.from_numpy(array.view(getattr(np, carrier))).view(getattr(torch, name))
    try:
        return torch.from_numpy(array)
    except TypeError:
        return array


def to_ortvalue(array: np.ndarray, element: int) -> Any:
    """An OrtValue over the memory of a contiguous array; the caller keeps the array alive.

    Only elements below one byte (:data:`PACKED`) are copied, into the packed form that ONNX Runtime has.

    Raises:
        TypeError: an element type that has no OrtValue over a buffer (text).
    """
    import onnxruntime

    binding = onnxruntime.OrtValue
    if element in NATIVE:
        return binding.ortvalue_from_numpy(array)
    if element in EXTENDED:
        carrier = np.uint16 if array.dtype.itemsize == 2 else np.uint8
        return binding.ortvalue_from_numpy_with_onnx_type(array.view(carrier), int(element))
    if element in PACKED:
        value = binding.ortvalue_from_shape_and_type(array.shape, int(element), "cpu")
        packed = pack(array.view(np.uint8).reshape(-1), PACKED[element][1])
        np.asarray(_Buffer(value, packed.size))[:] = packed
        return value
    raise TypeError(f"element type {element} has no OrtValue over a NumPy buffer")


class _Buffer:
    """Exposes the memory of an OrtValue and keeps it alive."""

    def __init__(self, value: Any, nbytes: int) -> None:
        self.value = value
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (value.data_ptr(), False),
        }


def from_ortvalue(value: Any, element: int) -> Any:
    """The array (list for a sequence, None for an empty optional) over the memory of an OrtValue."""
    if not value.has_value():
        return None
    if element not in EXTENDED and element not in PACKED:
        return value.numpy()
    shape = tuple(value.shape())
    count = math.prod(shape)
    dtype = NUMPY[element]
    if count == 0:
        return np.empty(shape, dtype)
    if element in PACKED:
        bits = PACKED[element][1]
        raw = np.asarray(_Buffer(value, (count * bits + 7) // 8))
        return unpack(raw, bits, count).view(dtype).reshape(shape)
    return np.asarray(_Buffer(value, count * dtype.itemsize)).view(dtype).reshape(shape)


def unpack(raw: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Values below one byte, first value in the low bits (ONNX's order), one per byte: uint8[count]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)[:count]


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of :func:`unpack`; the last byte is filled up with zeros."""
    per_byte = 8 // bits
    filled = np.zeros((len(values) + per_byte - 1) // per_byte * per_byte, np.uint8)
    filled[: len(values)] = values & np.uint8((1 << bits) - 1)
    shifted = filled.reshape(-1, per_byte) << np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(shifted, axis=1) if len(values) else np.empty(0, np.uint8)


def to_arrays(feeds: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Inputs as NumPy arrays, without copies, and whether any of them was a torch tensor."""
    if "torch" not in sys.modules:
        return dict(feeds), False
    arrays: dict[str, Any] = {}
    found = False
    for name, value in feeds.items():
        if is_torch(value):
            arrays[name] = from_torch(name, value)
            found = True
        else:
            arrays[name] = value
    return arrays, found


def settle(values: Any) -> None:
    """Waits for what torch still has to do to its tensors: ONNX Runtime has a stream of its own."""
    for value in values:
        if is_torch(value) and value.device.type == "cuda":
            sys.modules["torch"].cuda.current_stream(value.device).synchronize()
            return


def likeness(value: Any) -> Any:
    """An array of the dtype and shape of a tensor on a device, without memory; what is no tensor stays as it is."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        return value
    name = str(value.dtype).rpartition(".")[2]
    known = {dtype.name: dtype for dtype in (*NATIVE.values(), *EXTENDED.values())}
    if name not in known:
        raise InputError(f"a tensor of {value.dtype} on a device is nothing that ONNX Runtime takes.")
    return np.broadcast_to(np.empty((), known[name]), tuple(value.shape))


def view_of(value: Any) -> Any:
    """A torch tensor over the memory of an OrtValue, which it keeps alive."""
    torch = sys.modules["torch"]
    tensor = torch.from_dlpack(value._ortvalue.__dlpack__())
    return tensor.view(torch.bool) if value.data_type() == "tensor(bool)" else tensor
