"""Sizes that inputs are padded to, with what, and what is cut off of outputs. Imports no onnx_ir."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planish.ir.spec import TensorSpec

#: (axis, dimension, entries in front of those of the dimension).
Cut = tuple[int, str, int]


@dataclass(frozen=True)
class Buckets:
    """What padding an entry takes, where it is proved to leave the kept part of each output as it is.

    Attributes:
        sizes: dimension → the sizes that it is padded to, ascending.
        fills: input → what stands in its padding; None: anything.
        outputs: output → what is cut.
    """

    sizes: Mapping[str, tuple[int, ...]]
    fills: Mapping[str, float | None]
    outputs: Mapping[str, tuple[Cut, ...]]

    @property
    def count(self) -> int:
        """How many sets of sizes there are."""
        return math.prod(len(sizes) for sizes in self.sizes.values())

    def padded(self, real: Mapping[str, int]) -> dict[str, int] | None:
        """The next sizes that are no smaller; None if one is beyond the largest, or 0."""
        found = {}
        for dim, sizes in self.sizes.items():
            at = bisect_left(sizes, real[dim])
            if real[dim] < 1 or at == len(sizes):
                return None
            found[dim] = sizes[at]
        return found

    def kept(self, output: str, rank: int, real: Mapping[str, int]) -> tuple[slice, ...]:
        """The part of an output that belongs to inputs of these sizes."""
        cut = {axis: real[dim] + plus for axis, dim, plus in self.outputs.get(output, ())}
        return tuple(slice(0, cut[axis]) if axis in cut else slice(None) for axis in range(rank))

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "sizes": {dim: list(sizes) for dim, sizes in self.sizes.items()},
            "fills": dict(self.fills),
            "outputs": {name: [list(cut) for cut in cuts] for name, cuts in self.outputs.items()},
        }

    @classmethod
    def from_dict(cls, data: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Buckets:
        """Reads what :meth:`to_dict` gave; checks it, since it comes from files.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is something else, or not for these inputs and outputs.
        """
        symbols = {d for spec in inputs for d in spec.shape or () if isinstance(d, str)}
        sizes = {}
        for dim, listed in data["sizes"].items():
            ascending = isinstance(listed, list) and listed and all(type(n) is int and n > 0 for n in listed)
            if dim not in symbols or not ascending or sorted({*listed}) != listed:
                raise ValueError(f"sizes of '{str(dim)[:40]}'")
            sizes[dim] = tuple(listed)
        fills = dict(data["fills"])
        names = {spec.name for spec in inputs}
        if not all(name in names and (v is None or type(v) in (int, float)) for name, v in fills.items()):
            raise ValueError("fills of inputs")
        ranks = {spec.name: len(spec.shape or ()) for spec in outputs}
        cuts = {}
        for name, listed in data["outputs"].items():
            for axis, dim, plus in listed:
                if type(axis) is not int or type(plus) is not int or not 0 <= axis < ranks[name] or dim not in sizes:
                    raise ValueError(f"cuts of '{str(name)[:40]}'")
            cuts[name] = tuple((axis, dim, plus) for axis, dim, plus in listed)
        return cls(sizes, fills, cuts)
