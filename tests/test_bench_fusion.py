"""``benchmarks/fusion.py`` as a program on tiny models; what its results come to; no times are asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.fusion_causal import FORMS, feeds, measure, reference  # noqa: E402
from benchmarks.fusion_models import arguments, build  # noqa: E402
from benchmarks.fusion_models import feeds as model_feeds  # noqa: E402
from benchmarks.fusion_peers import Job  # noqa: E402
from benchmarks.fusion_rows import ROWS  # noqa: E402
from benchmarks.fusion_summary import summary  # noqa: E402
from benchmarks.fusion_tables import cell, show  # noqa: E402
from benchmarks.fusion_workers import WRONG, Process, Workers, entry  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def ratio(median: float, low: float, high: float) -> dict[str, float]:
    return {"median": median, "low": low, "high": high}


def row(name: str, gain: float, against: dict[str, Any], worst: float | None = 1e-7, **more: Any) -> dict[str, Any]:
    mine = {"status": "ok", "relative_l2": 1e-7, "ratio": ratio(gain, gain, gain)} | more
    peers = {peer: {"status": "ok", "planish_against": given} for peer, given in against.items()}
    return {
        "row": name,
        "transformer": True,
        "peers": {"planish": mine, **peers},
        "lengths": {"planish": {"worst": worst}},
    }


def test_summary_is_the_geometric_mean_and_names_slower_rows() -> None:
    rows = [
        row("a", 2.0, {"compile": ratio(0.9, 0.8, 0.95), "eager": ratio(0.5, 0.5, 0.5)}),
        row("b", 0.5, {"compile": ratio(0.9, 0.8, 1.01)}),
    ]
    found = summary({"rows": rows})
    assert found["geomean"] == {"planish": pytest.approx(1.0)} and found["transformer_rows"] == 2
    assert [(mine, name, peer) for mine, name, peer, _ in found["slower"]] == [("planish", "a", "compile")]
    assert found["invalid"] == []


def test_summary_names_what_is_not_valid() -> None:
    rows = [
        row("inexact", 1.0, {}, relative_l2=2e-5),
        row("one length", 1.0, {}, worst=None),
        row("another length", 1.0, {}, worst=1e-3),
        row("failed", 1.0, {}, status="failed", reason="no kernel"),
    ]
    found = dict(summary({"rows": rows})["invalid"])
    assert list(found) == [f"{name} (planish)" for name in ("inexact", "one length", "another length", "failed")]
    assert found["failed (planish)"] == "failed: no kernel" and "2.0e-05" in found["inexact (planish)"]


def test_cost_is_linear_when_a_further_layer_costs_the_same() -> None:
    def rung(layers: int, seconds: float) -> dict[str, Any]:
        return {"layers": layers, "status": "ok", "optimize_processor_seconds": seconds}

    assert summary({"cost": [rung(4, 1.4), rung(12, 2.2), rung(96, 10.6)]})["linear"] == pytest.approx(1.0)
    assert summary({"cost": [rung(4, 1.0)]})["linear"] is None


def test_decode_continues_the_prompt() -> None:
    given = ROWS["GPT-2 decode p512"]
    step = build(given, True)
    ids = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        whole = step.model(input_ids=ids, use_cache=True)
        before = step.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        past = [tensor for layer in before.layers for tensor in (layer.keys, layer.values)]
        logits, *present = step(ids[:, -1:], torch.ones_like(ids), past)
    torch.testing.assert_close(logits[:, 0], whole.logits[:, -1])
    torch.testing.assert_close(present[0], whole.past_key_values.layers[0].keys)
    inputs = arguments(model_feeds(given, step, 3, 5, padded=True))
    assert inputs["input_ids"].shape == (3, 1) and inputs["attention_mask"].shape == (3, 6)
    assert [tuple(tensor.shape) for tensor in inputs["past"]] == [(3, 4, 5, 16)] * 4


def test_causal_forms_are_one_function() -> None:
    from planish.runtime.ort import ort

    given = feeds(1, 37)
    expected = reference(given)
    for form, make in FORMS.items():
        session = ort.InferenceSession(make(37).SerializeToString(), providers=["CPUExecutionProvider"])
        (got,) = session.run(["y"], given)
        assert np.linalg.norm(got - expected) < 1e-6 * np.linalg.norm(expected), form


def test_causal_table(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    found = measure(16, tmp_path, 0.1, 1, ["ort", "planish", "kernels"])
    assert len(found["peers"]) == 2 * len(FORMS) + 2
    assert {item["status"] for item in found["peers"].values()} == {"ok"}
    assert found["fastest"]["any"] in found["peers"]
    assert all(worst is not None and worst < 1e-6 for worst in found["lengths"].values())
    totals = summary({"causal": [found]})
    assert totals["invalid"] == [] and set(totals["causal"]) == {"planish", "kernels"}


def job(folder: Path, peer: str, model: str = "missing.onnx") -> Job:
    return Job(peer, model, "missing.npz", str(folder))


def test_a_worker_that_dies_is_a_failure(tmp_path: Path) -> None:
    process = Process(job(tmp_path, "ort"))
    process.process.kill()
    answer = process.ask("build")
    assert answer["status"] == "failed" and answer["reason"].startswith("exit code -9")
    assert process.ask("run") == answer


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    with Workers({"ort": job(tmp_path / "ort", "ort"), "broken": job(tmp_path / "broken", "broken")}) as workers:
        workers.build()
        assert workers.alive() == []
        assert "missing.onnx" in entry(workers, "ort", None)["error"]
        found = entry(workers, "broken", None)
    assert cell(found) == "failed: RuntimeError: this peer always fails"


def test_far_from_eager_is_wrong(tmp_path: Path) -> None:
    with Workers({}) as workers:
        workers.processes["ort"] = process = Process(job(tmp_path, "ort"))
        assert entry(workers, "ort", WRONG)["status"] == "ok"
        assert cell(entry(workers, "ort", 0.0123)) == "wrong: 1e-02"
        assert entry(workers, "ort", float("inf"))["relative_l2"] is None
        process.close()


@pytest.mark.slow
def test_two_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fusion.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "fusion.py"),
        "--only",
        "models",
        "--small",
        "--seconds",
        "0.1",
    ]
    command += ["--rows", "BERT s128", "GPT-2 decode", "--peers", "planish", "eager", "broken", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert path.exists(), done.stderr[-2000:]
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [item["row"] for item in result["rows"]] == ["BERT s128", "GPT-2 decode p512"]
    for item in result["rows"]:
        peers = item["peers"]
        assert list(peers) == ["ort", "planish", "eager", "broken"]
        assert peers["broken"]["status"] == "failed" and "always fails" in peers["broken"]["reason"]
        assert "ratio" not in peers["broken"]
        for peer in ("ort", "planish", "eager"):
            assert peers[peer]["status"] == "ok" and peers[peer]["relative_l2"] < 1e-5
            assert len(peers[peer]["samples_ms"]) == item["rounds"] >= 7
            assert peers[peer]["ratio"]["low"] <= peers[peer]["ratio"]["median"] <= peers[peer]["ratio"]["high"]
        assert peers["eager"]["planish_against"]["runs"] == item["rounds"]
        assert len(item["lengths"]["planish"]["relative_l2"]) == 12
        assert item["lengths"]["planish"]["worst"] < 1e-5
    assert result["summary"]["transformer_rows"] == 2
    show(result)
    assert "always fails" in " ".join(capsys.readouterr().out.replace("│", " ").split())
