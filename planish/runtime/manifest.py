"""``manifest.json`` of an artifact: what is in the folder, checked before any of it is parsed.

The file is canonical JSON (sorted keys, one indentation, no NaN) that carries the SHA-256 of itself without that
line, so any change to it is seen. This guards against damage, not against somebody who writes a whole artifact: for
that, sign the folder (for example with the ``model-signing`` package).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from planish.ir.buckets import Buckets
from planish.ir.confined import parse_location
from planish.ir.errors import ArtifactError, UnsafeModelError
from planish.ir.spec import TensorSpec
from planish.version import __version__

NAME = "manifest.json"
FORMAT = "planish-artifact"
SCHEMA = 1
#: Larger files are refused before they are parsed, in bytes.
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and SHA-256 (hex) of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class EntryInfo:
    """An entry: its ONNX file (or its library, for ``tvm-cpu``), inputs and outputs.

    `parameters` are the weights that a library takes behind the inputs, in its order; `buckets` what padding was proved
    to take.
    """

    file: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    parameters: list[str] = field(default_factory=list)
    buckets: Buckets | None = None


@dataclass(frozen=True)
class Golden:
    """Inputs of an entry and the outputs expected for them, as safetensors files."""

    entry: str
    inputs: str
    outputs: str
    synthetic: bool = False


@dataclass
class Manifest:
    """The contents of ``manifest.json``; paths are relative to the folder, with ``/``.

    Attributes:
        pipeline: the passes, as a string that parses back.
        target: the target, as a string that parses back.
        fingerprint: the machine and the versions it was made on.
        opsets: entry → domain → version.
        weights: the file that holds the weights of all entries, or None.
        native: files of native code.
        features: what a processor must have for them, by file, as Linux names it.
        needs: what it takes beside that, as `planish.ir.machine.Needs.to_dict` has it: GPU code, memory, a driver.
        ledger: the verdict on each pass; the report file has the details.
        files: every file but the manifest.
    """

    pipeline: str
    target: str
    fingerprint: dict[str, Any]
    opsets: dict[str, dict[str, int]]
    entries: dict[str, EntryInfo]
    weights: str | None = None
    native: list[str] = field(default_factory=list)
    features: dict[str, list[str]] = field(default_factory=dict)
    needs: dict[str, Any] = field(default_factory=dict)
    golden: list[Golden] = field(default_factory=list)
    ledger: dict[str, Any] | None = None
    provenance: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: dict[str, FileInfo] = field(default_factory=dict)
    planish_version: str = __version__
    schema_version: int = SCHEMA

    def to_bytes(self) -> bytes:
        """The file, digest included."""
        data = {key: value for key, value in vars(self).items() if key != "entries" and (value or key != "needs")}
        data["format"] = FORMAT
        data["golden"] = [asdict(g) for g in self.golden]
        data["files"] = {path: asdict(info) for path, info in self.files.items()}
        data["entries"] = [  # a list, because their order counts and canonical JSON sorts keys
            {
                "name": name,
                "file": entry.file,
                "inputs": [s.to_dict() for s in entry.inputs],
                "outputs": [s.to_dict() for s in entry.outputs],
                **({"parameters": entry.parameters} if entry.parameters else {}),
                **({"buckets": entry.buckets.to_dict()} if entry.buckets is not None else {}),
            }
            for name, entry in self.entries.items()
        ]
        return _canonical(data | {"digest": _digest(data)})

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Manifest:
        """Reads a manifest; `where` is the path that errors name.

        Raises:
            ArtifactError: it is not a manifest, was changed, names files it does not list, or is of a newer schema.
        """
        data = _parse(raw, where)
        if data.get("format") != FORMAT:
            raise ArtifactError(f"'{where}' is not the manifest of a planish artifact.")
        version = data.get("schema_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ArtifactError(f"'{where}' is damaged: schema_version is {version!r}.")
        if version > SCHEMA:
            raise ArtifactError(
                f"'{where}' has artifact schema {version}; planish {__version__} reads schema {SCHEMA} and older. "
                "Update planish, or export the artifact again with this version."
            )
        if raw != _canonical(data) or data.pop("digest", None) != _digest(data):
            raise ArtifactError(f"'{where}' was changed after it was written; export the artifact again.")
        try:
            return _read(data)
        except UnsafeModelError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"'{where}' does not follow the schema: {type(error).__name__}: {error}.") from error


def _canonical(data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({k: v for k, v in data.items() if k != "digest"})).hexdigest()


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            raise ValueError("a key is given twice")
        return dict(items)

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    if len(raw) > MAX_BYTES:
        raise ArtifactError(f"'{where}' has {len(raw)} bytes; the limit is {MAX_BYTES}.")
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
        _canonical(data)  # lone surrogates and numbers like 1e999 parse, but can not be written
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"'{where}' is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"'{where}' is not the manifest of a planish artifact.")
    return data


def _read(data: dict[str, Any]) -> Manifest:
    files = {}
    for path, info in _mapping(data["files"]).items():
        parse_location(path)
        size, digest = info["size"], info["sha256"]
        if not isinstance(size, int) or size < 0 or not isinstance(digest, str) or len(digest) != 64:
            raise ValueError(f"size or sha256 of '{path}'")
        files[path] = FileInfo(size, digest)

    def listed(path: Any) -> str:
        if not isinstance(path, str) or path not in files:
            raise ValueError(f"file '{path}' is used and not listed")
        return path

    def entry(e: Any) -> EntryInfo:
        inputs, outputs = ([TensorSpec.from_dict(s) for s in e[kind]] for kind in ("inputs", "outputs"))
        parameters = [_text(name) for name in e.get("parameters", [])]
        buckets = Buckets.from_dict(e["buckets"], inputs, outputs) if "buckets" in e else None
        return EntryInfo(listed(e["file"]), inputs, outputs, parameters, buckets)

    entries = {_text(e["name"]): entry(e) for e in data["entries"]}
    if not entries:
        raise ValueError("there is no entry")
    golden = [Golden(_text(g["entry"]), listed(g["inputs"]), listed(g["outputs"]), g["synthetic"] is True)
              for g in data["golden"]]  # fmt: skip
    if unknown := [g.entry for g in golden if g.entry not in entries]:
        raise ValueError(f"golden data is for entry '{unknown[0]}', which is not there")
    return Manifest(
        pipeline=_text(data["pipeline"]),
        target=_text(data["target"]),
        fingerprint=dict(_mapping(data["fingerprint"])),
        opsets={name: dict(_mapping(item)) for name, item in _mapping(data["opsets"]).items()},
        entries=entries,
        weights=None if data["weights"] is None else listed(data["weights"]),
        native=[listed(path) for path in data["native"]],
        # Absent from artifacts that were written before there were generated kernels.
        features={listed(path): [_text(name) for name in names] for path, names in data.get("features", {}).items()},
        needs=dict(_mapping(data.get("needs", {}))),
        golden=golden,
        ledger=None if data["ledger"] is None else dict(_mapping(data["ledger"])),
        provenance={_text(k): _text(v) for k, v in _mapping(data["provenance"]).items()},
        notes=[_text(note) for note in data["notes"]],
        files=files,
        planish_version=_text(data["planish_version"]),
        schema_version=data["schema_version"],
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:40]!r} is not an object")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} is not a string")
    return value
