"""Artifacts that hold generated kernels: made here, loaded in processes without a compiler, refused and replaced."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from planish.ir.errors import ArtifactError, UnsupportedError
from planish.ir.ops import DIALECT
from planish.ir.program import Calibration, Program
from planish.ir.target import Target
from planish.runtime.artifact import load, read_manifest, verify_artifact
from planish.runtime.executable import Executable
from planish.runtime.kernels import library, linker
from planish.runtime.ort import compile_ort, kernel_library
from tests.runtime.models import all_files, model, reseal

pytest.importorskip("tvm")
ROOT = Path(__file__).parents[3]
NATIVE = "kernels/kernels.so"
TARGET = Target.parse("ort-cpu:threads=1,kernels")
LINEAR = "y = planish.Linear (x, w, b)"
NORM = "y = planish.RMSNorm <epsilon = 0.25> (x, scale)"  # compiles in a moment


def program_of(body: str, *entries: str) -> Program:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((33, 47)), "b": rng.standard_normal(47), "scale": rng.standard_normal(33)}
    text = f"""<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
    g (float[rows, 33] x) => (float[rows, {33 if body == NORM else 47}] y) {{ [node] {body} }}"""
    made = model(
        text, {name: a.astype(np.float32) for name, a in weights.items() if f"{name})" in body or f"{name}," in body}
    )
    program = Program({name: made if not at else made.clone() for at, name in enumerate(entries or ("main",))}, TARGET)
    if not entries:
        program.calibration = Calibration([{"x": rng.standard_normal((5, 33)).astype(np.float32)}])
    return program


def executable(program: Program) -> Executable:
    try:
        found = kernel_library(list(program.entries.values()), program.target)
    except UnsupportedError as error:
        pytest.skip(str(error))
    runners = {name: compile_ort(item, program.target, library=found) for name, item in program.entries.items()}
    return Executable(program, runners)


def batch(rows: int = 5) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng().standard_normal((rows, 33)).astype(np.float32)}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return executable(program_of(NORM)).export(tmp_path / "artifact")


@pytest.fixture(autouse=True)
def no_other_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test compiles in its own way is for it alone."""
    kept = dict(library._built)
    yield
    library._built.clear()
    library._built.update(kept)


