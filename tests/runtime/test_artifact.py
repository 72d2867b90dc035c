from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from planish.frontends.onnx import load_onnx
from planish.ir.errors import ArtifactError, InputError, UnsafeModelError
from planish.ir.program import Calibration, Program
from planish.runtime import artifact_writer, folder
from planish.runtime.artifact import load, read_manifest, verify_artifact
from planish.runtime.executable import Executable
from planish.runtime.manifest import NAME, FileInfo
from planish.runtime.ort import compile_ort
from tests.runtime.models import ONE_THREAD, all_files, executable, limited, model, reseal, two_layers


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return executable().export(tmp_path / "artifact")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield executable().export(tmp_path_factory.mktemp("shared") / "artifact")


def batch() -> dict[str, np.ndarray]:
    calibration = two_layers().calibration
    assert calibration is not None
    return calibration.batches[0]


def test_round_trip(artifact: Path) -> None:
    exe = executable()
    loaded = load(artifact)
    want, got = exe.run(batch()), loaded.run(batch())
    for name in want:
        np.testing.assert_array_equal(want[name], got[name])
    assert loaded.pipeline == exe.pipeline
    assert loaded.target == exe.target
    assert loaded.provenance == exe.provenance
    assert [str(s) for s in (*loaded.inputs, *loaded.outputs)] == [str(s) for s in (*exe.inputs, *exe.outputs)]
    assert loaded.report is None
    assert loaded(**batch())[0].shape == (3, 8)
    with pytest.raises(InputError, match="Did you mean 'ids'"):
        loaded.run({"idz": batch()["ids"]})


def test_ranges_of_sizes_stay(tmp_path: Path) -> None:
    path = executable(limited()).export(tmp_path / "a")
    entry = json.loads((path / NAME).read_text())["entries"][0]
    assert entry["inputs"][0]["ranges"] == [None, [1, 16]]
    assert "ranges" not in entry["outputs"][0]
    loaded = load(path)
    assert loaded.run({"x": np.ones((2, 16), np.float32)})["y"].shape == (2, 16)
    with pytest.raises(InputError, match="input 'x' has seq=17 in dimension 1; the captured model takes 1 to 16"):
        loaded.run({"x": np.ones((2, 17), np.float32)})
    # The file alone says it too, so that it holds for whoever optimizes it again.
    again = loaded.export(tmp_path / "b")
    assert load_onnx(again / "main.onnx").inputs()[0].ranges == (None, (1, 16))


def test_files_are_as_documented(artifact: Path) -> None:
    names = [path.relative_to(artifact).as_posix() for path in all_files(artifact)]
    assert names == [
        "golden/main.0.inputs.safetensors",
        "golden/main.0.outputs.safetensors",
        "main.onnx",
        "manifest.json",
        "weights/weights.safetensors",
    ]
    weights = load_file(artifact / "weights/weights.safetensors")
    assert {name: array.shape for name, array in weights.items()} == {"w1": (16, 64), "w2": (64, 8), "table": (100, 8)}
    np.testing.assert_array_equal(load_file(artifact / names[0])["x"], batch()["x"])
    # The standard tools read it too, weights included.
    proto = onnx.load(artifact / "main.onnx")
    onnx.checker.check_model(proto)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(proto.graph.initializer[0]), weights["w1"])
    manifest = read_manifest(artifact)
    assert manifest.opsets == {"main": {"": 20}}
    assert manifest.fingerprint["onnxruntime"]
    assert set(manifest.files) == set(names) - {"manifest.json"}
    assert not os.access(artifact / "main.onnx", os.X_OK)
    assert (artifact.stat().st_mode & 0o777) == 0o777 & ~folder._umask()


