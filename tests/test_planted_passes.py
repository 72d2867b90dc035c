"""Bad passes, planted through the public plugin API: each is caught, rolled back, named and reproducible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import planish
from planish.ir.program import Program
from planish.passes import registry
from planish.passes.base import ApproximatePass, ExactPass, PassContext, PassResult
from planish.passes.registry import register

pytestmark = pytest.mark.no_verify  # the gates themselves must catch what the fixture would

MODEL = """<ir_version: 10, opset_import: ["" : 23]>
g (float[batch, 8] x) => (float[batch, 8] y) <float[8] scale = {1, 2, 3, 4, 5, 6, 7, 8}>
{
  a = Mul(x, scale)
  b = Identity(a)
  c = Tanh(b)
  d = Add(c, scale)
  y = Identity(d)
}"""


@dataclass(frozen=True)
class Corrupt(ExactPass):
    """Removes a node whose output is still used."""

    name: ClassVar[str] = "planted-corrupt"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        graph = program.main.graph
        tanh = next(n for n in graph if n.op_type == "Tanh")
        graph.remove(tanh)
        return PassResult(True, 1)


@dataclass(frozen=True)
class Lie(ExactPass):
    """Changes numbers: replaces Tanh by Sigmoid."""

    name: ClassVar[str] = "planted-numerics"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        graph = program.main.graph
        tanh = next(n for n in graph if n.op_type == "Tanh")
        node = ir.node("Sigmoid", [tanh.inputs[0]], name="planted")
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = (
            "planted",
            tanh.outputs[0].shape,
            tanh.outputs[0].type,
        )
        graph.insert_before(tanh, node)
        tanh.outputs[0].replace_all_uses_with(node.outputs[0])
        graph.remove(tanh, safe=True)
        return PassResult(True, 1)


@dataclass(frozen=True)
class Raise(ExactPass):
    """Breaks the program, then raises half way."""

    name: ClassVar[str] = "planted-raise"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        graph = program.main.graph
        graph.remove(next(n for n in graph if n.op_type == "Tanh"))
        raise ZeroDivisionError("planted")


@dataclass(frozen=True)
class Hide(ExactPass):
    """Changes the program and says that it did not."""

    name: ClassVar[str] = "planted-hide"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        Lie().apply(program, ctx)
        return PassResult(False)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Registers the bad passes as a plugin would, and takes them out again."""
    registry.names()  # the built-in passes are there first
    known = dict(registry._passes)
    for cls in (Corrupt, Lie, Raise, Hide):
        register(cls)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    registry._passes.clear()
    registry._passes.update(known)


def model() -> onnx.ModelProto:
    return ir.to_proto(ir.from_onnx_text(MODEL))


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("planted-corrupt", "planted-corrupt"),
        ("planted-numerics", "rolled back: error"),
        ("planted-raise", "ZeroDivisionError"),
        ("planted-hide", "planted-hide"),
    ],
)
def test_a_bad_pass_is_caught_and_the_rest_is_done(planted: Path, name: str, verdict: str) -> None:
    x = np.random.default_rng(3).normal(size=(5, 8)).astype(np.float32)
    expected = onnxruntime.InferenceSession(model().SerializeToString()).run(None, {"x": x})[0]

    exe = planish.optimize(model(), "ort-cpu", passes=f"remove-no-ops,{name},eliminate-dead-code")

    np.testing.assert_allclose(exe(x), expected, rtol=1e-6)
    entry = exe.report.ledger[name]
    assert not entry.kept
    assert entry.verdict.startswith("rolled back: ")
    assert verdict in entry.verdict
    assert exe.report.ledger["remove-no-ops"].kept
    assert exe.report.after.ops == {"Mul": 1, "Tanh": 1, "Add": 1}
    assert_reproducer(entry.reproducer, name, planted)


def assert_reproducer(folder: str | None, name: str, root: Path) -> None:
    assert folder is not None
    path = Path(folder)
    assert path.is_relative_to(root)
    assert name in (path / "pipeline.txt").read_text()
    assert (path / "error.txt").read_text().strip()
    before = onnx.load(path / "before.onnx")
    assert [n.op_type for n in before.graph.node] == ["Mul", "Tanh", "Add"]  # as the pass found it


def test_three_bad_passes_in_one_run(planted: Path) -> None:
    pipeline = "planted-raise,planted-corrupt,planted-numerics,remove-no-ops"
    exe = planish.optimize(model(), passes=pipeline)
    kept = {e.name: e.kept for e in exe.report.ledger.entries if e.kind == "exact"}
    assert kept == {
        "infer-shapes": True,
        "planted-raise": False,
        "planted-corrupt": False,
        "planted-numerics": False,
        "remove-no-ops": True,
    }
    x = np.ones((1, 8), np.float32)
    scale = np.arange(1, 9, dtype=np.float32)
    np.testing.assert_allclose(exe(x), np.tanh(scale)[None] + scale, rtol=1e-6)


def test_a_reproducer_reproduces(planted: Path, capsys: Any) -> None:
    exe = planish.optimize(model(), passes="planted-numerics")
    folder = Path(str(exe.report.ledger["planted-numerics"].reproducer))
    again = planish.optimize(folder / "before.onnx", passes=(folder / "pipeline.txt").read_text().strip())
    assert again.report.ledger["planted-numerics"].verdict.startswith("rolled back: error")


@dataclass(frozen=True)
class Halve(ApproximatePass):
    """Scales a weight by a half: cheap, and far beyond any default budget."""

    name: ClassVar[str] = "planted-approximate"
    gives_up: ClassVar[str] = "half of the scale"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        scale = program.main.graph.initializers["scale"]
        assert scale.const_value is not None
        scale.const_value = ir.tensor(scale.const_value.numpy() / 2, name="scale")
        return PassResult(True, 1)


def test_an_approximate_pass_over_its_budget_is_rolled_back_on_the_runtime() -> None:
    exe = planish.optimize(model(), passes=[Halve()], budget=planish.Budget(error=1e-3, seconds=1))
    entry = exe.report.ledger["planted-approximate"]
    assert not entry.kept
    assert entry.verdict.startswith("rolled back: error ") and "> 1.0e-03" in entry.verdict
    x, scale = np.ones((1, 8), np.float32), np.arange(1, 9, dtype=np.float32)
    np.testing.assert_allclose(exe(x), np.tanh(scale)[None] + scale, rtol=1e-6)
