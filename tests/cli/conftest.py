"""A model with a Gelu in it, its artifact, and a call of the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import planish
from planish.cli import invoke
from tests.cli.command_line import save


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return save(tmp_path / "model.onnx")


@pytest.fixture
def artifact(model: Path) -> Path:
    planish.optimize(model, budget=planish.Budget(gates=False)).export("artifact")
    return model.parent / "artifact"


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*args: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = invoke([str(a) for a in args])
        out, err = capfd.readouterr()
        return code, out, err

    return run
