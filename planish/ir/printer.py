"""Printer: a model as short text that diffs well and parses back.

The form is ONNX's own textual syntax, one node per line. Left out: types of inner values (inference gives them
back), metadata, doc strings. Weights of more than `inline_bytes` are declared with type and shape, and a comment
line gives size and digest; `parse_model` takes their data from its `weights`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import onnx
import onnx_ir as ir

from planish.ir.blocks import op_name
from planish.ir.errors import InputError
from planish.ir.hashing import tensor_digest
from planish.ir.infer import infer_shapes
from planish.ir.names import ensure_names
from planish.ir.program import Program
from planish.ir.stripped import stripped_proto

_ELIDED = re.compile(r"^# weight (\".*?[^\\]\"|\S+) .* digest ([0-9a-f]+)$", re.MULTILINE)


def print_model(model: ir.Model, *, inline_bytes: int = 256, types: bool = False) -> str:
    """The text of `model`.

    Args:
        inline_bytes: weights up to this size are printed with their values.
        types: also print the known types of inner values.
    """
    proto = stripped_proto(model, inline_bytes=inline_bytes, large="declared", value_info=types)
    lines = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > inline_bytes:
            size = f"{tensor.nbytes / 1024:.1f} KiB"
            shape = ",".join(str(d) for d in tensor.shape.numpy())
            quoted = name if re.fullmatch(r"\S+", name) and not name.startswith('"') else f'"{name}"'
            lines.append(
                f"# weight {quoted} {tensor.dtype.name.lower()}[{shape}] {size} digest {tensor_digest(tensor)[:16]}"
            )
    body = onnx.printer.to_text(proto)
    text = "\n".join(line.rstrip() for line in body.splitlines())
    return "\n".join([*lines, text, ""])


def parse_model(text: str, *, weights: Mapping[str, ir.TensorProtocol] | None = None, infer: bool = True) -> ir.Model:
    """The model of a text that `print_model` or a person wrote.

    Args:
        text: ONNX textual syntax; ``#`` starts a comment.
        weights: data of the weights that the text leaves out.
        infer: fill in types and shapes of inner values.

    Raises:
        InputError: the text does not parse (the line says where), or a left-out weight is not in `weights`.
    """
    try:
        proto = onnx.parser.parse_model(text)
    except onnx.parser.ParseError as error:
        message = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
        raise InputError(f"model text does not parse: {' '.join(message.split())}") from error
    elided = {name.strip('"'): digest for name, digest in _ELIDED.findall(text)}
    tensors = {name: _given(name, digest, weights or {}) for name, digest in elided.items()}
    for name, tensor in tensors.items():
        # Declared as inputs while the graph is built, so that their uses resolve.
        proto.graph.input.add(name=name).type.tensor_type.elem_type = int(tensor.dtype)
    model: ir.Model = ir.from_proto(proto)
    first = len(model.graph.inputs) - len(tensors)
    for _ in tensors:
        value = model.graph.inputs.pop(first)
        value.const_value = tensors[value.name or ""]
        value.shape = ir.Shape(tensors[value.name or ""].shape.numpy())
        model.graph.register_initializer(value)
    ensure_names(model)
    if infer:
        infer_shapes(model)
    return model


def _given(name: str, digest: str, weights: Mapping[str, ir.TensorProtocol]) -> ir.TensorProtocol:
    if name not in weights:
        raise InputError(f"weight '{name}' (digest {digest}) is not in the text; give its data by weights={{...}}.")
    tensor = weights[name]
    if tensor_digest(tensor)[:16] != digest:
        raise InputError(
            f"weight '{name}' has digest {tensor_digest(tensor)[:16]}; the text was printed from {digest}."
        )
    return tensor


def op_counts(model: ir.Model | Program) -> dict[str, int]:
    """Number of nodes by operator, most frequent first; operators of other domains as ``domain::Op``."""
    nodes = model.nodes() if isinstance(model, Program) else model.graph.all_nodes()
    counts = Counter(map(op_name, nodes))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
