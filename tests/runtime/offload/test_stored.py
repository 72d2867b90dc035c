"""Artifacts of programs under a memory budget: the same tokens elsewhere, planned for what is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import planish
from planish.ir.budget import Budget
from planish.ir.errors import ArtifactError, InputError, UnsupportedError
from planish.ir.machine import Gpu, Machine, Needs, Processor
from planish.ir.target import Target
from planish.offload import optimize_budgeted
from planish.runtime import machine as probe
from planish.runtime.artifact import budget_table, read_manifest, verify_artifact
from planish.runtime.executable import Executable
from planish.runtime.offload import artifact
from planish.runtime.offload.account import MemoryBudgetError
from planish.runtime.offload.device import HostDevice
from planish.runtime.offload.plan import Rates
from tests.causal_models import causal_model, prompts

LIMIT, PROVIDER = 90_000, ("CUDAExecutionProvider",)
TARGET = Target.parse(f"ort-cuda:threads=1,memory={LIMIT}")


def exported(folder: Path, limit: int = LIMIT, **options: Any) -> Executable:
    options = {"budget": Budget(gates=False)} | options
    target = Target.parse(f"ort-cuda:threads=1,memory={limit}")
    exe = optimize_budgeted(causal_model("Llama"), target, task="causal-lm", device=HostDevice(limit), **options)
    exe.export(folder)
    return exe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """An artifact, and the tokens of the program that it was made of."""
    folder = tmp_path_factory.mktemp("budget") / "artifact"
    exe = exported(folder)
    ids, mask = prompts(3, 11)
    return folder, exe.generate(ids, 6, attention_mask=mask)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[HostDevice]]:
    """A machine with a GPU of 16 GiB, which ordinary memory stands for; gives the devices that were made."""
    found: list[HostDevice] = []

    def make(target: Target) -> HostDevice:
        found.append(HostDevice(target.memory))
        return found[-1]

    monkeypatch.setattr(artifact, "device_for", make)
    on_machine(monkeypatch, 16 << 30)
    yield found


def on_machine(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    card = Gpu("Tesla T4", 75, 16 << 30, free)
    here = Machine(Processor(memory=64 << 30), (card,), "580.1", (13, 0), "", {"onnxruntime": "1.31"}, PROVIDER)
    monkeypatch.setattr(probe, "machine", lambda: here)


def test_a_loaded_artifact_generates_the_same_tokens_within_its_budget(
    made: tuple[Path, np.ndarray], gpu: list[HostDevice]
) -> None:
    folder, wanted = made
    exe = planish.load(folder)
    ids, mask = prompts(3, 11)
    np.testing.assert_array_equal(exe.generate(ids, 6, attention_mask=mask), wanted)
    assert gpu[0].account.limit == LIMIT and gpu[0].account.peak <= LIMIT
    runner: Any = exe.runners["prefill"]
    assert runner.plan.streamed() and runner.engine.measured
    manifest = read_manifest(folder)
    needs = Needs.from_dict(manifest.needs)
    assert 0 < needs.memory <= LIMIT and needs.providers == PROVIDER and "torch" not in needs.software
    assert manifest.golden and verify_artifact(folder).ok
    pieces = [name for name in manifest.files if name.endswith(".onnx")]
    assert len(pieces) < 2 * 4 + 2  # layers of one structure share theirs


def test_another_budget_when_it_is_loaded(made: tuple[Path, np.ndarray], gpu: list[HostDevice]) -> None:
    folder, wanted = made
    ids, mask = prompts(3, 11)
    exe = planish.load(folder, memory="1GiB")
    np.testing.assert_array_equal(exe.generate(ids, 6, attention_mask=mask), wanted)
    assert not exe.runners["prefill"].plan.streamed() and exe.target.memory == 1 << 30  # type: ignore[attr-defined]
    with pytest.raises(MemoryBudgetError, match=r"take at least .* more than the budget of 20 KiB"):
        planish.load(folder, memory=20_000)
    with pytest.raises(InputError, match="memory='much' is not a size"):
        planish.load(folder, memory="much")


def test_less_memory_than_the_budget_is_planned_for_and_too_little_refused(
    made: tuple[Path, np.ndarray], gpu: list[HostDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = made
    on_machine(monkeypatch, LIMIT - 5000)
    exe = planish.load(folder)
    ids, mask = prompts(3, 11)
    np.testing.assert_array_equal(exe.generate(ids, 6, attention_mask=mask), wanted)
    assert gpu[-1].account.peak <= LIMIT - 5000
    assert "of the GPU are free: the plan is for these" in exe.runners["prefill"].notes[-1]  # type: ignore[attr-defined]
    on_machine(monkeypatch, 10_000)
    with pytest.raises(UnsupportedError, match="needs 0.1 MiB of GPU memory; .* too little"):
        planish.load(folder)
    assert len(gpu) == 1


def test_rates_are_those_of_the_machine_at_hand(
    made: tuple[Path, np.ndarray], gpu: list[HostDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    from planish.runtime.offload import engine

    for rates, cooperative in ((Rates(host=1.0), False), (Rates(host=1e15, latency=0.0), True)):
        monkeypatch.setattr(engine, "measure_rates", lambda parts, device, found=rates: found)
        exe = planish.load(made[0])
        ids, mask = prompts(3, 16)
        exe.generate(ids, 20, attention_mask=mask)
        plan = exe.runners["prefill"].plan  # type: ignore[attr-defined]
        assert plan.kv_host() and bool(plan.attended) is cooperative


def test_loading_imports_neither_torch_nor_the_passes(made: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, wanted = made
    ids, mask = prompts(3, 11)
    np.savez(tmp_path / "prompts.npz", ids=ids, mask=mask)
    code = f"""
