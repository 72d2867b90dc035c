"""Verifier: raises on a program that breaks a rule of the IR.

The cheap part is linear, needs no serialization and runs around every pass: names, SSA, order, scopes, opsets,
arities, attributes, weights. The full part adds onnx's checker and its strict type and shape inference.

An initializer that nothing uses is valid (dead code is for a pass to remove); one without data, or one that a
node uses although no graph holds it, is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set

import onnx
import onnx_ir as ir

from planish.ir import schemas
from planish.ir.errors import VerifyError
from planish.ir.infer import infer_proto
from planish.ir.program import Program
from planish.ir.schemas import DIALECT_DOMAIN, OpRecord
from planish.ir.serialize import TYPE_KEY
from planish.ir.stripped import stripped_proto

#: onnx expands an operator that is defined by a function without the defaults of its attributes, and then refuses
#: the expansion: MeanVarianceNormalization without axes. The model is right.
_ONNX_DEFECT = re.compile(r"op_type:MeanVarianceNormalization.*attributes 'value'.*Constant node", re.DOTALL)


def verify(program: Program, *, full: bool) -> None:
    """Checks every entry of `program`.

    Args:
        full: also run onnx's checker and strict inference (0.1 to 1 second for BERT-base).

    Raises:
        VerifyError: the first rule that is broken, in one line with entry, node and value.
    """
    if not program.entries:
        raise VerifyError("the program has no entry.")
    for entry, model in program.entries.items():
        _Checker(entry, model).run()
    if len(program.entries) > 1:
        _ = program.weights  # raises where two entries disagree on a weight
    if full:
        for entry, model in program.entries.items():
            _verify_dialect(entry, model)
            _verify_with_onnx(entry, model)


def verify_model(model: ir.Model, *, full: bool = True) -> None:
    """`verify` for a single model."""
    verify(Program({"main": model}), full=full)


class _Checker:
    """The cheap part for one model."""

    def __init__(self, entry: str, model: ir.Model) -> None:
        self.entry = entry
        self.model = model
        self.functions = {key: schemas.function_record(f) for key, f in model.functions.items()}

    def run(self) -> None:
        graph = self.model.graph
        for value in (*graph.inputs, *graph.outputs):
            if value.type is None and TYPE_KEY not in value.metadata_props:
                raise self._error(f"'{value.name}' is an input or output of the graph and has no type")
        self._graph(graph, graph.opset_imports, set(), set(), None)
        for key, function in self.model.functions.items():
            where = f"function {key[0]}::{key[1]}"
            self._function_signature(where, function)
            self._graph(function.graph, function.opset_imports, set(), set(), function)

    def _error(self, text: str, node: ir.Node | None = None) -> VerifyError:
        place = f"entry '{self.entry}'"
        if node is not None:
            place += f": node '{node.name}' ({node.domain + '::' if node.domain else ''}{node.op_type})"
        return VerifyError(f"{place}: {text}.")

    def _graph(
        self,
        graph: ir.Graph,
        imports: dict[str, int],
        outer_values: Set[ir.Value],
        outer_names: Set[str],
        function: ir.Function | None,
    ) -> None:
        defined, names = set(outer_values), set(outer_names)
        self._sources(graph, defined, names)
        node_names: set[str] = set()
        records: dict[tuple[str, str, str], OpRecord | None] = {}
        for node in graph:
            name = node.name
            if not name:
                raise self._error(f"a {node.op_type} node has no name (outputs {[v.name for v in node.outputs]})")
            if name in node_names:
                raise self._error("another node of the same graph has this name", node)
            node_names.add(name)
            if node.graph is not graph:
                raise self._error("the node is listed in a graph that is not its own", node)
            for value in node.inputs:
                if value is not None and value not in defined:
                    raise self._error(self._explain(value, node, graph), node)
            key = (node.domain, node.op_type, node.overload)
            try:
                record = records[key]
            except KeyError:
                record = records[key] = self._record(node, imports)
            if record is not None:
                self._arity(node, record)
            if record is not None or node.attributes:
                for subgraph in self._attributes(node, record, function):
                    # A subgraph sees the values before its node, and only these.
                    self._graph(subgraph, imports, defined, names, function)
            for value in node.outputs:
                self._define(value, defined, names, node)
        self._outputs(graph, defined)

    def _sources(self, graph: ir.Graph, defined: set[ir.Value], names: set[str]) -> None:
        for value in graph.inputs:
            self._define(value, defined, names, None)
        for key, value in graph.initializers.items():
            if key != value.name:
                raise self._error(f"initializer '{key}' is stored under a name that its value '{value.name}' has not")
            tensor = value.const_value
            if tensor is None:
                raise self._error(f"initializer '{key}' has no data")
            if value.dtype is not None and value.dtype != tensor.dtype:
                raise self._error(f"initializer '{key}' is declared {value.dtype} and holds {tensor.dtype}")
            if value.shape is not None and value.shape != tensor.shape and not _admits(value.shape, tensor.shape):
                raise self._error(f"initializer '{key}' is declared {value.shape} and holds {tensor.shape}")
            if value not in defined:
                self._define(value, defined, names, None)

    def _define(self, value: ir.Value, defined: set[ir.Value], names: set[str], node: ir.Node | None) -> None:
        name = value.name
        if not name:
            if node is not None and not value.uses() and not value.is_graph_output():
                return  # an optional output that is left out
            raise self._error("a value that is used has no name", node)
        if value in defined:
            raise self._error(f"value '{name}' is defined twice", node)
        if name in names:
            raise self._error(f"value '{name}' has the name of another value that is visible here", node)
        producer = value.producer()
        if node is None and producer is not None:
            raise self._error(f"'{name}' is an input or initializer and also the output of '{producer.name}'")
        defined.add(value)
        names.add(name)

    def _explain(self, value: ir.Value, node: ir.Node, graph: ir.Graph) -> str:
        producer = value.producer()
        if producer is not None:
            if producer is node or (producer.graph is graph and graph is not None):
                return f"value '{value.name}' is used before node '{producer.name}' makes it"
            if producer.graph is None:
                return f"value '{value.name}' is made by node '{producer.name}', which is in no graph"
            return f"value '{value.name}' is made by node '{producer.name}' of another graph or later in an outer one"
        if value.const_value is not None and not value.is_initializer():
            return f"value '{value.name}' holds a constant that no graph lists as an initializer"
        if value.graph is not None:
            return f"value '{value.name}' is an input or initializer of a graph that is not visible here"
        return f"value '{value.name}' is produced nowhere"

    def _record(self, node: ir.Node, imports: dict[str, int]) -> OpRecord | None:
        domain = node.domain
        version = imports.get(domain)
        if version is None:
            raise self._error(f"no opset import for its domain '{domain}'", node)
        if domain == DIALECT_DOMAIN:
            from planish.ir.ops import dialect_record

            record = dialect_record(node.op_type)
            if record is None:
                raise self._error("the dialect has no such operator", node)
            return record
        local = self.functions.get((domain, node.op_type, node.overload))
        if local is not None:
            return local
        if schemas.is_opaque(domain):
            return None
        record = schemas.onnx_record(domain, node.op_type, version)
        if record is None:
            newer = onnx.defs.has(node.op_type, domain)
            hint = "exists only in later opsets" if newer else "is neither an ONNX operator nor a function of the model"
            raise self._error(f"the operator {hint} (opset {version} of domain '{domain or 'ai.onnx'}')", node)
        if record.deprecated_since and version >= record.deprecated_since:
            raise self._error(f"the operator is gone since opset {record.deprecated_since}; opset is {version}", node)
        return record

    def _arity(self, node: ir.Node, record: OpRecord) -> None:
        inputs, outputs = node.inputs, node.outputs
        if not record.min_inputs <= len(inputs) <= record.max_inputs:
            raise self._error(f"{len(inputs)} inputs; allowed {_span(record.min_inputs, record.max_inputs)}", node)
        if not record.min_outputs <= len(outputs) <= record.max_outputs:
            raise self._error(f"{len(outputs)} outputs; allowed {_span(record.min_outputs, record.max_outputs)}", node)
        for index in record.needed_inputs:
            if index < len(inputs) and inputs[index] is None:
                raise self._error(f"input {index} is left out but required", node)

    def _attributes(self, node: ir.Node, record: OpRecord | None, function: ir.Function | None) -> Iterator[ir.Graph]:
        """Checks the attributes and yields the subgraphs among them."""
        attributes = node.attributes
        if record is not None:
            for name in record.required:
                if name not in attributes:
                    raise self._error(f"attribute '{name}' is required and missing", node)
        for name, attribute in attributes.items():
            if record is not None:
                if name not in record.attributes:
                    known = ", ".join(sorted(record.attributes)) or "none"
                    raise self._error(f"attribute '{name}' is unknown; known: {known}", node)
                want = record.attributes[name]
                if want is not None and attribute.type != want:
                    raise self._error(f"attribute '{name}' is {attribute.type.name}; it must be {want.name}", node)
            if attribute.is_ref():
                if function is None or attribute.ref_attr_name not in function.attributes:
                    raise self._error(
                        f"attribute '{name}' refers to '{attribute.ref_attr_name}', which no function around it has",
                        node,
                    )
            elif attribute.type == ir.AttributeType.GRAPH:
                yield attribute.value
            elif attribute.type == ir.AttributeType.GRAPHS:
                yield from attribute.value

    def _outputs(self, graph: ir.Graph, defined: Set[ir.Value]) -> None:
        for value in graph.outputs:
            if value not in defined:
                producer = value.producer()
                what = f"is made by node '{producer.name}', which is elsewhere" if producer else "is produced nowhere"
                raise self._error(f"output '{value.name}' of graph '{graph.name}' {what}")

    def _function_signature(self, where: str, function: ir.Function) -> None:
        if function.domain != DIALECT_DOMAIN:
            return
        from planish.ir.ops import dialect_record

        record = dialect_record(function.name)
        if record is None:
            raise self._error(f"{where}: the dialect has no such operator")
        for what, have, want in (
            ("inputs", len(function.inputs), record.max_inputs),
            ("outputs", len(function.outputs), record.max_outputs),
        ):
            if have != want and want != schemas.VARIADIC:
                raise self._error(f"{where}: the body has {have} {what}; the operator has {want}")
        if set(function.attributes) != set(record.attributes):
            raise self._error(
                f"{where}: the body has the attributes {sorted(function.attributes)}; "
                f"the operator has {sorted(record.attributes)}"
            )


def _admits(declared: ir.Shape, actual: ir.ShapeProtocol) -> bool:
    return len(declared) == len(actual) and all(
        not isinstance(d, int) or d == a for d, a in zip(declared, actual, strict=True)
    )


def _span(low: int, high: int) -> str:
    if high >= 2**31 - 1:
        return f"at least {low}"
    return str(low) if low == high else f"{low} to {high}"


def _verify_dialect(entry: str, model: ir.Model) -> None:
    """Dtypes and shapes of dialect nodes by their own rules, which onnx does not know."""
    from planish.ir.ops import InferenceError, TensorInfo, dialect_op

    for node in model.graph.all_nodes():
        if node.domain != DIALECT_DOMAIN:
            continue
        try:
            results = dialect_op(node.op_type).infer_node(node)
        except InferenceError as error:
            raise VerifyError(f"entry '{entry}': node '{node.name}' (planish::{node.op_type}): {error}.") from error
        for value, info in zip(node.outputs, results, strict=False):
            have = TensorInfo.of(value)
            if info.dtype is not None and have.dtype is not None and info.dtype != have.dtype:
                wrong = f"is declared {have.dtype.name.lower()} and is {info.dtype.name.lower()}"
            elif not _compatible(have.dims, info.dims):
                wrong = f"is declared {list(have.dims or ())} and is {list(info.dims or ())}"
            else:
                continue
            raise VerifyError(
                f"entry '{entry}': node '{node.name}' (planish::{node.op_type}): output '{value.name}' {wrong}."
            )


def _compatible(a: tuple[int | str | None, ...] | None, b: tuple[int | str | None, ...] | None) -> bool:
    if a is None or b is None:
        return True
    return len(a) == len(b) and all(
        x == y or not isinstance(x, int) or not isinstance(y, int) for x, y in zip(a, b, strict=True)
    )


def _verify_with_onnx(entry: str, model: ir.Model) -> None:
    try:
        proto = stripped_proto(model)
    except Exception as error:
        raise VerifyError(f"entry '{entry}': does not serialize: {_one_line(error)}") from error
    try:
        if all(_has_rank(info.type) for info in (*proto.graph.input, *proto.graph.output)):
            onnx.checker.check_model(proto)  # refuses an interface of unknown rank, which runtimes take
        _cut_at_opaque_nodes(proto.graph)
        infer_proto(proto, strict=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        if _ONNX_DEFECT.search(str(error)):
            return
        raise VerifyError(f"entry '{entry}': {_one_line(error)}") from error


def _has_rank(proto: onnx.TypeProto) -> bool:
    return not proto.HasField("tensor_type") or proto.tensor_type.HasField("shape")


def _cut_at_opaque_nodes(graph: onnx.GraphProto) -> None:
    """Turns results of operators without a schema into inputs of the graph, where their types are known.

    onnx's inference drops all its errors as soon as one node of the graph has no schema.
    """
    types = {info.name: info for info in (*graph.value_info, *graph.output) if info.type.HasField("tensor_type")}
    kept = []
    for node in graph.node:
        names = [name for name in node.output if name]
        if (node.domain == DIALECT_DOMAIN or schemas.is_opaque(node.domain)) and all(n in types for n in names):
            graph.input.extend(types[name] for name in names)
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:600]
