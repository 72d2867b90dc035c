"""Sizes for the symbolic dimensions of a graph's inputs, when the user gave none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from planish.ir.errors import InputError, unknown
from planish.ir.input_uses import Uses, patch_image_size
from planish.ir.program import TensorSpec

BATCH, SEQUENCE, PAST, IMAGE, OTHER = 2, 16, 8, 64, 4
_BATCH_NAME = re.compile(r"batch|^[nb]$|^bs$|^bsz$", re.IGNORECASE)
_PAST_NAME = re.compile(r"past|cache", re.IGNORECASE)
_TOTAL_NAME = re.compile(r"total", re.IGNORECASE)
_SEQUENCE_NAME = re.compile(r"seq|len|token|time|frame|step|word|^[lst]$", re.IGNORECASE)
_IMAGE_NAME = re.compile(r"height|width|^[hw]$|image", re.IGNORECASE)
_AUDIO_NAME = re.compile(r"waveform|input_values|audio|wav|samples", re.IGNORECASE)


def require_dims(names: Iterable[str], specs: Iterable[TensorSpec]) -> None:
    """Raises InputError (with a did-you-mean) for the first name that is in no dimension of the inputs."""
    symbols = {d for spec in specs for d in spec.shape or () if isinstance(d, str)}
    for name in names:
        if name not in symbols and not any(re.search(rf"\b{re.escape(name)}\b", s) for s in symbols):
            raise unknown("dimension", name, symbols)


def symbol_sizes(
    specs: list[TensorSpec], uses: Mapping[str, Uses], given: Mapping[str, int] | None = None
) -> dict[str, int]:
    """A size for every plain symbol in the shapes of `specs`; the same symbol has one size everywhere.

    Raises:
        InputError: a size in `given` is not positive.
    """
    sizes: dict[str, int] = {}
    for name, size in (given or {}).items():
        if not isinstance(size, int) or size < 1:
            raise InputError(f"size of dimension '{name}' is {size!r}; it must be a whole number of at least 1.")
        sizes[name] = size
    totals = []
    for spec in specs:
        for axis, dim in enumerate(spec.shape or ()):
            if not isinstance(dim, str) or dim in sizes or not dim.isidentifier():
                continue
            if _TOTAL_NAME.search(dim):
                totals.append(dim)
            else:
                sizes[dim] = guess_size(spec, axis, uses.get(spec.name))
    for name in totals:
        past = next((n for s, n in sizes.items() if _PAST_NAME.search(s)), 0)
        current = next((n for s, n in sizes.items() if _is_sequence(s) and not _PAST_NAME.search(s)), SEQUENCE)
        sizes.setdefault(name, past + current)
    for spec in specs:  # a symbol may be limited where it occurs again
        for axis, dim in enumerate(spec.shape or ()):
            if isinstance(dim, str) and dim in sizes and dim not in (given or {}):
                sizes[dim] = spec.clamp(axis, sizes[dim])
    return sizes


def concrete_shape(spec: TensorSpec, uses: Uses | None, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of `spec` in numbers. Expressions such as ``past + seq`` are evaluated from their symbols."""
    if spec.shape is None:
        return (BATCH,)
    return tuple(_concrete(spec, axis, dim, uses, sizes) for axis, dim in enumerate(spec.shape))


def _concrete(spec: TensorSpec, axis: int, dim: int | str | None, uses: Uses | None, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    if dim is None:
        return guess_size(spec, axis, uses)
    if dim in sizes:
        return sizes[dim]
    known = evaluate_dim(dim, sizes)
    return known if known is not None and known > 0 else guess_size(spec, axis, uses)


def evaluate_dim(dim: str, sizes: Mapping[str, int]) -> int | None:
    """The value of a symbol or an expression of symbols; None if one of them is unknown or it does not parse."""
    if dim in sizes:
        return sizes[dim]
    if dim.isidentifier():
        return None
    try:
        value = ir.SymbolicDim(dim).evaluate(dict(sizes))
    except (ValueError, TypeError, KeyError, ZeroDivisionError, AttributeError):
        return None
    return value if isinstance(value, int) else None


def guess_size(spec: TensorSpec, axis: int, uses: Uses | None) -> int:
    """A size for one dynamic axis that is in its range, by its symbol's name first and by where it stands then."""
    return spec.clamp(axis, _likely_size(spec, axis, uses))


def _likely_size(spec: TensorSpec, axis: int, uses: Uses | None) -> int:
    dim = (spec.shape or ())[axis]
    symbol = dim if isinstance(dim, str) else ""
    rank = len(spec.shape or ())
    is_float = spec.dtype is not None and ir.DataType(int(spec.dtype)).is_floating_point()
    if rank == 4 and axis == 1 and uses is not None and uses.convolutions:
        return _channels(uses.convolutions[0])
    if _BATCH_NAME.search(symbol):
        return BATCH
    if _PAST_NAME.search(symbol) and not _TOTAL_NAME.search(symbol):
        return PAST
    is_image = rank == 4 and axis >= 2 and (is_float or spec.dtype == ir.DataType.UINT8)
    if is_image and uses is not None and uses.convolutions:
        return patch_image_size(uses.convolutions[0]) or IMAGE
    if _IMAGE_NAME.search(symbol):
        return IMAGE
    if rank == 4 and axis == 2 and _PAST_NAME.search(spec.name):
        return PAST
    if axis == 0 and not _is_sequence(symbol):
        return BATCH
    if _is_sequence(symbol) or axis == 1:
        if is_float and rank == 2 and axis == 1 and _AUDIO_NAME.search(spec.name):
            return 16000
        return SEQUENCE if rank <= 3 or _is_sequence(symbol) else OTHER
    if is_image and not _PAST_NAME.search(spec.name):
        return SEQUENCE
    return OTHER


def _is_sequence(symbol: str) -> bool:
    # torch names its symbols s0, s1, …; these say nothing.
    return bool(_SEQUENCE_NAME.search(symbol)) and not re.fullmatch(r"s\d+", symbol)


def _channels(convolution: ir.Node) -> int:
    weight = convolution.inputs[1]
    group = convolution.attributes.get("group")
    inner = weight.shape[1] if weight is not None and weight.shape is not None and len(weight.shape) > 1 else 3
    return (inner if isinstance(inner, int) else 3) * (int(group.value) if group is not None else 1)
