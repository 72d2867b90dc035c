"""What a caller gives to an entry and gets from it. Imports no onnx_ir, so that loading an artifact stays quick."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

_NUMPY = {"float": "float32", "double": "float64"}
_ML_DTYPES = {
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
    "float8e8m0": "float8_e8m0fnu",
    "float6e2m3": "float6_e2m3fn",
    "float6e3m2": "float6_e3m2fn",
    "float4e2m1": "float4_e2m1fn",
}


class ElementType(enum.IntEnum):
    """Element types by their ONNX number; members equal those of ``onnx_ir.DataType``."""

    FLOAT = 1
    UINT8 = 2
    INT8 = 3
    UINT16 = 4
    INT16 = 5
    INT32 = 6
    INT64 = 7
    STRING = 8
    BOOL = 9
    FLOAT16 = 10
    DOUBLE = 11
    UINT32 = 12
    UINT64 = 13
    COMPLEX64 = 14
    COMPLEX128 = 15
    BFLOAT16 = 16
    FLOAT8E4M3FN = 17
    FLOAT8E4M3FNUZ = 18
    FLOAT8E5M2 = 19
    FLOAT8E5M2FNUZ = 20
    UINT4 = 21
    INT4 = 22
    FLOAT4E2M1 = 23
    FLOAT8E8M0 = 24
    UINT2 = 25
    INT2 = 26
    FLOAT6E2M3 = 27
    FLOAT6E3M2 = 28

    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype of one element, from ml_dtypes where NumPy has none; text is ``object``."""
        name = self.name.lower()
        if self is ElementType.STRING:
            return np.dtype(object)
        return np.dtype(getattr(ml_dtypes, _ML_DTYPES.get(name, name), None) or _NUMPY.get(name, name))


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an entry. `shape` holds ints, symbol names, None for an unknown size; None as a
    whole when the rank is unknown. `dtype` is None for values that are not tensors (sequences, optionals)."""

    name: str
    dtype: ir.DataType | ElementType | None
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ", ".join("?" if d is None else str(d) for d in self.shape)
        kind = self.dtype.name.lower() if self.dtype is not None else "non-tensor"
        return f"{self.name}: {kind}[{dims}]"

    @classmethod
    def of(cls, value: ir.Value) -> TensorSpec:
        """The spec of a graph input or output."""
        dims = None if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
        # A value whose type is a sequence, an optional or a sparse tensor has no element type of its own.
        tensor = type(value.type).__name__ == "TensorType"
        return cls(value.name or "", value.dtype if tensor else None, dims)
