"""planish::Relational…: a relational layer as one operator, its meaning a program of the inter-operator IR.

There is one operator for each program: its name ends in a hash of the program's text, which is the attribute
``program`` of every node. Inputs are edge_index (2, edges) and edge_type (edges,), int64, then the program's inputs and
weights, float32; values over nodes have a row for each node, the nodes of one type consecutive.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.errors import InputError, PlanishError
from planish.ir.ops.base import Attribute, DialectOp, Dim, InferenceError, Operand, Schema, TensorInfo, same_dim
from planish.ir.schemas import DIALECT_DOMAIN, VARIADIC, OpRecord

PREFIX = "Relational"
_NAME = re.compile(rf"{PREFIX}\w*_[0-9a-f]{{10}}")
PROGRAM = "program"


def relational_name(program: str) -> str:
    """The name of the operator of a program in text form, as `str` gives it."""
    label = re.match(r"program\s+(\w+)", program)
    if label is None:
        raise InputError("a relational program begins with 'program name('.")
    return f"{PREFIX}{label[1]}_{hashlib.sha256(program.encode()).hexdigest()[:10]}"


def is_relational(name: str) -> bool:
    """Whether an operator of this name is a relational layer."""
    return _NAME.fullmatch(name) is not None


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    from planish.ir.relational.text import parse_program
    from planish.ir.relational.verify import verify

    program = parse_program(text)
    verify(program)
    return program


class RelationalOp(DialectOp):
    """The operator of one program; which, its nodes say."""

    def record(self) -> OpRecord:
        return OpRecord(2, VARIADIC, 1, VARIADIC, {PROGRAM: ir.AttributeType.STRING}, (PROGRAM,), (0, 1))

    def function_of(self, node: ir.Node, opset: int = 23) -> ir.Function:
        from planish.ir.relational.body import body_of

        text = str(self.attributes_of(node)[PROGRAM])
        if relational_name(text) != self.name:
            raise PlanishError(f"a node of planish::{self.name} has a program with another name or hash.")
        return body_of(_parsed(text), DIALECT_DOMAIN, self.name, max(opset, self.min_opset))

    def infer_node(self, node: ir.Node) -> Sequence[TensorInfo]:
        return self.infer([None if v is None else TensorInfo.of(v) for v in node.inputs], self.attributes_of(node))


def make_op(name: str) -> RelationalOp:
    """The operator of this name; its program is not needed until a node is looked at."""
    schema = Schema(
        name,
        (Operand("edge_index", frozenset({ir.DataType.INT64}), "I"),),
        (Operand("y"),),
        (Attribute(PROGRAM, ir.AttributeType.STRING, required=True),),
        "A relational layer; see planish.ir.relational.inter.",
    )
    return RelationalOp(schema, functools.partial(_infer, name), _no_body, _reference, _flops)


def _no_body(opset: int) -> ir.Function:
    raise PlanishError("the body of a relational operator comes from a node of it.")


def _infer(name: str, inputs: Sequence[TensorInfo | None], attributes: Mapping[str, Any]) -> Sequence[TensorInfo]:
    try:
        program = _parsed(str(attributes[PROGRAM]))
    except InputError as error:
        raise InferenceError(str(error)) from error
    if relational_name(str(attributes[PROGRAM])) != name:
        raise InferenceError(f"its program is not that of {name}")
    if len(inputs) != 2 + len(program.arguments):
        raise InferenceError(
            f"{len(inputs)} inputs; edges and the arguments of its program are {2 + len(program.arguments)}"
        )
    rows = _rows(program, inputs)
    return [
        TensorInfo(ir.DataType.FLOAT, (*_axis(rows, program.variable(output)), *program.variable(output).shape))
        for output in program.outputs
    ]


def _axis(rows: Mapping[Any, Dim], variable: Any) -> tuple[Dim, ...]:
    return () if variable.domain.kind == "none" else (rows.get(variable.domain),)


def _rows(program: Any, inputs: Sequence[TensorInfo | None]) -> dict[Any, Dim]:
    """Rows by domain, as far as the inputs say; checks dtypes and shapes on the way."""
    from planish.ir.relational.domains import EDGE, NODE

    index, types = inputs[:2]
    edges: Dim = None
    for info, what, rank in ((index, "edge_index", 2), (types, "edge_type", 1)):
        if info is None:
            raise InferenceError(f"{what} is left out")
        if info.dtype not in (None, ir.DataType.INT64):
            raise InferenceError(f"{what} is {info.dtype}; it must be int64")
        if info.dims is not None:
            if len(info.dims) != rank or (
                rank == 2 and info.dims[0] not in (2, None) and isinstance(info.dims[0], int)
            ):
                raise InferenceError(f"{what} has shape {info.dims}; it must be {('(edges,)', '(2, edges)')[rank - 1]}")
            edges = same_dim(edges, info.dims[-1], "edge_index and edge_type")
    rows: dict[Any, Dim] = {EDGE: edges}
    for variable, info in zip(program.arguments, inputs[2:], strict=True):
        if info is None:
            raise InferenceError(f"'{variable.name}' is left out")
        if info.dtype not in (None, ir.DataType.FLOAT):
            raise InferenceError(f"'{variable.name}' is {info.dtype}; it must be float32")
        if info.dims is None:
            continue
        lead = 0 if variable.domain.kind == "none" else 1
        if len(info.dims) != lead + len(variable.shape):
            raise InferenceError(f"'{variable.name}' has shape {info.dims}; its program says {variable}")
        for have, want in zip(info.dims[lead:], variable.shape, strict=True):
            same_dim(have, want, f"'{variable.name}'")
        if lead:
            rows[variable.domain] = same_dim(rows.get(variable.domain), info.dims[0], f"rows of {variable.domain}")
    parts = [size for domain, size in rows.items() if domain.index is not None]
    if NODE not in rows and parts and all(isinstance(size, int) for size in parts):
        rows[NODE] = sum(size for size in parts if isinstance(size, int))
    return rows


def graph_of(program: Any, index: np.ndarray, types: np.ndarray, rows: Sequence[Dim]) -> Any:
    """The graph of edges, whose numbers of nodes and types the first axes of the program's arguments say.

    Args:
        rows: by argument; None if one that is needed is not a number.

    Raises:
        InputError: an edge that is out of range.
    """
    from planish.ir.relational.domains import EDGE_TYPE, NODE
    from planish.ir.relational.graph import Graph

    sizes: dict[Any, Dim] = {}
    for variable, size in zip(program.arguments, rows, strict=True):
        if variable.domain.kind != "none":
            sizes[variable.domain] = size
    parts = sorted((d for d in sizes if d.index is not None), key=lambda d: d.index)
    counts = [sizes[d] for d in parts] or [sizes.get(NODE)]
    kinds = sizes.get(EDGE_TYPE)
    known = [count for count in counts if isinstance(count, int)]
    if len(known) < len(counts) or isinstance(kinds, str):
        return None
    pointers = np.concatenate([[0], np.cumsum(known)]).astype(np.int64)
    return Graph(np.asarray(index, np.int64), np.asarray(types, np.int64), node_ptr=pointers, num_edge_types=kinds)


def _graph(program: Any, arrays: Sequence[np.ndarray]) -> Any:
    return graph_of(program, arrays[0], arrays[1], [array.shape[0] if array.ndim else 0 for array in arrays[2:]])


def _reference(*arrays: np.ndarray, program: str) -> tuple[np.ndarray, ...]:
    """Float64, by the interpreter."""
    from planish.ir.relational.interpret import interpret

    parsed = _parsed(program)
    values = {v.name: array for v, array in zip(parsed.arguments, arrays[2:], strict=True)}
    results = interpret(parsed, _graph(parsed, arrays), values)
    return tuple(results[name] for name in parsed.outputs)


def _flops(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> int:
    """Products at two operations each element and pair, all else at one for each element of its result."""
    from planish.ir.relational.domains import EDGE, PAIRS

    program = _parsed(str(attributes[PROGRAM]))
    rows = _rows(program, inputs)
    for domain in PAIRS:  # at most as many as edges; how many is not known from shapes
        rows[domain] = rows[EDGE]
    variables = program.variables()
    total = 0
    for op in program.ops:
        known = rows.get(op.over, 1)
        count = known if isinstance(known, int) else 1
        if op.kind == "linear":
            total += 2 * count * math.prod(op.result.shape) * variables[op.reads[0]].shape[-1]
        else:
            widest = max((variables[name].shape for name in op.reads), key=math.prod, default=())
            total += count * max(math.prod(op.result.shape), math.prod(widest))
    return total
