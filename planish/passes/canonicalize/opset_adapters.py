"""Rewrites of single nodes from one opset to another, and the reasons why a node can not be taken there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import defs

from planish.ir.provenance import provenance
from planish.passes.canonicalize.opset_tables import REDUCTIONS, STABLE


class Blocked(Exception):
    """The operator can not be raised to the opset asked for; the text says why."""


class Names:
    """Names that a body (a graph with its subgraphs, or a function) uses already."""

    def __init__(self, body: ir.Graph) -> None:
        self.values = {v.name for g in (body, *body.subgraphs()) for v in (*g.inputs, *g.initializers.values())}
        self.values |= {v.name for n in body.all_nodes() for v in n.outputs}
        self.nodes = {n.name for n in body.all_nodes()}

    @staticmethod
    def fresh(stem: str, taken: set[str | None]) -> str:
        while stem in taken:
            stem += "_"
        taken.add(stem)
        return stem


class Site:
    """One node to be raised from opset `old` to `target`, and what adapters do to it.

    Attributes:
        changed: whether the node had to be adapted.
    """

    def __init__(self, node: ir.Node, old: int, target: int, names: Names, pass_name: str) -> None:
        self.node, self.old, self.target, self.names, self.pass_name = node, old, target, names, pass_name
        self.changed = False

    def take(self, name: str) -> Any:
        """Removes an attribute and returns its value, None if it is not there."""
        attribute = self._attribute(name)
        if attribute is None:
            return None
        del self.node.attributes[name]
        self.changed = True
        return attribute.value

    def number(self, name: str, default: int) -> int:
        """An integer attribute."""
        attribute = self._attribute(name)
        return default if attribute is None else attribute.as_int()

    def put(self, name: str, number: int) -> None:
        """Sets an integer attribute."""
        self.node.attributes[name] = ir.AttrInt64(name, number)
        self.changed = True

    def _attribute(self, name: str) -> ir.Attr | None:
        attribute = self.node.attributes.get(name)
        if attribute is not None and attribute.is_ref():
            raise Blocked(f"takes its attribute '{name}' from the function around it")
        return attribute

    def input(self, index: int) -> ir.Value:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            raise Blocked("misses an input")
        return value

    def dtype(self) -> np.dtype[Any]:
        """The dtype of the first input."""
        dtype = self.input(0).dtype
        if dtype is None:
            raise Blocked("has an input of unknown dtype")
        return np.dtype(dtype.numpy())

    def rank(self, index: int) -> int | None:
        shape = self.input(index).shape
        return None if shape is None else len(shape)

    def give(self, index: int, array: np.ndarray[Any, Any]) -> None:
        """Makes a constant the input at `index`."""
        node = self.node
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        name = self.names.fresh(f"{node.name or node.op_type}.input{index}", self.names.nodes)
        constant = ir.node("Constant", [], {"value": ir.tensor(array)}, name=name)
        graph = node.graph
        assert graph is not None
        graph.insert_before(node, constant)
        value = constant.outputs[0]
        value.name = self.names.fresh(f"{node.outputs[0].name}.input{index}", self.names.values)
        value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
        node.replace_input_with(index, value)
        self._mark(constant)
        self.changed = True

    def _mark(self, made: ir.Node) -> None:
        made.metadata_props.update(self.node.metadata_props | provenance(self.pass_name, [self.node]))


def since(op_type: str, opset: int) -> int | None:
    """The version of a standard operator that counts at an opset; None if there is none."""
    try:
        version: int = defs.get_schema(op_type, opset).since_version
    except defs.SchemaError:
        return None
    return version


def raise_node(site: Site) -> None:
    """Raises one node of the standard domain, in place.

    Raises:
        Blocked: it can not be raised to the target, nor to an opset below it at which the operator is the same.
    """
    node = site.node
    before, after = since(node.op_type, site.old), since(node.op_type, site.target)
    if before is None or after is None:
        raise Blocked("is not an operator of both opsets")
    if before == after:
        return
    adapter = _ADAPTERS.get(node.op_type)
    if adapter is not None:
        adapter(site, before)
    elif before < STABLE.get(node.op_type, 1 << 30):
        raise Blocked(f"changes at opset {after}")
    if node.op_type == "AveragePool" and before < 19 <= after:
        # ONNX Runtime's kernel from 19 on is another one (rounding, ceil_mode) and not its fast one.
        raise Blocked("has another kernel from opset 19 on")
    if node.op_type == "ConvTranspose" and "output_shape" in node.attributes and before < 11:
        raise Blocked("with output_shape changes at opset 11")


def _list_to_input(*names: str) -> Callable[[Site, int], None]:
    """An adapter for operators whose attributes `names` became the inputs 1, 2, …"""

    def adapt(site: Site, before: int) -> None:
        for index, name in enumerate(names, 1):
            values = site.take(name)
            if values is not None and len(values):
                site.give(index, np.array(values, np.int64))

    return adapt


def _until(version: int, adapter: Callable[[Site, int], None]) -> Callable[[Site, int], None]:
    """`adapter` for versions below `version`, which keeps its meaning from then on."""

    def adapt(site: Site, before: int) -> None:
        after = since(site.node.op_type, site.target)
        if after is not None and before < version <= after:
            adapter(site, before)

    return adapt


def _softmax(site: Site, before: int) -> None:
    # Up to opset 12 the input is seen as a matrix cut at `axis`; that is the same only for the last axis.
    axis = site.number("axis", 1)
    rank = site.rank(0)
    if axis != -1 and (rank is None or axis % max(rank, 1) != rank - 1):
        raise Blocked("over an axis that is not known to be the last changes at opset 13")
    site.put("axis", -1)


def _clip(site: Site, before: int) -> None:
    if before < 6:
        raise Blocked("changes at opset 6")
    dtype = site.dtype()
    for index, name in enumerate(("min", "max"), 1):
        bound = site.take(name)
        if bound is not None:
            site.give(index, np.array(bound, dtype))


def _pad(site: Site, before: int) -> None:
    if before < 2:
        raise Blocked("changes at opset 2")
    dtype, value = site.dtype(), site.take("value")
    _list_to_input("pads")(site, before)
    if value:
        site.give(2, np.array(value, dtype))


def _top_k(site: Site, before: int) -> None:
    if before < 10:
        site.give(1, np.array([site.take("k")], np.int64))


def _dropout(site: Site, before: int) -> None:
    if before < 7:
        raise Blocked("changes at opset 7")
    if len(site.node.outputs) > 1 and (site.node.outputs[1].uses() or site.node.outputs[1].is_graph_output()):
        raise Blocked("with a mask changes at opset 12")
    site.take("ratio")  # not used in inference, which is what these versions always do


def _batch_normalization(site: Site, before: int) -> None:
    if before < 7 or site.take("spatial") == 0 or any(v.name for v in site.node.outputs[1:]):
        raise Blocked("in this form changes at opset 14")


def _split(site: Site, before: int) -> None:
    if before < 2:
        raise Blocked("changes at opset 2")
    if before < 13 <= site.target:
        _list_to_input("split")(site, before)
    if site.target >= 18 and (len(site.node.inputs) < 2 or site.node.inputs[1] is None):
        site.put("num_outputs", len(site.node.outputs))


def _per_tensor(site: Site, before: int) -> None:
    # Opset 13 gave scales an axis, which means nothing for a scalar scale.
    if site.rank(1) != 0:
        raise Blocked("with a scale that is not known to be a scalar changes at opset 13")


_ADAPTERS: dict[str, Callable[[Site, int], None]] = {
    **{f"Reduce{kind}": _until(18, _list_to_input("axes")) for kind in REDUCTIONS},
    "ReduceSum": _until(13, _list_to_input("axes")),
    "Squeeze": _until(13, _list_to_input("axes")),
    "Unsqueeze": _until(13, _list_to_input("axes")),
    **{name: _until(13, _softmax) for name in ("Softmax", "LogSoftmax", "Hardmax")},
    "Clip": _until(11, _clip),
    "Pad": _until(11, _pad),
    "Slice": _until(10, _list_to_input("starts", "ends", "axes")),
    "TopK": _until(10, _top_k),
    "Dropout": _until(12, _dropout),
    "BatchNormalization": _until(14, _batch_normalization),
    "Split": _split,
    "QuantizeLinear": _until(13, _per_tensor),
    "DequantizeLinear": _until(13, _per_tensor),
}
#: Operators whose adapters ask for the dtype or the rank of the input at this index.
TYPED = dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "Clip", "Pad"), 0) | {
    "QuantizeLinear": 1,
    "DequantizeLinear": 1,
}
