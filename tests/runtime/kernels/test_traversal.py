"""Traversal kernels against float64: rows without edges, numbered edges, heads, on every level of this processor."""

from __future__ import annotations

import numpy as np
import pytest

from planish.runtime.kernels.template import Template, aligned, function
from planish.runtime.kernels.traversal import Aggregate, EdgeSoftmax
from tests.runtime.kernels.levels import VECTORS, level

pytest.importorskip("tvm")

#: Each kind of everything, in turns; the kernels' parts do not depend on each other.
TEMPLATES: tuple[Template, ...] = (
    Aggregate(),
    Aggregate(True, "mean", "edge"),
    Aggregate(False, "max", "head"),
    Aggregate(True, "sum", "head", True),
    Aggregate(False, "mean", None, True),
    Aggregate(True, "max", "edge", True),
    EdgeSoftmax(),
    EdgeSoftmax(True, True),
)
#: (destinations, edges, rows of x, heads, features)
CASES = ((5, 11, 4, 1, 64), (4, 0, 3, 2, 5), (0, 0, 3, 1, 8), (1, 1, 1, 1, 1), (9, 40, 6, 3, 7), (6, 30, 20, 2, 24),
         (3, 50, 9, 1, 130), (7, 9, 5, 1, 197), (4, 12, 5, 0, 3), (4, 12, 5, 2, 0), (50, 20, 9, 4, 15))  # fmt: skip


def graph(destinations: int, edges: int, rows: int, indirect: bool, rng: np.random.Generator) -> list[np.ndarray]:
    """indptr, rows of x and, if numbered, edge numbers; some rows have no edges."""
    owner = np.sort(rng.choice(rng.permutation(max(destinations, 1))[: destinations // 2 + 1], edges))
    indptr = np.searchsorted(owner, np.arange(destinations + 1))
    found = [aligned(indptr.astype(np.int64)), aligned(rng.integers(0, rows, edges))]
    return [*found, aligned(rng.permutation(edges))] if indirect else found


def inputs_of(template: Template, case: tuple[int, ...], rng: np.random.Generator) -> list[np.ndarray]:
    destinations, edges, rows, heads, features = case
    found = graph(destinations, edges, rows, template.indirect, rng)  # type: ignore[attr-defined]

    def normal(*shape: int, spread: float = 1.0) -> np.ndarray:
        return aligned((spread * rng.standard_normal(shape)).astype("f"))

    if isinstance(template, EdgeSoftmax):
        found.append(normal(edges, heads, spread=20.0))
        if template.leaky:
            found.append(aligned(np.array([0.2], "f")))
        return [*found, normal(rows, heads, features)]
    assert isinstance(template, Aggregate)
    found.append(normal(rows, heads, features))
    if template.scale:
        found.append(normal(edges, heads) if template.scale == "head" else normal(edges))
    if template.addend:
        found.append(normal(edges, heads, features))
    return found


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.symbol)
def test_against_float64(template: Template, name: str) -> None:
    cpu, rng = level(name), np.random.default_rng()
    call = function(template, cpu)
    for case in CASES:
        inputs = inputs_of(template, case, rng)
        want = template.reference(*inputs)
        y = aligned(np.full(want.shape, np.nan, np.float32))
        call(*inputs, y)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5, err_msg=str(case))
        empty = np.diff(inputs[0]) == 0
        np.testing.assert_array_equal(y[empty], 0.0)


def test_softmax_of_extreme_logits() -> None:
    template = EdgeSoftmax()
    # One row each: all -inf; -inf beside a number; far apart; equal and huge.
    logits = np.array([-np.inf, -np.inf, -np.inf, 3.0, -1e30, 1e30, 3e38, 3e38], np.float32)[:, None]
    x = np.arange(1.0, 9.0, dtype=np.float32).reshape(8, 1, 1) * np.ones((1, 1, 20), np.float32)
    y = aligned(np.empty((4, 1, 20), np.float32))
    function(template)(
        aligned(np.arange(0, 9, 2, dtype=np.int64)), aligned(np.arange(8)), aligned(logits), aligned(x), y
    )
    np.testing.assert_allclose(y[:, 0, 0], [0.0, 4.0, 6.0, 7.5], rtol=1e-6)


def test_a_largest_value_may_be_minus_infinity() -> None:
    x = np.full((2, 1, 3), -np.inf, np.float32)
    x[1] = -5.0
    y = aligned(np.empty((3, 1, 3), np.float32))
    function(Aggregate(reduce="max"))(aligned(np.array([0, 1, 3, 3])), aligned(np.array([0, 0, 1])), aligned(x), y)
    np.testing.assert_array_equal(y[:, 0, 0], [-np.inf, -5.0, 0.0])


def test_one_row_of_x_for_many_edges_is_compact_materialization() -> None:
    rng = np.random.default_rng()
    # Values of (source, type) are rows of x; edges are sorted by type, and numbered so.
    pairs, edge_row = rng.standard_normal((6, 1, 16)).astype("f"), rng.integers(0, 6, 40)
    destination = rng.integers(0, 5, 40)
    order = np.argsort(destination, kind="stable")
    indptr = np.searchsorted(destination[order], np.arange(6))
    y = aligned(np.empty((5, 1, 16), np.float32))
    call = function(Aggregate(indirect=True))
    call(aligned(indptr.astype(np.int64)), aligned(edge_row), aligned(order), aligned(pairs), y)
    want = np.zeros((5, 1, 16))
    np.add.at(want, destination, pairs[edge_row].astype(np.float64))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
