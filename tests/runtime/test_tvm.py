"""Target tvm-cpu: runs, errors, and artifacts that need TVM's runtime and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import planish
from planish.ir.errors import ArtifactError, InputError, UnsafeModelError, UnsupportedError
from planish.ir.program import Calibration, Program
from planish.ir.target import Target
from planish.runtime import tvm as tvm_runtime
from planish.runtime import tvm_artifact
from planish.runtime.artifact import read_manifest, verify_artifact
from planish.runtime.executable import Executable
from planish.runtime.tvm import TvmRunner, compile_tvm
from tests.runtime.models import model, reseal, two_layers

pytest.importorskip("tvm")
TARGET = Target.parse("tvm-cpu:threads=1")


@pytest.fixture(scope="module")
def program() -> Program:
    made = two_layers()
    made.target = TARGET
    return made


@pytest.fixture(scope="module")
def runner(program: Program) -> TvmRunner:
    return compile_tvm(program.main, TARGET)


@pytest.fixture(scope="module")
def artifact(program: Program, runner: TvmRunner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tvm") / "artifact"
    return Executable(program, {"main": runner}, pipeline="fuse-gelu").export(path)


def feeds(program: Program, batch: int = 3, length: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng()
    return {"x": rng.standard_normal((batch, 16)).astype(np.float32), "ids": rng.integers(0, 100, (batch, length))}


def expected(program: Program, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    weights = {name: value.const_value.numpy() for name, value in program.main.graph.initializers.items()}  # type: ignore[union-attr]
    hidden = np.maximum(given["x"].astype(np.float64) @ weights["w1"], 0)
    return {"y": hidden @ weights["w2"], "e": weights["table"][given["ids"]]}


def test_any_batch_and_length_runs(program: Program, runner: TvmRunner) -> None:
    for batch, length in ((1, 1), (2, 33), (17, 3), (64, 2)):
        given = feeds(program, batch, length)
        got = runner.run(given)
        for name, want in expected(program, given).items():
            assert got[name].dtype == np.float32 and got[name].flags.writeable
            np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5)
    assert runner.prepared(given)()["y"].shape == (64, 8)


def test_memory_of_any_kind_is_taken(program: Program, runner: TvmRunner) -> None:
    given = feeds(program)
    want = runner.run(given)
    flat = np.empty(3 * 16 + 1, np.float32)[1:].reshape(3, 16)  # not at a multiple of 64 bytes
    flat[...] = given["x"]
    strided = np.asfortranarray(given["x"])
    fixed = given["x"].copy()
    fixed.flags.writeable = False
    for x in (flat, strided, fixed):
        np.testing.assert_array_equal(runner.run({**given, "x": x})["y"], want["y"])


def test_torch_in_torch_out(program: Program, runner: TvmRunner) -> None:
    torch = pytest.importorskip("torch")
    given = feeds(program)
    got = runner.run({name: torch.from_numpy(array) for name, array in given.items()})
    assert all(isinstance(value, torch.Tensor) for value in got.values())
    np.testing.assert_array_equal(got["y"].numpy(), runner.run(given)["y"])


def test_outputs_stay_as_they_are(program: Program, runner: TvmRunner) -> None:
    given = feeds(program)
    first = runner.run(given)["y"]
    kept = first.copy()
    for _ in range(3):
        runner.run(feeds(program))
    np.testing.assert_array_equal(first, kept)


def test_threads_may_share_a_runner(program: Program, runner: TvmRunner) -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        for batch in (1, 5, 9):
            given = feeds(program, batch, seed + 1)
            if not np.allclose(runner.run(given)["y"], expected(program, given)["y"], atol=1e-4):
                wrong.append(f"{seed} {batch}")

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_inputs_that_do_not_fit_are_errors(program: Program, runner: TvmRunner) -> None:
    given = feeds(program)
    for changed, message in (
        ({"x": given["x"].astype(np.float64)}, "float64, expected x"),
        ({"x": given["x"][:2]}, "b=3 .* but 'x' has b=2"),
        ({"ids": np.full((3, 5), 100)}, "a gather failed .* outside of the tensor"),
        ({"ids": given["ids"][:, :0], "x": given["x"]}, "size 0 in dimension 1"),
        ({"z": given["x"]}, "no input is named 'z'"),
    ):
        with pytest.raises(InputError, match=message):
            runner.run({**given, **changed})
    empty = {"x": given["x"][:0], "ids": given["ids"][:0]}
    assert runner.run(empty)["y"].shape == (0, 8)


def test_sizes_that_were_assumed_equal_are_checked() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[n, 4] a, float[m, 4] b) => (float[n, 4] o) { o = Add(a, b) }"""
    runner = compile_tvm(model(text), TARGET)
    a = np.ones((3, 4), np.float32)
    assert runner.run({"a": a, "b": a})["o"].sum() == 24
    with pytest.raises(InputError, match="n=3, m=2: n must be m"):
        runner.run({"a": a, "b": a[:2]})


def test_options_levels_and_targets() -> None:
    made = model('<ir_version: 10, opset_import: ["" : 20]> g (float[n] a) => (float[n] o) { o = Relu(a) }')
    with pytest.raises(InputError, match="option of ONNX Runtime"):
        compile_tvm(made, Target.parse("tvm-cpu:session.intra_op.allow_spinning=0"))
    with pytest.raises(InputError, match="arch is one of avx2"):
        compile_tvm(made, Target.parse("tvm-cpu:arch=avx3"))
    with pytest.raises(UnsupportedError, match="use 'tvm-cpu'"):
        compile_tvm(made, Target.parse("ort-cpu"))
    runner = compile_tvm(made, Target.parse("tvm-cpu:arch=avx2"))
    assert "avx2" in runner.features and not {f for f in runner.features if f.startswith("avx512")}


