"""Inputs made up from the specs of a program, with values that its operators accept.

Token ids come from the rows of the table that they index, masks are ones with a padded row, positions count up,
images are normalized noise. Such inputs are good for timing and for comparing two programs; they are not data.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from planish.ir.causal_lm import LENGTHS, cache_layer
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.input_sizes import concrete_shape, require_dims, symbol_sizes
from planish.ir.input_uses import Uses, uses_of
from planish.ir.program import Program, TensorSpec

_WORDS = ("a", "graph", "of", "nodes", "and", "values", "")
#: First operator behind a float input → interval in which it is defined and not steep.
_DOMAINS = {
    "Log": (0.5, 1.5),
    "Sqrt": (0.5, 1.5),
    "Reciprocal": (0.5, 1.5),
    "Pow": (0.5, 1.5),
    "Acosh": (1.1, 3.0),
    "Asin": (-0.9, 0.9),
    "Acos": (-0.9, 0.9),
    "Atanh": (-0.9, 0.9),
}
_SHAPE_LIKE = {("Reshape", 1), ("Expand", 1), ("Tile", 1), ("ConstantOfShape", 0), ("TopK", 1), ("Range", 2)}


def synthesize(
    program: Program, entry: str = "main", *, dims: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """One batch of inputs for an entry.

    Args:
        dims: sizes of symbolic dimensions; the others get 2 (batch), 16 (sequence), 64 (image side) and so on,
            the same symbol the same size everywhere.
        seed: other values for other seeds; equal for equal arguments.

    Raises:
        InputError: `dims` names no dimension of this entry, or holds a size below 1.
        UnsupportedError: an input that is not a tensor (a sequence, an optional).
    """
    specs = program.inputs(entry)
    model = program.entry(entry)
    values = {v.name: v for v in model.graph.inputs}
    require_dims(dims or (), specs)
    for spec in specs:
        if spec.dtype is None:
            raise UnsupportedError(f"input '{spec.name}' is no tensor; values for it can not be made up: give inputs.")
    uses = {spec.name: uses_of(values[spec.name], model) for spec in specs}
    sizes = symbol_sizes(specs, uses, dims)
    batch = {}
    for spec in specs:
        rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
        shape = concrete_shape(spec, uses[spec.name], sizes)
        # NumPy gives a number where an array has no dimensions.
        batch[spec.name] = np.asarray(_values(spec, shape, uses[spec.name], sizes, rng))
    caches = [value for name, value in batch.items() if cache_layer(name) is not None]
    if caches and LENGTHS in batch:  # a step of a causal language model needs room for one more token
        batch[LENGTHS] = np.full_like(batch[LENGTHS], max(0, caches[0].shape[2] - 1))
    return batch


def _values(
    spec: TensorSpec, shape: tuple[int, ...], uses: Uses, sizes: Mapping[str, int], rng: np.random.Generator
) -> np.ndarray:
    assert spec.dtype is not None
    dtype = ir.DataType(int(spec.dtype))
    if int(np.prod(shape, dtype=np.float64)) > 2**31:
        raise InputError(f"input '{spec.name}' would have shape {list(shape)}; give smaller sizes by dims.")
    if dtype == ir.DataType.STRING:
        return np.array(rng.choice(_WORDS, shape), dtype=object).reshape(shape)
    name = spec.name.lower()
    if "mask" in name and "masked" not in name:
        return _mask(dtype, shape, uses)
    if dtype == ir.DataType.BOOL:
        return np.asarray(rng.random(shape) < 0.5) if shape else np.array(True)
    if dtype.is_floating_point():
        return _floats(name, shape, uses, rng).astype(dtype.numpy())
    if dtype.numpy().kind == "c":
        return np.asarray(rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype.numpy())
    return _integers(name, dtype, shape, uses, sizes, rng).astype(dtype.numpy())


def _mask(dtype: ir.DataType, shape: tuple[int, ...], uses: Uses) -> np.ndarray:
    """Ones; the last row of a batch ends in padding. A float mask that is added is zeros (nothing masked)."""
    if dtype.is_floating_point() and ("Add", 0) in uses.operators | {(op, 0) for op, p in uses.operators if p == 1}:
        return np.zeros(shape, dtype.numpy())
    mask = np.ones(shape, dtype.numpy())
    if len(shape) == 2 and shape[0] > 1 and shape[1] > 3:
        mask[-1, shape[1] - shape[1] // 4 :] = 0
    return mask


def _floats(name: str, shape: tuple[int, ...], uses: Uses, rng: np.random.Generator) -> np.ndarray:
    if "timestep" in name:
        return rng.integers(0, 1000, shape).astype(np.float64)
    for operator, position in sorted(uses.operators):
        if operator in _DOMAINS and position == 0:
            low, high = _DOMAINS[operator]
            return np.asarray(rng.uniform(low, high, shape))
    # Clipped, so that no made-up outlier decides what a float16 model can hold.
    return np.clip(np.asarray(rng.standard_normal(shape)), -3.0, 3.0)


def _integers(
    name: str,
    dtype: ir.DataType,
    shape: tuple[int, ...],
    uses: Uses,
    sizes: Mapping[str, int],
    rng: np.random.Generator,
) -> np.ndarray:
    rows = uses.bound(sizes)
    if "position" in name and shape:
        count = np.arange(shape[-1]) % (rows or max(shape[-1], 1))
        return np.broadcast_to(count, shape).copy()
    if rows is not None:
        # The first ids of a vocabulary are mostly padding and other marks; a long table spares them.
        return np.asarray(rng.integers(5 if rows > 100 else 0, max(rows, 1), shape))
    if "length" in name or name.endswith("_len") or ("sequence_lens", 4) in uses.operators:
        longest = max([n for s, n in sizes.items() if "seq" in s or "len" in s or "time" in s], default=4)
        lengths = np.sort(rng.integers(1, longest + 1, shape).reshape(-1))[::-1].copy()
        lengths[:1] = longest  # recurrent operators want the longest first, and one that fills the sequence
        return lengths.reshape(shape)
    if uses.operators & _SHAPE_LIKE:
        return np.ones(shape, np.int64)
    if dtype in (ir.DataType.UINT8, ir.DataType.INT8) and len(shape) >= 2:
        low, high = (0, 256) if dtype == ir.DataType.UINT8 else (-128, 128)
        return np.asarray(rng.integers(low, high, shape))
    top = 2 if dtype.bitwidth < 4 else 5
    return np.asarray(rng.integers(0 if top == 2 else 1, top, shape))
