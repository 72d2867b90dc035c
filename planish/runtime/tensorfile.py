"""Safetensors files, written from buffers without a copy and read without trust.

Format: https://github.com/huggingface/safetensors#format. Header length (8 bytes, little endian), a JSON header, the
data without holes. A header padded with spaces puts the data at a page boundary, so that one file serves both as
safetensors and as ONNX external data that a runtime maps into memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.ir.errors import ArtifactError
from planish.ir.spec import ElementType

#: Where data begins in a file that a runtime maps into memory, in bytes.
PAGE = 4096
_MAX_HEADER = 100 << 20
_CODES = {
    ElementType.DOUBLE: "F64",
    ElementType.FLOAT: "F32",
    ElementType.FLOAT16: "F16",
    ElementType.BFLOAT16: "BF16",
    ElementType.FLOAT8E4M3FN: "F8_E4M3",
    ElementType.FLOAT8E5M2: "F8_E5M2",
    ElementType.INT64: "I64",
    ElementType.INT32: "I32",
    ElementType.INT16: "I16",
    ElementType.INT8: "I8",
    ElementType.UINT64: "U64",
    ElementType.UINT32: "U32",
    ElementType.UINT16: "U16",
    ElementType.UINT8: "U8",
    ElementType.BOOL: "BOOL",
    ElementType.COMPLEX64: "C64",
}
_TYPES = {code: element for element, code in _CODES.items()}


@dataclass(frozen=True)
class Item:
    """A tensor to write: `raw` gives its bytes as uint8 when they are needed."""

    name: str
    element: int
    shape: tuple[int, ...]
    nbytes: int
    raw: Callable[[], np.ndarray]

    @classmethod
    def of(cls, name: str, array: np.ndarray, element: int) -> Item:
        data = np.ascontiguousarray(array).reshape(-1)
        return cls(name, element, array.shape, array.nbytes, lambda: data.view(np.uint8))


def storable(element: int) -> bool:
    """Whether safetensors has a dtype for it; other elements can be stored as their bytes."""
    return element in _CODES


def layout(items: Sequence[Item], align: int = 64) -> tuple[bytes, list[Item], dict[str, tuple[int, int]]]:
    """The header, the items in file order, and name → (offset in the file, length), in bytes.

    Tensors of a multiple of 64 bytes come first, so that they (nearly all large ones are such) lie at cache lines;
    then the others, wide elements first, so that each lies at a multiple of its element size.
    """
    order = sorted(items, key=lambda i: (i.nbytes % 64 != 0, -_width(i)))
    header: dict[str, Any] = {"__metadata__": {"format": "planish"}}
    ranges, at = {}, 0
    for item in order:
        code = _CODES.get(ElementType(item.element))
        # Without a dtype in the format, the stored bytes stand for themselves.
        described = (code, list(item.shape)) if code else ("U8", [item.nbytes])
        header[item.name] = {"dtype": described[0], "shape": described[1], "data_offsets": [at, at + item.nbytes]}
        ranges[item.name] = (at, item.nbytes)
        at += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % align)
    start = len(text) + 8
    return len(text).to_bytes(8, "little") + text, order, {n: (start + a, length) for n, (a, length) in ranges.items()}


def read(data: bytes, where: str) -> dict[str, np.ndarray]:
    """Tensors of a file, as read-only arrays over `data`.

    Raises:
        ArtifactError: the header is not one of this format, or does not describe the data exactly.
    """
    try:
        return _read(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"'{where}' is not a safetensors file: {error}.") from error


def _read(data: bytes) -> dict[str, np.ndarray]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _MAX_HEADER):
        raise ValueError("the header is longer than the file")
    header: Mapping[str, Any] = json.loads(data[8 : 8 + length].decode("utf-8"))
    start, arrays = 8 + length, {}
    at = 0
    for name, info in sorted(header.items(), key=lambda kv: kv[1].get("data_offsets", [0, 0])):
        if name == "__metadata__":
            continue
        dtype = np.dtype(_TYPES[info["dtype"]].numpy())
        shape = tuple(int(d) for d in info["shape"])
        begin, end = info["data_offsets"]
        count = math.prod(shape)
        if any(d < 0 for d in shape) or begin != at or end - begin != count * dtype.itemsize:
            raise ValueError(f"tensor '{name}' does not fit its range")
        at = end
        if start + end > len(data):
            raise ValueError(f"tensor '{name}' ends after the file")
        arrays[name] = np.frombuffer(data, dtype, count, start + begin).reshape(shape)
    if start + at != len(data):
        raise ValueError("there are bytes after the last tensor")
    return arrays


def _width(item: Item) -> int:
    return ElementType(item.element).numpy().itemsize if item.element in _CODES else 1
