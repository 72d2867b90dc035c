"""Whether given inputs fit the inputs of an entry, in one place for calls, calibration data and artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from planish.ir.errors import InputError, did_you_mean
from planish.ir.spec import TensorSpec


def check_inputs(
    specs: Sequence[TensorSpec], inputs: Mapping[str, Any], optional: frozenset[str] = frozenset()
) -> None:
    """Checks names, dtypes, ranks, fixed sizes, ranges of sizes, and that a symbol has one size everywhere.

    Args:
        specs: the inputs of an entry.
        inputs: arrays by name; values without ``dtype`` and ``shape`` (sequences) are only checked by name.
        optional: names that may be given and need not be.

    Raises:
        InputError: the first thing that does not fit, with what was expected.
    """
    names = [spec.name for spec in specs]
    for name in inputs:
        if name not in names and name not in optional:
            raise InputError(f"no input is named '{name}'.{did_you_mean(name, names)} Inputs: {_listed(specs)}.")
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        if spec.name not in inputs:
            raise InputError(f"input '{spec.name}' is missing. Inputs: {_listed(specs)}.")
        value = inputs[spec.name]
        if hasattr(value, "dtype") and hasattr(value, "shape"):
            _check_array(spec, value, sizes)


def _check_array(spec: TensorSpec, value: Any, sizes: dict[str, tuple[int, str]]) -> None:
    shape = tuple(int(n) for n in value.shape)
    if spec.dtype is not None and isinstance(value, np.ndarray) and not _same_dtype(spec, value):
        raise InputError(
            f"input '{spec.name}' is {value.dtype}, expected {spec}; convert it, for example with "
            f".astype('{spec.dtype.name.lower()}')."
        )
    if spec.shape is None:
        return
    if len(shape) != len(spec.shape):
        raise InputError(f"input '{spec.name}' has {len(shape)} dimensions {list(shape)}, expected {spec}.")
    for axis, (expected, size) in enumerate(zip(spec.shape, shape, strict=True)):
        if isinstance(expected, int) and expected != size:
            raise InputError(f"input '{spec.name}' has size {size} in dimension {axis}, expected {expected} ({spec}).")
        if isinstance(expected, str):
            first, where = sizes.setdefault(expected, (size, spec.name))
            if first != size:
                raise InputError(
                    f"input '{spec.name}' has {expected}={size} in dimension {axis}, "
                    f"but '{where}' has {expected}={first}."
                )
    if spec.ranges is not None:
        _check_ranges(spec, shape)


def _check_ranges(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    for axis, (span, size) in enumerate(zip(spec.ranges or (), shape, strict=False)):
        if span is None or (span[0] <= size and (span[1] is None or size <= span[1])):
            continue
        name = spec.shape[axis] if spec.shape is not None else None
        takes = f"{span[0]} or more" if span[1] is None else f"{span[0]} to {span[1]}"
        raise InputError(
            f"input '{spec.name}' has {f'{name}={size}' if name else f'size {size}'} in dimension {axis}; the captured "
            f"model takes {takes} there: give such a size, or capture it again with a wider range in dynamic_shapes."
        )


def _same_dtype(spec: TensorSpec, value: np.ndarray) -> bool:
    assert spec.dtype is not None
    if spec.dtype.name == "STRING":
        return value.dtype.kind in "OUST"
    return bool(value.dtype == spec.dtype.numpy())


def as_batches(data: Any, specs: Sequence[TensorSpec]) -> list[dict[str, np.ndarray]]:
    """Reads calibration data into a list of checked dicts by input name.

    Args:
        data: one batch or a list of batches; a batch is a dict by input name, one array, or a tuple in input
            order. Arrays may be torch tensors.

    Raises:
        InputError: it is none of these, is empty, or does not fit the inputs.
    """
    batches = list(data) if isinstance(data, list) else [data]
    if not batches:
        raise InputError("calibration holds no batch; give at least one.")
    if all(_is_array(item) for item in batches) and len(specs) == len(batches) > 1:
        batches = [tuple(batches)]  # a list of arrays in input order is one batch
    result = []
    for number, batch in enumerate(batches):
        named = _named(batch, specs)
        arrays = {name: _array(value) for name, value in named.items()}
        try:
            check_inputs(specs, arrays)
        except InputError as error:
            raise InputError(f"calibration batch {number}: {error}") from None
        result.append(arrays)
    return result


def _named(batch: Any, specs: Sequence[TensorSpec]) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return dict(batch)
    values = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if len(values) != len(specs):
        raise InputError(f"calibration: a batch has {len(values)} inputs, expected {len(specs)}: {_listed(specs)}.")
    return {spec.name: value for spec, value in zip(specs, values, strict=True)}


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype == object and not all(isinstance(item, str | bytes) for item in array.ravel()):
        raise InputError(f"calibration: {type(value).__name__} does not convert to a numpy array.")
    return array


def _listed(specs: Sequence[TensorSpec]) -> str:
    return "; ".join(map(str, specs)) or "none"