def in_a_fresh_process(path: Path, program: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where neither TVM nor torch can be imported."""
    code = f"""
import sys
for name in ("tvm", "tvm_ffi", "torch", "onnxscript"):
    sys.modules[name] = None
import numpy as np
import planish
path = {str(path)!r}
{program}
"""
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)


def test_round_trip_in_a_process_without_a_compiler(tmp_path: Path) -> None:
    exe = executable(program_of(LINEAR))
    path = exe.export(tmp_path / "artifact")
    manifest = read_manifest(path)
    assert manifest.native == [NATIVE] and set(manifest.features) == {NATIVE}
    assert manifest.features[NATIVE] == sorted(exe.runners["main"].library.features)  # type: ignore[attr-defined]
    # The file runs without the kernels too, anywhere.
    assert [(f.domain, f.name) for f in onnx.load(path / "main.onnx").functions] == [("planish", "Linear")]
    done = in_a_fresh_process(
        path,
        f"""
from planish.ir.errors import ArtifactError
from planish.runtime.artifact import verify_artifact
result = verify_artifact(path, allow_native=True)
assert result.ok and result.error.relative_l2 == 0, result
exe = planish.load(path, allow_native=True)
assert not exe.runners["main"].notes, exe.runners["main"].notes
x = np.random.default_rng(7).standard_normal((9, 33)).astype(np.float32)
np.save({str(tmp_path / "y.npy")!r}, exe(x))
try:
    planish.load(path)
except ArtifactError as error:
    print(error)
""",
        "-W",
        "error::RuntimeWarning",
    )
    assert not done.returncode, done.stderr
    assert f"holds native code ({NATIVE})" in done.stdout and "allow_native=True" in done.stdout
    x = np.random.default_rng(7).standard_normal((9, 33)).astype(np.float32)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), exe(x))


def test_entries_share_one_library(tmp_path: Path) -> None:
    exe = executable(program_of(LINEAR, "prefill", "decode"))
    path = exe.export(tmp_path / "artifact")
    assert [p.name for p in (path / "kernels").iterdir()] == ["kernels.so"]
    loaded = load(path, allow_native=True, threads=2)
    for entry in ("prefill", "decode"):
        given = batch(3)
        np.testing.assert_array_equal(loaded.run(given, entry)["y"], exe.run(given, entry)["y"])


def test_loaded_artifacts_export_again(artifact: Path, tmp_path: Path) -> None:
    again = load(artifact, allow_native=True).export(tmp_path / "again")
    assert [p.read_bytes() for p in all_files(again)] == [p.read_bytes() for p in all_files(artifact)]
    assert verify_artifact(again, allow_native=True).ok


def falls_back(artifact: Path, reason: str) -> None:
    """Asserts that the artifact runs without its kernels, says why, and gives the same numbers."""
    with pytest.warns(RuntimeWarning, match=f"kernels in '.*{NATIVE}' are not used: .*{reason}.*runs without them"):
        loaded = load(artifact, allow_native=True)
    (note,) = loaded.runners["main"].notes  # type: ignore[attr-defined]
    assert reason in note and "ONNXRuntimeError" not in note
    given = batch()
    (want,) = DIALECT["RMSNorm"].reference(given["x"], weights_of(artifact)["scale"], epsilon=0.25)
    np.testing.assert_allclose(loaded.run(given)["y"], want, rtol=1e-5, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert verify_artifact(artifact, allow_native=True).ok


def weights_of(artifact: Path) -> dict[str, np.ndarray]:
    proto = onnx.load(artifact / "main.onnx")
    return {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}


def test_a_processor_that_lacks_a_feature(artifact: Path) -> None:
    features = read_manifest(artifact).features[NATIVE]
    reseal(artifact, features={NATIVE: [*features, "avx4096"]})
    falls_back(artifact, "they need avx4096, which this processor does not have")


def test_a_file_that_is_no_library(artifact: Path) -> None:
    (artifact / NATIVE).write_bytes(b"\x7fELF and then nothing")
    reseal(artifact)
    falls_back(artifact, "")


def rebuilt() -> Path:
    """A library that is compiled in another way than usual."""
    library._built.clear()
    found = library.library_for(list(program_of(NORM).entries.values()))
    assert found is not None
    return found.path


@pytest.mark.parametrize("minors", [(1, 2), (900, 901)])
def test_the_library_refuses_another_onnxruntime(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, minors: tuple[int, int]
) -> None:
    monkeypatch.setattr(library, "ORT_MINORS", minors)
    message = f"planish's kernels were tested with ONNX Runtime 1.{minors[0]} to 1.{minors[1]}, not with"
    shutil.copy(rebuilt(), artifact / NATIVE)
    reseal(artifact)
    falls_back(artifact, message)
    with pytest.raises(UnsupportedError, match=f"generated kernels can not be used: .*{message}"):
        compile_ort(program_of(NORM).main, TARGET)


def test_the_library_refuses_another_processor(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own check, for whoever loads it without planish: the manifest here asks for nothing."""
    table = library._table
    monkeypatch.setattr(library, "_table", lambda kernels, features: table(kernels, [*features, "avx4096"]))
    shutil.copy(rebuilt(), artifact / NATIVE)
    reseal(artifact, features={})
    falls_back(artifact, "planish's kernels need avx4096, which this processor does not have")


MARKER = """
#include <stdio.h>
__attribute__((constructor)) static void loaded(void) { fclose(fopen("%s", "w")); }
"""


def test_a_changed_library_is_never_loaded(artifact: Path, tmp_path: Path) -> None:
    marker, source = tmp_path / "loaded", tmp_path / "hostile.c"
    source.write_text(MARKER % marker)
    linker.link([source], [], tmp_path / "hostile.so", [], [])
    original = (artifact / NATIVE).read_bytes()
    hostile = (tmp_path / "hostile.so").read_bytes()
    same_size = hostile + bytes(max(0, len(original) - len(hostile)))
    for changed in (hostile, same_size[: len(original)], original[:-1], original[:-1] + bytes([original[-1] ^ 1])):
        (artifact / NATIVE).write_bytes(changed)
        with pytest.raises(ArtifactError, match="kernels.so' (is not the file that was exported|has .* bytes)"):
            load(artifact, allow_native=True)
    (artifact / NATIVE).unlink()
    (artifact / NATIVE).symlink_to(tmp_path / "hostile.so")
    with pytest.raises(Exception, match="symbolic link"):
        load(artifact, allow_native=True)
    assert not marker.exists()
    # Whoever makes the hashes fit is the author, whom `allow_native` trusts.
    (artifact / NATIVE).unlink()
    (artifact / NATIVE).write_bytes(hostile)
    reseal(artifact)
    with pytest.raises(ArtifactError, match="allow_native=True"):
        load(artifact)
    assert not marker.exists()
    falls_back(artifact, "")
    assert marker.exists()


def test_what_is_loaded_is_what_was_hashed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is replaced between the hash and its use is not the one that runs."""
    from planish.runtime import artifact as module

    feeds = batch()
    expected = load(artifact, allow_native=True).run(feeds)["y"]
    whole = module._load

    def replaced(folder: Path, *rest: object) -> Executable:
        (folder / NATIVE).write_bytes(b"somebody else's")
        return whole(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_load", replaced)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(load(artifact, allow_native=True).run(feeds)["y"], expected)


def test_manifest_features_are_checked(artifact: Path) -> None:
    manifest = (artifact / "manifest.json").read_bytes()
    for features in ({"no such file": []}, {NATIVE: [3]}, {NATIVE: 3}, [NATIVE]):
        (artifact / "manifest.json").write_bytes(manifest)
        reseal(artifact, features=features)
        with pytest.raises(ArtifactError, match="does not follow the schema"):
            load(artifact, allow_native=True)


def test_a_target_without_kernels_has_none(tmp_path: Path) -> None:
    program = program_of(NORM)
    program.target = Target.parse("ort-cpu:threads=1")
    path = executable(program).export(tmp_path / "artifact")
    assert not read_manifest(path).native and not (path / "kernels").exists()
    assert verify_artifact(path).ok
