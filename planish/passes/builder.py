"""What a rewrite builds its replacement with: ``op.Gelu(x, approximate="tanh")``, ``op.initializer(array)``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.errors import PlanishError, did_you_mean
from planish.ir.graphs import subgraphs_of
from planish.ir.hashing import tensor_digest
from planish.ir.program import Program
from planish.ir.provenance import provenance
from planish.passes.base import Decline
from planish.passes.names import Names
from planish.passes.opset import needs_opset

_ONLY = {"tensor(bool)": ir.DataType.BOOL, "tensor(int64)": ir.DataType.INT64}  # what predicates and Shape return
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class Constants:
    """New initializers of a program. Equal contents become one tensor under one name in every entry.

    The name says the rule and a digest of the contents, so a second entry, or a second run, arrives at the same
    name; a weight store never sees two tensors under one name.
    """

    def __init__(self, program: Program, names: Names) -> None:
        self._program, self._names = program, names

    def place(self, model: ir.Model, tensor: ir.TensorProtocol, label: str) -> ir.Value:
        """Returns a value of the main graph of `model` that holds `tensor`; subgraphs see it as outer scope."""
        digest = tensor_digest(tensor)
        name = f"{label}_{digest[:10]}"
        initializers = model.graph.initializers
        shared, taken = tensor, False
        for other in self._program.entries.values():
            known = other.graph.initializers.get(name)
            if known is not None and known.const_value is not None:
                if tensor_digest(known.const_value) != digest or known.is_graph_input():
                    taken = False
                    break
                shared, taken = known.const_value, True
        if not taken:
            name = self._names.fresh(name)
        if name in initializers:
            return initializers[name]
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=shared
        )
        model.graph.register_initializer(value)
        return value


class Builder:
    """Records the nodes of one replacement. Nothing enters the graph before the driver accepts it.

    Args:
        rule: name of the rule, for messages and names of constants.
        opsets: opset imports of the model.
    """

    def __init__(self, rule: str, opsets: dict[str, int]) -> None:
        self._rule, self._opsets = rule, opsets
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self.new_domains: set[str] = set()

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if op_type.startswith("_"):
            raise AttributeError(op_type)
        return functools.partial(self._call, op_type)

    def initializer(self, array: Any, name: str | None = None) -> ir.Value:
        """A constant from an array, a number, a list or a tensor; `name` is a wish for its first part.

        Pass the tensor of a match (``match["w"].const_value``) to share a weight instead of copying it.
        """
        tensor = array if isinstance(array, ir.TensorProtocol) else ir.tensor(np.asarray(array, order="C"))
        value = ir.Value(
            name=name or self._rule.replace("-", "_"),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self.constants.append(value)
        return value

    def graph(self, build: Callable[[], Sequence[ir.Value]], name: str) -> ir.Graph:
        """A branch or body without inputs: the nodes that `build` adds, and the values that it returns.

        What else `build` reads is captured from around it. A value that is not made inside gets an Identity.
        """
        outer, self.nodes = self.nodes, []
        try:
            made = list(build())
            inside = {value for node in self.nodes for value in node.outputs}
            for index, value in enumerate(made):
                if value not in inside or value in made[:index]:
                    copy = self.Identity(value)
                    copy.type, copy.shape = value.type, value.shape
                    made[index] = copy
            values = [v for node in self.nodes for v in node.outputs if v.name is None]
            nodes = [node for node in self.nodes if node.name is None]
            graph = ir.Graph([], made, nodes=self.nodes, name=name)
            # The graph has named them by itself; their names follow when all is put in its place.
            for node in nodes:
                node.name = None
            for value in values:
                value.name = None
            return graph
        finally:
            self.nodes = outer

    def discard(self) -> None:
        """Takes back what was built: nodes that enter no graph must not count as users of the values they read."""
        _detach(self.nodes)
        self.nodes = []

    def _call(
        self,
        op_type: str,
        *inputs: Any,
        _domain: str = "",
        _outputs: int | Sequence[str | None] = 1,
        _version: int | None = None,
        _name: str | None = None,
        **attributes: Any,
    ) -> Any:
        """Adds a node; returns its output, or a tuple of its outputs if there are several.

        Inputs are values, None, arrays, numbers or lists of integers; a bare number gets the dtype that the
        operator's schema asks for beside its other inputs. Attributes may be attributes of matched nodes.

        Raises:
            Decline: the operator does not exist at the opset that the model imports.
            PlanishError: the operator has no such attribute.
        """
        domain = "" if _domain == "ai.onnx" else _domain
        schema = self._schema(domain, op_type, _version)
        values = self._operands(schema, inputs)
        attrs = [self._attribute(schema, op_type, n, a) for n, a in attributes.items() if a is not None]
        count = _outputs if isinstance(_outputs, int) else len(_outputs)
        node = ir.Node(domain, op_type, values, attrs, num_outputs=count, version=_version, name=_name)
        _set_dtypes(schema, node)
        if not isinstance(_outputs, int):
            for value, name in zip(node.outputs, _outputs, strict=True):
                value.name = name
        self.nodes.append(node)
        return node.outputs[0] if count == 1 else tuple(node.outputs)

    def _schema(self, domain: str, op_type: str, version: int | None) -> Any:
        if domain not in self._opsets:
            self.new_domains.add(domain)
            if domain != "":
                return None
        opset = version or self._opsets.get(domain, 1)
        schema = _schema(domain, op_type, opset)
        if schema is None and domain == "":
            since = _first_version(domain, op_type)
            if since is None:
                raise PlanishError(f"rule '{self._rule}' builds {op_type}, which is no ONNX operator.")
            raise Decline(f"{op_type} {needs_opset(since, opset)}")
        return schema

    def _attribute(self, schema: Any, op_type: str, name: str, value: Any) -> ir.Attr:
        if schema is not None and name not in schema.attributes:
            hint = did_you_mean(name, schema.attributes)
            raise PlanishError(f"rule '{self._rule}': {op_type} has no attribute '{name}'.{hint}")
        if isinstance(value, ir.Attr):
            return ir.Attr(name, value.type, value.value, ref_attr_name=value.ref_attr_name)
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, np.ndarray):
            value = ir.tensor(value)
        if isinstance(value, bool):
            value = int(value)
        if schema is not None:
            kind = ir.AttributeType(int(schema.attributes[name].type.value))
            if kind == ir.AttributeType.FLOAT:
                value = float(value)
            if kind in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
                return ir.Attr(name, kind, list(value))
        return ir.convenience.convert_attribute(name, value)

    def _operands(self, schema: Any, inputs: Iterable[Any]) -> list[ir.Value | None]:
        given = list(inputs)
        values: list[ir.Value | None] = []
        for index, item in enumerate(given):
            if item is None or isinstance(item, ir.Value):
                values.append(item)
            elif isinstance(item, np.ndarray | np.generic | ir.TensorProtocol):
                values.append(self.initializer(item))
            elif isinstance(item, bool | int | float | list | tuple):
                values.append(self.initializer(_number(item, _dtype_beside(schema, index, given))))
            else:
                raise PlanishError(
                    f"rule '{self._rule}': an input of class {type(item).__name__}; "
                    "inputs are values, arrays, numbers, or None."
                )
        return values


def _detach(nodes: Iterable[ir.Node]) -> None:
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(index, None)
        for graph in subgraphs_of(node):
            _detach(list(graph))


def _number(item: Any, dtype: ir.DataType | None) -> Any:
    array = np.asarray(item)
    if dtype is not None:
        return array.astype(dtype.numpy())
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _dtype_beside(schema: Any, index: int, given: list[Any]) -> ir.DataType | None:
    """The dtype of the inputs that the schema wants to have the type of input `index`."""
    if schema is None:
        floats = [v.dtype for v in given if isinstance(v, ir.Value) and v.dtype in _FLOATS]
        return floats[0] if floats and isinstance(given[index], float) else None
    kind = _formal(schema, index)
    for other, item in enumerate(given):
        if isinstance(item, ir.Value) and item.dtype is not None and _formal(schema, other) == kind:
            return item.dtype
    return None


def _set_dtypes(schema: Any, node: ir.Node) -> None:
    """Gives the outputs the dtypes that follow from the schema; shapes are left to inference."""
    if schema is None:
        return
    target = node.attributes.get("to") if node.op_type == "Cast" else None
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    for index, value in enumerate(node.outputs):
        if target is not None:
            value.dtype = ir.DataType(target.as_int())
            continue
        formal = schema.outputs[min(index, len(schema.outputs) - 1)]
        kind = formal.type_str
        if not formal.is_homogeneous:  # of control flow: each output has its own type
            continue
        for position, operand in enumerate(node.inputs):
            if operand is not None and operand.type is not None and _formal(schema, position) == kind:
                value.type = operand.type
                break
        else:
            only = allowed.get(kind, [kind])
            if len(only) == 1 and only[0] in _ONLY:
                value.dtype = _ONLY[only[0]]


def _formal(schema: Any, index: int) -> str:
    formals = schema.inputs
    return str(formals[min(index, len(formals) - 1)].type_str) if formals else ""


@functools.lru_cache(maxsize=4096)
def _schema(domain: str, op_type: str, version: int) -> Any:
    import onnx

    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    return None if schema.deprecated else schema


def _first_version(domain: str, op_type: str) -> int | None:
    import onnx

    versions = [
        s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == op_type and s.domain == domain
    ]
    return min(versions, default=None)


def new_metadata(pass_name: str, replaced: Sequence[ir.Node], root: ir.Node) -> dict[str, str]:
    """Metadata of a new node: all of the root's, what only the others have, and where the node comes from."""
    merged: dict[str, str] = {}
    for node in (root, *replaced):
        for key, value in node.metadata_props.items():
            merged.setdefault(key, value)
    return merged | provenance(pass_name, replaced)
