"""Artifacts: folders that hold an optimized program and all that is needed to check and run it.

``manifest.json``, ``main.onnx`` (or one file per entry), ``weights/weights.safetensors`` (stored once, and at the
same time the ONNX files' external data), ``golden/*.safetensors``, ``report.json``, ``report.html``, and
``kernels/`` if there is native code. Files that the manifest does not list are never opened.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.ir.confined import ConfinedFile, open_confined
from planish.ir.errors import ArtifactError, InputError, PlanishError, UnsafeModelError, UnsupportedError
from planish.ir.ledger import ErrorStats
from planish.ir.target import Target
from planish.runtime.executable import Executable, Runner
from planish.runtime.fingerprint import differences, fingerprint
from planish.runtime.manifest import MAX_BYTES, NAME, Manifest
from planish.runtime.native import private_copies

if TYPE_CHECKING:
    from planish.runtime.report import Report

_CHUNK = 1 << 20
#: What an entry under a memory budget names in the place of a model.
_SPLIT = "pieces/split.json"


@dataclass
class VerifyResult:
    """What :func:`verify_artifact` found on this machine.

    Attributes:
        ok: every golden output is within `tolerance`.
        files, bytes: how many files were hashed, and their size.
        error: the worst error over the golden outputs; None if there are none.
        golden: the error of each golden sample, with its entry.
        tolerance: relative L2 that was allowed.
        differences: in what this machine differs from the one that made the artifact.
        unlisted: files in the folder that are no part of the artifact (and were not opened).
        notes: what the maker of the artifact left out.
    """

    ok: bool
    files: int
    bytes: int
    error: ErrorStats | None
    golden: list[tuple[str, ErrorStats]]
    tolerance: float
    differences: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "error": self.error.to_dict() if self.error else None,
            "golden": [{"entry": entry, "error": error.to_dict()} for entry, error in self.golden],
        }


def export_artifact(exe: Executable, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes `exe` as an artifact folder; see :meth:`planish.Executable.export`.

    Returns:
        The folder.
    """
    from planish.runtime import artifact_writer

    return artifact_writer.write(exe, Path(path), overwrite)


def load(
    path: str | os.PathLike[str],
    *,
    allow_native: bool = False,
    threads: int | None = None,
    memory: str | int | None = None,
) -> Executable:
    """Loads an artifact. Sizes and hashes of all files are checked before any of them is parsed.

    Imports neither torch nor the passes, compiles nothing, and maps the weights instead of reading them.

    Args:
        path: the folder.
        allow_native: load native code (``kernels/*.so``) if the artifact has any; it runs with your rights, so
            only from a source that you trust.
        threads: intra-op threads in place of the artifact's; 0 lets the runtime choose.
        memory: for a program under a memory budget: another budget, as ``"2GiB"`` or in bytes.

    Raises:
        ArtifactError: not an artifact, damaged, incomplete, of a newer schema, or with native code not allowed.
        UnsafeModelError: a file of it is a link, or refers to something outside the folder.
    """
    return _load(*_checked(path), allow_native, threads, memory)


def verify_artifact(
    path: str | os.PathLike[str],
    *,
    allow_native: bool = False,
    threads: int | None = None,
    tolerance: float | None = None,
) -> VerifyResult:
    """Hashes every file of an artifact again, runs its golden inputs, and compares with the expected outputs.

    Args:
        tolerance: relative L2 allowed; None: by the dtype of the outputs.

    Raises:
        InputError: as for :func:`load`.
    """
    from planish.ir.compare import compare_outputs, worst_of
    from planish.ir.compare import tolerance as default_tolerance
    from planish.runtime.tensorfile import read

    folder, manifest, contents = _checked(path)
    exe = _load(folder, manifest, contents, allow_native, threads)
    found, allowed = [], 0.0
    for sample in manifest.golden:
        expected = read(contents[sample.outputs], str(folder / sample.outputs))
        got = exe.run(read(contents[sample.inputs], str(folder / sample.inputs)), sample.entry)
        found.append((sample.entry, compare_outputs(expected, got)))
        allowed = max(allowed, default_tolerance(expected))
    error = worst_of([stats for _, stats in found]) if found else None
    limit = allowed if tolerance is None else tolerance
    return VerifyResult(
        ok=error is None or error.relative_l2 <= limit,
        files=len(manifest.files) + 1,
        bytes=sum(info.size for info in manifest.files.values()),
        error=error,
        golden=found,
        tolerance=limit,
        differences=differences(manifest.fingerprint, fingerprint()),
        unlisted=sorted(_unlisted(folder, manifest)),
        notes=manifest.notes,
    )


