"""Which nodes give the same outputs for the same inputs each time they run."""

from __future__ import annotations

import onnx_ir as ir

from planish.ir.graphs import constant_tensor, subgraphs_of
from planish.ir.schemas import DIALECT_DOMAIN

_RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
)
#: Domains whose operators have a specification without state, apart from the random ones above.
_PURE_DOMAINS = ("", DIALECT_DOMAIN, "ai.onnx.ml")


class Determinism:
    """Answers for the nodes of one model; bodies of its functions are looked at once."""

    def __init__(self, model: ir.Model) -> None:
        self._functions = model.functions
        self._known: dict[ir.OperatorIdentifier, bool] = {}

    def of(self, node: ir.Node) -> bool:
        """Whether `node`, with all that is inside it, is known to be deterministic."""
        key = node.op_identifier()
        if key in self._functions:
            return self._function(key)
        if node.domain not in _PURE_DOMAINS or node.op_type in _RANDOM:
            return False
        if node.op_type == "Dropout" and not is_inference_dropout(node):
            return False
        return all(self.of(n) for graph in subgraphs_of(node) for n in graph) if node.attributes else True

    def _function(self, key: ir.OperatorIdentifier) -> bool:
        if key not in self._known:
            self._known[key] = False  # a function that calls itself is invalid
            self._known[key] = all(self.of(n) for n in self._functions[key].graph)
        return self._known[key]


def is_inference_dropout(node: ir.Node) -> bool:
    """Whether a Dropout passes its input through: training_mode is absent or constant false."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    tensor = constant_tensor(node.inputs[2])
    return tensor is not None and not bool(tensor.numpy().ravel()[0])
