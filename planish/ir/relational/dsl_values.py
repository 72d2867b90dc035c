"""Values of a relational layer that is being written, and the line of the user's source that an error is about."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.ir.errors import InputError
from planish.ir.relational.domains import Domain
from planish.ir.relational.inter import Location, Operand
from planish.ir.relational.verify import error_at

if TYPE_CHECKING:
    from planish.ir.relational.dsl import Layer

#: Files whose lines are not the user's.
_OWN = {
    str(Path(__file__).with_name(f"{name}.py")) for name in ("dsl", "dsl_rows", "dsl_values", "functions", "builder")
}


def here() -> Location:
    """The line of the user's source that is being traced."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in _OWN:
        frame = frame.f_back
    return Location(frame.f_code.co_filename, frame.f_lineno)


def fault(message: str) -> InputError:
    """An error at the user's line; the caller raises it."""
    return error_at(here(), message)


Operator = Callable[["Value", Any], "Value"]


def _arithmetic(kind: str) -> tuple[Operator, Operator]:
    """The methods of ``value + other`` and of ``other + value``."""

    def method(self: Value, other: Any) -> Value:
        return self.apply(kind, other)

    def reverse(self: Value, other: Any) -> Value:
        return self.apply(kind, other, reverse=True)

    return method, reverse


@dataclass(frozen=True, eq=False)
class Value:
    """A value as it is read in a loop; arithmetic makes operators of it.

    Attributes:
        layer: the layer being written.
        operand: the value, and by which end it is read.
        over: the domain of the loop; ``none`` fits into every loop.
    """

    layer: Layer
    operand: Operand
    over: Domain

    @property
    def shape(self) -> tuple[int, ...]:
        """The trailing shape: sizes without the rows."""
        return self.layer.builder.variable(self.operand).shape

    @property
    def name(self) -> str:
        return self.operand.name

    def apply(self, kind: str, *others: Any, reverse: bool = False, **attrs: Any) -> Value:
        """The operator `kind` of this and `others`."""
        values = [self, *others]
        return self.layer.apply(kind, *(values[::-1] if reverse else values), **attrs)

    __add__, __radd__ = _arithmetic("add")
    __sub__, __rsub__ = _arithmetic("sub")
    __mul__, __rmul__ = _arithmetic("mul")
    __truediv__, __rtruediv__ = _arithmetic("div")

    def __neg__(self) -> Value:
        return self.apply("neg")

    def reshape(self, *shape: int) -> Value:
        """With other trailing sizes: ``x.reshape(heads, -1)``."""
        if shape.count(-1) == 1:
            total, given = math.prod(self.shape), math.prod(s for s in shape if s != -1)
            shape = tuple(total // given if s == -1 and given else s for s in shape)
        return self.apply("reshape", shape=tuple(shape))

    def sum(self, *axes: int) -> Value:
        """The sum over trailing axes."""
        return self.apply("fsum", axes=axes or tuple(range(len(self.shape))))

    def __bool__(self) -> bool:
        raise fault("a value is known when the layer runs, not while it is written; use max, min or step for choices")