def test_weights_of_several_entries_are_stored_once(tmp_path: Path) -> None:
    shared = two_layers()
    other = shared.clone().main
    other.graph.outputs.pop()
    program = Program({"prefill": shared.main, "decode": other}, shared.target)
    exe = Executable(program, {name: compile_ort(m, program.target) for name, m in program.entries.items()})
    path = exe.export(tmp_path / "a")
    assert (path / "prefill.onnx").is_file()
    size = (path / "weights/weights.safetensors").stat().st_size
    assert size < 4096 + sum(t.nbytes for t in shared.weights.values()) + 64
    loaded = load(path)
    assert loaded.entries == ["prefill", "decode"]
    assert list(loaded.run(batch(), entry="decode")) == ["y"]
    assert verify_artifact(path).notes == ["no golden data: there were no inputs to run."]


def test_verify_states_the_error_here(artifact: Path) -> None:
    result = verify_artifact(artifact)
    assert result.ok
    assert result.error is not None
    assert result.error.relative_l2 == 0
    assert (result.files, result.differences, result.unlisted) == (5, [], [])
    assert json.loads(json.dumps(result.to_dict()))["golden"][0]["entry"] == "main"
    # Expected outputs of another machine that computes otherwise:
    name = "golden/main.0.outputs.safetensors"
    data = bytearray((artifact / name).read_bytes())
    data[-4:] = np.float32(9.0).tobytes()
    (artifact / name).write_bytes(data)
    reseal(artifact, fingerprint={"machine": "m68k", "cores": os.cpu_count()})
    (artifact / "stray.txt").write_text("not part of it")
    result = verify_artifact(artifact)
    assert not result.ok
    assert result.error is not None
    assert result.error.relative_l2 > result.tolerance
    assert result.differences == [f"machine: made with m68k, here {os.uname().machine}"]
    assert result.unlisted == ["stray.txt"]
    assert verify_artifact(artifact, tolerance=1e3).ok


def test_golden_data_that_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (string[n] x) => (string[n] y) { y = Identity(x) }'
    program = Program.single(model(text), ONE_THREAD)
    program.calibration = Calibration([{"x": np.array(["a"], object)}])
    notes = read_manifest(executable(program).export(tmp_path / "text")).notes
    left_out = "golden sample 0 of entry 'main' is left out: "
    assert notes == [left_out + "'x' is object, which a safetensors file can not hold."]
    monkeypatch.setattr(artifact_writer, "GOLDEN_BYTES", 100)
    notes = read_manifest(executable().export(tmp_path / "large")).notes
    assert notes == [left_out + "888 bytes, of 100 that are left for golden data."]


def test_loaded_artifacts_export_again(artifact: Path, tmp_path: Path) -> None:
    again = load(artifact).export(tmp_path / "again")
    assert [p.read_bytes() for p in all_files(again)] == [p.read_bytes() for p in all_files(artifact)]
    loaded = load(again)
    (again / "main.onnx").write_bytes(b"changed")
    with pytest.raises(ArtifactError, match="was changed after the artifact was loaded"):
        loaded.export(tmp_path / "third")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "artifact"]


def test_threads(artifact: Path) -> None:
    loaded = load(artifact, threads=2)
    assert loaded.target.threads == 2
    with pytest.raises(InputError, match="threads is -1; it must be a number from 0 to 9999"):
        load(artifact, threads=-1)


