"""How many tokens each layer merges."""

from __future__ import annotations

from collections.abc import Sequence

from planish.ir.errors import InputError


def counts(r: int | Sequence[int], layers: int, inflection: float = 0.0) -> list[int]:
    """The number of tokens that each of so many layers merges, before it is limited to half of those there are.

    A number with an inflection runs linearly from int(r · (1 - inflection)) in the first layer to what makes the mean
    r in the last one (Bolya et al. 2023, arXiv:2210.09461): -1 merges 2r at first and none at last.

    Raises:
        InputError: a list that does not have a number for each layer.
    """
    if not isinstance(r, int):
        if len(r) != layers:
            raise InputError(f"r lists {len(r)} numbers for a stack of {layers} layers; give one for each layer.")
        return list(r)
    least = int(r * (1 - inflection))
    step = (2 * r - 2 * least) / max(layers - 1, 1)
    return [int(least + step * layer) for layer in range(layers)]
