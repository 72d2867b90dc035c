"""The benchmark of cache forms runs, and its forms agree."""

from __future__ import annotations

from benchmarks.kv_cache import FORMS, measure, scatter


def test_forms_give_the_same_values() -> None:
    found = measure(heads=4, groups=2, batch=2, length=9, capacity=16, seconds=0.05)
    assert list(found) == [*FORMS, "gqa, not shared"]


def test_scatter_in_place_does_not_depend_on_the_capacity() -> None:
    small, large = (scatter(capacity, seconds=0.1) for capacity in (64, 8192))
    assert large["shared"] < 3 * small["shared"] + 20
    assert large["copied"] > 3 * large["shared"]
