"""What a model message must hold before it becomes a program: limits, versions, operators, edges, the checker.

The ONNX checker is run too, last and on a message without weights, but it stops at the first finding, speaks of
protobuf, and knows neither limits nor what a runtime can take; so what users hit most is checked here first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx_ir as ir
from onnx import defs

from planish.frontends.onnx_tensors import all_tensors, dims_of
from planish.ir.errors import InputError, PlanishError, UnsupportedError, did_you_mean
from planish.ir.external import tensor_bytes
from planish.ir.schemas import DIALECT_DOMAIN, is_opaque

MAX_NODES = 1_000_000  #: nodes of a model, subgraphs and functions included
MAX_EXPANDED = 10_000_000  #: nodes once every function call is inlined
MAX_DEPTH = 32  #: nesting of subgraphs, and of function calls
MAX_MESSAGE = 1000  # characters of an error
MAX_NAME = 1 << 16  #: characters of a name

# Operators of early drafts of ONNX that are in no schema and still run on ONNX Runtime.
_LEGACY = frozenset({
    "Affine", "ATen", "Crop", "DynamicSlice", "GRUUnit", "GivenTensorFill", "ImageScaler", "LayerNormalization",
    "MeanVarianceNormalization", "ParametricSoftplus", "Scale", "ScaledTanh", "SimplifiedLayerNormalization",
    "ThresholdedRelu",
})  # fmt: skip
_ONNX_DOMAINS = ("", "ai.onnx.ml", "ai.onnx.preview.training", "ai.onnx.training", "ai.onnx.preview")


@contextmanager
def one_line(where: str) -> Iterator[None]:
    """Turns whatever goes wrong inside into one InputError line that starts with `where`."""
    try:
        yield
    except InputError as error:
        text = _printable(str(error), MAX_MESSAGE)
        named = text.startswith("'") and text[1:].startswith(where.strip("'"))
        raise type(error)(text if named else f"{where}: {text}") from None
    except PlanishError:
        raise
    except MemoryError:
        raise InputError(f"{where}: not enough memory to load it.") from None
    except RecursionError:
        raise InputError(f"{where}: nested deeper than {MAX_DEPTH} levels; limit {MAX_DEPTH}.") from None
    except Exception as error:  # onnx, onnx_ir and protobuf raise many kinds for damaged input
        raise InputError(f"{where}: not a valid ONNX model: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """The part of an error that says what is wrong, in one line of at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    if "MaxDepth" in text:
        return f"it is nested more than {MAX_DEPTH} deep; limit {MAX_DEPTH}."
    return _printable(text, 300)


