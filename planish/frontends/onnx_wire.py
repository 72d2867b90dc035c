"""Takes the large weights out of an ONNX file before protobuf sees it.

Protobuf would hold every weight twice while parsing and ends at 2 GiB. This reads just enough of the wire format
(https://protobuf.dev/programming-guides/encoding) to find the raw data of the main graph's initializers, reads each
once into an aligned buffer, and leaves a small message. Anything unusual is left to protobuf to judge.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from planish.frontends.onnx_tensors import DETACH_BYTES, Tensors, fits
from planish.ir.errors import InputError
from planish.ir.external import tensor_from_buffer

MIN_FILE = 1 << 20  #: smaller files are parsed whole
_GRAPH, _INITIALIZER = 7, 5  # field numbers in ModelProto and GraphProto
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14  # in TensorProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class _Field(NamedTuple):
    """A field on the wire; offsets in bytes of its tag, its value, and the byte after it."""

    number: int
    kind: int
    start: int
    value: int
    end: int


class _Weight(NamedTuple):
    outer: _Field
    raw: _Field


class _Odd(Exception):
    """Not the plain layout that this module handles."""


def split_weights(file: IO[bytes], size: int, tensors: Tensors) -> bytes | None:
    """The message of an open model file without its large initializers, which go to `tensors`.

    None if the file is small or not laid out plainly; protobuf then parses it whole.
    """
    if size < MIN_FILE:
        return None
    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
        try:
            graph, weights = _find(data, size)
        except _Odd:
            return None
    if not weights:
        return None
    body: list[bytes] = []
    position = graph.value
    for weight in weights:
        message = _detach(file, weight, tensors)
        if message is not None:
            body += [_read(file, position, weight.outer.start), b"\x2a", _varint(len(message)), message]
            position = weight.outer.end
    body.append(_read(file, position, graph.end))
    inner = b"".join(body)
    return b"".join([_read(file, 0, graph.start), b"\x3a", _varint(len(inner)), inner, _read(file, graph.end, size)])


def _find(data: mmap.mmap, size: int) -> tuple[_Field, list[_Weight]]:
    graphs = [f for f in _fields(data, 0, size) if f.number == _GRAPH]
    if len(graphs) != 1 or graphs[0].kind != _BYTES:
        raise _Odd
    weights = []
    for field in _fields(data, graphs[0].value, graphs[0].end):
        if field.number != _INITIALIZER or field.kind != _BYTES or field.end - field.value <= DETACH_BYTES:
            continue
        parts = list(_fields(data, field.value, field.end))
        raw = [p for p in parts if p.number == _RAW_DATA]
        external = any(p.number in (_EXTERNAL_DATA, _DATA_LOCATION) for p in parts)
        if len(raw) == 1 and raw[0].kind == _BYTES and not external and raw[0].end - raw[0].value > DETACH_BYTES:
            weights.append(_Weight(field, raw[0]))
    return graphs[0], weights


def _detach(file: IO[bytes], weight: _Weight, tensors: Tensors) -> bytes | None:
    """The message of one initializer without its data; None if protobuf and the checks should see it as it is."""
    header = onnx.TensorProto()
    outer, raw = weight.outer, weight.raw
    try:
        header.ParseFromString(_read(file, outer.value, raw.start) + _read(file, raw.end, outer.end))
    except DecodeError:
        return None
    length = raw.end - raw.value
    if not fits(header, length):
        return None
    buffer = np.empty(length, np.uint8)
    file.seek(raw.value)
    if file.readinto(buffer.data) != length:  # type: ignore[attr-defined]
        raise InputError("the file became shorter while it was read.")
    dtype = ir.DataType(header.data_type)
    tensors.detach(header, tensor_from_buffer(buffer, dtype, tuple(header.dims), header.name))
    data: bytes = header.SerializeToString()
    return data


def _read(file: IO[bytes], start: int, end: int) -> bytes:
    file.seek(start)
    data = file.read(end - start)
    if len(data) != end - start:
        raise InputError("the file became shorter while it was read.")
    return data


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[_Field]:
    while position < end:
        start = position
        tag, position = _read_varint(data, position, end)
        kind = tag & 7
        if kind == _VARINT:
            value = position
            _, position = _read_varint(data, position, end)
        elif kind == _BYTES:
            length, value = _read_varint(data, position, end)
            position = value + length
        elif kind in (_FIXED64, _FIXED32):
            value, position = position, position + (8 if kind == _FIXED64 else 4)
        else:
            raise _Odd
        if position > end or not tag >> 3:
            raise _Odd
        yield _Field(tag >> 3, kind, start, value, position)


def _read_varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 64, 7):
        if position >= end:
            raise _Odd
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
    raise _Odd


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
