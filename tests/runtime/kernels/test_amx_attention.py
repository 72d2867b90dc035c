"""Attention in bfloat16 on AMX: against float64 attention over rounded operands."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from planish.runtime.kernels.amx_attention import FlashAttention
from planish.runtime.kernels.template import aligned, function
from tests.runtime.kernels.tiles import require_tiles

#: What rounding a softmax weight to bfloat16 costs, relative to it, and float32 sums beside that.
WEIGHT = 2.0**-8


@pytest.fixture(autouse=True)
def _tiles() -> None:
    require_tiles()


@cache
def compiled(template: FlashAttention) -> Any:
    return function(template)


def run(template: FlashAttention, inputs: list[np.ndarray]) -> np.ndarray:
    """The kernel's output, from memory full of NaN: what is not written shows."""
    y = aligned(np.full(inputs[0].shape, np.nan, np.float32))
    compiled(template)(*map(aligned, inputs), y)
    return y


def check(template: FlashAttention, inputs: list[np.ndarray]) -> None:
    """Within what rounded weights allow: 2**-8 of the same attention over absolute values."""
    got, want = run(template, inputs), template.reference(*inputs)
    absolute = template.reference(*inputs[:2], np.abs(inputs[2]), *inputs[3:])
    assert np.all(np.abs(got - want) <= WEIGHT * absolute + 1e-6), np.abs(got - want).max()


def inputs_of(
    template: FlashAttention, batch: int, queries: int, keys: int, heads: tuple[int, int], *more: Any
) -> list[np.ndarray]:
    rng = np.random.default_rng()
    d = template.head_size
    shapes = ((batch, queries, heads[0] * d), (batch, keys, heads[1] * d), (batch, keys, heads[1] * d))
    found = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    rest = [np.asarray(item) for item in more]
    return [*found, *(item for item in rest if item.dtype == bool), *_settings(template, rest)]


def _settings(template: FlashAttention, rest: list[np.ndarray]) -> list[np.ndarray]:
    numbers = [item for item in rest if item.dtype != bool]
    scale = np.array([template.head_size**-0.5], np.float32)
    return [scale, *(item.astype(np.int64) for item in numbers)]


SIZES = [(1, 1, 1), (2, 33, 70), (1, 32, 32), (3, 5, 129), (1, 70, 300), (2, 0, 4), (1, 4, 0), (0, 3, 3)]


@pytest.mark.parametrize("head_size", [64, 20, 1])
def test_sizes_and_grouped_heads(head_size: int) -> None:
    template = FlashAttention(head_size)
    for batch, queries, keys in SIZES:
        for heads in ((1, 1), (6, 2)):
            check(template, inputs_of(template, batch, queries, keys, heads))


def test_causal_with_any_mask() -> None:
    template = FlashAttention(64, True, "bool")
    rng = np.random.default_rng()
    for batch, queries, keys in SIZES:
        for offset in (0, keys - queries, -2):
            for shape in ((batch, 1, 1, keys), (1, 2, queries, keys), (1, 1, queries, 1), (1, 1, 1, 1)):
                mask = rng.random(shape) < 0.6
                check(template, inputs_of(template, batch, queries, keys, (2, 1), mask, [offset]))


def test_queries_without_keys_give_zeros() -> None:
    template = FlashAttention(64, True, "bool")
    mask = np.arange(40) >= 7
    y = run(template, inputs_of(template, 1, 40, 40, (2, 2), mask[None, None, None], [0]))
    assert not y[:, :7].any() and np.all(y[:, 7:].any(-1))


@pytest.mark.parametrize("scale", [0.0, -0.3, 30.0])
def test_scales(scale: float) -> None:
    template = FlashAttention(64)
    inputs = inputs_of(template, 1, 40, 200, (2, 2))
    inputs[3] = np.array([scale], np.float32)
    # Scores of thousands: sums of 64 products in another order move an exponent.
    got, want = run(template, inputs), template.reference(*inputs)
    assert np.linalg.norm(got - want) <= 4e-3 * np.linalg.norm(want)


def test_maximum_that_rises_late() -> None:
    """What was summed before is scaled down, to nothing in the end."""
    template = FlashAttention(64)
    inputs = inputs_of(template, 1, 40, 600, (1, 1))
    inputs[1] *= np.linspace(0.01, 6, 600, dtype=np.float32)[None, :, None]
    check(template, inputs)


def test_nan_stays_in_its_query_and_its_head() -> None:
    template = FlashAttention(64)
    inputs = inputs_of(template, 1, 40, 50, (2, 2))
    inputs[0][0, 33, 5] = np.nan
    y = run(template, inputs)
    assert np.isnan(y[0, 33, :64]).all()
    y[0, 33, :64] = 0
    assert np.isfinite(y).all()


def test_operands_are_rounded_and_sums_are_not() -> None:
    """Far from exact attention by more than float32, and by no more than bfloat16."""
    from planish.ir.ops.flash_attention import attention

    template = FlashAttention(64)
    inputs = inputs_of(template, 1, 64, 256, (2, 2))
    exact = attention(inputs[:3], (2, 2), float(inputs[3][0]), np.ones((64, 256), bool))
    error = np.linalg.norm(run(template, inputs) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 1e-2


@pytest.mark.parametrize(("settings", "message"), [((0,), "head_size is 0"), ((64, False, "float"), "not 'float'")])
def test_wrong_settings(settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlashAttention(*settings)
