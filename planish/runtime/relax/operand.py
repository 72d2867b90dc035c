"""What the translator knows of a value: its dtype, its symbolic sizes, and where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Integer tensors of at most this many elements may be shapes: their elements are followed as expressions.
SHAPE_ELEMENTS = 64


@dataclass
class Operand:
    """A value of the graph.

    Exactly one of `var`, `array` and `sizes` says where it is; `array` and `sizes` become variables when needed.

    Attributes:
        dtype: as TVM names it: ``"float32"``, ``"int64"``, ``"bool"``.
        dims: sizes, as numbers or int64 expressions.
        var: the Relax variable that holds it.
        array: a constant.
        sizes: elements of an integer tensor of rank 0 or 1, computed from sizes of inputs: an array of objects, each
            a number or an int64 expression.
        order: the axes in the order in which they are stored, where that is another one than theirs.
        name: of the ONNX value, for constants.
    """

    dtype: str
    dims: list[Any]
    var: Any = None
    array: np.ndarray | None = None
    sizes: np.ndarray | None = None
    order: tuple[int, ...] | None = None
    name: str = ""

    @classmethod
    def constant(cls, array: np.ndarray, name: str = "") -> Operand:
        array = np.asarray(array)
        return cls(str(array.dtype), list(array.shape), array=array, name=name)

    @classmethod
    def of_sizes(cls, sizes: np.ndarray, dtype: str = "int64") -> Operand:
        if all(isinstance(item, int | np.integer) for item in sizes.flat):
            return cls.constant(sizes.astype(dtype))
        return cls(dtype, list(sizes.shape), sizes=sizes)

    @property
    def rank(self) -> int:
        return len(self.dims)

    def elements(self) -> np.ndarray | None:
        """The elements of a small integer tensor of rank 0 or 1, as far as they are known now; else None."""
        if self.sizes is not None:
            return self.sizes
        array = self.array
        if array is None or array.dtype.kind not in "iub" or array.ndim > 1 or array.size > SHAPE_ELEMENTS:
            return None
        return np.array([int(item) for item in array.flat], object).reshape(array.shape)

    def numbers(self) -> list[int] | None:
        """The elements as plain numbers, if they all are."""
        if self.array is None:
            return None
        return [int(item) for item in self.array.reshape(-1)]

    def scalar(self) -> Any:
        """The number of a constant with one element, else None."""
        return self.array.reshape(-1)[0] if self.array is not None and self.array.size == 1 else None


def stored(dims: Sequence[Any], order: Sequence[int] | None) -> list[Any]:
    """Sizes in the order in which the axes are stored."""
    return list(dims) if order is None else [dims[axis] for axis in order]
