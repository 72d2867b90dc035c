"""What the translator knows of a value: its dtype, its symbolic sizes, and where it is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
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


def same_order(dims: Sequence[Any], own: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two orders of axes differ by axes of size 1 alone, which lie nowhere."""
    long = [axis for axis, size in enumerate(dims) if not (isinstance(size, int) and size == 1)]
    return [axis for axis in own if axis in long] == [axis for axis in other if axis in long]


@dataclass
class Parameter:
    """A weight that the function takes behind its inputs.

    Attributes:
        name: unique in the program.
        array: what to pass.
        var: the variable that stands for it.
    """

    name: str
    array: np.ndarray
    var: Any


def weights_of(parameters: Mapping[str, Parameter]) -> dict[str, np.ndarray]:
    """Parameter name → array, in the order in which the function takes them."""
    return {name: parameter.array for name, parameter in parameters.items()}


@dataclass
class Lazy:
    """Elements that are computed one by one; several of these that follow each other become one loop.

    Attributes:
        name: of the loop.
        inputs: variables, or lazy ones that nothing else reads.
        body: (indices, *readers) → the element; a reader gives the element of an input at indices.
        dims: sizes, as int64 expressions.
        dtype: of the elements.
        var: the variable, once it is emitted.
    """

    name: str
    inputs: list[Any]
    body: Callable[..., Any]
    dims: list[Any]
    dtype: str
    var: Any = None

    @property
    def length(self) -> int:
        """How many operators are in the loop."""
        return 1 + sum(item.length for item in self.inputs if isinstance(item, Lazy) and item.var is None)

    def reader(self, leaves: list[Any], force: Callable[[Any], Any]) -> Callable[[Sequence[Any], Sequence[Any]], Any]:
        """(indices, tensors of `leaves`) → the element; adds the variables that are read to `leaves`."""
        readers: list[Any] = []
        for item in self.inputs:
            if isinstance(item, Lazy) and item.var is None:
                readers.append(item.reader(leaves, force))
                continue
            var = force(item)
            if not any(var.same_as(leaf) for leaf in leaves):
                leaves.append(var)
            place = next(i for i, leaf in enumerate(leaves) if var.same_as(leaf))
            readers.append(lambda indices, tensors, place=place: tensors[place](*indices))

        def read(indices: Sequence[Any], tensors: Sequence[Any]) -> Any:
            own = [lambda *at, r=reader: r(at, tensors) for reader in readers]
            return self.body(indices, *own).astype(self.dtype)

        return read


def shown(size: Any) -> str:
    """A size as users write it: TVM's text without its types."""
    return re.sub(r"T\.", "", re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(size)))


def identifier(name: str) -> str:
    """A name as TVM takes it."""
    return "".join(c if c.isalnum() else "_" for c in name) or "size"


def digest(array: np.ndarray) -> str:
    """A name for a constant that has none."""
    return f"constant.{hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]}"


def same_array(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays hold the same bytes in the same form."""
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
