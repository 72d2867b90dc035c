"""What a machine has, what an artifact needs, and what of it is missing: pure data and rules, nothing is probed here.

`planish.runtime.machine` describes the machine at hand. Rules are tested with machines that are made up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from planish.ir.errors import InputError

Version = tuple[int, ...]
_CODE = re.compile(r"(sm|compute)_(\d{2,3})([af]?)")
#: (least arch, what instructions come with it); CUDA C++ Programming Guide, "Compute Capabilities".
_GPU_FEATURES = (
    (61, "dp4a"),
    (70, "tensor cores (float16)"),
    (75, "tensor cores (int8)"),
    (80, "bfloat16"),
    (80, "async copy"),
    (89, "fp8"),
    (90, "TMA"),
)


@dataclass(frozen=True)
class Processor:
    """A CPU.

    Attributes:
        name: as the system has it, ``"Intel(R) Xeon(R) …"``.
        machine: of `platform.machine()`, such as ``"x86_64"``.
        cores: that this process may use.
        features: names as in Linux's ``/proc/cpuinfo``.
        memory: bytes of main memory, or None.
    """

    name: str = ""
    machine: str = ""
    cores: int = 0
    features: frozenset[str] = frozenset()
    memory: int | None = None


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        arch: 10 · major + minor of the compute capability: 75, 80, 90.
        memory, free: bytes in all, and free when it was looked at (None: not known).
        processors: streaming multiprocessors.
        shared: bytes of shared memory that one block may ask for.
    """

    name: str
    arch: int
    memory: int
    free: int | None = None
    processors: int = 0
    shared: int = 0

    @property
    def features(self) -> list[str]:
        """Instructions that decide between forms of a kernel."""
        found = [name for least, name in _GPU_FEATURES if self.arch >= least]
        return [*found, "wgmma"] if self.arch == 90 else found  # only compute capability 9.0 has it

    def runs(self, codes: Iterable[str]) -> str | None:
        """The best of these binaries that it runs, machine code before PTX; None if there is none.

        ``sm_XY`` runs on the same major version from minor Y on, ``sm_XYa`` on exactly XY, ``sm_XYf`` on its family;
        ``compute_XY`` (PTX) is translated for any from XY on (CUDA C++ Programming Guide, "Binary Compatibility").
        """
        return max((code for code in codes if self._runs(code)), key=_rank, default=None)

    def _runs(self, code: str) -> bool:
        kind, arch, suffix = parse_code(code)
        if suffix == "a":
            return self.arch == arch
        if kind == "sm" or suffix == "f":
            return self.arch // 10 == arch // 10 and self.arch >= arch
        return self.arch >= arch


@dataclass(frozen=True)
class Machine:
    """A machine and its software.

    Attributes:
        gpus: in CUDA's order; empty without a driver.
        driver: version of the NVIDIA driver, such as ``"580.82"``; empty if it is not known or there is none.
        cuda: latest version of CUDA that the driver takes, such as (13, 0); None without a driver.
        no_gpu: why there is no GPU; empty if there is one.
        software: name → version of what is installed: ``onnxruntime``, ``tvm``, ``torch``, ``nvcc``, ``nccl``…
        providers: of ONNX Runtime.
    """

    processor: Processor = Processor()
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cuda: Version | None = None
    no_gpu: str = ""
    software: Mapping[str, str] = field(default_factory=dict)
    providers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Needs:
    """What an artifact takes to run. Empty fields ask for nothing.

    Attributes:
        machine: of `platform.machine()`.
        features: instructions of the processor without which it does not run.
        faster_with: instructions without which it runs, slower.
        software: name → least version; empty for any.
        providers: of ONNX Runtime.
        gpus: how many.
        code: what its GPU code is compiled for: ``"sm_75"``, ``"sm_90a"``, and ``"compute_80"`` for PTX.
        cuda: version of CUDA that the driver must take.
        memory: bytes on each GPU.
        host_memory: bytes of main memory.
    """

    machine: str = ""
    features: tuple[str, ...] = ()
    faster_with: tuple[str, ...] = ()
    software: Mapping[str, str] = field(default_factory=dict)
    providers: tuple[str, ...] = ()
    gpus: int = 0
    code: tuple[str, ...] = ()
    cuda: Version | None = None
    memory: int = 0
    host_memory: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What is not empty, for a manifest."""
        found = {key: value for key, value in vars(self).items() if value}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Needs:
        """Reads `to_dict`'s form.

        Raises:
            InputError: a field that is not known, or of another type: the artifact is of a later version.
        """
        values: dict[str, Any] = {}
        for key, value in data.items():
            kind = _FIELDS.get(key)
            if kind is None or not _fits(kind, value):
                raise InputError(f"needs: '{key}' is {str(value)[:60]!r}, which this version of planish does not know.")
            values[key] = tuple(value) if isinstance(value, list) else value
        for code in values.get("code", ()):
            parse_code(code)
        return cls(**values)


_FIELDS = {
    **dict.fromkeys(("features", "faster_with", "providers", "code"), "texts"),
    **dict.fromkeys(("gpus", "memory", "host_memory"), "number"),
    "machine": "text",
    "software": "versions",
    "cuda": "numbers",
}


@dataclass(frozen=True)
class Point:
    """One need, and how the machine stands to it.

    Attributes:
        need, have: in words.
        met: whether it is met.
        required: it does not run otherwise; else it runs, slower.
    """

    need: str
    have: str
    met: bool
    required: bool = True

    def __str__(self) -> str:
        return f"needs {self.need}; {self.have}" if self.required else f"is slower without {self.need}; {self.have}"


def unmet(needs: Needs, machine: Machine, device: int = 0) -> list[str]:
    """Why an artifact can not run on a machine, a line for each reason; empty if it can.

    Args:
        device: the first GPU that it would use.
    """
    return [str(point) for point in points(needs, machine, device) if point.required and not point.met]


def points(needs: Needs, machine: Machine, device: int = 0) -> list[Point]:
    """Each need with what the machine has."""
    found = [*_processor(needs, machine.processor), *_software(needs, machine)]
    if needs.gpus or needs.code or needs.memory or needs.cuda:
        found += _gpus(needs, machine, device)
    return found


def parse_code(text: str) -> tuple[str, int, str]:
    """(``sm`` or ``compute``, arch, suffix) of a name of GPU code.

    Raises:
        InputError: it is none.
    """
    match = _CODE.fullmatch(text)
    if match is None:
        raise InputError(f"'{text[:40]}' is no GPU code such as 'sm_80', 'sm_90a' or 'compute_80'.")
    return match[1], int(match[2]), match[3]


def version_of(text: str) -> Version:
    """The leading numbers of a version: ``(1, 31, 1)`` of ``"1.31.1+cpu"``."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def _rank(code: str) -> tuple[bool, int, str]:
    kind, arch, suffix = parse_code(code)
    return kind == "sm", arch, suffix


