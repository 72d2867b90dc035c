"""Builds the body of a dialect operator: the graph of an ONNX function, with references to its attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from planish.ir.ops.base import Schema
from planish.ir.schemas import DIALECT_DOMAIN

Input = ir.Value | None


class FunctionBody:
    """A function in the making.

    Attributes:
        values: the inputs by name.
    """

    def __init__(self, schema: Schema, opset: int) -> None:
        self.schema, self._opset = schema, opset
        self.values = {operand.name: ir.Value(name=operand.name) for operand in schema.inputs}
        self._types = {attribute.name: attribute.type for attribute in schema.attributes}
        self._nodes: list[ir.Node] = []

    def add(self, op: str, *inputs: Input, refs: Mapping[str, str] | None = None, **attributes: Any) -> ir.Value:
        """The first output of a new node; `refs`: attribute of the node → attribute of the function."""
        return self.outputs(op, 1, *inputs, refs=refs, **attributes)[0]

    def outputs(
        self, op: str, count: int, *inputs: Input, refs: Mapping[str, str] | None = None, **attributes: Any
    ) -> list[ir.Value]:
        """The outputs of a new node."""
        label = f"{op.lower()}_{len(self._nodes)}"
        for name, of in (refs or {}).items():
            attributes[name] = ir.RefAttr(name, of, self._types[of])
        outputs = [ir.Value(name=f"{label}_out{i or ''}") for i in range(count)]
        self._nodes.append(ir.node(op, list(inputs), attributes=attributes, name=label, outputs=outputs))
        return outputs

    def ints(self, *numbers: int) -> ir.Value:
        return self.add("Constant", value_ints=list(numbers))

    def floating(self, number: float) -> ir.Value:
        return self.add("Constant", value_float=number)

    def number(self, attribute: str) -> ir.Value:
        """A number that is an attribute of the function: an int as int64 of shape (1), a float as a scalar."""
        if self._types[attribute] == ir.AttributeType.FLOAT:
            return self.add("Constant", refs={"value_float": attribute})
        return self.add("Unsqueeze", self.add("Constant", refs={"value_int": attribute}), self.ints(0))

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """A size of a value, as int64 of shape (1)."""
        return self.add("Shape", value, start=axis, end=axis + 1)

    def shape(self, *parts: ir.Value) -> ir.Value:
        return self.add("Concat", *parts, axis=0)

    def cut(
        self, value: ir.Value, start: ir.Value, end: ir.Value | None = None, *, axis: int = 1, step: int = 1
    ) -> ir.Value:
        """value[start:end:step] along an axis; start and end have shape (1)."""
        stop = end if end is not None else self.ints(2**62)
        return self.add("Slice", value, start, stop, self.ints(axis), self.ints(step))

    def span(self, start: ir.Value, end: ir.Value, step: int = 1) -> ir.Value:
        """start, start + step, … below end, as int64; both have shape (1)."""
        scalars = [self.add("Squeeze", v, self.ints(0)) for v in (start, end)]
        return self.add("Range", *scalars, self.add("Constant", value_int=step))

    def function(self, *results: ir.Value) -> ir.Function:
        """The function, with these outputs."""
        for operand, value in zip(self.schema.outputs, results, strict=True):
            value.name = operand.name
        name, inputs = self.schema.name, list(self.values.values())
        graph = ir.Graph(inputs, list(results), nodes=self._nodes, opset_imports={"": self._opset}, name=name)
        attributes = [ir.Attr(a.name, a.type, a.default) for a in self.schema.attributes]
        return ir.Function(DIALECT_DOMAIN, name, graph=graph, attributes=attributes)
