"""nvcc is found where it may be, is asked for every architecture, and its refusals are said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from planish.ir.errors import UnsupportedError
from planish.runtime.cuda import cache, toolchain

# The largest of each kernel, which need the most registers.
KERNELS = [
    ("attention.cu", {"HEAD": 128, "GROUPS": 1}),
    ("attention.cu", {"HEAD": 128, "GROUPS": 2}),
    ("attention_decode.cu", {"HEAD": 128, "SHARED": 1}),
    ("merge_tokens.cu", {"VALUE": 0}),
    ("quantized_gemv.cu", {"BITS": 4, "CHANNEL": 0}),
]


@pytest.fixture(autouse=True)
def fresh():
    for cached in (toolchain.nvcc, cache.binary):
        cached.cache_clear()
    yield
    for cached in (toolchain.nvcc, cache.binary):
        cached.cache_clear()


def stand_in(folder: Path, monkeypatch, script: str) -> None:
    """A program that is called as nvcc is."""
    program = folder / "home" / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder / "home"))


def test_every_architecture_and_ptx(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, 'while [ "$1" != -o ]; do shift; done; to=$2; shift 2; printf "%s " "$@" > "$to"')
    said = toolchain.fatbin("attention.cu", {"HEAD": 64}).decode()
    assert "-DHEAD=64 " in said
    for arch in (
        "compute_75,code=sm_75",
        "compute_80,code=sm_80",
        "compute_90a,code=sm_90a",
        "compute_80,code=compute_80",
    ):
        assert f"-gencode arch={arch} " in said


def test_turing_has_no_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE", "")
    stand_in(tmp_path, monkeypatch, 'while [ "$1" != -o ]; do shift; done; to=$2; shift 2; printf "%s " "$@" > "$to"')
    assert b"sm_75" in cache.binary("attention.cu", (("ELEMENT_BF16", 0), ("HEAD", 64)))
    assert b"sm_75" not in cache.binary("attention.cu", (("ELEMENT_BF16", 1), ("HEAD", 64)))


def test_kept_on_disk(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir(mode=0o700)
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "kept"))
    stand_in(
        tmp_path, monkeypatch, f'while [ "$1" != -o ]; do shift; done; echo once >> {tmp_path}/runs; echo made > $2'
    )
    for _ in range(2):
        assert cache.binary("attention.cu", (("HEAD", 64),)) == b"made\n"
        cache.binary.cache_clear()
    assert (tmp_path / "runs").read_text() == "once\n"


def test_a_refusal_is_one_line(tmp_path, monkeypatch):
    stand_in(
        tmp_path, monkeypatch, "echo note >&2; echo 'attention.cu(3): error: no such thing' >&2; echo more >&2; exit 1"
    )
    with pytest.raises(
        UnsupportedError, match=r"nvcc refuses attention.cu for sm_75, .*: attention.cu\(3\): error: no such"
    ):
        toolchain.fatbin("attention.cu")


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(toolchain, "nvcc", lambda: None)
    with pytest.raises(UnsupportedError, match="set CUDA_HOME, or pip install 'planish\\[cuda\\]'"):
        toolchain.fatbin("attention.cu")


@pytest.mark.skipif(toolchain.nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize(("source", "defines"), KERNELS)
def test_no_kernel_spills(source, defines, tmp_path):
    """Registers that go to memory in a hot loop cost more than anything that the loop gains."""
    import subprocess

    for arch in toolchain.ARCHITECTURES:
        if arch == "sm_75" and defines.get("GROUPS") == 2:
            continue  # which is not used there
        flags = [f"-D{name}={value}" for name, value in defines.items()]
        command = [toolchain.nvcc(), "-cubin", "-o", tmp_path / "k", "-std=c++17", "-O3", "-Xptxas", "-v", *flags]
        command += ["-arch", arch, Path(toolchain.__file__).parent / "source" / source]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in said, (arch, said)
        assert "warning" not in said, said