def _processor(needs: Needs, processor: Processor) -> Iterable[Point]:
    if needs.machine:
        have = f"this machine is {processor.machine}"
        yield Point(f"a processor of type {needs.machine}", have, needs.machine == processor.machine)
    for features, required in ((needs.features, True), (needs.faster_with, False)):
        if features:
            lacking = sorted(set(features) - processor.features)
            have = f"the processor lacks {', '.join(lacking)}" if lacking else "the processor has them"
            yield Point(f"the instructions {', '.join(features)}", have, not lacking, required)
    if needs.host_memory:
        known = processor.memory is not None
        have = f"there are {_size(processor.memory or 0)}" if known else "its size is not known"
        met = not known or needs.host_memory <= (processor.memory or 0)
        yield Point(f"{_size(needs.host_memory)} of main memory", have, met)


def _software(needs: Needs, machine: Machine) -> Iterable[Point]:
    for name, least in needs.software.items():
        there = machine.software.get(name)
        met = there is not None and version_of(there) >= version_of(least)
        need = f"{name} {least} or later" if least else name
        yield Point(need, f"{name} {there} is installed" if there is not None else "it is not installed", met)
    for name in needs.providers:
        has = ", ".join(machine.providers) or "none"
        yield Point(f"ONNX Runtime's {name}", f"this build has {has}", name in machine.providers)


def _gpus(needs: Needs, machine: Machine, device: int) -> Iterable[Point]:
    count = max(needs.gpus, 1)
    used = machine.gpus[device : device + count]
    there = machine.no_gpu.rstrip(".") or f"there are {len(machine.gpus)}"
    if device and machine.gpus:
        there += f", and GPU {device} would be the first"
    yield Point("a GPU" if count == 1 else f"{count} GPUs", there, len(used) == count)
    if needs.cuda is not None and (machine.cuda is not None or used):
        have = "its version is not known"
        if machine.cuda is not None:
            driver = f"driver {machine.driver}" if machine.driver else "the driver"
            have = f"{driver} takes up to CUDA {_dotted(machine.cuda)}"
        met = machine.cuda is not None and machine.cuda >= needs.cuda
        yield Point(f"a driver for CUDA {_dotted(needs.cuda)}", have, met)
    for index, gpu in enumerate(used, device):
        yield from _gpu(needs, gpu, f"GPU {index} ({gpu.name}, sm_{gpu.arch})")


def _gpu(needs: Needs, gpu: Gpu, which: str) -> Iterable[Point]:
    if needs.code:
        code = gpu.runs(needs.code)
        yield Point(
            f"a GPU for which it has code ({', '.join(needs.code)})",
            f"{which} runs {code}" if code is not None else f"{which} runs none of it",
            code is not None,
        )
    if needs.memory:
        room = gpu.memory if gpu.free is None else gpu.free
        have = f"{which} has {_size(gpu.memory)}" + (f", {_size(gpu.free)} of it free" if gpu.free is not None else "")
        short = f": {_size(needs.memory - room)} too little" if room < needs.memory else ""
        yield Point(f"{_size(needs.memory)} of GPU memory", have + short, not short)


def _size(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 28 else f"{count / (1 << 20):.1f} MiB"


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def _fits(kind: str, value: Any) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "versions":
        return isinstance(value, Mapping) and all(isinstance(t, str) for pair in value.items() for t in pair)
    if kind == "number":
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    of = str if kind == "texts" else int
    return isinstance(value, list | tuple) and all(isinstance(item, of) for item in value)
