"""The machine at hand, and what artifacts and targets need of one."""

from __future__ import annotations

import pytest

from planish.ir.errors import UnsupportedError
from planish.ir.machine import Needs
from planish.ir.target import Target
from planish.runtime import machine as probe
from planish.runtime.cuda import devices
from planish.runtime.manifest import Manifest


def manifest(target: str, native: bool = False, **more: object) -> Manifest:
    files = ["kernels/main.so"] if native else []
    features = {file: ["avx2", "fma"] for file in files}
    return Manifest("", target, {"machine": "x86_64"}, {}, {}, native=files, features=features, **more)  # type: ignore[arg-type]


def test_this_machine_is_described() -> None:
    here = probe.machine()
    assert here.processor.machine and here.processor.cores >= 1 and here.processor.features
    assert "onnxruntime" in here.software and "CPUExecutionProvider" in here.providers
    assert bool(here.gpus) != bool(here.no_gpu) and (here.cuda is None) >= (not here.gpus and not here.driver)


def test_without_a_driver_the_rest_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise UnsupportedError("this machine has no NVIDIA driver (libcuda is not found).")

    monkeypatch.setattr(devices, "cuda_version", none)
    here = probe.machine()
    assert here.gpus == () and here.cuda is None and "no NVIDIA driver" in here.no_gpu and here.processor.cores


def test_kernels_only_make_an_onnx_model_faster_and_are_all_of_a_compiled_one() -> None:
    assert probe.needs_of(manifest("ort-cpu")) == Needs(software={"onnxruntime": ""})
    kernels = probe.needs_of(manifest("ort-cpu:kernels", native=True))
    assert kernels.faster_with == ("avx2", "fma") and not kernels.features and not kernels.machine
    compiled = probe.needs_of(manifest("tvm-cpu", native=True))
    assert compiled.features == ("avx2", "fma") and compiled.machine == "x86_64" and compiled.software == {"tvm": ""}


def test_what_an_artifact_says_itself_goes_first() -> None:
    needs = probe.needs_of(manifest("ort-cuda", needs={"code": ["sm_80"], "memory": 1 << 30, "gpus": 2}))
    assert needs.code == ("sm_80",) and needs.gpus == 2 and needs.providers == ("CUDAExecutionProvider",)
    assert needs.software == {"onnxruntime": ""}


def test_needs_are_in_the_manifest_only_where_there_are_any() -> None:
    assert b"needs" not in manifest("ort-cpu").to_bytes()
    assert b'"needs"' in manifest("ort-cuda", needs={"gpus": 1}).to_bytes()


@pytest.mark.parametrize(
    ("target", "needs"),
    [
        ("ort-cpu", Needs(software={"onnxruntime": ""})),
        ("ort-cpu:kernels", Needs(software={"tvm": "", "onnxruntime": "", "C compiler": ""})),
        ("ort-cpu:memory=1GiB", Needs(software={"onnxruntime": ""}, host_memory=1 << 30)),
        (
            "tvm-cuda:sm_75,memory=1GiB",
            Needs(
                software={"tvm": "", "nvcc": "", "C compiler": ""},
                gpus=1,
                code=("sm_75", "compute_75"),
                memory=1 << 30,
            ),
        ),
    ],
)
def test_what_targets_need(target: str, needs: Needs) -> None:
    assert probe.needs_of_target(Target.parse(target)) == needs
    if target == "ort-cpu":
        assert "avx512f" in probe.needs_of_target(Target.parse("tvm-cpu:arch=avx512")).features
