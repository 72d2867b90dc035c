"""Target tvm-cuda: compiled, exported and inspected without a GPU; refusals in words; numerics where there is a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import planish
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.machine import Gpu, Machine, Needs, Processor
from planish.ir.program import Program
from planish.ir.target import Target
from planish.runtime.artifact import read_manifest
from planish.runtime.cuda import driver, toolchain
from planish.runtime.executable import Executable
from planish.runtime.tvm_cuda import TvmCudaRunner, compile_tvm_cuda, lacking, refuse, require
from tests.runtime.models import model, two_layers

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(toolchain.nvcc() is None, reason="no nvcc")
TARGET = Target.parse("tvm-cuda:sm_80")
H100 = Gpu("H100", 90, 80 << 30, 79 << 30)
WITH_H100 = Machine(Processor(machine="x86_64"), (H100,), driver="580.1", cuda=(13, 0), software={"tvm": "0.27.0"})
gpu = pytest.mark.skipif(not driver.available(), reason="no GPU")


@pytest.fixture(scope="module")
def program() -> Program:
    made = two_layers()
    made.target = TARGET
    return made


@pytest.fixture(scope="module")
def runner(program: Program) -> TvmCudaRunner:
    return compile_tvm_cuda(program.main, TARGET)


@pytest.fixture(scope="module")
def artifact(program: Program, runner: TvmCudaRunner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tvm_cuda") / "artifact"
    return Executable(program, {"main": runner}, pipeline="").export(path)


def test_the_library_holds_machine_code_and_ptx_and_no_source(artifact: Path) -> None:
    code = (artifact / "kernels/main.so").read_bytes()
    assert b"__global__" not in code and b"#include" not in code
    assert code.count(b"\x50\xed\x55\xba") >= 1  # a fat binary begins with it
    path = artifact.parent / "main.so"
    path.write_bytes(code)
    exported = subprocess.run(["nm", "-D", str(path)], capture_output=True, text=True, check=True).stdout
    assert "__tvm_ffi_planish_linear" in exported and "__tvm_ffi_planish_attention" not in exported
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert "cublas" not in needed and "libcuda" not in needed  # found when it runs


def test_the_manifest_says_what_a_machine_must_have(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    needs = Needs.from_dict(manifest.needs)
    assert needs.code == ("sm_80", "compute_80") and needs.cuda == (13, 0) and needs.gpus == 1
    weights = sum(array.nbytes for array in two_layers_weights())
    assert needs.memory >= weights
    refuse(manifest, WITH_H100, "here")
    for machine, words in (
        (Machine(no_gpu="this machine has no NVIDIA driver.", software={"tvm": "1"}), "no NVIDIA driver"),
        (_machine(Gpu("T4", 75, 16 << 30)), "T4, sm_75) runs none of it"),
        (_machine(H100, cuda=(12, 4)), "driver 580.1 takes up to CUDA 12.4"),
        (_machine(Gpu("small", 90, 1 << 10)), "of GPU memory"),
    ):
        with pytest.raises(UnsupportedError, match="can not run on this machine") as raised:
            refuse(manifest, machine, "here")
        assert words in str(raised.value) and "\n" not in str(raised.value)


def two_layers_weights() -> list[np.ndarray]:
    return [v.const_value.numpy() for v in two_layers().main.graph.initializers.values()]  # type: ignore[union-attr]


def _machine(gpu: Gpu, cuda: tuple[int, int] = (13, 0)) -> Machine:
    return Machine(Processor(machine="x86_64"), (gpu,), driver="580.1", cuda=cuda, software={"tvm": "0.27.0"})


def test_targets_are_refused_in_words() -> None:
    require(TARGET, WITH_H100)
    with pytest.raises(UnsupportedError, match="sm_100"):
        require(Target.parse("tvm-cuda:sm_100"), WITH_H100)
    assert lacking(Needs(gpus=1), WITH_H100) == ""
    with pytest.raises(InputError, match="option of ONNX Runtime"):
        compile_tvm_cuda(two_layers().main, Target.parse("tvm-cuda:session.x=1"))


def test_memory_is_planned(program: Program, runner: TvmCudaRunner) -> None:
    with pytest.raises(UnsupportedError, match=r"MiB more than memory allows"):
        compile_tvm_cuda(program.main, Target.parse("tvm-cuda:sm_80,memory=1KiB"))
    assert runner.needs.memory > 0


@pytest.mark.skipif(driver.available(), reason="there is a GPU")
def test_without_a_gpu_it_is_exported_and_not_run(artifact: Path, runner: TvmCudaRunner) -> None:
    given = {"x": np.zeros((3, 16), np.float32), "ids": np.zeros((3, 5), np.int64)}
    with pytest.raises(UnsupportedError, match="can not run on this machine: it needs a GPU"):
        runner.run(given)
    with pytest.raises(UnsupportedError, match="can not run on this machine"):
        planish.load(artifact, allow_native=True)
    x = model('<ir_version: 10, opset_import: ["" : 20]> g (float[2] a) => (float[2] o) { o = Relu(a) }')
    with pytest.raises(UnsupportedError, match="gates=False"):
        planish.optimize(x, "tvm-cuda")


def test_what_has_no_code_is_named() -> None:
    made = model('<ir_version: 10, opset_import: ["" : 20]> g (float[n] a) => (float[m] o) { o, p = Unique(a) }')
    with pytest.raises(UnsupportedError, match="target tvm-cuda does not take Unique"):
        compile_tvm_cuda(made, TARGET)


def test_a_refusal_leaves_the_driver_missing() -> None:
    """The stand-in for the driver's library, which lets TVM's runtime load, is not taken for a driver."""
    if driver.available():
        pytest.skip("there is a GPU")
    code = (
        "from planish.runtime.cuda.tvm_libraries import load_runtime\n"
        "from planish.runtime.cuda import driver\n"
        "load_runtime(stand_in=True)\n"
        "print(driver.available())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


@gpu
def test_runs_on_the_gpu(program: Program, runner: TvmCudaRunner) -> None:
    weights = {name: value.const_value.numpy() for name, value in program.main.graph.initializers.items()}  # type: ignore[union-attr]
    rng = np.random.default_rng()
    for batch, length in ((1, 1), (2, 33), (17, 3)):
        given = {
            "x": rng.standard_normal((batch, 16)).astype(np.float32),
            "ids": rng.integers(-100, 100, (batch, length)),
        }
        got = runner.run(given)
        hidden = np.maximum(given["x"].astype(np.float64) @ weights["w1"], 0)
        np.testing.assert_allclose(got["y"], hidden @ weights["w2"], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got["e"], weights["table"][given["ids"]])
    with pytest.raises(InputError, match="a gather failed"):
        runner.run({"x": np.zeros((1, 16), np.float32), "ids": np.full((1, 1), 100)})
