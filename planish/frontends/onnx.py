"""ONNX files and messages into programs, with everything that a hostile or damaged file can do refused in one line.

Order of work: the message is parsed with its large weights left where they are, counted against limits, its
external data opened safely, its operators and edges checked, then turned into the IR and checked by the ONNX checker.
The opset stays the file's: what the gates compare with is the user's own model (the pass `raise-opset` lifts it).
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from planish.frontends import onnx_checks as checks
from planish.frontends.onnx_normalize import normalize_proto, rename_shadowing
from planish.frontends.onnx_tensors import Tensors, bind_external_tensors, detach_weights, open_tensors
from planish.frontends.onnx_wire import split_weights
from planish.ir.errors import InputError, did_you_mean
from planish.ir.program import Program
from planish.ir.schemas import min_ir_version
from planish.ir.serialize import PROTO_LIMIT, to_proto_without_weights
from planish.ir.target import Target

_DEFAULTS = 4  # first ir_version where an input with an initializer is one with a default
_SNIFF = (
    (0, b"PK\x03\x04", "a zip archive, such as a torch.save or torch.export file"),
    (0, b"\x80\x02", "a Python pickle, such as an old torch.save file; it is not opened, since that runs code"),
    (0, b"\x80\x04", "a Python pickle; it is not opened, since that runs code"),
    (0, b"\x80\x05", "a Python pickle; it is not opened, since that runs code"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (4, b"ORTM", "a model in ONNX Runtime's own .ort format; give the .onnx file that it was made from"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\x89HDF", "an HDF5 file, such as a Keras model"),
    (0, b"\x7fELF", "a shared library or a program"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"version https://git-lfs", "a Git LFS pointer; run 'git lfs pull' to get the model itself"),
    (0, b"<", "an HTML or XML page, maybe a failed download"),
)


@dataclass
class _Source:
    """A message with the weights taken out of it, and where it came from."""

    proto: onnx.ModelProto
    tensors: Tensors
    base_dir: str | None
    notes: list[str] = field(default_factory=list)


def load_onnx(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model,
    target: Target | str = "ort-cpu",
    *,
    base_dir: str | os.PathLike[str] | None = None,
) -> Program:
    """Loads an ONNX model as a program with the entry ``"main"``. The source is never changed.

    Args:
        source: path of an ``.onnx`` file, its bytes, a ModelProto, or an onnx_ir model.
        target: what the program is for.
        base_dir: folder of the external data when the source is not a path.

    Raises:
        InputError: the file is missing, damaged, or not ONNX, or the model breaks a rule of ONNX.
        UnsafeModelError: external data outside the model's folder, behind a link, or otherwise unsafe.
        UnsupportedError: a valid model with an operator, dtype or version that planish can not take.
    """
    target = Target.parse(target)
    shown = os.fspath(source) if isinstance(source, str | os.PathLike) else "the model"
    with _quiet_onnx_ir(), checks.one_line(f"'{shown}'" if shown != "the model" else shown):
        base = os.fspath(base_dir) if base_dir is not None else None
        if isinstance(source, ir.Model):
            model, notes = _from_ir(source, base)
        else:
            opened = _open(source, base)
            notes = opened.notes
            model = _to_ir(opened)
        notes += _normalize(model)
        checks.run_checker(to_proto_without_weights(model)[0])
        opset = str(model.graph.opset_imports.get("", 0))
        provenance = {"frontend": "onnx", "source": str(shown), "opset": opset}
        if producer := " ".join(filter(None, (model.producer_name, model.producer_version))):
            provenance["producer"] = producer
        if notes:
            provenance["notes"] = " ".join(notes)
        return Program({"main": model}, target, provenance)


@contextmanager
def _quiet_onnx_ir() -> Iterator[None]:
    """Keeps onnx_ir's warnings about damaged models, which the checks here turn into errors, off the user's terminal.

    Only what this thread logs while it loads is dropped.
    """
    thread = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    loggers = [logging.getLogger(name) for name in ("onnx_ir.serde", "onnx_ir._core", "onnx_ir._convenience")]
    for logger in loggers:
        logger.addFilter(of_others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(of_others)


def _open(source: Any, base_dir: str | None) -> _Source:
    if isinstance(source, onnx.ModelProto):
        if not source.HasField("graph"):
            raise InputError("is not an ONNX model: it has no graph.")
        tensors = Tensors()
        return _Source(detach_weights(source, tensors), tensors, base_dir)
    if isinstance(source, bytes | bytearray | memoryview):
        return _parse(bytes(source), base_dir, Tensors())
    if isinstance(source, str | os.PathLike):
        return _open_path(os.fspath(source), base_dir)
    raise InputError(
        f"a model must be a path, bytes, onnx.ModelProto or onnx_ir.Model, not {type(source).__name__}; "
        "torch modules go through planish.optimize."
    )


def _open_path(path: str, base_dir: str | None) -> _Source:
    fd = _open_regular(path)
    base = base_dir if base_dir is not None else os.path.dirname(os.path.abspath(path))
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if not size:
            raise InputError("the file is empty (0 bytes).")
        tensors = Tensors()
        # The weights are read once, straight to where they stay; only the rest goes through protobuf.
        message = split_weights(file, size, tensors)
        if message is not None:
            return _parse(message, base, tensors)
        if size > PROTO_LIMIT:
            raise InputError(f"{size} bytes are more than one ONNX file can hold (2 GiB); use external data.")
        file.seek(0)
        return _parse(file.read(), base, tensors)


def _open_regular(path: str) -> int:
    if "\0" in path or not path:
        raise InputError("the path is empty or holds a NUL character.")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        folder, name = os.path.split(path)
        if not os.path.isdir(folder or "."):
            raise InputError(f"no such file; the folder '{folder}' does not exist.") from None
        raise InputError(f"no such file.{did_you_mean(name, os.listdir(folder or '.'))}") from None
    except IsADirectoryError:
        raise _is_folder(path) from None
    except OSError as error:
        raise InputError(f"can not be read: {error.strerror}.") from None
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    raise _is_folder(path) if stat.S_ISDIR(mode) else InputError("is a pipe or a device, not a regular file.")


def _is_folder(path: str) -> InputError:
    names = sorted(os.listdir(path))
    if "manifest.json" in names:
        return InputError("is a folder, it looks like a planish artifact; open it with planish.load.")
    models = [n for n in names if n.endswith(".onnx")]
    return InputError(f"is a folder, not a file.{f' Did you mean {models[0]!r} in it?' if models else ''}")


def _parse(data: bytes, base_dir: str | None, tensors: Tensors) -> _Source:
    if not data:
        raise InputError("the file is empty (0 bytes).")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        if "MaxDepth" in str(error):
            raise
        raise _not_onnx(data, "is not a whole ONNX file: the protobuf message is truncated or damaged") from None
    if not proto.HasField("graph"):
        raise _not_onnx(data, "is not an ONNX model: it has no graph")
    if not proto.graph.node and not proto.graph.output and (looks := sniff(data)):
        raise InputError(f"is not an ONNX model; it looks like {looks}.")
    return _Source(detach_weights(proto, tensors, ours=True), tensors, base_dir)


def _not_onnx(data: bytes, why: str) -> InputError:
    looks = sniff(data)
    return InputError(f"{why} ({len(data)} bytes).{f' It looks like {looks}.' if looks else ''}")


def sniff(data: bytes) -> str | None:
    """What a file that is no ONNX file looks like, or None."""
    for offset, magic, kind in _SNIFF:
        if data[offset : offset + len(magic)] == magic:
            return kind
    if len(data) > 9 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < 100_000_000:
        return "a safetensors file, which holds weights and no graph"
    if data[:1] in b"{[":
        return "a JSON file"
    head = data[:512]
    return "a text file" if all(b >= 32 or b in b"\t\n\r\f" for b in head) else None


def _to_ir(source: _Source) -> ir.Model:
    proto = source.proto
    checks.check_versions(proto)
    source.notes += normalize_proto(proto)
    checks.check_limits(proto)
    open_tensors(proto, source.tensors, source.base_dir)
    checks.check_operators(proto)
    checks.check_edges(proto)
    model: ir.Model = ir.from_proto(proto)
    source.tensors.attach(model)
    return model


def _from_ir(source: ir.Model, base_dir: str | None) -> tuple[ir.Model, list[str]]:
    model = source.clone()
    bind_external_tensors(model, base_dir)
    proto, _ = to_proto_without_weights(model)
    checks.check_versions(proto)
    checks.check_limits(proto)
    checks.check_operators(proto)
    checks.check_edges(proto)
    return model, []


def _normalize(model: ir.Model) -> list[str]:
    """Constants told from defaults, unique and non-empty node names, topological order, in place; returns notes."""
    notes = []
    inputs = model.graph.inputs
    if model.ir_version < _DEFAULTS and any(v.name in model.graph.initializers for v in inputs):
        # Every initializer had to be listed as an input then, and runtimes take it as a constant; in later versions
        # such an input is one that a caller may override. The model is lifted to a later version, so the list goes.
        inputs[:] = [v for v in inputs if v.name not in model.graph.initializers]
        notes.append("Weights were listed as inputs, as ir_version 3 asked; they are constants, as runtimes take them.")
    model.ir_version = max(model.ir_version, min_ir_version(model))
    bodies = [model.graph, *(f.graph for f in model.functions.values())]
    for body in bodies:
        if renamed := rename_shadowing(body):
            notes.append(f"{renamed} values of subgraphs had the name of a value around them; they were renamed.")
        taken: set[str] = set()
        unnamed = []
        for node in body.all_nodes():
            if node.name and node.name not in taken:
                taken.add(node.name)
            else:
                unnamed.append(node)
        for number, node in enumerate(unnamed):
            stem = node.name or node.op_type
            name = f"{stem}_{number}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
        if not _sorted(body):
            body.sort()
            notes.append("Nodes were not in topological order; they are now.")
    return notes


def _sorted(body: ir.Graph) -> bool:
    done: set[ir.Node] = set()
    own = set(body)
    for node in body:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer in own and producer not in done:
                return False
        done.add(node)
        for attribute in node.attributes.values():
            graphs = attribute.value if attribute.type == ir.AttributeType.GRAPHS else [attribute.value]
            if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or attribute.is_ref():
                continue
            for graph in graphs:
                outer = [v.producer() for n in graph.all_nodes() for v in n.inputs if v is not None]
                if any(p in own and p not in done for p in outer) or not _sorted(graph):
                    return False
    return True
