"""The machine at hand, described as `planish.ir.machine` has it. No session is created and no GPU is used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.ir.errors import PlanishError, UnsupportedError
from planish.ir.machine import Gpu, Machine, Needs, Processor
from planish.ir.processor import features
from planish.ir.target import Target
from planish.runtime.cuda import devices
from planish.runtime.cuda.toolchain import nvcc
from planish.runtime.fingerprint import processor_name
from planish.runtime.kernels.cpu import LEVELS
from planish.runtime.kernels.linker import compiler

if TYPE_CHECKING:
    from planish.runtime.manifest import Manifest

#: What a package is called where it is installed from, by what is imported; the first that is there counts.
_PACKAGES = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "tvm": ("apache-tvm", "tvm"),
    "torch": ("torch",),
}


def machine() -> Machine:
    """Processor, GPUs, driver and software of this machine."""
    gpus: tuple[Gpu, ...] = ()
    no_gpu, driver, cuda = "", "", None
    try:
        cuda, driver = devices.cuda_version(), devices.driver_version()
        gpus = tuple(devices.gpus())
    except UnsupportedError as error:
        no_gpu = str(error)
    return Machine(_this_processor(), gpus, driver, cuda, no_gpu, software(), _providers())


def software() -> dict[str, str]:
    """Name → version of the runtimes, compilers and libraries that planish uses where they are there."""
    found = {name: text for name, names in _PACKAGES.items() if (text := _package(names))}
    if (made_by := nvcc()) is not None:
        found["nvcc"] = _said(str(made_by), r"release (\d+\.\d+)")
    if linked_by := _c_compiler():
        found["C compiler"] = _said(linked_by, r"(\d+\.\d+(?:\.\d+)?)")
    return found


def needs_of(manifest: Manifest) -> Needs:
    """What an artifact takes to run: by its target, its native code, and what it says itself."""
    target = Target.parse(manifest.target)
    compiled = target.runtime == "tvm"
    found: dict[str, Any] = {"software": {"tvm": ""} if compiled else {"onnxruntime": ""}}
    instructions = sorted({name for file in manifest.native for name in manifest.features.get(file, ())})
    # ONNX Runtime runs functions of the model in the place of kernels; of a compiled program there is nothing else.
    found["features" if compiled else "faster_with"] = instructions
    if compiled and "machine" in manifest.fingerprint:
        found["machine"] = str(manifest.fingerprint["machine"])
    if target.device == "cuda":
        found["gpus"] = 1
        if not compiled:
            found["providers"] = ["CUDAExecutionProvider"]
    return Needs.from_dict(found | manifest.needs)


def needs_of_target(target: Target) -> Needs:
    """What compiling for a target and running there takes, beside the program's own needs."""
    generated = target.generates and target.device == "cpu"
    software = {"tvm": ""} if target.runtime == "tvm" or generated else {}
    software |= {"onnxruntime": ""} if target.runtime == "ort" else {}
    software |= {"C compiler": ""} if generated else {}
    if target.device == "cuda":
        code: tuple[str, ...] = (target.arch,) if target.arch else ()
        if target.runtime == "tvm":  # compiled there too; what is compiled has PTX beside machine code
            software |= {"nvcc": "", "C compiler": ""}
            code += tuple(arch.rstrip("af").replace("sm_", "compute_") for arch in code)
        providers = ("CUDAExecutionProvider",) if target.runtime == "ort" else ()
        return Needs(software=software, providers=providers, gpus=1, code=code, memory=target.memory or 0)
    level = LEVELS.get(target.arch or "")
    instructions = tuple(sorted(level.features)) if level is not None else ()
    return Needs(software=software, features=instructions, host_memory=target.memory or 0)


def _this_processor() -> Processor:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    memory = None
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Processor(processor_name(), platform.machine(), cores, features(), memory)


def _providers() -> tuple[str, ...]:
    try:
        import onnxruntime

        return tuple(onnxruntime.get_available_providers())
    except (ImportError, AttributeError, OSError):
        return ()


def _package(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _c_compiler() -> str:
    try:
        return compiler()[0]
    except PlanishError:  # none, or $CC names what is none
        return ""


def _said(command: str, pattern: str) -> str:
    """The version that a compiler says it is, with its name; only the name if it says none."""
    name = Path(command).name
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return name
    match = re.search(pattern, done.stdout)
    return f"{match[1]} ({name})" if match else name
