"""What is known of a value of which one dimension is padded: the domain of `planish.ir.analyses.padding`."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

#: A size, at each of the sample sizes of the symbols.
Size = tuple[int, ...]
#: Numbers that softmax turns to zero beside any score of usual size.
LOWEST = -6e4


class Mixes(Exception):
    """The kept part of a result depends on padding, or is not known not to; the message says why."""


class Fact(enum.Enum):
    """What is known of the elements beyond the real size along one axis, at real positions of all other axes.

    Attributes:
        ANY: nothing.
        FREE: true wherever an element at a real position of this axis is; of numbers: not hidden from softmax where
            one is not.
        LOW: finite and so low that softmax makes zero of it, or -inf.
    """

    ANY = enum.auto()
    FREE = enum.auto()
    LOW = enum.auto()


@dataclass(frozen=True)
class Known:
    """Each of these elements is this number; of booleans 0 or 1."""

    value: float


class State(enum.IntEnum):
    """What padded elements can be, wherever they are: numbers, barring overflow; or -inf too; or anything."""

    FINITE = 0
    OPEN = 1
    ANY = 2


@dataclass(frozen=True)
class Span:
    """How an axis carries the dimension: its index is (outer position · size + position) · inner + rest.

    Attributes:
        outer, inner: sizes around it.
        plus: entries in front of those of the dimension, all of them real; only with outer and inner of 1.
        fact: what is known of elements beyond the real size.
    """

    outer: Size
    inner: Size
    plus: int = 0
    fact: Fact | Known = Fact.ANY

    @property
    def plain(self) -> bool:
        """Whether the axis is the dimension itself, and the entries in front of it."""
        return {*self.outer, *self.inner} == {1}

    def like(self, other: Span) -> bool:
        return (self.outer, self.inner, self.plus) == (other.outer, other.inner, other.plus)


@dataclass(frozen=True)
class Affine:
    """A tensor whose element is ``start + sum(step[axis] * index[axis])``, at padded positions too."""

    start: float
    steps: Mapping[int, float] = field(default_factory=dict)

    def moved(self, axes: Mapping[int, int]) -> Affine | None:
        """With axes renamed; None if one of them is gone."""
        if any(axis not in axes for axis in self.steps):
            return None
        return Affine(self.start, {axes[axis]: step for axis, step in self.steps.items()})

    def plus(self, other: Affine, factor: float = 1) -> Affine:
        steps = {a: self.steps.get(a, 0) + factor * other.steps.get(a, 0) for a in {*self.steps, *other.steps}}
        return Affine(self.start + factor * other.start, {axis: step for axis, step in steps.items() if step})

    def times(self, factor: float) -> Affine:
        return Affine(self.start * factor, {axis: step * factor for axis, step in self.steps.items() if factor})


@dataclass(frozen=True)
class Held:
    """A value.

    Attributes:
        sizes: of its axes, None where unknown; None as a whole for an unknown rank.
        spans: the axes that carry the dimension.
        state: what padded elements can be.
        affine: its elements as a function of their positions, where they are one.
        below: its elements are integers from 0 to less than this size, in the padding too.
        columns: of the entries along its last axis, as far as they are affine or below a size.
        diagonal: of a mask over queries and keys, its last two axes: each query sees its own position, padded or not.
        table: a constant, or the corner of one that it is.
        mixed: why its real part may depend on padding; empty: it does not.
        dtype: its element type's name.
        data: whether it is computed from elements of inputs, not from sizes and constants alone.
    """

    sizes: tuple[Size | None, ...] | None
    spans: Mapping[int, Span] = field(default_factory=dict)
    state: State = State.FINITE
    affine: Affine | None = None
    below: Size | None = None
    columns: tuple[Affine | Size, ...] | None = None
    diagonal: bool = False
    table: np.ndarray | None = None
    mixed: str = ""
    dtype: str = ""
    data: bool = False

    @property
    def rank(self) -> int | None:
        return None if self.sizes is None else len(self.sizes)

    @property
    def constant(self) -> float | None:
        """The number that every element is."""
        return self.affine.start if self.affine is not None and not self.affine.steps else None

    def size(self, axis: int) -> Size | None:
        return None if self.sizes is None else self.sizes[axis]

    def axis_of(self, axis: int) -> int:
        """An axis counted from the front.

        Raises:
            Mixes: the rank is not known, or there is no such axis.
        """
        if self.rank is None or not -self.rank <= axis < self.rank:
            raise Mixes("the rank of an operand is not known")
        return axis % self.rank

    def forget(self, state: State | None = None) -> Held:
        """The same axes, with nothing known of their elements."""
        spans = {axis: replace(span, fact=Fact.ANY) for axis, span in self.spans.items()}
        return Held(self.sizes, spans, self.state if state is None else state)


def of_array(array: np.ndarray, samples: int) -> Held:
    """A constant."""
    sizes = tuple((n,) * samples for n in array.shape)
    number = array.dtype.kind in "biuf" or array.dtype.name == "bfloat16"
    if not number or not array.size:
        return Held(sizes, table=array if number else None)
    infinite = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    state = State.FINITE
    if infinite and not np.isfinite(array).all():
        bad = np.isnan(array).any() or np.isposinf(array.astype(np.float32, copy=False)).any()
        state = State.ANY if bad else State.OPEN
    return Held(sizes, state=state, affine=_affine_of(array), table=array)


def _affine_of(array: np.ndarray) -> Affine | None:
    first = float(array.flat[0])
    if math.isnan(first):
        return None
    if array.size == 1 or (array == array.flat[0]).all():
        return Affine(first)
    if array.dtype.kind not in "iu" or array.size > 1 << 20:
        return None
    axes = [axis for axis, n in enumerate(array.shape) if n > 1]
    for axis in axes:  # positions along one axis
        row = np.moveaxis(array, axis, 0)
        step = float(row[1].flat[0]) - first
        wanted = first + step * np.arange(len(row))
        if (row.reshape(len(row), -1) == wanted[:, None]).all():
            return Affine(first, {axis: step})
    return None
