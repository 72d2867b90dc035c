"""The benchmark of caches in few bits runs, and says how many bytes they have and how far they are off."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tvm")

from benchmarks.cache_formats import FORMS, measure


@pytest.mark.slow
def test_forms() -> None:
    rows = measure("Llama", [24], seconds=0.2, small=True)
    assert [row["form"] for row in rows] == list(FORMS)
    assert [row["share"] for row in rows] == [1, pytest.approx(0.2656, abs=1e-3), 0.25, 0.5, 0.5]
    assert rows[0]["error"] == 0 and all(0 < row["error"] < 0.05 for row in rows[1:])
