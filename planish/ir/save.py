"""Models and their weights on disk: streamed, aligned, renamed into place only when complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO

import onnx
import onnx_ir as ir

from planish.ir.confined import checked_write_path
from planish.ir.errors import InputError, PlanishError
from planish.ir.external import stored_bytes
from planish.ir.program import Program
from planish.ir.serialize import PROTO_LIMIT, inline, point_at, to_proto_without_weights

_ALIGN = 64  # bytes: a cache line, and what vector loads want
_PAGE = 4096  # bytes: tensors of at least _PAGE_FROM bytes start on a page, so that they can be mapped by themselves
_PAGE_FROM = 1 << 20
_CHUNK = 1 << 24  # bytes handed to the system at once


def write_weights(file: IO[bytes], weights: Mapping[str, ir.TensorProtocol]) -> dict[str, tuple[int, int]]:
    """Writes tensors to an open file and returns name → (offset, length) in bytes, for :func:`point_at`.

    Each tensor object is written once, however many names it has, at a multiple of 64 bytes (4096 for large ones).
    """
    layout: dict[str, tuple[int, int]] = {}
    written: dict[int, tuple[int, int]] = {}
    position = file.tell()
    for name, tensor in weights.items():
        if id(tensor) not in written:
            align = _PAGE if tensor.nbytes >= _PAGE_FROM else _ALIGN
            gap = -position % align
            file.write(bytes(gap))
            position += gap
            data = memoryview(stored_bytes(tensor).data)
            for start in range(0, len(data), _CHUNK):
                file.write(data[start : start + _CHUNK])
            written[id(tensor)] = (position, len(data))
            position += len(data)
        layout[name] = written[id(tensor)]
    return layout


def save_model(
    model: Program | ir.Model,
    path: str | os.PathLike[str],
    *,
    weights_file: str | None = "weights.bin",
    atomic: bool = True,
    threshold: int = 1024,
) -> list[str]:
    """Writes a model and its weights; returns the paths written.

    Args:
        model: a program with one entry, or a model; not changed, and may be mapped from the files being replaced.
        path: the ``.onnx`` file; its folder must exist.
        weights_file: file for the weights above `threshold` bytes, relative to the folder of `path`. None puts them
            into the ``.onnx`` file, which can hold 2 GiB.
        atomic: write to temporary files in the same folder and rename them once all are complete.

    Raises:
        InputError: the place can not be written, or the disk is full; nothing half-written is left.
        PlanishError: the model is too large for one file.
    """
    path = os.fspath(path)
    folder, name = os.path.split(os.path.abspath(path))
    proto, weights = to_proto_without_weights(model.main if isinstance(model, Program) else model, threshold)
    outputs: list[tuple[str, Callable[[IO[bytes]], object]]] = []
    if weights_file is None:
        inline(proto, weights)
    elif weights:
        target = checked_write_path(folder, weights_file)
        if target == os.path.join(folder, name):
            raise InputError(f"'{path}': the weights file must not be the model file.")
        outputs.append((target, lambda file: point_at(proto, weights_file, write_weights(file, weights))))
    outputs.append((checked_write_path(folder, name), lambda file: file.write(_message(proto))))
    with _replacing([target for target, _ in outputs], atomic) as names:
        for temporary, (_, write) in zip(names, outputs, strict=True):
            with open(temporary, "wb") as file:
                write(file)
    return [target for target, _ in outputs]


@contextmanager
def _replacing(targets: list[str], atomic: bool) -> Iterator[list[str]]:
    """Yields names to write to; renames all to `targets` at the end, or leaves nothing behind on any failure."""
    names: list[str] = []
    try:
        for target in targets:
            if atomic:
                fd, name = tempfile.mkstemp(prefix=".planish-", dir=os.path.dirname(target))
                os.close(fd)
                names.append(name)
            else:
                names.append(target)
        yield names
        mask = os.umask(0)
        os.umask(mask)
        for name, target in zip(names, targets, strict=True):
            os.chmod(name, 0o666 & ~mask)  # mkstemp makes files that only their owner can read
            if atomic:
                os.replace(name, target)
    except BaseException as error:
        for name in names:
            with suppress(OSError):
                os.unlink(name)
        if isinstance(error, OSError):
            raise InputError(
                f"can not write '{targets[-1]}': {error.strerror or error}; nothing was written."
            ) from None
        raise


def _message(proto: onnx.ModelProto) -> bytes:
    size = proto.ByteSize()
    if size > PROTO_LIMIT:
        raise PlanishError(f"the model is {size} bytes without its weights; one ONNX file can hold 2 GiB.")
    data: bytes = proto.SerializeToString()
    return data
