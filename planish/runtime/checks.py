"""Whether inputs fit, remembered by their shapes: what every runner asks before it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from planish.ir.errors import InputError
from planish.ir.signature import check_inputs
from planish.ir.spec import TensorSpec

#: Shapes whose check is remembered; a server that sees more distinct shapes than this checks each time.
_REMEMBERED = 4096


class InputChecks:
    """Checks inputs by name.

    Args:
        inputs: the specs.
        optional: names that may be given and need not be.
        more: a further check of inputs that fit the specs, which depends on shapes alone.
    """

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        optional: frozenset[str] = frozenset(),
        more: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.inputs, self.optional, self.more = list(inputs), optional, more
        self._checked: set[tuple[Any, ...]] = set()

    def __call__(self, arrays: Mapping[str, Any]) -> None:
        """Raises InputError if the inputs do not fit; shapes that were fine before are not checked again."""
        try:
            key = tuple([(name, type(a), a.dtype, a.shape) for name, a in arrays.items()])
        except AttributeError:  # sequences and optionals
            self._check(arrays)
            return
        if key not in self._checked:
            self._check(arrays)
            if len(self._checked) < _REMEMBERED:
                self._checked.add(key)

    def _check(self, arrays: Mapping[str, Any]) -> None:
        for spec in self.inputs:
            value = arrays.get(spec.name)
            if spec.dtype is not None and spec.name in arrays and not isinstance(value, np.ndarray):
                raise InputError(
                    f"input '{spec.name}' is of type {type(value).__name__}, expected {spec}; "
                    "give a numpy array or a torch tensor."
                )
        check_inputs(self.inputs, arrays, self.optional)
        if self.more is not None:
            self.more(arrays)