def _printable(text: str, limit: int) -> str:
    """`text` with what could break the line (names come from the file) shown as escapes, cut to `limit`."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_versions(proto: onnx.ModelProto) -> None:
    """Refuses versions newer than the installed onnx knows; merges the two spellings of the standard domain."""
    if not proto.HasField("ir_version") or proto.ir_version < 1:
        raise InputError("is not a valid ONNX model: it states no ir_version.")
    if proto.ir_version > onnx.IR_VERSION:
        raise UnsupportedError(f"ir_version {proto.ir_version} is newer than {onnx.IR_VERSION}, the newest supported.")
    imports: dict[str, int] = {}
    for entry in (*proto.opset_import, *(e for f in proto.functions for e in f.opset_import)):
        limit = defs.onnx_opset_version()
        if entry.domain in ("", "ai.onnx") and not 1 <= entry.version <= limit:
            raise UnsupportedError(f"opset {entry.version} is not supported; 1 to {limit} are.")
    for entry in proto.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if imports.setdefault(domain, entry.version) != entry.version:
            raise InputError(f"imports two versions of the domain '{domain or 'ai.onnx'}'.")
    if not imports:
        if proto.ir_version >= 3:
            raise InputError("is not a whole ONNX model: it imports no opset, so it may be truncated.")
        imports[""] = 1
    del proto.opset_import[:]
    for domain, version in imports.items():
        proto.opset_import.add(domain=domain, version=version)


def check_limits(proto: onnx.ModelProto) -> None:
    """Counts nodes, depth, name lengths and tensor sizes before anything is allocated for them."""
    bodies = [(proto.graph.node, 0), *((f.node, 0) for f in proto.functions)]
    count = 0
    while bodies:
        nodes, depth = bodies.pop()
        count += len(nodes)
        if count > MAX_NODES:
            raise InputError(f"has more than {MAX_NODES} nodes; limit {MAX_NODES}.")
        if depth > MAX_DEPTH:
            raise InputError(f"subgraphs are nested more than {MAX_DEPTH} deep; limit {MAX_DEPTH}.")
        for node in nodes:
            for name in (node.name, node.op_type, *node.input, *node.output):
                if len(name) > MAX_NAME:
                    raise InputError(f"the name '{name[:40]}...' has {len(name)} characters; limit {MAX_NAME}.")
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    bodies.append((attribute.g.node, depth + 1))
                bodies += [(graph.node, depth + 1) for graph in attribute.graphs]
    for tensor in all_tensors(proto):
        _check_tensor(tensor)


def _check_tensor(tensor: onnx.TensorProto) -> None:
    dims = dims_of(tensor)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    if tensor.data_location or tensor.external_data:
        raise InputError(f"tensor '{tensor.name}' names external data but is not marked external.")
    if tensor.HasField("segment"):
        raise UnsupportedError(f"tensor '{tensor.name}' is stored in segments, which no runtime reads.")
    dtype = ir.DataType(tensor.data_type)
    elements = math.prod(dims)
    if tensor.HasField("raw_data") and dtype != ir.DataType.STRING:
        have, need, unit = len(tensor.raw_data), tensor_bytes(dtype, dims), "bytes"
    else:
        field, per = _field(dtype)
        have, need, unit = len(getattr(tensor, field)), -(-elements * per[0] // per[1]), f"items in {field}"
        if elements == 0 and not have:
            return
    if have != need:
        raise InputError(
            f"tensor '{tensor.name}': {dtype.name} of shape {list(dims)} needs {need} {unit}, the file has {have}."
        )


def _field(dtype: ir.DataType) -> tuple[str, tuple[int, int]]:
    """The typed field that stores `dtype`, and its items per element as a fraction."""
    special = {
        ir.DataType.FLOAT: ("float_data", (1, 1)),
        ir.DataType.COMPLEX64: ("float_data", (2, 1)),
        ir.DataType.DOUBLE: ("double_data", (1, 1)),
        ir.DataType.COMPLEX128: ("double_data", (2, 1)),
        ir.DataType.INT64: ("int64_data", (1, 1)),
        ir.DataType.UINT64: ("uint64_data", (1, 1)),
        ir.DataType.UINT32: ("uint64_data", (1, 1)),
        ir.DataType.STRING: ("string_data", (1, 1)),
    }
    packed = {4: (1, 2), 2: (1, 4)}
    return special.get(dtype) or ("int32_data", packed.get(dtype.bitwidth, (1, 1)))


def check_operators(proto: onnx.ModelProto) -> None:
    """Every operator must be in its domain's schema at the imported version, in the model's functions, or the
    runtime's own; function calls must not be recursive nor blow up."""
    functions = {(_domain(f.domain), f.name, f.overload): f for f in proto.functions}
    if len(functions) != len(proto.functions):
        raise InputError("defines a function twice.")
    missing: dict[str, set[str]] = {}
    bodies = [(proto.graph.node, proto.opset_import), *((f.node, f.opset_import) for f in proto.functions)]
    for nodes, imports in bodies:
        versions = {_domain(e.domain): e.version for e in imports}
        for node in _all_nodes(nodes):
            domain = _domain(node.domain)
            if (domain, node.op_type, node.overload) in functions:
                continue
            if domain in _ONNX_DOMAINS:
                _check_onnx_operator(node, domain, versions)
            elif not is_opaque(domain) and domain != DIALECT_DOMAIN:
                missing.setdefault(domain, set()).add(node.op_type)
    if missing:
        listed = "; ".join(f"{d}: {', '.join(sorted(ops)[:8])}" for d, ops in sorted(missing.items()))
        raise UnsupportedError(
            f"uses operators that are neither in ONNX nor defined in the model ({listed}). Export it with functions "
            "for them, or without them."
        )
    _check_calls(functions, proto)


