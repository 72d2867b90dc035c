"""The benchmark of low precision: what it makes of its measurements, and one tiny row as a whole."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks import precision


def row(name: str, rival_error: float, **peers: tuple[float, float]) -> dict[str, Any]:
    found: dict[str, Any] = {
        peer: {"status": "ok", "relative_l2": error, "against_rival": {"median": speed, "low": speed, "high": speed}}
        for peer, (speed, error) in peers.items()
    }
    return {"row": name, "peers": {**found, precision.RIVAL: {"status": "ok", "relative_l2": rival_error}}}


def test_the_best_is_the_fastest_whose_error_is_small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "LOW", ("bf16", "int8"))
    rows = [
        row("BERT s128", 5e-3, bf16=(1.2, 4e-3), int8=(2.0, 2e-2)),
        row("BERT s512", 5e-3, bf16=(0.8, 6e-3), int8=(0.9, 2e-2)),
        row("GPT-2 decode p512", 5e-3, bf16=(3.0, 4e-3)),
        row("ViT-B/16", 5e-3),
    ]
    found = precision.summary(rows)
    assert found["best"]["BERT s128"]["peer"] == "bf16"
    # Nothing keeps to the error: the fastest, with its error beside it.
    assert found["best"]["BERT s512"] == {"peer": "int8", "speed": 0.9, "error": 2e-2, "rival_error": 5e-3}
    assert "ViT-B/16" not in found["best"]
    # Decoding is no part of the mean over prompts.
    assert found["prefill_geomean"] == pytest.approx((1.2 * 0.9) ** 0.5) and found["prefill_least"] == 0.9


def test_decoding_against_float32() -> None:
    found = row("GPT-2 decode p512", 5e-3, weights8=(1.0, 4e-3), weights4=(1.0, 4e-2))
    for peer, speed in (("weights8", 2.0), ("weights4", 3.0)):
        found["peers"][peer]["against_f32"] = {"median": speed}
    assert precision.summary([found])["decode"] == {"GPT-2 decode p512": {"peer": "weights4", "speed": 3.0}}
    assert "int8" not in precision.fitting(precision.ROWS["GPT-2 decode p512"])
    assert "weights4" not in precision.fitting(precision.ROWS["BERT s128"])


def test_rows_by_name() -> None:
    assert [r.name for r in precision.chosen(["bert"])] == ["BERT s128", "BERT s512"]
    with pytest.raises(SystemExit, match="no row starts with nothing"):
        precision.chosen(["nothing"])


@pytest.mark.slow
def test_a_small_row(tmp_path: Path) -> None:
    if importlib.util.find_spec("tvm") is None:
        pytest.skip("without TVM there are no kernels")
    result = tmp_path / "result.json"
    arguments = ["--rows", "BERT s128", "--small", "--seconds", "0.1", "--peers", "bf16", "--json", str(result)]
    assert precision.main(arguments) == 0
    (found,) = json.loads(result.read_text())["rows"]
    assert set(found["peers"]) == {"ort", "bf16"} and found["rounds"] >= 7
    low = found["peers"]["bf16"]
    assert low["status"] == "ok" and low["relative_l2"] < 2e-2 and low["peak"] >= low["resident"] > 1 << 20
    assert low["bytes"] > 1 << 14 and low["ratio"]["median"] > 0
