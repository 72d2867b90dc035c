"""Artifacts of TVM's targets: a shared library for each entry, and the weights as its kernels read them.

Weights are parameters of the code and are not in it: they are stored once for all entries, and mapped into memory.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.ir.errors import ArtifactError, InputError
from planish.runtime import tensorfile
from planish.runtime.kernels.cpu import missing
from planish.runtime.manifest import EntryInfo, Manifest
from planish.runtime.tensors import element_type

if TYPE_CHECKING:
    from planish.ir.target import Target
    from planish.runtime.executable import Executable
    from planish.runtime.tvm import TvmRunner
    from planish.runtime.tvm_cuda import TvmCudaRunner


def parameters_of(exe: Executable) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """The weights of all entries, each once, by a name of its own; and entry → names in the order of its code."""
    store: dict[str, np.ndarray] = {}
    names: dict[str, list[str]] = {}
    for entry, runner in exe.runners.items():
        names[entry] = []
        for name, array in runner.weights.items():  # type: ignore[attr-defined]
            free, number = name, 1
            while free in store and not _same(store[free], array):
                free, number = f"{entry}.{name}.{number}", number + 1
            store[free] = array
            names[entry].append(free)
    return store, names


def items_of(store: Mapping[str, np.ndarray]) -> list[tensorfile.Item]:
    """The weights as items of a safetensors file."""
    items = []
    for name, array in store.items():
        element = element_type(array)
        if element is None or not tensorfile.storable(element):
            raise InputError(f"weight '{name}' is {array.dtype}, which a safetensors file can not hold.")
        items.append(tensorfile.Item.of(name, array, element))
    return items


def write_code(runner: Any) -> bytes:
    """The shared library of an entry.

    Raises:
        UnsupportedError: there is no C compiler to link it.
    """
    assert runner.export is not None
    with tempfile.TemporaryDirectory(prefix="planish-tvm-") as folder:
        path = Path(folder) / "entry.so"
        runner.export(path)
        return path.read_bytes()


def read_weights(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The weights of an artifact over its file, which is mapped and not read."""
    if manifest.weights is None:
        return {}
    path = folder / manifest.weights
    with open(path, "rb") as file:
        # A private mapping may be written to, which TVM asks of memory that it is given; nothing writes to it.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return tensorfile.read(data, str(path))  # type: ignore[arg-type]


def load_entry(
    folder: Path,
    manifest: Manifest,
    entry: EntryInfo,
    weights: Mapping[str, np.ndarray],
    target: Target,
    native: Mapping[str, Path],
) -> TvmRunner | TvmCudaRunner:
    """The runner of an entry; `native` is where copies of the artifact's code are.

    Raises:
        ArtifactError: this processor lacks what the code needs, or the artifact is not whole.
    """
    where = folder / entry.file
    if entry.file not in manifest.native:
        raise ArtifactError(f"'{where}' is not listed as native code.")
    if lacking := missing(manifest.features.get(entry.file, ())):
        raise ArtifactError(
            f"'{where}' needs {', '.join(lacking)}, which this processor does not have; export for it with the "
            "target tvm-cpu:arch=avx2, or optimize for ort-cpu."
        )
    unknown = [name for name in entry.parameters if name not in weights]
    if unknown:
        raise ArtifactError(f"'{where}' needs the weight '{unknown[0]}', which '{manifest.weights}' does not hold.")
    own = {name: weights[name] for name in entry.parameters}
    if target.device == "cuda":
        from planish.runtime.tvm_cuda import TvmCudaRunner, load_module

        return TvmCudaRunner(load_module(native[entry.file]), own, entry.inputs, entry.outputs, target)
    from planish.runtime.tvm import load_tvm

    return load_tvm(native[entry.file], own, entry.inputs, entry.outputs, target)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