def test_an_artifact_runs_with_the_runtime_alone(program: Program, runner: TvmRunner, artifact: Path) -> None:
    given = feeds(program, 7, 4)
    np.savez(artifact.parent / "given.npz", **given)
    code = f"""
import sys
import numpy as np
import planish
exe = planish.load({str(artifact)!r}, allow_native=True)
got = exe.run(dict(np.load({str(artifact.parent / "given.npz")!r})))
np.savez({str(artifact.parent / "got.npz")!r}, **got)
import tvm
assert tvm._RUNTIME_ONLY
loaded = [n for n in sys.modules if n.startswith(("planish.passes", "planish.runtime.relax", "onnx", "tvm.relax"))]
assert not loaded, loaded
"""
    environment = os.environ | {"TVM_USE_RUNTIME_LIB": "1", "PYTHONPATH": str(Path(planish.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(artifact.parent / "got.npz") as got:
        for name, want in runner.run(given).items():
            np.testing.assert_array_equal(got[name], want)


def test_an_artifact_says_what_it_is(program: Program, artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert manifest.target == "tvm-cpu:threads=1" and manifest.native == ["kernels/main.so"]
    assert manifest.features["kernels/main.so"] and not (artifact / "main.onnx").exists()
    result = verify_artifact(artifact, allow_native=True)
    assert result.ok and result.error is not None and result.error.relative_l2 == 0
    again = planish.load(artifact, allow_native=True, threads=2).export(artifact.parent / "copy")
    assert read_manifest(again).files == manifest.files


def test_artifacts_that_are_not_to_be_run(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="native code .*allow_native=True"):
        planish.load(artifact)
    copy = planish.load(artifact, allow_native=True).export(tmp_path / "copy")
    code = copy / "kernels" / "main.so"
    raw = code.read_bytes()
    code.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        planish.load(copy, allow_native=True)
    code.write_bytes(b"no library")
    reseal(copy)
    with pytest.raises(ArtifactError, match="does not load"):
        planish.load(copy, allow_native=True)
    monkeypatch.setattr(tvm_artifact, "missing", lambda features: ["avx512f"])
    with pytest.raises(ArtifactError, match="needs avx512f, which this processor does not have"):
        planish.load(artifact, allow_native=True)


def test_weights_and_code_must_belong_together(artifact: Path, tmp_path: Path) -> None:
    copy = planish.load(artifact, allow_native=True).export(tmp_path / "copy")
    entries = read_manifest(copy).entries
    entries["main"].parameters.append("nothing")
    reseal(copy, entries=entries)
    with pytest.raises(ArtifactError, match="needs the weight 'nothing'"):
        planish.load(copy, allow_native=True)
    reseal(copy, native=[])
    with pytest.raises((ArtifactError, UnsafeModelError), match="not listed as native code"):
        planish.load(copy, allow_native=True)


def test_optimize_measures_on_the_target(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((32, 64)).astype(np.float32), "b": rng.standard_normal(64).astype(np.float32)}
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[n, 32] x) => (float[n, 64] y) { h = MatMul(x, w) s = Add(h, b) y = Gelu(s) }"""
    x = rng.standard_normal((9, 32)).astype(np.float32)
    exe = planish.optimize(
        ir.to_proto(model(text, weights)), TARGET, calibration={"x": x}, budget=planish.Budget(seconds=2, min_gain=0.0)
    )
    assert isinstance(exe.runners["main"], TvmRunner) and exe.report is not None
    path = exe.export(tmp_path / "artifact")
    loaded = planish.load(path, allow_native=True)
    np.testing.assert_array_equal(loaded(x), exe(x))
    plain = planish.optimize(ir.to_proto(model(text, weights)), calibration={"x": x}, passes=[])
    np.testing.assert_allclose(exe(x), plain(x), rtol=1e-5, atol=1e-5)


def test_without_tvm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, artifact: Path) -> None:
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'planish\[tvm\]'"):
        planish.load(artifact, allow_native=True)
    made = two_layers()
    with pytest.raises(UnsupportedError, match=r"pip install 'planish\[tvm\]'"):
        compile_tvm(made.main, TARGET)


def test_calibration_of_entries_shares_weights(tmp_path: Path) -> None:
    made = two_layers()
    made.target = TARGET
    both = Program({"a": made.main, "b": made.main.clone()}, TARGET)
    given = feeds(made)
    both.calibration = Calibration([given], entry="a")
    exe = Executable(both, {name: compile_tvm(item, TARGET) for name, item in both.entries.items()})
    path = exe.export(tmp_path / "artifact")
    single = sum(array.nbytes for array in exe.runners["a"].weights.values())  # type: ignore[attr-defined]
    assert (path / "weights" / "weights.safetensors").stat().st_size < 1.5 * single + 8192
    loaded = planish.load(path, allow_native=True)
    for entry in ("a", "b"):
        np.testing.assert_array_equal(loaded.run(given, entry)["y"], exe.run(given, entry)["y"])


def test_the_pool_follows_the_target() -> None:
    tvm_runtime._set_threads(2)
    assert tvm_runtime._threads.count == 2
    tvm_runtime._set_threads(1)
    assert tvm_runtime._threads.count == 1
