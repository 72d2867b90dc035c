"""The summary of the GPU's benchmarks: a line for each promise, from the JSON that they write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cuda_summary.py"


def summary(folder: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout


def write(folder: Path, compiled: float, decode: float) -> None:
    ms = {"ort-cuda:dtype=float16": 2.0, "ort_fusions, graph": 2.2, "HF torch.compile, graph": compiled}
    rows = {"bert": {who: {"ms": time} for who, time in ms.items()}}
    (folder / "ort_cuda.json").write_text(json.dumps({"rows": rows}))
    step = {"kind": "decode", "length": 32768, "block": 64, "s2": 10.0, "flash": 90.0, "cudnn": decode, "gb_s": 2000.0}
    short = step | {"length": 8192, "cudnn": 1.0}  # of which nothing is promised
    (folder / "cuda_attention.json").write_text(json.dumps({"rows": [step, short]}))


def test_what_holds_and_what_does_not(tmp_path):
    write(tmp_path, compiled=5.0, decode=50.0)
    code, text = summary(tmp_path)
    assert code == 0 and "FAILS" not in text and text.count("| not run |") == 4
    assert "| bert: against torch.compile in a graph | 2.50 | ≥ 2 | holds |" in text
    assert "| S2, block 64, 32K: step against the best dense | 5.00 | ≥ 4 | holds |" in text
    write(tmp_path, compiled=3.9, decode=39.0)
    code, text = summary(tmp_path)
    assert code == 1 and text.count("FAILS") == 2
    assert "| bert: against torch.compile in a graph | 1.95 | ≥ 2 | FAILS |" in text
    assert "| S2, block 64, 32K: step against the best dense | 3.90 | ≥ 4 | FAILS |" in text


@pytest.mark.parametrize(("copy", "says"), [(3.0e12, "| 1.50 | ≤ 1.5 | holds |"), (3.1e12, "| 1.55 | ≤ 1.5 | FAILS |")])
def test_the_floor_is_what_a_copy_reaches(tmp_path, copy, says):
    write(tmp_path, compiled=5.0, decode=50.0)
    (tmp_path / "cuda_gemv.json").write_text(json.dumps({"copy_bytes_s": copy}))
    assert f"| S2, block 64, 32K: step over the bandwidth floor {says}" in summary(tmp_path)[1]
    (tmp_path / "cuda_gemv.json").write_text(json.dumps({"copy_bytes_s": copy, "gpu": "another"}))
    assert "bandwidth floor" not in summary(tmp_path)[1]


def test_memory_and_the_cards(tmp_path):
    ours = {"limit": 100, "peak": 97, "same_tokens": True, "tokens_per_second": 36.0}
    rows = {
        "planish, a quarter of the weights": ours,
        "accelerate, max_memory a quarter": {"limit": 100, "peak": 190, "tokens_per_second": 3.0},
        "accelerate, cpu_offload": {"error": "took more than 240 s"},
    }
    (tmp_path / "cuda_memory.json").write_text(json.dumps({"gpu": "one card", "rows": rows}))
    (tmp_path / "cuda_gemv.json").write_text(json.dumps({"gpu": "another", "copy_bytes_s": 3e12}))
    code, text = summary(tmp_path)
    assert code == 0 and text.count("| holds |") == 3
    assert "| planish, a quarter of the weights: peak over the budget | 0.97 | ≤ 1 | holds |" in text
    assert "| planish, a quarter of the weights: tokens/s against accelerate | 12.00 | ≥ 1 | holds |" in text
    assert "\nanother: cuda_gemv.\n" in text and text.endswith("\none card: cuda_memory.\n")
    rows["planish, a quarter of the weights"] = ours | {"peak": 101, "same_tokens": False}
    (tmp_path / "cuda_memory.json").write_text(json.dumps({"gpu": "one card", "rows": rows}))
    assert summary(tmp_path)[1].count("FAILS") == 2
