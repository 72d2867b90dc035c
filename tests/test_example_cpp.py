"""examples/cpp: an artifact with kernels runs without Python, and gives Python's numbers."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from planish.ir.errors import UnsupportedError
from planish.ir.program import Calibration, Program
from planish.ir.target import Target
from planish.runtime.executable import Executable
from planish.runtime.ort import compile_ort
from tests.runtime.models import model

pytest.importorskip("tvm")
SOURCES = Path(__file__).parents[1] / "examples/cpp"
TEXT = """<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
g (float[rows, 24] x, int64[rows] ids) => (float[rows, 24] y, float[rows, 24] s, int64[rows] twice) {
  [gather] e = Gather (table, ids)
  [norm] y, s = planish.AddRMSNormalization (x, e, scale)
  [double] twice = Add (ids, ids)
}"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler (c++, g++, clang++)")
    path = tmp_path_factory.mktemp("cpp") / "run"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", SOURCES / "run.cpp", "-ldl", "-o", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return path


@pytest.fixture(scope="module")
def runtime() -> Path:
    found = list((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip("this build of ONNX Runtime has no libonnxruntime.so")
    return found[0]


@pytest.fixture(scope="module")
def executable() -> Executable:
    rng = np.random.default_rng(3)
    weights = {"table": rng.standard_normal((9, 24)), "scale": rng.standard_normal(24)}
    made = Program.single(
        model(TEXT, {name: array.astype(np.float32) for name, array in weights.items()}),
        Target.parse("ort-cpu:threads=1,kernels"),
    )
    inputs = {"x": rng.standard_normal((7, 24)).astype(np.float32), "ids": rng.integers(0, 9, 7)}
    made.calibration = Calibration([inputs])
    try:
        return Executable(made, {"main": compile_ort(made.main, made.target)})
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.fixture
def artifact(executable: Executable, tmp_path: Path) -> Path:
    return executable.export(tmp_path / "artifact")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(("options", "libraries"), [((), 1), (("--threads", 2), 1), (("--without-kernels",), 0)])
def test_the_numbers_are_those_of_python(
    options: tuple[object, ...], libraries: int, program: Path, runtime: Path, artifact: Path, executable: Executable
) -> None:
    done = run(program, artifact, runtime, *options)
    assert not done.returncode, done.stdout + done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == f"ONNX Runtime {onnxruntime.__version__}, libraries of kernels: {libraries}"
    assert executable.program is not None and executable.program.calibration is not None
    want = executable.run(executable.program.calibration.batches[0])
    found = {}
    for line in lines:
        match = re.fullmatch(r"(\w+): relative error (\S+), norm (\S+)", line)
        assert match is not None, line
        found[match[1]] = float(match[2]), float(match[3])
    assert found.keys() == want.keys()
    for name, (error, norm) in found.items():
        assert norm == pytest.approx(np.linalg.norm(want[name].astype(np.float64)), rel=1e-6)
        # On one thread it is the same code on the same numbers.
        assert error == 0 if libraries else error < 1e-6


def test_other_outputs_are_told(program: Path, runtime: Path, artifact: Path) -> None:
    path = artifact / "golden/main.0.outputs.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    at = 8 + length + json.loads(data[8 : 8 + length])["y"]["data_offsets"][0]
    data[at : at + 4] = struct.pack("<f", 1e3)
    path.write_bytes(data)
    done = run(program, artifact, runtime)
    assert done.returncode == 1
    (error,) = re.findall(r"^y: relative error (\S+),", done.stdout, re.MULTILINE)
    assert float(error) > 0.5


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"x":{"dtype":"F32","shape":[7,24],"data_offsets":[0,999999]}}', "the data of x is not where"),
        (b'{"x":{"dtype":"F32","shape":[7,24],"data_offsets":[8,4]}}', "the data of x is not where"),
        (b'{"x":{"dtype":"F32","shape":[99999999999,99999999999],"data_offsets":[0,4]}}', "x is too large"),
        (b'{"x":{"dtype":"F8","shape":[],"data_offsets":[0,1]}}', "dtype F8 is not one that this program reads"),
        (b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "the header has no whole number"),
        (b'{"x":{"dtype"', "the header has no ':'"),
    ],
)
def test_damaged_files_are_errors(header: bytes, message: str, program: Path, runtime: Path, artifact: Path) -> None:
    (artifact / "golden/main.0.inputs.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    done = run(program, artifact, runtime)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_wrong_use_is_an_error(program: Path, runtime: Path, artifact: Path) -> None:
    for words, message in (
        ([artifact], "usage: run ARTIFACT"),
        ([artifact, runtime, "--fast"], "unknown option --fast"),
        ([artifact, artifact / "main.onnx"], "main.onnx"),
        ([artifact, artifact / "kernels/kernels.so"], "is not ONNX Runtime"),
        ([artifact, runtime, "--entry", "decode"], "decode.0.inputs.safetensors can not be opened"),
    ):
        done = run(program, *words)
        assert done.returncode == 2 and message in done.stderr, done.stderr
