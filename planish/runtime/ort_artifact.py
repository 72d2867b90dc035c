"""Entries of an artifact on ONNX Runtime: sessions that read the artifact's weights and use its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.ir.errors import ArtifactError, UnsafeModelError
from planish.ir.target import Target
from planish.runtime.executable import Runner
from planish.runtime.kernels.cpu import missing
from planish.runtime.manifest import EntryInfo, Manifest

if TYPE_CHECKING:
    import onnxruntime as ort

    from planish.runtime.ort import OrtRunner
    from planish.runtime.ort_device import DeviceRunner
    from planish.runtime.shared_weights import EntryWeights, SharedWeights


def runners(
    folder: Path, manifest: Manifest, contents: Mapping[str, bytes], target: Target, native: Mapping[str, Path]
) -> dict[str, Runner]:
    """What runs the entries, by name.

    Args:
        contents: the files of models, by name.
        native: libraries of kernels, by name.

    Raises:
        ArtifactError, UnsafeModelError: a model is not that of the manifest, or refers to other files.
    """
    from planish.runtime.shared_weights import wanted

    models = {name: contents[entry.file] for name, entry in manifest.entries.items()}
    shared = None
    if wanted(target, len(models)) and manifest.weights is not None:
        from planish.runtime.ort_cuda import device_index

        shared = shared_weights(folder, manifest, models, index=device_index(target))
    return {
        name: runner(folder, manifest, entry, models[name], target, native, shared.of(name) if shared else None)
        for name, entry in manifest.entries.items()
    }


def shared_weights(
    folder: Path,
    manifest: Manifest,
    models: Mapping[str, bytes],
    *,
    device: str = "cuda",
    index: int = 0,
    least: int | None = None,
) -> SharedWeights:
    """The weights that entries of an artifact share: those in one place of its weights file. Nothing is copied yet.

    Args:
        models: by entry.
        device, index, least: as of :func:`planish.runtime.shared_weights.of_program`.

    Raises:
        ArtifactError, UnsafeModelError: a model refers to other files.
    """
    import numpy as np
    import onnx

    from planish.ir.confined import open_confined
    from planish.runtime.shared_weights import LEAST, SharedWeights, Weight, why_not

    entries: dict[str, dict[str, Weight]] = {}
    for name, model in models.items():
        check_references(model, manifest, str(folder / manifest.entries[name].file))
        proto = onnx.ModelProto.FromString(model)
        reasons = why_not(proto, kernels=bool(manifest.native), least=LEAST if least is None else least)
        held = entries[name] = {}
        for tensor in proto.graph.initializer:
            if reasons[tensor.name] or tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            stored = {item.key: item.value for item in tensor.external_data}
            shape = tuple(tensor.dims)
            weight = Weight((int(stored.get("offset", "0")), tensor.data_type, shape), tensor.data_type, shape)
            # What is not as it should be is for ONNX Runtime to refuse.
            if min(shape, default=0) >= 0 and stored.get("length") == str(weight.nbytes):
                held[tensor.name] = weight

    def read(weight: Weight) -> np.ndarray:
        assert manifest.weights is not None
        with open_confined(folder, manifest.weights) as file:
            offset: int = weight.key[0]  # type: ignore[index]
            file.check_range(offset, weight.nbytes)
            return np.frombuffer(file.map(), np.uint8, weight.nbytes, offset)

    return SharedWeights(entries, read, device, index)


def runner(
    folder: Path,
    manifest: Manifest,
    entry: EntryInfo,
    model: bytes,
    target: Target,
    native: Mapping[str, Path],
    shared: EntryWeights | None = None,
) -> Runner:
    """What runs an entry whose model is `model`; `native` are the libraries of kernels by name.

    Args:
        shared: weights that other entries have too.

    Raises:
        ArtifactError, UnsafeModelError: the model is not that of the manifest, or refers to other files.
    """
    from planish.runtime.ort import OrtRunner, create_session
    from planish.runtime.ort_options import FLUSH, FOLDER, session_options

    where = str(folder / entry.file)
    check_references(model, manifest, where)
    refused = ""
    kept: list[Any] = []

    def session(providers: Sequence[Any]) -> tuple[ort.InferenceSession, ort.SessionOptions]:
        nonlocal refused
        settings = session_options(target, None, optimize=True)
        settings.add_session_config_entry(FOLDER, str(folder))
        refused = _register_kernels(folder, manifest, settings, native)
        if shared is not None:
            kept[:] = shared.give(settings)
        made = create_session(model, settings, None, providers)
        for kind, specs, values in (
            ("inputs", entry.inputs, made.get_inputs()),
            ("outputs", entry.outputs, made.get_outputs()),
        ):
            if [s.name for s in specs] != [v.name for v in values]:
                raise ArtifactError(f"'{where}' has the {kind} {[v.name for v in values]}, not those of the manifest.")
        return made, settings

    found: OrtRunner | DeviceRunner
    if target.device == "cuda":
        from planish.runtime.ort_cuda import on_gpu

        made_by = lambda providers: session(providers)[0]  # noqa: E731
        found = on_gpu(made_by, target, entry.inputs, entry.outputs, kept, entry.buckets)
    else:
        made, settings = session(["CPUExecutionProvider"])
        flushing = settings.get_session_config_entry(FLUSH) == "1"
        found = OrtRunner(made, entry.inputs, entry.outputs, flush_denormals=flushing, keep_alive=kept)
    if refused:
        found.notes.append(refused)
    return found


def _register_kernels(
    folder: Path, manifest: Manifest, settings: ort.SessionOptions, native: Mapping[str, Path]
) -> str:
    """Gives the session the artifact's kernels. Returns why they are not used, if so: the model then runs with the
    functions that it has in their place, which compute the same and are slower.
    """
    from planish.runtime.ort import one_line

    for name in manifest.native:
        lacking = missing(manifest.features.get(name, ()))
        reason = f"they need {', '.join(lacking)}, which this processor does not have" if lacking else ""
        if not lacking:
            try:
                settings.register_custom_ops_library(str(native[name]))
            except Exception as error:  # of another version of ONNX Runtime, or not for this system
                reason = one_line(error)
        if reason:
            text = f"the kernels in '{folder / name}' are not used: {reason}. The model runs without them, slower."
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            return text
    return ""


def check_references(model: bytes, manifest: Manifest, where: str) -> None:
    """Refuses a model that refers to any file but the weights of this artifact, or past their end."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        proto = onnx.ModelProto.FromString(model)
    except DecodeError as error:
        raise ArtifactError(f"'{where}' is not an ONNX file: {error}.") from error
    for tensor in _external_tensors(proto):
        described = {item.key: item.value for item in tensor.external_data}
        if described.get("location") != manifest.weights:
            raise UnsafeModelError(
                f"'{where}': weight '{tensor.name}' is in '{described.get('location', '')[:200]}', "
                "which is not the weights file of this artifact."
            )
        numbers = [described.get(key, "0") for key in ("offset", "length")]
        if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers):
            raise UnsafeModelError(f"'{where}': weight '{tensor.name}' has an offset or length that is no number.")
        assert manifest.weights is not None
        if sum(map(int, numbers)) > manifest.files[manifest.weights].size:
            raise UnsafeModelError(f"'{where}': weight '{tensor.name}' lies past the end of '{manifest.weights}'.")


def _external_tensors(proto: Any) -> Iterable[Any]:
    """Every tensor of a model with external data: initializers and attributes, in subgraphs and functions too."""
    import onnx

    external = onnx.TensorProto.EXTERNAL
    pending: list[Any] = [proto.graph, *proto.functions]
    while pending:
        body = pending.pop()
        tensors = list(getattr(body, "initializer", ()))
        for sparse in getattr(body, "sparse_initializer", ()):
            tensors += (sparse.values, sparse.indices)
        for attribute in (a for node in body.node for a in node.attribute):
            tensors += (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                tensors += (sparse.values, sparse.indices)
            if attribute.HasField("g"):
                pending.append(attribute.g)
            pending += attribute.graphs
        yield from (t for t in tensors if t.data_location == external)