def golden_inputs(path: str | os.PathLike[str], entry: str | None = None) -> dict[str, Any]:
    """The inputs of the first golden sample of an entry, by default of the first one that has any.

    Raises:
        InputError: as for :func:`load`, or there is no such sample.
    """
    from planish.runtime.tensorfile import read

    folder, manifest, contents = _checked(path)
    for sample in manifest.golden:
        if entry in (None, sample.entry):
            return read(contents[sample.inputs], str(folder / sample.inputs))
    of = f" of entry '{entry}'" if entry else ""
    raise InputError(f"'{folder}' holds no golden sample{of}; give --inputs FILE.npz.")


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of an artifact folder; checks the manifest, not the files."""
    folder = Path(path)
    if not folder.exists():
        raise ArtifactError(f"'{folder}' does not exist.")
    if not folder.is_dir():
        hint = " It looks like a model: planish.optimize takes it." if folder.suffix == ".onnx" else ""
        raise ArtifactError(f"'{folder}' is a file; an artifact is a folder with a {NAME}.{hint}")
    if not os.path.lexists(folder / NAME):
        raise ArtifactError(f"'{folder}' is not an artifact: it holds no {NAME}.")
    with _open(folder, NAME) as file:
        if file.size > MAX_BYTES:
            raise ArtifactError(f"'{file.path}' has {file.size} bytes; the limit is {MAX_BYTES}.")
        return Manifest.from_bytes(file.read(), file.path)


def _checked(path: str | os.PathLike[str]) -> tuple[Path, Manifest, dict[str, bytes]]:
    """The folder, its manifest, and the contents of the small files, after every file was hashed.

    What is used later is what was hashed: the bytes are kept. Only the weights are opened again by the runtime.
    """
    folder = Path(os.path.abspath(path))
    manifest = read_manifest(folder)
    opened: dict[str, ConfinedFile] = {}
    try:
        for name, info in manifest.files.items():
            opened[name] = file = _open(folder, name)
            if file.size != info.size:
                raise ArtifactError(
                    f"'{file.path}' has {file.size} bytes, the manifest says {info.size}: it was truncated or replaced."
                )
        keep = {name for name in opened if name != manifest.weights}

        def check(name: str) -> tuple[str, bytes]:
            return name, _hash(opened[name], manifest.files[name].sha256, name in keep)

        # hashlib releases the interpreter lock, so files are hashed side by side; the largest begins first.
        order = sorted(opened, key=lambda name: -manifest.files[name].size)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            results = pool.map(check, order)
            _import_what_loading_needs(manifest.target)
            contents = dict(results)
    finally:
        for file in opened.values():
            file.close()
    return folder, manifest, {name: contents[name] for name in keep}


def _import_what_loading_needs(target: str) -> None:
    """Imports, a tenth of a second of them, while other threads hash the weights."""
    if not target.startswith("ort-"):
        return
    import onnx  # noqa: F401

    import planish.runtime.ort  # noqa: F401


def _hash(file: ConfinedFile, expected: str, keep: bool) -> bytes:
    digest = hashlib.sha256()
    if keep:
        data = file.read()
        digest.update(data)
    else:
        data, buffer = b"", memoryview(bytearray(_CHUNK))
        for offset in range(0, file.size, _CHUNK):
            part = buffer[: min(_CHUNK, file.size - offset)]
            file.read_into(part, offset)
            digest.update(part)
    if digest.hexdigest() != expected:
        raise ArtifactError(f"'{file.path}' is not the file that was exported: its SHA-256 differs.")
    return data


def _open(folder: Path, name: str) -> ConfinedFile:
    try:
        return open_confined(folder, name)
    except UnsafeModelError:
        raise
    except InputError as error:
        raise ArtifactError(f"the artifact is incomplete: {error}") from error


def budget_table(
    path: str | os.PathLike[str], target: Target | None = None, sizes: Mapping[str, int] | None = None
) -> tuple[dict[str, Any], list[str]] | None:
    """The plan of an artifact under a memory budget, as data and as lines of text; None for other artifacts.

    Nothing is run, and no GPU is looked for: rates are those of the machine that made it.

    Args:
        target: whose budget is planned for; None: the artifact's.
        sizes: ``batch``, ``prompt`` and ``new``, in tokens, where they differ from those that it was made with.

    Raises:
        InputError: as for :func:`load`, or another size; MemoryBudgetError: the budget is too small.
    """
    if not is_budgeted(read_manifest(path)):
        return None
    from planish.runtime.offload.artifact import planned

    folder, manifest, contents = _checked(path)
    plan, source = planned(folder, manifest, contents, target or Target.parse(manifest.target), sizes or {})
    return plan.to_dict(), [*plan.table().splitlines(), f"  rates: {source}"]


def is_budgeted(manifest: Manifest) -> bool:
    """Whether an artifact is one of a program under a memory budget."""
    return any(entry.file == _SPLIT for entry in manifest.entries.values())


def _load(
    folder: Path,
    manifest: Manifest,
    contents: Mapping[str, bytes],
    allow_native: bool,
    threads: int | None,
    memory: str | int | None = None,
) -> Executable:
    if manifest.native and not allow_native:
        raise ArtifactError(
            f"'{folder}' holds native code ({', '.join(manifest.native)}), which runs with your rights; if you trust "
            "where it came from, load it with allow_native=True (--allow-native)."
        )
    try:
        target = Target.parse(manifest.target)
    except InputError as error:
        raise ArtifactError(f"'{folder / NAME}': {error}") from error
    if threads is not None:
        if not isinstance(threads, int) or isinstance(threads, bool) or not 0 <= threads <= 9999:
            raise InputError(f"threads is {threads!r}; it must be a number from 0 to 9999.")
        target = replace(target, threads=threads)
    budgeted = is_budgeted(manifest)
    if memory is not None:
        if not budgeted:
            raise InputError(f"memory is {memory!r}, but '{folder}' is no program under a memory budget.")
        target = replace(target, memory=Target.parse(f"{target.name}:memory={memory}").memory)
    if target.device == "cuda":
        from planish.runtime.machine import machine

        here = machine()
        if target.runtime == "ort":
            from planish.runtime.ort_cuda import refuse
        else:
            from planish.runtime.tvm_cuda import refuse
        refuse(manifest, here, str(folder))
    runners: dict[str, Runner]
    with private_copies({name: contents[name] for name in manifest.native}) as native:
        if budgeted:
            from planish.runtime.offload import artifact as offload

            runners = {**offload.runners(folder, manifest, contents, target, here)}
        elif target.runtime == "ort":
            from planish.runtime import ort_artifact

            runners = ort_artifact.runners(folder, manifest, contents, target, native)
        elif target.runtime == "tvm":
            from planish.runtime import tvm_artifact

            weights = tvm_artifact.read_weights(folder, manifest)
            runners = {
                name: tvm_artifact.load_entry(folder, manifest, entry, weights, target, native)
                for name, entry in manifest.entries.items()
            }
        else:
            raise UnsupportedError(f"'{folder}' is for target '{target}', which this version of planish can not run.")
    return Executable(
        None,
        runners,
        report=_report_reader(folder, contents),
        pipeline=manifest.pipeline,
        provenance=manifest.provenance,
        target=target,
        source=folder,
    )


def _report_reader(folder: Path, contents: Mapping[str, bytes]) -> Callable[[], Report | None]:
    """Reads the report when it is asked for: its module is more than loading needs."""

    def read() -> Report | None:
        import json

        from planish.runtime.report import Report

        if "report.json" not in contents:
            return None
        try:
            return Report.from_dict(json.loads(contents["report.json"]))
        except (PlanishError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"'{folder / 'report.json'}' is not a report: {error}.") from error

    return read


def _unlisted(folder: Path, manifest: Manifest) -> Iterable[str]:
    for base, _, names in os.walk(folder):
        for name in names:
            relative = (Path(base) / name).relative_to(folder).as_posix()
            if relative != NAME and relative not in manifest.files:
                yield relative