import sys, numpy as np, planish
from planish.ir.machine import Gpu, Machine
from planish.runtime import machine as probe
from planish.runtime.offload import artifact
from planish.runtime.offload.device import HostDevice
artifact.device_for = lambda target: HostDevice(target.memory)
card = Gpu("T4", 75, 1 << 34, 1 << 34)
probe.machine = lambda: Machine(gpus=(card,), software={{"onnxruntime": ""}}, providers={PROVIDER})
given = np.load({str(tmp_path / "prompts.npz")!r})
tokens = planish.load({str(folder)!r}).generate(given["ids"], 6, attention_mask=given["mask"])
np.save({str(tmp_path / "tokens.npy")!r}, tokens)
heavy = "torch transformers onnxscript planish.passes planish.frontends planish.driver planish.offload"
print([name for name in heavy.split() if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    np.testing.assert_array_equal(np.load(tmp_path / "tokens.npy"), wanted)


def test_loaded_artifacts_export_again(made: tuple[Path, np.ndarray], gpu: list[HostDevice], tmp_path: Path) -> None:
    again = planish.load(made[0]).export(tmp_path / "again")
    ids, mask = prompts(3, 11)
    np.testing.assert_array_equal(planish.load(again).generate(ids, 6, attention_mask=mask), made[1])


def test_weights_in_few_bits(tmp_path: Path, gpu: list[HostDevice]) -> None:
    passes = "quantize-weights{bits=4,block=16},float16"
    exe = exported(tmp_path / "artifact", 1 << 20, approximate=passes)
    loaded = planish.load(tmp_path / "artifact")
    ids, _ = prompts(2, 9)
    wanted = exe.run({"input_ids": ids, "lengths": np.array([9, 9])})["logits"]
    found = loaded.run({"input_ids": ids, "lengths": np.array([9, 9])})["logits"]
    np.testing.assert_array_equal(found, wanted)


def test_made_for_a_gpu_that_is_not_here(tmp_path: Path, gpu: list[HostDevice], made: tuple[Path, np.ndarray]) -> None:
    if probe.machine().gpus[0].name != "Tesla T4":
        pytest.skip("the machine has a GPU of its own")
    target = f"ort-cuda:sm_80,threads=1,memory={100 << 20}"
    probe_machine, probe.machine = probe.machine, lambda: Machine(no_gpu="no driver", providers=PROVIDER)
    try:
        exe = planish.optimize(causal_model("Llama"), target, task="causal-lm", budget=Budget(gates=False))
        with pytest.raises(UnsupportedError, match="export it"):
            exe.generate(np.full((1, 4), 7), 2)
        exe.export(tmp_path / "artifact")
    finally:
        probe.machine = probe_machine
    manifest = read_manifest(tmp_path / "artifact")
    assert manifest.needs["memory"] > 72 << 20  # with what libraries take
    found = budget_table(tmp_path / "artifact")
    assert found is not None and found[1][-1] == "  rates: assumed"


def test_the_table_of_an_artifact(made: tuple[Path, np.ndarray]) -> None:
    wide = Target.parse("ort-cuda:memory=1GiB")
    found = budget_table(made[0], wide)
    assert found is not None
    data, lines = found
    text = "\n".join(lines)
    assert data["budget"] == 1 << 30 and data["streamed"] == 0
    assert "weights of 3 of 3 units" in text and "libraries" in text and "layers 0 to 1" in text
    assert "a step is estimated at" in text and "GB/s of attention on the host" in text
    with pytest.raises(MemoryBudgetError, match="memory=.*MiB is the least"):
        budget_table(made[0])  # a GPU has libraries, which ordinary memory has not


def test_inspect_prints_the_table(
    made: tuple[Path, np.ndarray], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from planish.cli import invoke

    monkeypatch.setenv("COLUMNS", "200")
    where = [str(made[0]), "-t", "ort-cuda:memory=128MiB"]
    assert invoke(["inspect", *where]) == 0
    text = capsys.readouterr().out
    assert "memory for 2 x (16 + 2) tokens" in text and "libraries" in text and "a step is estimated at" in text
    assert invoke(["inspect", *where, "--dim", "prompt=40", "--dim", "batch=5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["prompt"] == 40 and found["plan"]["batch"] == 5 and found["plan"]["new_tokens"] == 2
    assert invoke(["inspect", str(made[0]), "-t", "ort-cuda:memory=1MiB"]) == 0
    assert "more than the budget of 1.0 MiB" in capsys.readouterr().out
    assert invoke(["inspect", *where, "--dim", "promt=40"]) != 0
    assert "prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data["layers"].pop(), "1 layers with 3 boundaries"),
        (lambda data: data["tail"].update(model=99), "KeyError"),
        (lambda data: data["tail"].update(weights=data["tail"]["weights"][:-1]), "does not have the inputs"),
        (lambda data: data["head"].update(model=None), "TypeError"),
        (lambda data: next(iter(data["weights"].values())).update(shape=[3]), "bytes in the weights file"),
        (lambda data: data.update(version=2), "has version 2"),
        (lambda data: data["request"].update(batch=None, more=1), "TypeError"),
    ],
)
def test_a_description_that_does_not_fit_its_files(
    made: tuple[Path, np.ndarray], gpu: list[HostDevice], tmp_path: Path, change: Any, words: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(made[0], folder)
    path = folder / "pieces/split.json"
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="truncated or replaced|SHA-256 differs"):
        planish.load(folder)
    resign(folder, "pieces/split.json")
    with pytest.raises(ArtifactError, match=words):
        planish.load(folder)


def resign(folder: Path, name: str) -> None:
    """A manifest that fits a changed file, as somebody who writes a whole artifact would make it."""
    import hashlib

    from planish.runtime.manifest import FileInfo

    manifest = read_manifest(folder)
    raw = (folder / name).read_bytes()
    manifest.files[name] = FileInfo(len(raw), hashlib.sha256(raw).hexdigest())
    (folder / "manifest.json").write_bytes(manifest.to_bytes())


def test_memory_is_for_budgets_only(tmp_path: Path) -> None:
    import torch

    model = torch.nn.Linear(4, 4)
    exe = planish.optimize(model, example_inputs=(torch.ones(1, 4),), budget=Budget(gates=False))
    exe.export(tmp_path / "plain")
    assert budget_table(tmp_path / "plain") is None
    with pytest.raises(InputError, match="is no program under a memory budget"):
        planish.load(tmp_path / "plain", memory="1GiB")