def _check_onnx_operator(node: onnx.NodeProto, domain: str, versions: dict[str, int]) -> None:
    shown = f"node '{node.name or node.op_type}'"
    version = versions.get(domain)
    if version is None:
        if domain == "":
            raise InputError(f"{shown} uses {node.op_type}, but the model imports no opset of ai.onnx.")
        version = defs.onnx_ml_opset_version() if domain == "ai.onnx.ml" else 1
    try:
        defs.get_schema(node.op_type, version, domain)
    except defs.SchemaError:
        if domain == "" and node.op_type in _LEGACY:
            return
        prefix = f"{domain}." if domain else ""
        newer = [s.since_version for s in defs.get_all_schemas_with_history()
                 if s.name == node.op_type and s.domain == domain]  # fmt: skip
        if newer:
            raise UnsupportedError(
                f"{shown}: operator {prefix}{node.op_type} needs opset {min(newer)}; the model imports {version}."
            ) from None
        names = {s.name for s in defs.get_all_schemas() if s.domain == domain}
        hint = did_you_mean(node.op_type, names)
        raise UnsupportedError(f"{shown}: no operator '{prefix}{node.op_type}' in opset {version}.{hint}") from None


def _check_calls(functions: dict[tuple[str, str, str], onnx.FunctionProto], proto: onnx.ModelProto) -> None:
    sizes: dict[tuple[str, str, str], int] = {}

    def size(nodes: object, path: tuple[tuple[str, str, str], ...]) -> int:
        total = 0
        for node in _all_nodes(nodes):
            key = (_domain(node.domain), node.op_type, node.overload)
            total += 1
            if key in functions:
                if key in path:
                    raise InputError(f"function '{key[0]}::{key[1]}' calls itself; recursion is not possible in ONNX.")
                if len(path) >= MAX_DEPTH:
                    raise InputError(f"function calls are nested more than {MAX_DEPTH} deep; limit {MAX_DEPTH}.")
                if key not in sizes:
                    sizes[key] = size(functions[key].node, (*path, key))
                total += sizes[key]
            if total > MAX_EXPANDED:
                raise InputError(f"has more than {MAX_EXPANDED} nodes once functions are inlined.")
        return total

    size(proto.graph.node, ())
    for key, function in functions.items():
        size(function.node, (key,))


def check_edges(proto: onnx.ModelProto) -> None:
    """Every value used must be defined, once per scope, and every output produced."""
    _check_graph(proto.graph, set(), "graph")
    for function in proto.functions:
        known = set(function.input)
        for name in (n for node in function.node for n in node.output):
            known.add(name)
        _check_nodes(function.node, known, f"function '{function.name}'")
        for name in function.output:
            if name not in known:
                raise InputError(f"function '{function.name}': output '{name}' is produced by no node.")


def _check_graph(graph: onnx.GraphProto, outer: set[str], where: str) -> None:
    own: set[str] = set()
    for info in graph.input:
        if not info.name or info.name in own:
            raise InputError(f"{where}: input '{info.name}' is {'defined twice' if info.name else 'without a name'}.")
        own.add(info.name)
    own.update(t.name for t in graph.initializer)
    for node in graph.node:
        for name in filter(None, node.output):
            if name in own:
                raise InputError(f"{where}: value '{name}' is defined again by node '{node.name or node.op_type}'.")
            own.add(name)
    known = own | outer
    _check_nodes(graph.node, known, where)
    for info in graph.output:
        if info.name not in known:
            raise InputError(f"{where}: output '{info.name}' is produced by no node.{did_you_mean(info.name, own)}")


def _check_nodes(nodes: object, known: set[str], where: str) -> None:
    for node in nodes:  # type: ignore[attr-defined]
        shown = node.name or node.op_type
        for name in filter(None, node.input):
            if name not in known:
                hint = did_you_mean(name, known) if len(known) < 5000 else ""
                raise InputError(f"{where}: node '{shown}' reads '{name}', which nothing defines.{hint}")
        for attribute in node.attribute:
            for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                _check_graph(graph, known, f"{where}, subgraph '{attribute.name}' of node '{shown}'")


def run_checker(proto: onnx.ModelProto) -> None:
    """Runs the ONNX checker on a message whose weights are left out; changes the message."""
    for tensor in all_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            # The checker opens external files by path. Shapes of weights are checked by shape inference, not here.
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            del tensor.dims[:]
            tensor.dims.append(0)
    for info in (*proto.graph.input, *proto.graph.output):
        if info.type.HasField("tensor_type") and not info.type.tensor_type.HasField("shape"):
            info.type.tensor_type.shape.SetInParent()  # the checker wants a shape, runtimes do not
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise InputError(f"not a valid ONNX model: {first_line(error)}") from None


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _all_nodes(nodes: object) -> Iterator[onnx.NodeProto]:
    for node in nodes:  # type: ignore[attr-defined]
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all_nodes(attribute.g.node)
            for graph in attribute.graphs:
                yield from _all_nodes(graph.node)
