"""Everything a user can get wrong, through the command line and through Python.

Each is one clear line on standard error, the right exit code, nothing half-written, the input untouched.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import planish
from planish.ir.errors import InputError, PlanishError

MODEL = """<ir_version: 10, opset_import: ["" : 23]>
g (float[batch, 8] x, int64[batch] n) => (float[batch, 8] y) <float[8] scale = {1, 2, 3, 4, 5, 6, 7, 8}>
{
  a = Mul(x, scale)
  t = Tanh(a)
  i = Identity(t)
  y = Add(i, scale)
}"""


def proto(text: str = MODEL) -> onnx.ModelProto:
    return ir.to_proto(ir.from_onnx_text(text))


def snapshot(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def command(folder: Path, *args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), COLUMNS="400")
    return subprocess.run(
        [sys.executable, "-m", "planish.cli", *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **more,
    )


def external(folder: Path, **changed: str) -> Path:
    """A model whose weight is in w.bin beside it; `changed` replaces keys of its external data."""
    model = proto("""<ir_version: 10, opset_import: ["" : 23]>
        g (float[batch, 8] x) => (float[batch, 8] y) { y = Mul(x, w) }""")
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[8], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in ({"location": "w.bin", "offset": "0", "length": "32"} | changed).items():
        tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)
    (folder / "w.bin").write_bytes(np.ones(8, np.float32).tobytes())
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def linked(folder: Path, link: Callable[[Path, Path], None]) -> Path:
    path = external(folder)
    secret = folder.parent / f"{folder.name}-secret.bin"
    secret.write_bytes((folder / "w.bin").read_bytes())
    (folder / "w.bin").unlink()
    link(secret, folder / "w.bin")
    return path


def write(folder: Path, data: bytes, name: str = "model.onnx") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def good(folder: Path) -> Path:
    return write(folder, proto().SerializeToString())


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda d: d / "modle.onnx", "modle.onnx"),
    "folder": (lambda d: d, "folder"),
    "empty": (lambda d: write(d, b""), "empty"),
    "text": (lambda d: write(d, b"hello, I am a text\n" * 40), "ONNX file"),
    "random": (lambda d: write(d, np.random.default_rng(0).bytes(4000)), "ONNX file"),
    "truncated": (lambda d: write(d, proto().SerializeToString()[:-25]), "truncated"),
    "missing weights": (lambda d: ((p := external(d)), (d / "w.bin").unlink(), p)[2], "w.bin"),
    "truncated weights": (lambda d: ((p := external(d)), os.truncate(d / "w.bin", 12), p)[2], "12"),
    "offset past the end": (lambda d: external(d, offset="4096"), "w.bin"),
    "negative offset": (lambda d: external(d, offset="-4"), "offset"),
    "length that is not the tensor's": (lambda d: external(d, length="16"), "16"),
    "absolute path": (lambda d: external(d, location="/etc/passwd"), "/etc/passwd"),
    "parent path": (lambda d: external(d, location="../w.bin"), ".."),
    "inner parent path": (lambda d: external(d, location="a/../../w.bin"), ".."),
    "symlink": (lambda d: linked(d, lambda a, b: b.symlink_to(a)), "link"),
    "hardlink": (lambda d: linked(d, lambda a, b: os.link(a, b)), "link"),
    "fifo": (lambda d: linked(d, lambda a, b: os.mkfifo(b)), "regular"),
    "unknown op": (lambda d: write(d, _with_op("Tanhh")), "Tanhh"),
    "unknown domain": (lambda d: write(d, _with_op("Thing", "acme")), "acme"),
    "newer opset": (lambda d: write(d, _with_opset(99)), "99"),
}


def _with_op(op: str, domain: str = "") -> bytes:
    model = proto()
    model.graph.node[1].op_type, model.graph.node[1].domain = op, domain
    if domain:
        model.opset_import.add(domain=domain, version=1)
    return bytes(model.SerializeToString())


def _with_opset(version: int) -> bytes:
    model = proto()
    model.opset_import[0].version = version
    return bytes(model.SerializeToString())


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part.lower() in done.stderr.lower()


@pytest.mark.parametrize("case", FILES)
def test_bad_model_files(tmp_path: Path, case: str) -> None:
    make, part = FILES[case]
    folder = tmp_path / "work"
    folder.mkdir()
    path = make(folder)
    before = snapshot(folder)
    with pytest.raises(InputError) as caught:
        planish.optimize(path)
    assert part.lower() in str(caught.value).lower()
    assert "\n" not in str(caught.value)
    assert snapshot(folder) == before


@pytest.mark.parametrize("case", ["missing", "text", "truncated", "parent path", "unknown op"])
def test_bad_model_files_on_the_command_line(tmp_path: Path, case: str) -> None:
    make, part = FILES[case]
    folder = tmp_path / "work"
    folder.mkdir()
    path = make(folder)
    before = snapshot(folder)
    assert_refused(command(folder, "optimize", str(path), "-o", "out"), part)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["-t", "ort-cpuu"], ["unknown target", "did you mean 'ort-cpu'"]),
        (["-t", "tvm-cuda:sm_999"], ["needs a GPU", "--no-gates"]),
        (["-p", "fuse-gellu"], ["unknown pass", "did you mean 'fuse-gelu'"]),
        (["-p", "fuse-gelu,,x"], ["^"]),
        (["-p", "fold-constants{max_bites=3}"], ["max_bytes"]),
        (["-p", "fold-constants{max_bytes=}"], ["^"]),
        (["--budget", "error=much"], ["much"]),
        (["--budget", "eror=1"], ["did you mean 'error'"]),
        (["--inputs", "nothing.npz"], ["nothing.npz"]),
    ],
)
def test_bad_options(tmp_path: Path, args: list[str], parts: list[str]) -> None:
    path = good(tmp_path)
    before = snapshot(tmp_path)
    assert_refused(command(tmp_path, "optimize", path.name, "-o", "out", *args), *parts)
    assert snapshot(tmp_path) == before


def test_a_caret_stands_under_the_place(tmp_path: Path) -> None:
    done = command(tmp_path, "optimize", good(tmp_path).name, "-o", "out", "-p", "remove-no-ops,fuse-gelu{x")
    lines = done.stderr.rstrip("\n").splitlines()
    caret = next(i for i, line in enumerate(lines) if line.strip() == "^")
    assert "fuse-gelu{x" in lines[caret - 1]
    assert lines[caret].index("^") >= lines[caret - 1].index("fuse-gelu{x")


def test_an_output_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    path = good(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    before = snapshot(tmp_path)
    for more in ([], ["--overwrite"]):
        assert_refused(command(tmp_path, "optimize", path.name, "-o", "out", "--no-gates", *more), "out")
        assert snapshot(tmp_path) == before


@pytest.fixture(scope="module")
def exe() -> planish.Executable:
    return planish.optimize(proto(), budget=planish.Budget(gates=False))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": np.zeros((2, 8), "f")}, "'n' is missing"),
        ({"x": np.zeros((2, 8), "f"), "nn": np.zeros(2, np.int64)}, "Did you mean"),
        ({"x": np.zeros((2, 9), "f"), "n": np.zeros(2, np.int64)}, "size 9 in dimension 1, expected 8"),
        ({"x": np.zeros(8, "f"), "n": np.zeros(2, np.int64)}, "1 dimensions"),
        ({"x": np.zeros((2, 8)), "n": np.zeros(2, np.int64)}, "float64"),
        ({"x": np.zeros((2, 8), "f"), "n": np.zeros(3, np.int64)}, "batch=3"),
    ],
)
def test_bad_inputs_at_call(exe: planish.Executable, inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        exe.run(inputs)


def test_too_many_positional_inputs(exe: planish.Executable) -> None:
    with pytest.raises(InputError, match="3"):
        exe(np.zeros((2, 8), "f"), np.zeros(2, np.int64), np.zeros(1))


@pytest.mark.parametrize("model", [None, 3, object(), [], b"", "", {}])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(InputError):
        planish.optimize(model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"passes": 3}, "passes is a int"),
        ({"passes": [3]}, "class int"),
        ({"passes": [planish.Budget]}, "class type"),
        ({"passes": "fuse-gellu"}, "Did you mean 'fuse-gelu'"),
        ({"budget": {"error": 1e-3}}, "budget is a dict"),
        ({"target": "ort-cpuu"}, "Did you mean 'ort-cpu'"),
        ({"target": 3}, "target must be a string"),
        ({"dynamic_shapes": {"x": {0: "batch"}}}, "dynamic_shapes is for torch modules"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(planish.PlanishError) as caught:
        planish.optimize(proto(), **arguments)
    assert words in str(caught.value) and caught.value.exit_code == 2


def test_wrong_calibration_is_refused_before_any_pass() -> None:
    with pytest.raises(InputError, match="calibration batch 0: input 'n' is missing"):
        planish.optimize(proto(), calibration={"x": np.zeros((2, 8), "f")})


def artifact(folder: Path) -> Path:
    planish.optimize(proto(), budget=planish.Budget(gates=False)).export(folder / "artifact")
    return folder / "artifact"


def test_a_corrupted_artifact_is_refused(tmp_path: Path) -> None:
    path = artifact(tmp_path)
    model = path / "main.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(bytes(data))
    assert_refused(command(tmp_path, "run", "artifact", "--inputs", "x.npz"), "main.onnx")
    assert_refused(
        command(tmp_path, "verify", "artifact"),
        "main.onnx",
        code=command(tmp_path, "verify", "artifact").returncode or 2,
    )
    with pytest.raises(InputError, match="main.onnx"):
        planish.load(path)


def test_a_newer_artifact_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = artifact(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["schema_version"] = 999
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="999"):
        planish.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{}", "\x00"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = artifact(tmp_path)
    (path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json"):
        planish.load(path)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exe = planish.optimize(proto(), budget=planish.Budget(gates=False))
    before = sorted(tmp_path.rglob("*"))

    def full(*args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(PlanishError, match="can not write '.*/artifact': the disk is full"):
        exe.export(tmp_path / "artifact")
    assert sorted(tmp_path.rglob("*")) == before


def test_control_c_in_the_middle(tmp_path: Path) -> None:
    path = good(tmp_path)
    before = snapshot(tmp_path)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), PYTHONUNBUFFERED="1")
    code = (
        # A process that was started in the background ignores the signal, and so would this one.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import planish.passes.gates as g, time, sys\n"
        "old = g.Gates._settle\n"
        "def slow(self, *a):\n    print('ready', file=sys.stderr, flush=True); time.sleep(60)\n"
        "g.Gates._settle = slow\n"
        f"import planish.cli; sys.argv = ['planish', 'optimize', {str(path)!r}, '-o', 'out']; planish.cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    seen = ""
    deadline = time.monotonic() + 60
    while "ready" not in seen and time.monotonic() < deadline:
        seen += process.stderr.readline()
    time.sleep(1)  # "ready" is read before the line that wrote it is done
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted" in errors.lower()
    assert snapshot(tmp_path) == before
