"""lower-cuda-opset: the opset up to which ONNX Runtime's CUDA provider has kernels for pooling and its like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx import defs

from planish.ir.errors import VerifyError
from planish.ir.graphs import is_op
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.ir.provenance import provenance
from planish.ir.verify import verify_model
from planish.passes.base import ExactPass, PassContext, PassResult
from planish.passes.canonicalize.opset_tables import STABLE
from planish.passes.registry import register

#: What has a CUDA kernel up to opset 21, and none from 22 on (ONNX Runtime 1.31).
_WITHOUT = ("MaxPool", "InstanceNormalization", "Elu")
_OLDER = 21


@register
@dataclass(frozen=True)
class LowerCudaOpset(ExactPass):
    """Declares opset 21 where an operator has a kernel on GPUs up to there alone, and all others mean the same there.

    Otherwise it runs on the CPU, with copies before and behind it, and the program can not be a CUDA graph. From opset
    22 on these operators merely take bfloat16 too. No node changes; `fired` counts those that have a kernel now.
    """

    name: ClassVar[str] = "lower-cuda-opset"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(False)
        if ctx.target.name != "ort-cuda":
            return result
        for model in program.entries.values():
            gaining = [node for node in model.graph.all_nodes() if is_op(node, *_WITHOUT)]
            if not gaining or model.opset_imports.get("", 0) <= _OLDER:
                continue
            reasons = [(node, reason) for node in model.graph.all_nodes() if (reason := _newer(node))]
            if model.functions:
                reasons = [(gaining[0], "the program has functions, whose opset is another")]
            if reasons:
                node, reason = reasons[0]
                result.declined.append(Declined(self.name, node.name or node.op_type, reason))
                continue
            if reason := _lower(model):
                result.declined.append(Declined(self.name, gaining[0].name or gaining[0].op_type, reason))
                continue
            for node in gaining:
                node.metadata_props.update(provenance(self.name, [node]))
            result.modified, result.fired = True, result.fired + len(gaining)
        return result


def _newer(node: ir.Node) -> str:
    """Why a node can not be at the older opset; empty if it can."""
    if node.domain:
        return ""
    try:
        schema = defs.get_schema(node.op_type, _OLDER)
    except defs.SchemaError:
        return f"{node.op_type} is not an operator of opset {_OLDER}"
    first = STABLE.get(node.op_type)
    if schema.since_version != defs.get_schema(node.op_type).since_version and (
        first is None or schema.since_version < first
    ):
        return f"{node.op_type} means something else at opset {_OLDER}"
    unknown = [name for name in node.attributes if name not in schema.attributes]
    if unknown:
        return f"{node.op_type} has no '{unknown[0]}' at opset {_OLDER}"
    if any(value is not None and value.dtype == ir.DataType.BFLOAT16 for value in (*node.inputs, *node.outputs)):
        return f"{node.op_type} in bfloat16 may be newer than opset {_OLDER}"
    return ""


def _lower(model: ir.Model) -> str:
    """Declares the older opset; why it can not, in which case nothing has changed."""
    graphs = [graph for graph in model.graphs() if "" in graph.opset_imports]
    before = [graph.opset_imports[""] for graph in graphs]
    for graph in graphs:
        graph.opset_imports[""] = _OLDER
    try:
        verify_model(model, full=False)
    except VerifyError as error:
        for graph, version in zip(graphs, before, strict=True):
            graph.opset_imports[""] = version
        return f"it would not be valid at opset {_OLDER}: {error}"
    return ""
