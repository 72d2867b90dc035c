"""Tensors over the bytes of confined files (:mod:`planish.ir.confined`): mapped, never copied."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.confined import (
    MAX_LOCATION,
    ConfinedFile,
    checked_write_path,
    open_confined,
    parse_location,
    resolve,
)
from planish.ir.errors import InputError

__all__ = [
    "MAX_LOCATION",
    "ConfinedFile",
    "MappedTensor",
    "checked_write_path",
    "open_confined",
    "parse_location",
    "resolve",
    "stored_bytes",
    "tensor_bytes",
    "tensor_from_buffer",
]


class MappedTensor(ir.LazyTensor):
    """A tensor in a range of a :class:`ConfinedFile`, mapped at first use and never copied.

    `file` stays open so that a file that became shorter is an error, not a bus error in the reader.
    """

    def __init__(self, file: ConfinedFile, offset: int, dtype: ir.DataType, shape: tuple[int, ...], name: str) -> None:
        super().__init__(self._load, dtype, ir.Shape(shape, frozen=True), cache=True, name=name)
        self.file = file
        self.offset = offset
        self._dims = shape

    def buffer(self) -> np.ndarray:
        """The bytes as they are stored (little endian, sub-byte dtypes packed); uint8, read-only, shape (nbytes,)."""
        size = self.nbytes
        if not size:
            return np.empty(0, np.uint8)
        if os.fstat(self.file.fileno()).st_size < self.offset + size:
            raise InputError(f"'{self.file.path}' became shorter after the model was loaded; load it again.")
        return np.frombuffer(self.file.map(), np.uint8, size, self.offset)

    def tofile(self, file: Any) -> None:
        file.write(self.buffer().data)

    def tobytes(self) -> bytes:
        return self.buffer().tobytes()

    def _load(self) -> ir.TensorProtocol:
        return tensor_from_buffer(self.buffer(), self.dtype, self._dims, self.name)


def tensor_from_buffer(
    data: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...], name: str | None
) -> ir.Tensor[Any]:
    """A tensor over `data` (uint8, as ONNX stores it); copies only if the address does not suit the dtype."""
    if dtype.bitwidth < 8:
        return ir.PackedTensor(data, dtype, shape=shape, name=name)  # type: ignore[return-value]
    kind = np.dtype(dtype.numpy())
    if data.size and data.ctypes.data % kind.alignment:
        data = data.copy()
    array = data.view(kind if np.little_endian else kind.newbyteorder("<")).reshape(shape)
    return ir.Tensor(array, dtype=dtype, shape=ir.Shape(shape, frozen=True), name=name)


def stored_bytes(tensor: ir.TensorProtocol) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a tensor as ONNX stores them: uint8, shape (nbytes,), at an address that suits the dtype.

    Without a copy where memory has them so.
    """
    if isinstance(tensor, MappedTensor) and tensor.offset % max(tensor.dtype.bitwidth // 8, 1) == 0:
        return tensor.buffer()
    if tensor.dtype.bitwidth < 8 or not np.little_endian:
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def tensor_bytes(dtype: ir.DataType, shape: tuple[int, ...]) -> int:
    """Stored size in bytes of a tensor of `shape`; exact for sub-byte dtypes, which are packed."""
    return (dtype.bitwidth * math.prod(shape) + 7) // 8
