"""The weights of a unit in one block: one copy brings them to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.external import stored_bytes
from planish.runtime.offload.device import COPY, Device, flat
from planish.runtime.offload.pieces import Piece

_ALIGN = 256


class PackedWeights:
    """Where each weight of a unit lies in its block.

    Attributes:
        nbytes: of the block.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._tensors: dict[int, tuple[ir.TensorProtocol, int]] = {}
        self.nbytes = 0
        for piece in pieces:
            for tensor in piece.weights:
                if id(tensor) not in self._tensors:
                    self._tensors[id(tensor)] = tensor, self.nbytes
                    self.nbytes += tensor.nbytes + -tensor.nbytes % _ALIGN
        self._host: np.ndarray | None = None

    def offsets(self, piece: Piece) -> list[int]:
        """Where the weights of a piece lie, in the order of its slots."""
        return [self._tensors[id(tensor)][1] for tensor in piece.weights]

    def host(self, device: Device) -> np.ndarray:
        """The block in memory that the device copies from directly; made once."""
        if self._host is None:
            block = device.host(self.nbytes)
            for tensor, offset in self._tensors.values():
                block[offset : offset + tensor.nbytes] = stored_bytes(tensor)
            self._host = block
        return self._host

    def load(self, device: Device, address: int) -> None:
        """Puts the copy to an address into the copy stream."""
        device.upload(address, self.host(device).ctypes.data, flat(self.nbytes), COPY)

    def forget(self) -> None:
        """Lets the block on the host go; it is made again where it is needed."""
        self._host = None


def value_bytes(value: ir.Value, sizes: dict[str, int]) -> int:
    """Size of a value at given sizes of the symbols."""
    return int(np.prod(shape_of(value, sizes), dtype=np.int64)) * itemsize(value)


def itemsize(value: Any) -> int:
    """Bytes of an element; packed types count as one."""
    return max(int(value.dtype.bitwidth) // 8, 1)


def shape_of(value: ir.Value, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of a value at given sizes of the symbols.

    Raises:
        UnsupportedError: it is not known.
    """
    from planish.ir.errors import UnsupportedError
    from planish.ir.input_sizes import evaluate_dim

    if value.shape is None or value.dtype is None:
        raise UnsupportedError(f"the shape of '{value.name}' is not known, and it goes from layer to layer.")
    dims = [d if isinstance(d, int) else evaluate_dim(d.value or "?", sizes) for d in value.shape]
    if any(d is None for d in dims):
        raise UnsupportedError(f"the shape of '{value.name}' is {value.shape}, which can not be told from the inputs.")
    return tuple(int(d) for d in dims if d is not None)
