"""Reading what commands are given: models and artifacts by path, inputs in ``.npz`` files; writing outputs whole."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.ir.errors import InputError
from planish.ir.target import Target
from planish.runtime.folder import whole_file

if TYPE_CHECKING:
    from planish.ir.program import Program
    from planish.runtime.executable import Executable


def is_artifact(path: str | Path) -> bool:
    """Whether `path` is a folder that `planish.load` would read."""
    return Path(path).is_dir()


def open_program(path: str | Path, target: Target | str = "ort-cpu") -> Program:
    """The program in an ONNX file, or in an artifact folder (all of its entries).

    Raises:
        InputError: the file or folder is missing, damaged or unsafe.
    """
    from planish.frontends.onnx import load_onnx
    from planish.ir.program import Program

    target = Target.parse(target)
    if not is_artifact(path):
        return load_onnx(path, target)
    from planish.runtime.artifact import read_manifest

    manifest, folder = read_manifest(path), Path(path)
    if _compiled(path):
        raise InputError(
            f"'{folder}' holds compiled code for {manifest.target} and no graph: its report.html shows what was "
            "compiled; for more give the model's file."
        )
    entries = {name: load_onnx(folder / entry.file, target) for name, entry in manifest.entries.items()}
    merged = Program({name: program.main for name, program in entries.items()}, target)
    merged.provenance = {**manifest.provenance, "artifact": str(folder), "pipeline": manifest.pipeline}
    _share_weights(merged)
    return merged


def _share_weights(program: Program) -> None:
    """Entries of an artifact are separate files; a weight of one name and content is one tensor again."""
    from planish.ir.hashing import tensor_digest

    store: dict[str, Any] = {}
    for model in program.entries.values():
        for name, value in model.graph.initializers.items():
            if value.const_value is None:
                continue
            known = store.setdefault(name, value.const_value)
            if known is not value.const_value and tensor_digest(known) == tensor_digest(value.const_value):
                value.const_value = known


def open_executable(path: str | Path, target: Target | str | None = None, *, allow_native: bool = False) -> Executable:
    """An artifact as it was exported, or an ONNX file on plain ONNX Runtime with all of its own optimizations.

    Args:
        target: for an ONNX file what to compile for; of an artifact only the threads are changed by it.
    """
    from planish.runtime.executable import Executable

    wanted = Target.parse(target or "ort-cpu")
    if is_artifact(path):
        from planish.runtime.artifact import load

        return load(Path(path), allow_native=allow_native, threads=wanted.threads or None)
    from planish.runtime.compile import compile_entry

    program = open_program(path, wanted)
    return Executable(program, {"main": compile_entry(program, "main", wanted)})


def made_up_inputs(
    path: str | Path, target: Target, dims: Mapping[str, int] | None = None, entry: str | None = None
) -> dict[str, np.ndarray]:
    """Inputs for a model or an artifact that the user gives none for: made from its specs; those of the first golden
    sample where an artifact holds compiled code and no graph.
    """
    from planish.ir.inputs import synthesize

    if is_artifact(path) and _compiled(path):
        from planish.runtime.artifact import golden_inputs

        if dims:
            raise InputError(f"--dim: '{path}' holds compiled code and no graph to make inputs for; give --inputs.")
        return golden_inputs(path, entry)
    program = open_program(path, target)
    return synthesize(program, entry or program.default_entry, dims=dims)


def _compiled(path: str | Path) -> bool:
    """Whether an artifact holds compiled code in place of its graphs."""
    from planish.runtime.artifact import read_manifest

    manifest = read_manifest(path)
    return any(entry.file in manifest.native for entry in manifest.entries.values())


def load_inputs(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, by name. Nothing in the file is executed.

    Raises:
        InputError: no such file, not an npz file, or it holds Python objects.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4)[:2] != b"PK":
                raise InputError(f"inputs '{path}' is not an .npz file; write one with numpy.savez(path, name=array).")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise InputError(f"can not read the inputs '{path}': {error.strerror or error}.") from None
    except ValueError as error:
        if "Object arrays" in str(error):
            raise InputError(f"inputs '{path}' holds Python objects, which are never loaded; save arrays.") from None
        raise InputError(f"inputs '{path}' is damaged: {error}.") from None
    except (zipfile.BadZipFile, EOFError, KeyError, MemoryError, NotImplementedError, SyntaxError) as error:
        raise InputError(f"inputs '{path}' is damaged: {error}.") from None


def save_outputs(path: str | Path, outputs: Mapping[str, Any]) -> None:
    """Writes arrays to an ``.npz`` file, whole or not at all.

    Raises:
        InputError: the file can not be written, or an output is not an array.
    """
    with whole_file(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        for name, value in outputs.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, _plain(name, value), allow_pickle=False)


def _plain(name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray | np.generic):
        raise InputError(f"output '{name}' is a {type(value).__name__}, not an array; an .npz file can not hold it.")
    array = np.asarray(value)
    if array.dtype == object:
        return array.astype(np.str_)
    if array.dtype.kind == "V":  # bfloat16 and the 8-bit floats have no code in the format
        return array.astype(np.float32)
    return array


def batches(paths: Sequence[str | Path]) -> list[dict[str, np.ndarray]] | None:
    """Calibration batches from files; None when there are none."""
    return [load_inputs(path) for path in paths] or None
