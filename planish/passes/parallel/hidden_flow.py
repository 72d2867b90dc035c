"""Where the hidden units of a feed-forward network run: from the columns of its first weights to the rows of its last.

As for the heads of an attention (`planish.passes.layers.head_flow`), with units in the place of heads.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from planish.ir.analyses.layers import Part
from planish.ir.graphs import constant_tensor, dims_of
from planish.passes.base import Decline
from planish.passes.layers import head_flow
from planish.passes.layers.head_flow import HeadFlow
from planish.passes.layers.head_views import Layout

#: What works on each number by itself, beside what does for heads.
_ACTIVATIONS = {"Gelu", "Erf", "Tanh", "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "HardSwish", "HardSigmoid", "Mish"}
_ACTIVATIONS |= {"Swish", "Softplus", "Pow", "Sqrt", "Exp", "Abs", "SwiGLU", "QuickGelu", "FastGelu", "BiasGelu"}
_DOMAINS = ("", "planish", "com.microsoft")
_AROUND = ("Add", "Sum", "Cast", "Identity", "Reshape")


class HiddenFlow(HeadFlow):
    """The hidden units of one network; `counts` are their number, under both roles of heads."""

    def _attention(self) -> None:
        hidden = self.node.inputs[0]
        dims = dims_of(hidden)
        width = dims[-1] if dims else None
        if not isinstance(width, int):
            raise Decline(f"the width of '{hidden.name if hidden is not None else '?'}' is not known")
        self.counts = {"q": width, "kv": width}
        self.meet(hidden, Layout(-1, width, 1, "q"))

    def _visit(self, node: ir.Node, at: ir.Value) -> None:
        rule = _RULES.get(node.op_type)
        if rule is None or node.domain not in _DOMAINS or (node.domain and node.op_type not in _ACTIVATIONS):
            raise Decline(f"{node.op_type} '{node.name}' works on hidden units, in a way that is not known")
        rule(self, node, at)


def hidden_flow(graph: ir.Graph, part: Part) -> HiddenFlow:
    """The flow of a feed-forward part.

    Raises:
        Decline: its last product, or the way of its hidden units, is not seen.
    """
    flow = HiddenFlow(graph, last_product(part), ())
    flow.trace()
    if not any(edit.matrix for edit in flow.edits if isinstance(edit, head_flow.Cut) and not flow.reads(edit.node)):
        raise Decline("no product with a weight matrix makes its hidden units")
    return flow


def last_product(part: Part) -> ir.Node:
    """The product whose result a part adds to the stream, up to constants.

    Raises:
        Decline: there is none.
    """
    inside, at = set(part.nodes), part.branch
    while (node := at.producer()) is not None and node in inside:
        if node.op_type in ("MatMul", "Gemm") and not node.domain and constant_tensor(node.inputs[1]) is not None:
            return node
        below = [v for v in node.inputs if v is not None and constant_tensor(v) is None]
        if node.op_type not in _AROUND or node.domain or (len(below) != 1 and node.op_type != "Reshape"):
            break
        at = below[0]
    raise Decline("what it adds to the stream is not seen to be a product with a weight matrix")


def _activation(flow: HeadFlow, node: ir.Node, at: ir.Value) -> None:
    if any(v is None for v in node.inputs):
        raise Decline(f"{node.op_type} '{node.name}' has an operand left out")
    head_flow._elementwise(flow, node, at)


_RULES: dict[str, Callable[[HeadFlow, ir.Node, ir.Value], None]] = {
    **head_flow._RULES,
    **dict.fromkeys(_ACTIVATIONS, _activation),
}
