"""Structural hash: equal for programs that differ only in the names of nodes and inner values.

The hash covers operators, attributes, edges, types and shapes, weight contents, functions, opset imports and
the names of inputs and outputs (they are the interface). It does not cover metadata and doc strings.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from planish.ir.program import Program

# Tensors are immutable by convention and shared between clones, so a digest is computed once per object.
_digests: dict[int, tuple[weakref.ref[object], str]] = {}


def structural_hash(item: Program | ir.Model, *, contents: bool = True) -> str:
    """Returns 32 hex digits that are equal for structurally equal programs (or models).

    Args:
        contents: False takes weights by the identity of their tensor objects instead of by content. That costs
            the same whatever their size, and compares states of one program within one process.
    """
    digest = hashlib.blake2b(digest_size=16)
    models = item.entries.items() if isinstance(item, Program) else [("main", item)]
    for name, model in models:
        digest.update(f"entry {name} {sorted(model.graph.opset_imports.items())}\n".encode())
        _Hasher(digest, contents).graph(model.graph)
        for identifier in sorted(model.functions):
            function = model.functions[identifier]
            digest.update(f"function {identifier} {sorted(function.opset_imports.items())}\n".encode())
            digest.update(f"{sorted((n, _attribute_text(a)) for n, a in function.attributes.items())}\n".encode())
            _Hasher(digest, contents).graph(function)
    return digest.hexdigest()


def tensor_digest(tensor: ir.TensorProtocol) -> str:
    """Digest of dtype, shape and contents of a tensor, cached for as long as the tensor object lives."""
    key = id(tensor)
    known = _digests.get(key)
    if known is not None and known[0]() is tensor:
        return known[1]
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape.numpy())}".encode(), digest_size=16)
    if tensor.dtype == ir.DataType.STRING:
        for item in np.asarray(tensor.numpy()).ravel():
            digest.update(repr(item).encode())
    else:
        array = np.ascontiguousarray(tensor.numpy())
        digest.update(array.reshape(-1).view(np.uint8).data)
    text = digest.hexdigest()
    with contextlib.suppress(TypeError):  # a tensor class without weak references: computed each time
        _digests[key] = (weakref.ref(tensor, lambda _, k=key: _digests.pop(k, None)), text)  # type: ignore[misc]
    return text


def _identity(tensor: ir.TensorProtocol) -> str:
    return f"{id(tensor)} {tensor.dtype} {tensor.shape}"


def _attribute_text(attribute: ir.Attr) -> str:
    return f"{attribute.type} {attribute.ref_attr_name or attribute.value!r}"


class _Hasher:
    """Feeds one graph (and its subgraphs) to a digest, numbering values in order of definition."""

    def __init__(self, digest: hashlib.blake2b, contents: bool) -> None:
        self.digest = digest
        self.tensor = tensor_digest if contents else _identity
        self.numbers: dict[ir.Value, int] = {}
        # Weights are numbered at their first use, so that renaming one does not change the hash.
        self.pending: dict[ir.Value, str] = {}

    def graph(self, graph: ir.Graph | ir.Function) -> None:
        initializers = getattr(graph, "initializers", {})
        for value in graph.inputs:
            self._define(value, f"input {value.name}")
        for value in initializers.values():
            content = self.tensor(value.const_value) if value.const_value is not None else "none"
            if value not in self.numbers:
                self.pending[value] = f"weight {content}"
            else:
                self.digest.update(f"default {self.numbers[value]} {content}\n".encode())
        for node in graph:
            self._node(node)
        outputs = " ".join(f"{v.name}={self._use(v)}" for v in graph.outputs)
        self.digest.update(f"outputs {outputs}\n".encode())
        unused = sorted(self.pending.pop(v) for v in initializers.values() if v in self.pending)
        self.digest.update(f"unused {unused}\n".encode())

    def _define(self, value: ir.Value, text: str = "value") -> int:
        number = self.numbers.setdefault(value, len(self.numbers))
        self.digest.update(f"{text} {number} {value.type} {value.shape}\n".encode())
        return number

    def _use(self, value: ir.Value | None) -> str:
        if value is None:
            return "-"
        if value in self.pending:
            return str(self._define(value, self.pending.pop(value)))
        return str(self.numbers[value]) if value in self.numbers else f"free {value.name}"

    def _node(self, node: ir.Node) -> None:
        operands = " ".join(self._use(v) for v in node.inputs)
        identity = f"{node.domain}::{node.op_type}::{node.overload} v{node.version}"
        self.digest.update(f"node {identity} ({operands})\n".encode())
        for name in sorted(node.attributes):
            self._attribute(name, node.attributes[name])
        for output in node.outputs:
            self._define(output)

    def _attribute(self, name: str, attribute: ir.Attr) -> None:
        self.digest.update(f"attribute {name} {attribute.type} {attribute.ref_attr_name}\n".encode())
        if attribute.ref_attr_name:
            return
        if attribute.type == ir.AttributeType.GRAPH:
            self.graph(attribute.value)
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.value:
                self.graph(graph)
        elif attribute.type == ir.AttributeType.TENSOR:
            self.digest.update(self.tensor(attribute.value).encode())
        elif attribute.type == ir.AttributeType.TENSORS:
            for tensor in attribute.value:
                self.digest.update(self.tensor(tensor).encode())
        else:
            value = attribute.value
            listed = list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else value
            self.digest.update(repr(listed).encode())
