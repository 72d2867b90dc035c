"""Artifacts of programs under a memory budget: read on a machine with a GPU, or only planned for.

A plan depends on the machine: its rates are measured when an artifact is loaded, and what goes where is found again for
each generation. torch is not needed, nor are the passes: the driver is called directly, and pieces were lowered when
they were cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from planish.ir.confined import open_confined
from planish.ir.errors import ArtifactError, unknown
from planish.ir.machine import Machine
from planish.ir.target import Target
from planish.runtime import tensorfile
from planish.runtime.manifest import Manifest
from planish.runtime.offload.account import size_text
from planish.runtime.offload.device import Device
from planish.runtime.offload.engine import Engine
from planish.runtime.offload.plan import Plan
from planish.runtime.offload.planned import PlannedDevice
from planish.runtime.offload.runner import BudgetRunner
from planish.runtime.offload.stored import Reader


def runners(
    folder: Path, manifest: Manifest, contents: Mapping[str, bytes], target: Target, machine: Machine
) -> dict[str, BudgetRunner]:
    """What runs the entries of an artifact on the GPU at hand.

    Args:
        target: whose memory is the budget.
        machine: the one at hand.

    Raises:
        ArtifactError, UnsafeModelError: the files are not what the manifest says, or refer to others.
        MemoryBudgetError: the budget, or what is free of the GPU, is too small for what the artifact was made for.
    """
    reader = _read(folder, manifest, contents)
    limit, note = available(target, machine)
    engine = Engine(reader.split, device_for(replace(target, memory=limit)), target)
    engine.measure()
    runner = BudgetRunner(engine, reader.request)
    runner.notes += [note] if note else []
    return dict.fromkeys(manifest.entries, runner)


def planned(
    folder: Path, manifest: Manifest, contents: Mapping[str, bytes], target: Target, sizes: Mapping[str, int]
) -> tuple[Plan, str]:
    """The plan of an artifact for a target, without a GPU, and where its rates are from.

    Args:
        sizes: of the request, in the place of those that the artifact was made with.

    Raises:
        InputError: a size that a request has not.
        MemoryBudgetError: the budget is too small.
    """
    reader = _read(folder, manifest, contents)
    known = asdict(reader.request)
    for name in sizes:
        if name not in known:
            raise unknown("size", name, known)
    engine = Engine(reader.split, PlannedDevice(target.memory, target), target, reader.rates)
    source, rates = "assumed", engine.rates
    if reader.rates is not None:
        source = f"measured where it was made: {rates.link / 1e9:.3g} GB/s to the GPU"
        source += f", {rates.host / 1e9:.3g} GB/s of attention on the host"
    return engine.plan(replace(reader.request, **sizes)), source


def available(target: Target, machine: Machine) -> tuple[int | None, str]:
    """The budget, or where less of the GPU is free, that; and a word on it."""
    from planish.runtime.ort_cuda import device_index

    index = device_index(target)
    free = machine.gpus[index].free if index < len(machine.gpus) else None
    if target.memory is None or free is None or free >= target.memory:
        return target.memory, ""
    return free, f"{size_text(free)} of the GPU are free: the plan is for these, not for {size_text(target.memory)}"


def device_for(target: Target) -> Device:
    """The GPU of a target."""
    from planish.runtime.offload.cuda_device import CudaDevice

    return CudaDevice(target.memory, target)


def _read(folder: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> Reader:
    from planish.runtime.ort_artifact import check_references

    if manifest.weights is None:
        raise ArtifactError(f"'{folder}' has no weights.")
    for name, data in contents.items():
        if name.endswith(".onnx"):
            check_references(data, manifest, str(folder / name))
    with open_confined(folder, manifest.weights) as file:
        mapped: Any = file.map()  # lives on when the file is closed
    arrays = tensorfile.read(mapped, str(folder / manifest.weights))
    return Reader(str(folder), contents, arrays, mapped)
