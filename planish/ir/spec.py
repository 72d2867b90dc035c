"""What a caller gives to an entry and gets from it. Imports no onnx_ir, so that loading an artifact stays quick."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

# On a graph input, the metadata "planish.range.<dim>" is "<smallest>..<largest>", or "<smallest>..": the sizes for
# which a capture holds.
RANGE = "planish.range"
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
    whole for an unknown rank. `dtype` is None for values that are not tensors (sequences, optionals).

    `ranges` holds, per dimension, (smallest, largest or None for no limit) where a size is known to be limited, and
    None where it is not; None as a whole where nothing is limited.
    """

    name: str
    dtype: ir.DataType | ElementType | None
    shape: tuple[int | str | None, ...] | None
    ranges: tuple[tuple[int, int | None] | None, ...] | None = None

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
        return cls(value.name or "", value.dtype if tensor else None, dims, _ranges(value.metadata_props, dims))

    def clamp(self, axis: int, size: int) -> int:
        """The size nearest to `size` that dimension `axis` takes."""
        low, high = (self.ranges and self.ranges[axis]) or (0, None)
        return max(low, size if high is None else min(size, high))

    def to_dict(self) -> dict[str, Any]:
        """JSON data; ``ranges`` is there only if something is limited."""
        data: dict[str, Any] = {
            "name": self.name,
            "dtype": None if self.dtype is None else self.dtype.name,
            "shape": None if self.shape is None else list(self.shape),
        }
        if self.ranges is not None:
            data["ranges"] = [None if span is None else list(span) for span in self.ranges]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorSpec:
        """Reads what :meth:`to_dict` gave; checks it, since it comes from files.

        Raises:
            ValueError, TypeError, KeyError: it is something else.
        """
        name, dtype, shape, ranges = data["name"], data["dtype"], data["shape"], data.get("ranges")
        if not isinstance(name, str) or not isinstance(dtype, str | None):
            raise ValueError(f"name or dtype of {str(name)[:40]!r}")
        if shape is not None and not all(d is None or isinstance(d, int | str) for d in shape):
            raise ValueError(f"shape of '{name}'")
        if ranges is not None and not (
            isinstance(ranges, list) and shape is not None and len(ranges) == len(shape) and all(map(_is_span, ranges))
        ):
            raise ValueError(f"ranges of '{name}'")
        return cls(
            name,
            None if dtype is None else ElementType[dtype],
            None if shape is None else tuple(shape),
            None if ranges is None else tuple(None if span is None else (span[0], span[1]) for span in ranges),
        )


def _ranges(
    metadata: Mapping[str, str], dims: tuple[int | str | None, ...] | None
) -> tuple[tuple[int, int | None] | None, ...] | None:
    """The ranges that metadata holds; what is no range, or is for a fixed size, is left out."""
    if not metadata or dims is None:
        return None
    spans: list[tuple[int, int | None] | None] = []
    for axis, dim in enumerate(dims):
        text = None if isinstance(dim, int) else metadata.get(f"{RANGE}.{axis}")
        match = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{0,18})", text or "")
        low, high = (int(match[1]), int(match[2]) if match[2] else None) if match else (0, None)
        spans.append((low, high) if match and (high is None or low <= high) else None)
    return tuple(spans) if any(span is not None for span in spans) else None


def _is_span(span: Any) -> bool:
    """Whether this is None or [smallest, largest or None]."""
    if span is None:
        return True
    if not isinstance(span, list) or len(span) != 2 or type(span[0]) is not int or span[0] < 0:
        return False
    return span[1] is None or (type(span[1]) is int and span[0] <= span[1])
