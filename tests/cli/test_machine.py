"""`planish inspect` of the machine, and of what an artifact needs of it. No test depends on what this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planish.ir.machine import Gpu, Machine, Processor
from planish.runtime import machine as probe
from planish.runtime.artifact import read_manifest
from planish.runtime.kernels.cpu import LEVELS
from tests.cli.command_line import as_json

GIB = 1 << 30
PLAIN = Machine(
    Processor("Old Xeon", "x86_64", 4, LEVELS["avx2"].features, 8 * GIB),
    no_gpu="this machine has no NVIDIA driver (libcuda is not found).",
    software={"onnxruntime": "1.31.1", "nvcc": "13.0 (nvcc)"},
    providers=("CPUExecutionProvider",),
)
TURING = Machine(
    PLAIN.processor,
    (Gpu("Tesla T4", 75, 15 * GIB, 14 * GIB, 40, 65536),),
    "580.82",
    (13, 0),
    software={"onnxruntime": "1.31.1"},
    providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(probe, "machine", lambda: PLAIN)


def test_without_a_path_the_machine_is_shown(call: Any) -> None:
    code, out, _ = call("inspect")
    assert code == 0
    for words in ("Old Xeon (x86_64), 4 cores, 8.0 GiB", "avx2", "no NVIDIA driver", "1.31.1", "weights keep 7 bits"):
        assert words in out
    assert "float32 stays" in out and "Target ort-cpu runs on this machine." in out
    found = as_json(call("inspect", "--json")[1])
    assert found["machine"]["processor"]["levels"] == ["avx2"] and found["unmet"] == [] and not found["machine"]["gpus"]
    assert [p["name"] for p in found["precision"]] == ["bf16", "quantize", "quantize-weights"]


def test_a_target_that_does_not_run_here_is_said_to_and_is_no_failure(call: Any) -> None:
    code, out, _ = call("inspect", "-t", "ort-cuda")
    assert code == 0 and "Target ort-cuda does NOT run on this machine" in out and "this build has CPU" in out
    found = as_json(call("inspect", "-t", "tvm-cuda:sm_80,memory=4GiB", "--json")[1])
    assert [line.split(";")[0] for line in found["unmet"]] == [
        "needs tvm",
        "needs C compiler",
        "needs a GPU",
    ] and found["precision"] == []


def test_a_gpu_is_shown_with_what_it_has(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "machine", lambda: TURING)
    code, out, _ = call("inspect", "--target", "ort-cuda")
    assert code == 0
    for words in ("Tesla T4, sm_75, 15.0 GiB, 14.0 GiB free", "tensor cores (int8)", "580.82, up to CUDA 13.0"):
        assert words in out
    assert "sm_75 has no bfloat16: float16 in its place" in out and "Target ort-cuda runs on this machine." in out
    found = as_json(call("inspect", "-t", "ort-cuda:memory=16GiB", "--json")[1])
    assert found["machine"]["gpus"][0]["arch"] == "sm_75" and "too little" in found["unmet"][0]


def test_an_artifact_is_shown_with_what_it_needs(artifact: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = call("inspect", artifact)
    assert code == 0 and "What it needs" in out and "It runs on this machine." in out and "Operators" in out
    manifest = read_manifest(artifact)
    manifest.needs = {"gpus": 1, "code": ["sm_80"], "memory": 2 * GIB}
    (artifact / "manifest.json").write_bytes(manifest.to_bytes())
    monkeypatch.setattr(probe, "machine", lambda: TURING)
    code, out, _ = call("inspect", artifact)
    assert code == 0 and "GPU 0 (Tesla T4, sm_75) runs none of it" in out and "It does NOT run on this machine" in out
    found = as_json(call("inspect", artifact, "--json")[1])
    assert [p["met"] for p in found["needs"]] == [True, True, False, True] and len(found["unmet"]) == 1
    assert found["made_for"] == "ort-cpu" and found["ops"]
