from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.errors import ArtifactError, InputError
from planish.ir.spec import ElementType, TensorSpec
from planish.runtime.manifest import FORMAT, SCHEMA, EntryInfo, FileInfo, Golden, Manifest, _canonical, _digest

SPECS = [
    TensorSpec("ids", ElementType.INT64, ("b", None, 3)),
    TensorSpec("état", None, None),
    TensorSpec("x", ElementType.FLOAT, ("b", "s"), ((1, 8), None)),
]


def manifest(**changed: Any) -> Manifest:
    files = {name: FileInfo(5, "0" * 64) for name in ("main.onnx", "w/w.bin", "golden/i", "golden/o", "kernels/k.so")}
    given = {
        "pipeline": "fuse-gelu,skip-layers{layers=[3,7]}",
        "target": "ort-cpu:threads=2",
        "fingerprint": {"cores": 2, "features": ["avx2"]},
        "opsets": {"main": {"": 23, "planish": 1}},
        "entries": {"main": EntryInfo("main.onnx", SPECS, SPECS[:1])},
        "weights": "w/w.bin",
        "native": ["kernels/k.so"],
        "golden": [Golden("main", "golden/i", "golden/o", True)],
        "ledger": {"entries": [], "tolerance": 2e-05},
        "provenance": {"source": "model.onnx"},
        "notes": ["nothing"],
        "files": files,
    }
    return Manifest(**(given | changed))


def edited(**changed: Any) -> bytes:
    """A manifest whose author changed it and knows how to make the digest fit."""
    data = json.loads(manifest().to_bytes())
    for key, value in changed.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    return _canonical(data | {"digest": _digest(data)})


def test_round_trip() -> None:
    raw = manifest().to_bytes()
    assert Manifest.from_bytes(raw, "m") == manifest()
    assert Manifest.from_bytes(raw, "m").to_bytes() == raw
    assert json.loads(raw)["format"] == FORMAT


def test_newer_schema_is_refused_with_numbers() -> None:
    with pytest.raises(ArtifactError, match=rf"artifact schema {SCHEMA + 1}; planish \S+ reads schema {SCHEMA} and"):
        Manifest.from_bytes(edited(schema_version=SCHEMA + 1), "m")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"format": NaN}', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "a key is given twice"),
        (b'{"a": 1e999}', "not valid JSON"),
        (b"[1]", "is not the manifest"),
        (b"{}", "is not the manifest"),
        (edited(schema_version="1"), "schema_version is '1'"),
        (edited(schema_version=True), "schema_version is True"),
        (edited(entries=[]), "there is no entry"),
        (edited(weights="other.bin"), "file 'other.bin' is used and not listed"),
        (edited(pipeline=3), "is not a string"),
        (edited(files={"a": {"size": -1, "sha256": "0" * 64}}), "size or sha256 of 'a'"),
        (edited(native=None), "KeyError: 'native'"),
        (manifest().to_bytes().replace(b"threads=2", b"threads=3"), "was changed after it was written"),
        (manifest().to_bytes() + b"\n", "was changed after it was written"),
    ],
)
def test_what_is_wrong_is_named(raw: bytes, message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_bytes(raw, "folder/manifest.json")
    assert message in str(caught.value)
    assert "folder/manifest.json" in str(caught.value)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "C:\\x", "", "a\0b"])
def test_paths_that_leave_the_folder(path: str) -> None:
    with pytest.raises(InputError):
        Manifest.from_bytes(edited(files={path: {"size": 1, "sha256": "0" * 64}}), "m")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_a_byte_is_seen(data: st.DataObject) -> None:
    raw = bytearray(manifest().to_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    new = data.draw(st.integers(0, 255).filter(lambda b: b != raw[at]))
    raw[at] = new
    with pytest.raises(InputError):
        Manifest.from_bytes(bytes(raw), "m")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(json.loads(manifest().to_bytes()))), json_values)
def test_values_of_other_kinds_are_errors_or_equal_manifests(key: str, value: Any) -> None:
    """Even when the digest fits: a stranger can write that too."""
    data = json.loads(manifest().to_bytes()) | {key: value}
    try:
        raw = _canonical(data | {"digest": _digest(data)})
        read = Manifest.from_bytes(raw, "m")
    except (InputError, ValueError):
        return
    assert Manifest.from_bytes(read.to_bytes(), "m") == read
