"""Outputs without elements, for inputs without elements: nothing is to be computed, only shapes are to be known.

ONNX Runtime's recurrent kernels end the process on a batch of zero, and its Attention refuses one, where the
operators that it was fused from do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from planish.ir.spec import TensorSpec


class EmptyOutputs:
    """Knows the outputs of an entry where none of them has an element.

    Args:
        inputs, outputs: the specs of the entry.
    """

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        symbols = {d for spec in self.inputs for d in spec.shape or () if isinstance(d, str)}
        #: Whether there are inputs for which no output has an element.
        self.possible = bool(self.outputs) and all(
            spec.dtype is not None
            and spec.shape is not None
            and all(isinstance(d, int) or d in symbols for d in spec.shape)
            and any(d == 0 or isinstance(d, str) for d in spec.shape)
            for spec in self.outputs
        )

    def of(self, arrays: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """The outputs for checked inputs if all of them are empty, else None."""
        if not self.possible or not any(0 in getattr(a, "shape", ()) for a in arrays.values()):
            return None
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            shape = getattr(arrays.get(spec.name), "shape", ())
            sizes.update({d: int(n) for d, n in zip(spec.shape or (), shape, strict=False) if isinstance(d, str)})
        result = {}
        for spec in self.outputs:
            shape = tuple(d if isinstance(d, int) else sizes.get(d or "", 1) for d in spec.shape or ())
            if 0 not in shape or spec.dtype is None:
                return None
            result[spec.name] = np.empty(shape, spec.dtype.numpy())
        return result
