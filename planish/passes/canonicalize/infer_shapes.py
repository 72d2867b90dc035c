"""infer-shapes: fills in types and shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.ir import infer
from planish.ir.graphs import dims_of
from planish.ir.program import Program
from planish.passes.base import ExactPass, PassContext, PassResult
from planish.passes.registry import register


@register
@dataclass(frozen=True)
class InferShapes(ExactPass):
    """Fills in the types and shapes of all values; `fired` counts the values about which something was learned."""

    name: ClassVar[str] = "infer-shapes"
    ensures: ClassVar[tuple[str, ...]] = ("shapes",)

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        learned = 0
        for model in program.entries.values():
            before = [(v, _known(v)) for v in _values(model)]
            infer.infer_shapes(model)
            learned += sum(known != _known(value) for value, known in before)
        return PassResult(learned > 0, learned)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _known(value: ir.Value) -> tuple[object, object]:
    return (str(value.type), dims_of(value))
