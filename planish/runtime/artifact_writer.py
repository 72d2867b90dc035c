"""Writes artifacts; see :mod:`planish.runtime.artifact` for what is in one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.ir.errors import ArtifactError, InputError
from planish.runtime import tensorfile
from planish.runtime.caches import fitting
from planish.runtime.executable import Executable
from planish.runtime.fingerprint import fingerprint
from planish.runtime.folder import require_space, whole_folder
from planish.runtime.manifest import NAME, EntryInfo, FileInfo, Golden, Manifest
from planish.runtime.tensors import element_type

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from planish.ir.program import Program

WEIGHTS = "weights/weights.safetensors"
#: Golden samples that are stored at most, and bytes they may take together: they are there to check, not to measure.
GOLDEN_SAMPLES = 2
GOLDEN_BYTES = 16 << 20


def write(exe: Executable, path: Path, overwrite: bool) -> Path:
    """Writes the artifact of `exe` to `path`, all of it or nothing.

    Raises:
        InputError: something is there already, the folder can not be written, or the disk is full.
    """
    target = Path(os.path.abspath(path))
    check_target(target, overwrite)
    with whole_folder(target, overwrite) as folder:
        if exe.program is not None:
            write_files = _write_program if exe.target.runtime == "ort" else _write_compiled
            if any(hasattr(runner, "engine") for runner in exe.runners.values()):
                write_files = _write_budgeted
            write_files(exe, exe.program, _Files(folder), target)
        elif exe.source is not None:
            _copy(exe.source, _Files(folder), target)
        else:
            raise InputError("this executable holds no program to export.")
    return target


def check_target(target: Path, overwrite: bool) -> None:
    """Refuses a place for an artifact where something else is; the command line asks before it does any work.

    Raises:
        InputError: the parent folder does not exist, or what is there is not to be replaced.
    """
    if not target.parent.is_dir():
        raise InputError(f"can not write '{target}': folder '{target.parent}' does not exist; make it first.")
    if target.is_symlink():
        raise InputError(f"can not write '{target}': it is a symbolic link; name the folder itself.")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise InputError(f"can not write '{target}': it is a file; an artifact is a folder.")
    if not (target / NAME).is_file() or b'"planish-artifact"' not in (target / NAME).read_bytes():
        raise InputError(f"'{target}' is there already and is no artifact; it is never replaced. Name another folder.")
    if not overwrite:
        raise InputError(
            f"'{target}' is there already; pass overwrite=True (--overwrite) to replace it, or name another folder."
        )


class _Files:
    """Writes files into the folder and keeps their sizes and hashes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[str, FileInfo] = {}

    def path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        return path

    def write(self, name: str, *parts: Any) -> None:
        """Writes buffers (or functions that return one, called one after the other) to a new file."""
        digest, size = hashlib.sha256(), 0
        with open(self.path(name), "xb") as file:
            for part in parts:
                view = memoryview(part() if callable(part) else part)
                file.write(view)
                digest.update(view)
                size += view.nbytes
        self.written[name] = FileInfo(size, digest.hexdigest())

    def add(self, name: str) -> None:
        """Takes in a file that somebody else wrote into the folder."""
        with open(self.folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.written[name] = FileInfo((self.folder / name).stat().st_size, digest)

    def close(self, manifest: Manifest) -> None:
        manifest.files = self.written
        self.path(NAME).write_bytes(manifest.to_bytes())


def _write_program(exe: Executable, program: Program, files: _Files, target: Path) -> None:
    from planish.ir.serialize import point_at, to_proto_without_weights
    from planish.runtime.ort import with_bodies

    store = _Store()
    protos: dict[str, tuple[onnx.ModelProto, dict[str, str]]] = {}
    for name, model in program.entries.items():
        proto, weights = to_proto_without_weights(with_bodies(model))
        protos[name] = proto, store.add(name, weights)
    header, order, ranges = tensorfile.layout(store.items, tensorfile.PAGE)
    graphs = sum(proto.ByteSize() for proto, _ in protos.values())
    require_space(target, len(header) + sum(item.nbytes for item in order) + graphs)
    opsets, entries = {}, {}
    for name, (proto, stored) in protos.items():
        point_at(proto, WEIGHTS, {weight: ranges[key] for weight, key in stored.items()})
        file = f"{name}.onnx"
        files.write(file, proto.SerializeToString(deterministic=True))
        opsets[name] = {item.domain: item.version for item in proto.opset_import}
        runner = exe.runners[name]
        buckets = getattr(runner, "buckets", None)
        entries[name] = EntryInfo(file, runner.inputs, runner.outputs, buckets=buckets)
    if order:
        files.write(WEIGHTS, header, *(item.raw for item in order))
    _write_rest(exe, program, files, entries, opsets, WEIGHTS if order else None, _write_kernels(exe, files))


def _write_budgeted(exe: Executable, program: Program, files: _Files, target: Path) -> None:
    """The files of a program under a memory budget: models of its pieces, and how they follow each other."""
    from planish.ir.serialize import point_at
    from planish.runtime.offload.stored import SPLIT, Writer

    store = _Store()
    runner: Any = next(iter(exe.runners.values()))
    made = Writer(runner.engine, runner.request, store.add)
    header, order, ranges = tensorfile.layout(store.items, tensorfile.PAGE)
    require_space(target, len(header) + sum(item.nbytes for item in order))
    for number, (proto, stored) in enumerate(made.models):
        point_at(proto, WEIGHTS, {weight: ranges[key] for weight, key in stored.items()})
        files.write(f"pieces/{number}.onnx", proto.SerializeToString(deterministic=True))
    files.write(SPLIT, made.description())
    files.write(WEIGHTS, header, *(item.raw for item in order))
    entries = {name: EntryInfo(SPLIT, runner.inputs, runner.outputs) for name in exe.runners}
    opsets = {name: dict(program.entry(name).opset_imports) for name in exe.runners}
    _write_rest(exe, program, files, entries, opsets, WEIGHTS, {})


def _write_compiled(exe: Executable, program: Program, files: _Files, target: Path) -> None:
    """The files of a target that compiles all of the program: code for each entry, weights as the code reads them."""
    from planish.runtime import tvm_artifact

    store, names = tvm_artifact.parameters_of(exe)
    header, order, _ = tensorfile.layout(tvm_artifact.items_of(store), tensorfile.PAGE)
    require_space(target, len(header) + sum(item.nbytes for item in order))
    entries, features, opsets = {}, {}, {}
    for name, runner in exe.runners.items():
        file = f"kernels/{name}.so"
        files.write(file, tvm_artifact.write_code(runner))
        entries[name] = EntryInfo(file, runner.inputs, runner.outputs, names[name])
        features[file] = sorted(runner.features)  # type: ignore[attr-defined]
        opsets[name] = dict(program.entry(name).opset_imports)
    if order:
        files.write(WEIGHTS, header, *(item.raw for item in order))
    _write_rest(exe, program, files, entries, opsets, WEIGHTS if order else None, features)


def _write_rest(
    exe: Executable,
    program: Program,
    files: _Files,
    entries: dict[str, EntryInfo],
    opsets: dict[str, dict[str, int]],
    weights: str | None,
    features: dict[str, list[str]],
) -> None:
    """Golden data, report and manifest."""
    notes: list[str] = []
    manifest = Manifest(
        pipeline=exe.pipeline,
        target=str(exe.target),
        fingerprint=fingerprint(),
        opsets=opsets,
        entries=entries,
        weights=weights,
        native=list(features),
        features=features,
        needs=_needs(exe, program),
        golden=_write_golden(exe, program, files, notes),
        ledger=_write_report(exe, files),
        provenance={str(k): str(v) for k, v in exe.provenance.items()},
        notes=notes,
    )
    files.close(manifest)


def _needs(exe: Executable, program: Program) -> dict[str, Any]:
    """What a machine must have beside a processor, for targets that ask for more."""
    if exe.target.name == "tvm-cuda":
        every = [runner.needs for runner in exe.runners.values()]  # type: ignore[attr-defined]
        largest: dict[str, Any] = max(every, key=lambda item: item.memory).to_dict()
        return largest
    if exe.target.name != "ort-cuda":
        return {}
    for runner in exe.runners.values():
        if hasattr(runner, "engine"):
            budgeted: dict[str, Any] = runner.needs().to_dict()  # type: ignore[attr-defined]
            return budgeted
    from planish.runtime.ort_cuda import needs

    return needs(program, exe.target, [getattr(runner, "library", None) for runner in exe.runners.values()]).to_dict()


def _write_kernels(exe: Executable, files: _Files) -> dict[str, list[str]]:
    """Writes the library of generated kernels, if there is one; returns what a processor must have, by file."""
    libraries = (getattr(runner, "library", None) for runner in exe.runners.values())
    found = {library for library in libraries if library is not None}
    features = {}
    for number, library in enumerate(sorted(found, key=lambda item: str(item.path))):
        name = f"kernels/kernels{number or ''}.so"
        files.write(name, library.path.read_bytes())
        features[name] = sorted(library.features)
    return features


class _Store:
    """The weights of all entries, each tensor once."""

    def __init__(self) -> None:
        self.items: list[tensorfile.Item] = []
        self._keys: dict[int, str] = {}
        self._names: set[str] = set()
        self._kept: list[Any] = []  # an identity must not be used twice

    def add(self, entry: str, weights: Mapping[str, ir.TensorProtocol]) -> dict[str, str]:
        """Takes in the weights of an entry; returns name in the entry → name in the file."""
        stored = {}
        for name, tensor in weights.items():
            key = self._keys.get(id(tensor))
            if key is None:
                key = self._keys[id(tensor)] = self._free(name, entry)
                self._kept.append(tensor)
                self._append(key, tensor)
            stored[name] = key
        return stored

    def _append(self, name: str, tensor: ir.TensorProtocol) -> None:
        from planish.ir.external import stored_bytes

        shape = tuple(int(d) for d in tensor.shape.numpy())
        raw: Callable[[], np.ndarray] = lambda: stored_bytes(tensor)  # noqa: E731
        self.items.append(tensorfile.Item(name, int(tensor.dtype), shape, tensor.nbytes, raw))

    def _free(self, name: str, entry: str) -> str:
        candidate, number = name, 1
        while candidate in self._names or candidate == "__metadata__":
            candidate, number = f"{entry}.{name}.{number}", number + 1
        self._names.add(candidate)
        return candidate


def _write_golden(exe: Executable, program: Program, files: _Files, notes: list[str]) -> list[Golden]:
    calibration = program.calibration
    if calibration is None:
        notes.append("no golden data: there were no inputs to run.")
        return []
    if any(getattr(runner, "offline", False) for runner in exe.runners.values()):
        notes.append(f"no golden data: made for {exe.target} on a machine that can not run it.")
        return []
    golden: list[Golden] = []
    left = GOLDEN_BYTES
    for part in calibration.parts:
        if part.entry not in exe.runners:
            continue  # under a memory budget, steps follow a prompt
        names = {spec.name for spec in exe.runners[part.entry].inputs}
        for number, batch in enumerate(part.batches[:GOLDEN_SAMPLES]):
            where = f"golden sample {number} of entry '{part.entry}'"
            given = fitting(program.entry(part.entry).graph, names, batch)
            outputs = exe.run(given, part.entry)
            try:
                tensors = [_items(given), _items(outputs)]
            except InputError as error:
                notes.append(f"{where} is left out: {error}")
                continue
            size = sum(item.nbytes for items in tensors for item in items)
            if size > left:
                notes.append(f"{where} is left out: {size} bytes, of {left} that are left for golden data.")
                continue
            left -= size
            paths = [f"golden/{part.entry}.{number}.{kind}.safetensors" for kind in ("inputs", "outputs")]
            for path, items in zip(paths, tensors, strict=True):
                header, order, _ = tensorfile.layout(items)
                files.write(path, header, *(item.raw for item in order))
            golden.append(Golden(part.entry, paths[0], paths[1], part.synthetic))
    return golden


def _items(arrays: Mapping[str, Any]) -> list[tensorfile.Item]:
    """The arrays to store; raises InputError for what safetensors can not hold (text, sequences, 4 bit numbers)."""
    items = []
    for name, array in arrays.items():
        element = element_type(array) if isinstance(array, np.ndarray) else None
        if element is None or not tensorfile.storable(element):
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise InputError(f"'{name}' is {kind}, which a safetensors file can not hold.")
        items.append(tensorfile.Item.of(name, array, element))
    return items


def _write_report(exe: Executable, files: _Files) -> dict[str, Any] | None:
    """Writes report.json and report.html; returns the ledger for the manifest, near misses only counted."""
    from planish.runtime.report_html import render_html

    if exe.report is None:
        return None
    data = exe.report.to_dict()
    files.write("report.json", json.dumps(data, indent=1, allow_nan=False).encode())
    files.write("report.html", render_html(exe.report).encode())
    ledger = dict(data["ledger"])
    ledger["entries"] = [{**entry, "declined": len(entry["declined"])} for entry in ledger["entries"]]
    return ledger


def _copy(source: Path, files: _Files, target: Path) -> None:
    """Copies the artifact that an executable was loaded from; damage since then is an error."""
    from planish.ir.confined import open_confined
    from planish.runtime.artifact import read_manifest

    manifest = read_manifest(source)
    require_space(target, sum(info.size for info in manifest.files.values()))
    for name, info in manifest.files.items():
        with open_confined(source, name) as file:
            files.write(name, *_parts(file.read, file.size))
        if files.written[name] != info:
            raise ArtifactError(f"'{source / name}' was changed after the artifact was loaded; nothing was written.")
    files.close(manifest)


def _parts(read: Callable[[int, int], bytes], size: int, chunk: int = 16 << 20) -> Sequence[Callable[[], bytes]]:
    return [lambda at=at: read(at, min(chunk, size - at)) for at in range(0, size, chunk)]  # type: ignore[misc]
