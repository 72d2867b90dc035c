"""NCCL through ctypes: a communicator, and sums on a stream. Loading this module loads no library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from planish.ir.errors import InputError, UnsupportedError

_ID_BYTES = 128
#: ncclDataType_t by name of the dtype; ncclSum (NCCL's nccl.h).
_TYPES = {"float16": 6, "float32": 7, "float64": 8, "bfloat16": 9}
_SUM = 0


class _Id(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * _ID_BYTES),)


@functools.cache
def library() -> ctypes.CDLL:
    """NCCL: that of the system, or of the package nvidia-nccl.

    Raises:
        UnsupportedError: there is none.
    """
    names = ["libnccl.so.2"]
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        names += [str(path) for path in sorted(Path(folder).glob("nccl/lib/libnccl.so.2"))]
    for name in names:
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        found.ncclGetErrorString.restype = ctypes.c_char_p
        return found
    raise UnsupportedError("this machine has no NCCL (libnccl.so.2 is not found); pip install nvidia-nccl-cu13.")


def _check(code: int, doing: str) -> None:
    if code:
        text = library().ncclGetErrorString(code)
        raise UnsupportedError(f"{doing}: NCCL says '{text.decode(errors='replace')}' (error {code}).")


def new_id() -> bytes:
    """What all ranks of one communicator give; made by one of them."""
    made = _Id()
    _check(library().ncclGetUniqueId(ctypes.byref(made)), "making an id")
    return ctypes.string_at(ctypes.addressof(made), _ID_BYTES)


class Communicator:
    """One rank's end, on the CUDA device that is current. Waits until all ranks are there.

    Raises:
        InputError: the rank is not one of them.
        UnsupportedError: there is no NCCL, or it refuses.
    """

    def __init__(self, identity: bytes, rank: int, ranks: int) -> None:
        self._handle = ctypes.c_void_p()
        if not 0 <= rank < ranks or len(identity) != _ID_BYTES:
            raise InputError(f"rank {rank} of {ranks} with an id of {len(identity)} bytes; give one of `new_id`.")
        same = _Id.from_buffer_copy(identity)
        init = library().ncclCommInitRank
        init.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, _Id, ctypes.c_int]
        _check(init(ctypes.byref(self._handle), ranks, same, rank), f"joining as rank {rank} of {ranks}")

    def all_reduce(self, tensor: Any, stream: int) -> None:
        """Adds a contiguous CUDA tensor over all ranks, in place, on a stream (its address).

        Raises:
            InputError: the tensor is not contiguous, or of a dtype without a sum.
        """
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in _TYPES or not tensor.is_contiguous():
            raise InputError(f"a sum over ranks takes a contiguous floating-point tensor, not {name}, {tensor.shape}.")
        address = ctypes.c_void_p(tensor.data_ptr())
        code = library().ncclAllReduce(
            address, address, ctypes.c_size_t(tensor.numel()), _TYPES[name], _SUM, self._handle, ctypes.c_void_p(stream)
        )
        _check(code, "a sum over ranks")

    def close(self) -> None:
        """Leaves. What was begun must be done on the device before."""
        if self._handle:
            _check(library().ncclCommDestroy(self._handle), "leaving")
            self._handle = ctypes.c_void_p()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is begun inside is begun at its end, by all ranks of one thread: none of them is waited for before."""
    _check(library().ncclGroupStart(), "beginning a group")
    try:
        yield
    finally:
        _check(library().ncclGroupEnd(), "beginning what a group holds")


def all_of_one_process(devices: Sequence[int]) -> list[Communicator]:
    """The communicators of ranks that one thread moves on, by the numbers of their GPUs.

    Raises:
        UnsupportedError: there is no NCCL, or it refuses.
    """
    import torch

    identity = new_id()
    made = []
    with together():
        for rank, device in enumerate(devices):
            with torch.cuda.device(device):
                torch.cuda.current_stream()
                made.append(Communicator(identity, rank, len(devices)))
    return made
