"""Segment GEMM against float64: skewed and empty segments, gather, scatter, scale, on every level of this processor."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from planish.ir.errors import InputError
from planish.runtime.kernels.segment_gemm import SegmentGemm, pack, panel, tile_list
from planish.runtime.kernels.template import aligned, function
from tests.runtime.kernels.levels import VECTORS, level

pytest.importorskip("tvm")

#: Each kind of scatter and of weights, with gather and scale in turns.
COMBINATIONS = tuple(enumerate(itertools.product(("none", "store", "add"), (False, True))))
TEMPLATES = {
    name: tuple(
        SegmentGemm(bool((i + turn) % 2), scatter, bool((i + turn) // 2 % 2), packed)  # type: ignore[arg-type]
        for i, (scatter, packed) in COMBINATIONS
    )
    for turn, name in enumerate(VECTORS)
}
#: (sources, K, N, rows of each segment, limit of a tile)
CASES = (
    (9, 7, 5, (3, 0, 4, 1), 96),
    (40, 64, 64, (70, 1, 0, 29, 6), 12),
    (5, 1, 1, (1,), 1),
    (30, 33, 97, (13, 17), 7),
    (4, 0, 3, (2, 2), 96),
    (6, 16, 130, (0, 0, 5), 2),
    (3, 8, 8, (0, 0), 96),
)


@pytest.mark.parametrize(("template", "name"), [(t, name) for name in VECTORS for t in TEMPLATES[name]], ids=str)
def test_against_float64(template: SegmentGemm, name: str) -> None:
    cpu, rng = level(name), np.random.default_rng()
    call = function(template, cpu)
    for sources, depth, columns, counts, limit in CASES:
        rows = sum(counts)
        if not template.gather:
            sources = rows
        pointers = np.concatenate([[0], np.cumsum(counts)])
        x = aligned(rng.standard_normal((sources, depth)).astype("f"))
        weight = rng.standard_normal((len(counts), depth, columns)).astype("f")
        inputs = [
            x,
            aligned(pack(weight, panel(cpu)) if template.packed else weight),
            aligned(tile_list(pointers, limit)),
        ]
        if template.gather:
            inputs.append(aligned(rng.integers(0, sources, rows)))
        targets = rows
        if template.scatter == "store":
            targets = rows + 3
            inputs.append(aligned(rng.permutation(targets)[:rows]))
        elif template.scatter == "add":
            targets = rows // 3 + 1
            inputs.append(aligned(rng.integers(0, targets, rows)))
        if template.scale:
            inputs.append(aligned(rng.standard_normal(rows).astype("f")))
        # Where nothing is added, what was there must not matter.
        start = 7.0 if template.scatter != "none" else np.nan
        y = aligned(np.full((targets, columns), start, np.float32))
        want = template.reference(*inputs, y)
        call(*inputs, y)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=2e-5 * max(1, depth) ** 0.5, err_msg=f"{depth} x {columns}")


def test_adding_gives_the_same_bits_in_every_run() -> None:
    template, rng = SegmentGemm(gather=True, scatter="add"), np.random.default_rng()
    call, weight = function(template), aligned(rng.standard_normal((3, 20, 100)).astype("f"))
    inputs = [
        aligned(rng.standard_normal((50, 20)).astype("f")),
        weight,
        aligned(tile_list(np.array([0, 100, 100, 240]))),
    ]
    inputs += [aligned(rng.integers(0, 50, 240)), aligned(rng.integers(0, 9, 240))]
    results = []
    for _ in range(3):
        y = aligned(np.zeros((9, 100), np.float32))
        call(*inputs, y)
        results.append(y)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_tiles_cover_every_row_once_and_are_balanced() -> None:
    rng = np.random.default_rng()
    counts = rng.integers(0, 50, 40) * rng.integers(0, 2, 40)
    counts[3] = 10_000
    pointers = np.concatenate([[0], np.cumsum(counts)])
    tiles = tile_list(pointers, 100)
    owner = np.full(pointers[-1], -1)
    for segment, begin, end in tiles:
        assert 0 < end - begin <= 100 and (owner[begin:end] == -1).all()
        owner[begin:end] = segment
    np.testing.assert_array_equal(owner, np.repeat(np.arange(40), counts))
    large = np.diff(tiles[tiles[:, 0] == 3, 1:], axis=1)[:, 0]
    # Whole register tiles; only the last one is what is left.
    assert (large[:-1] == large[0]).all() and large[0] % 6 == 0
    assert tile_list(np.array([0, 0, 0])).shape == (0, 3)


@pytest.mark.parametrize("pointers", [[], [1, 2], [0, 3, 2], [[0, 1]]])
def test_pointers_that_do_not_ascend_are_refused(pointers: object) -> None:
    with pytest.raises(InputError, match="ascends from 0"):
        tile_list(np.array(pointers))
    with pytest.raises(InputError, match="give at least 1"):
        tile_list(np.array([0, 1]), 0)
