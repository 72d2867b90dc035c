"""Sessions of pieces, run on addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from planish.ir.errors import UnsupportedError
from planish.ir.target import Target
from planish.runtime import flush
from planish.runtime.offload.device import Device
from planish.runtime.offload.pieces import Piece
from planish.runtime.offload.weights import shape_of
from planish.runtime.ort import run_error, with_bodies
from planish.runtime.ort_device import read_on_host
from planish.runtime.ort_options import session_options

#: Operands that kernels of GPUs read on the host: sizes.
_ON_HOST = {
    "GroupQueryAttention": (6,), "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Tile": (1,),
    "Unsqueeze": (1,), "Squeeze": (1,), "Range": (0, 1, 2), "ConstantOfShape": (0,),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a value is: on the device, or on the host."""

    address: int
    on_host: bool = False


class PieceSession:
    """The session that pieces of one structure share.

    Args:
        piece: one of them.
        device: None: on the host, with the CPU provider.
        workspace: bytes that it may take on the device.
    """

    def __init__(self, piece: Piece, device: Device | None, target: Target, workspace: int = 0) -> None:
        graph = piece.model.graph
        self._inputs = [(v.name or "", v) for v in graph.inputs]
        self._outputs = [(v.name or "", v) for v in graph.outputs]
        self._kind = "cpu" if device is None else device.kind
        options = session_options(target, None, True)
        model = ir.to_proto(with_bodies(piece.model)).SerializeToString()
        if device is None:
            from planish.runtime.ort import create_session

            self.session, self._options = create_session(model, options, piece.model), None
        else:
            self.session, self._options = device.session(model, options, workspace)
            self._require_kernels()

    def _require_kernels(self) -> None:
        """Refuses a piece that runs on the host in part: what is read there would be copied once, when it is bound."""
        found = read_on_host(self.session, self._kind)
        for name, value in self._inputs:
            if name not in found or reads_on_host(value) or not value.uses():  # what nothing reads is nowhere
                continue
            users = sorted({f"{user.op_type} of {user.inputs[at].dtype}" for user, at in value.uses()})  # type: ignore
            raise UnsupportedError(
                f"ONNX Runtime has no kernel on the GPU for {', '.join(users)}, and a memory budget needs one: give "
                "dtype=float16 in the target, or leave memory= out."
            )

    def bind(
        self, inputs: Sequence[Place], weights: Sequence[int], outputs: Sequence[Place], sizes: dict[str, int]
    ) -> Callable[[], None]:
        """A function that runs on these addresses, at these sizes of the symbols."""
        binding = self.session.io_binding()
        places = [*inputs, *(Place(address) for address in weights)]
        for (name, value), place in zip(self._inputs, places, strict=True):
            kind = "cpu" if place.on_host else self._kind
            binding.bind_input(name, kind, 0, int(value.dtype or 0), shape_of(value, sizes), place.address)
        for (name, value), place in zip(self._outputs, outputs, strict=True):
            kind = "cpu" if place.on_host else self._kind
            binding.bind_output(name, kind, 0, int(value.dtype or 0), shape_of(value, sizes), place.address)

        def run() -> None:
            try:
                flush.begin()
                self.session.run_with_iobinding(binding, self._options)
            except Exception as error:
                raise run_error(error) from error
            finally:
                flush.end()

        return run


def reads_on_host(value: ir.Value) -> bool:
    """Whether all that reads an input wants it on the host."""
    uses = [(user, at) for user, at in value.uses()]
    return bool(uses) and all(
        at in _ON_HOST.get(user.op_type, ()) and (not user.domain or user.op_type == "GroupQueryAttention")
        for user, at in uses
    )


def address_of(array: np.ndarray) -> int:
    """Where a contiguous array begins."""
    assert array.flags.c_contiguous
    return int(array.ctypes.data)
