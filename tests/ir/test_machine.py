"""What of an artifact's needs a machine meets: machines that are made up, one for each reason to refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planish.ir.errors import InputError
from planish.ir.machine import Gpu, Machine, Needs, Processor, parse_code, points, unmet, version_of

GIB = 1 << 30
T4 = Gpu("Tesla T4", 75, 16 * GIB, free=3 * GIB)
H100 = Gpu("H100", 90, 80 * GIB, free=79 * GIB)
CPU = Processor("Xeon", "x86_64", 8, frozenset({"avx2", "fma"}), 32 * GIB)
MACHINE = Machine(
    CPU, (T4, H100), "580.82", (13, 0), software={"onnxruntime": "1.31.1+gpu"}, providers=("CUDAExecutionProvider",)
)
NEEDS = Needs(
    machine="x86_64",
    features=("avx2",),
    software={"onnxruntime": "1.30"},
    providers=("CUDAExecutionProvider",),
    gpus=1,
    code=("sm_75", "sm_80", "sm_90a", "compute_80"),
    cuda=(12, 8),
    memory=2 * GIB,
    host_memory=GIB,
)


def test_a_machine_that_has_all_of_it() -> None:
    assert unmet(NEEDS, MACHINE) == [] == unmet(NEEDS, MACHINE, device=1) and all(p.met for p in points(NEEDS, MACHINE))
    assert unmet(Needs(), Machine()) == [] and points(Needs(), Machine()) == []


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"machine": "aarch64"}, "needs a processor of type aarch64; this machine is x86_64"),
        ({"features": ("avx512f", "avx2")}, "avx512f, avx2; the processor lacks avx512f"),
        ({"software": {"onnxruntime": "1.32"}}, "needs onnxruntime 1.32 or later; onnxruntime 1.31.1+gpu is installed"),
        ({"software": {"tvm": ""}}, "needs tvm; it is not installed"),
        ({"providers": ("TensorrtExecutionProvider",)}, "this build has CUDAExecutionProvider"),
        ({"gpus": 3}, "needs 3 GPUs; there are 2"),
        ({"code": ("sm_80", "sm_90a", "compute_80")}, "GPU 0 (Tesla T4, sm_75) runs none of it"),
        ({"cuda": (13, 1)}, "needs a driver for CUDA 13.1; driver 580.82 takes up to CUDA 13.0"),
        ({"memory": 4 * GIB}, "has 16.00 GiB, 3.00 GiB of it free: 1.00 GiB too little"),
        ({"host_memory": 64 * GIB}, "needs 64.00 GiB of main memory; there are 32.00 GiB"),
    ],
)
def test_each_need_that_is_not_met_is_said_once(needs: dict, words: str) -> None:
    (reason,) = unmet(replace(NEEDS, **needs), MACHINE)
    assert words in reason


def test_without_a_driver_the_reason_for_that_is_said() -> None:
    none = replace(MACHINE, gpus=(), driver="", cuda=None, no_gpu="this machine has no NVIDIA driver.")
    assert unmet(NEEDS, none) == ["needs a GPU; this machine has no NVIDIA driver"]
    assert "and GPU 2 would be the first" in unmet(NEEDS, MACHINE, device=2)[0]


def test_two_gpus_are_looked_at_each() -> None:
    both = replace(NEEDS, gpus=2, memory=10 * GIB)
    assert unmet(both, MACHINE) == [
        "needs 10.00 GiB of GPU memory; GPU 0 (Tesla T4, sm_75) has 16.00 GiB, 3.00 GiB of it free: 7.00 GiB too little"
    ]


def test_memory_that_is_not_known_to_be_free_counts_as_a_whole() -> None:
    machine = replace(MACHINE, gpus=(replace(T4, free=None),))
    assert unmet(replace(NEEDS, memory=16 * GIB), machine) == []
    assert "0.5 MiB too little" in unmet(replace(NEEDS, memory=16 * GIB + (1 << 19)), machine)[0]


def test_what_only_makes_it_faster_is_stated_and_refuses_nothing() -> None:
    needs = replace(NEEDS, faster_with=("amx_tile",))
    assert unmet(needs, MACHINE) == []
    (slow,) = [point for point in points(needs, MACHINE) if not point.met]
    assert str(slow) == "is slower without the instructions amx_tile; the processor lacks amx_tile"


@pytest.mark.parametrize(
    ("arch", "codes", "best"),
    [
        (75, ("sm_75", "compute_75"), "sm_75"),
        (86, ("sm_75", "sm_80", "compute_80"), "sm_80"),
        (89, ("sm_75", "sm_80", "sm_86"), "sm_86"),
        (80, ("sm_86", "compute_75"), "compute_75"),  # a later minor version does not run
        (90, ("sm_80", "sm_90a"), "sm_90a"),
        (90, ("sm_80",), None),  # another major version does not run
        (100, ("sm_90a", "compute_80"), "compute_80"),  # 'a' is for one arch
        (100, ("compute_90a",), None),
        (103, ("sm_100f",), "sm_100f"),
        (120, ("sm_100f", "compute_100f"), None),
        (70, ("sm_75", "compute_75"), None),
    ],
)
def test_which_code_a_gpu_runs(arch: int, codes: tuple[str, ...], best: str | None) -> None:
    assert Gpu("", arch, GIB).runs(codes) == best


def test_features_by_arch() -> None:
    assert "bfloat16" not in T4.features and "tensor cores (int8)" in T4.features
    assert {"wgmma", "TMA", "fp8"} <= set(H100.features)
    assert "wgmma" not in Gpu("", 100, GIB).features and "TMA" in Gpu("", 100, GIB).features


def test_needs_go_through_a_manifest() -> None:
    assert Needs.from_dict(NEEDS.to_dict()) == NEEDS and Needs().to_dict() == {}
    for wrong in ({"gpu": 1}, {"gpus": True}, {"gpus": -1}, {"code": "sm_80"}, {"code": ["x80"]}, {"cuda": ["13"]}):
        with pytest.raises(InputError):
            Needs.from_dict(wrong)
    with pytest.raises(InputError, match="no GPU code"):
        parse_code("sm80")
    assert version_of("1.31.1+cpu") == (1, 31, 1) and version_of("dev") == ()
    # 1.9 is older than 1.30
    old = replace(MACHINE, software={"onnxruntime": "1.9"})
    assert len(unmet(NEEDS, old)) == 1