def test_what_is_there_already(artifact: Path, tmp_path: Path) -> None:
    exe = executable(two_layers(seed=1))
    with pytest.raises(InputError, match="is there already; pass overwrite=True"):
        exe.export(artifact)
    before = load(artifact).run(batch())["y"]
    exe.export(artifact, overwrite=True)
    assert not np.array_equal(load(artifact).run(batch())["y"], before)
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.tex").write_text("…")
    (tmp_path / "file").write_text("…")
    (tmp_path / "link").symlink_to(artifact)
    for name, message in (("precious", "is no artifact"), ("file", "it is a file"), ("link", "symbolic link")):
        with pytest.raises(InputError, match=message):
            exe.export(tmp_path / name, overwrite=True)
    with pytest.raises(InputError, match="does not exist; make it first"):
        exe.export(tmp_path / "no/such")
    (tmp_path / "empty").mkdir()
    assert load(exe.export(tmp_path / "empty")).entries == ["main"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error"), KeyboardInterrupt()]
)
def test_failures_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, existing: bool, exchange: bool
) -> None:
    exe, target = executable(), tmp_path / "artifact"
    if existing:
        exe.export(target)
    before = {path: path.read_bytes() for path in all_files(tmp_path)}
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda first, second: False)
    steps = [(artifact_writer._Files, "close"), (folder, "_sync"), (folder, "_publish")]
    for owner, name in steps:
        with monkeypatch.context() as patch:

            def fail(*args: Any, **named: Any) -> None:
                raise failure

            patch.setattr(owner, name, fail)
            with pytest.raises((InputError, KeyboardInterrupt)) as caught:
                exe.export(target, overwrite=True)
        if isinstance(failure, OSError):
            wanted = "the disk is full" if failure.errno == errno.ENOSPC else "I/O error"
            assert wanted in str(caught.value)
        assert {path: path.read_bytes() for path in all_files(tmp_path)} == before
        assert [p.name for p in tmp_path.iterdir()] == (["artifact"] if existing else [])
    exe.export(target, overwrite=True)
    assert verify_artifact(target).ok
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="needs 0 MiB, the disk has 0 MiB left"):
        executable().export(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    for name, message in (
        ("no", "does not exist"),
        (".", "holds no manifest.json"),
        ("model.onnx", "planish.optimize"),
    ):
        with pytest.raises(ArtifactError, match=message):
            load(tmp_path / name)


def test_missing_truncated_and_replaced_files(artifact: Path) -> None:
    for path in all_files(artifact):
        data = path.read_bytes()
        for changed in (None, b"", data[:-1], data + b"\0", bytes([data[0] ^ 1]) + data[1:]):
            path.unlink(missing_ok=True)
            if changed is not None:
                path.write_bytes(changed)
            with pytest.raises(ArtifactError) as caught:
                load(artifact)
            assert path.name in str(caught.value)
            assert "\n" not in str(caught.value)
        path.write_bytes(data)
    load(artifact)


def test_links_are_refused(artifact: Path, tmp_path: Path) -> None:
    for name in ("main.onnx", "weights/weights.safetensors", NAME):
        outside = tmp_path / "outside"
        (artifact / name).rename(outside)
        (artifact / name).symlink_to(outside)
        with pytest.raises(UnsafeModelError, match="symbolic link"):
            load(artifact)
        (artifact / name).unlink()
        outside.rename(artifact / name)


def test_models_that_refer_elsewhere(artifact: Path) -> None:
    """The author of a whole artifact can make every hash fit; the loader still stays inside."""
    proto = onnx.load(artifact / "main.onnx", load_external_data=False)
    external = proto.graph.initializer[0].external_data
    for key, value, message in (
        ("location", "../secret", "is not the weights file"),
        ("location", "/etc/passwd", "is not the weights file"),
        ("location", "golden/main.0.inputs.safetensors", "is not the weights file"),
        ("offset", "99999999", "lies past the end"),
        ("offset", "-8", "is no number"),
        ("length", "9" * 30, "is no number"),
    ):
        entry = next(item for item in external if item.key == key)
        old, entry.value = entry.value, value
        (artifact / "main.onnx").write_bytes(proto.SerializeToString())
        reseal(artifact)
        with pytest.raises(UnsafeModelError, match=message):
            load(artifact)
        entry.value = old
    (artifact / "main.onnx").write_bytes(proto.SerializeToString())
    reseal(artifact)
    load(artifact)


def test_tensors_outside_that_hide_in_attributes(artifact: Path) -> None:
    proto = onnx.load(artifact / "main.onnx", load_external_data=False)
    hidden = onnx.TensorProto(data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL, name="hidden")
    hidden.external_data.add(key="location", value="../secret")
    constant = onnx.helper.make_node("Constant", [], ["hidden"], value=hidden)
    inner = onnx.helper.make_graph([constant], "inner", [], [onnx.helper.make_tensor_value_info("hidden", 1, [4])])
    nested = onnx.helper.make_node("If", ["c"], ["i"], then_branch=inner, else_branch=inner)
    function = onnx.helper.make_function("d", "f", [], ["hidden"], [constant], [onnx.helper.make_opsetid("", 20)])
    for change in ("node", "nested", "function"):
        hostile = onnx.ModelProto.FromString(proto.SerializeToString())
        if change == "function":
            hostile.functions.append(function)
        else:
            hostile.graph.node.append(constant if change == "node" else nested)
        (artifact / "main.onnx").write_bytes(hostile.SerializeToString())
        reseal(artifact)
        with pytest.raises(UnsafeModelError, match="weight 'hidden' is in '../secret'"):
            load(artifact)


def test_native_code_only_when_allowed(artifact: Path) -> None:
    (artifact / "kernels").mkdir()
    (artifact / "kernels/k.so").write_bytes(b"no library")
    manifest = read_manifest(artifact)
    reseal(artifact, files={**manifest.files, "kernels/k.so": FileInfo(0, "0" * 64)}, native=["kernels/k.so"])
    reseal(artifact)
    with pytest.raises(ArtifactError, match=r"kernels/k.so.*allow_native=True \(--allow-native\)"):
        load(artifact)
    with pytest.warns(RuntimeWarning, match="'.*k.so' are not used: .* The model runs without them"):
        exe = load(artifact, allow_native=True)
    assert "k.so" in exe.runners["main"].notes[0]


def test_entries_that_do_not_match_the_model(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    entry = manifest.entries["main"]
    reseal(artifact, entries={"main": type(entry)(entry.file, entry.inputs[:1], entry.outputs)})
    with pytest.raises(ArtifactError, match="not those of the manifest"):
        load(artifact)
    reseal(artifact, entries={"main": entry}, target="ort-gpu")
    with pytest.raises(ArtifactError, match="unknown target 'ort-gpu'"):
        load(artifact)
    reseal(artifact, target="ort-cuda")
    with pytest.raises(InputError, match="can not run"):
        load(artifact)
    # For this target the program is native code itself.
    reseal(artifact, target="tvm-cpu")
    with pytest.raises(ArtifactError, match="main.onnx' is not listed as native code"):
        load(artifact, allow_native=True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_any_file_is_an_error(shared: Path, tmp_path: Path, data: st.DataObject) -> None:
    files = all_files(shared)
    path = files[data.draw(st.integers(0, len(files) - 1))]
    raw = bytearray(original := path.read_bytes())
    how = data.draw(st.sampled_from(["flip", "cut", "insert", "zero"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    if how == "flip":
        raw[at] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del raw[at:]
    elif how == "insert":
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        raw[at:] = bytes(len(raw) - at)
    try:
        path.write_bytes(raw)
        if bytes(raw) == original:
            load(shared)
        else:
            with pytest.raises(InputError):
                load(shared)
    finally:
        path.write_bytes(original)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_models_behind_good_hashes_do_not_crash(shared: Path, data: st.DataObject) -> None:
    """Damage whose hashes fit again: an error, or a model that runs or fails with an error."""
    originals = {path: path.read_bytes() for path in all_files(shared)}
    name = data.draw(st.sampled_from(["main.onnx", "golden/main.0.outputs.safetensors"]))
    raw = bytearray(originals[shared / name])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        (shared / name).write_bytes(raw)
        reseal(shared)
        try:
            verify_artifact(shared)
        except InputError as error:
            assert "\n" not in str(error)
    finally:
        for path, content in originals.items():
            path.write_bytes(content)


def test_loading_imports_little(artifact: Path) -> None:
    code = """
import sys, planish, numpy as np
exe = planish.load(sys.argv[1])
exe.run({'x': np.ones((1, 16), np.float32), 'ids': np.zeros((1, 2), np.int64)})
heavy = 'torch onnxscript onnx_ir sympy networkx rich jinja2 plotly transformers planish.passes planish.frontends'
print([name for name in heavy.split() if name in sys.modules])
"""
    run = subprocess.run(
        [sys.executable, "-c", code, artifact],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.stdout.strip() == "[]"
