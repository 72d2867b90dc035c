"""Types and shapes of all values, in place, with symbolic sizes kept.

Standard operators go through onnx's inference on a copy without weights, dialect operators through their own
symbolic rule, contrib operators keep what their values have. What was known is never lost: inference adds types
and shapes where there were none, names where there was nothing, numbers where there was a name, and on a
conflict the existing information stays.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable

import onnx
import onnx_ir as ir

from planish.ir.schemas import DIALECT_DOMAIN
from planish.ir.size_names import SizeNames, is_made_up
from planish.ir.stripped import INLINE_BYTES, large_constant, stripped_proto

logger = logging.getLogger(__name__)
_MAX_ROUNDS = 4
#: Elements of computed vectors up to which propagation takes less than about a second.
_VECTOR_ELEMENTS = 2_000_000


def infer_shapes(model: ir.Model) -> None:
    """Fills in types and shapes of every value of `model` that follow from its inputs and weights.

    A model that onnx's inference refuses as a whole keeps what it has: to refuse is for the verifier.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                _from_tensor(value, value.const_value)
        for node in graph:
            if node.op_type == "Constant" and not node.domain:
                tensor = large_constant(node, INLINE_BYTES)
                if tensor is not None:
                    _from_tensor(node.outputs[0], tensor)
    dialect = [n for n in model.graph.all_nodes() if n.domain == DIALECT_DOMAIN]
    for _ in range(_MAX_ROUNDS):
        _infer_standard(model)
        # A rule may learn something that the standard operators behind it wait for.
        if not sum(_infer_dialect(node) for node in dialect):
            break


def _from_tensor(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    if value.type is None:
        value.type = ir.TensorType(tensor.dtype)
    if value.shape is None:
        value.shape = ir.Shape(tensor.shape.numpy())


def _infer_standard(model: ir.Model) -> None:
    proto = stripped_proto(model)
    names = SizeNames(model, proto)
    try:
        inferred = infer_proto(proto, strict=False)
    except Exception as error:  # onnx raises several types; the model keeps what it has
        logger.debug("onnx inference refused the model: %s", error)
        return
    _merge_graph(model.graph, inferred.graph, names)
    names.apply(model)


def infer_proto(proto: onnx.ModelProto, *, strict: bool) -> onnx.ModelProto:
    """onnx's inference, with propagation of shape data unless that would hang.

    Propagation walks every element of a vector as if it were a shape: one of 1e9 elements, which a file of a
    hundred bytes can ask for, takes minutes inside a call that nothing interrupts.
    """
    options = {"check_type": strict, "strict_mode": strict}
    plain = onnx.shape_inference.infer_shapes(proto, **options, data_prop=False)
    if _vector_elements(plain.graph) > _VECTOR_ELEMENTS:
        return plain
    try:
        return onnx.shape_inference.infer_shapes(proto, **options, data_prop=True)
    except onnx.shape_inference.InferenceError:
        # Propagation takes any small integer tensor for a shape, and refuses valid broadcasts of them.
        return plain


def _vector_elements(graph: onnx.GraphProto) -> int:
    """Elements of all vectors that nodes compute, as far as sizes are numbers."""
    shapes = [info.type.tensor_type.shape.dim for info in (*graph.value_info, *graph.output)]
    inner = (a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
    own: int = sum(dims[0].dim_value for dims in shapes if len(dims) == 1)
    return own + sum(map(_vector_elements, inner))


def _merge_graph(graph: ir.Graph, proto: onnx.GraphProto, names: SizeNames) -> None:
    infos = {info.name: info.type for info in (*proto.value_info, *proto.output)}
    nodes = {node.output[0]: node for node in proto.node if node.output}
    for node in graph:
        for value in node.outputs:
            info = infos.get(value.name or "")
            if info is not None:
                _merge_type(value, info, names)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref() and node.outputs:
                other = nodes.get(node.outputs[0].name or "")
                for item in other.attribute if other is not None else ():
                    if item.name == attribute.name:
                        _merge_graph(attribute.value, item.g, names)


def _merge_type(value: ir.Value, proto: onnx.TypeProto, names: SizeNames) -> None:
    """Adds to `value` what `proto` knows more."""
    kind = proto.WhichOneof("value")
    if kind is None:
        return
    if kind != "tensor_type":
        if value.type is None:
            with contextlib.suppress(ir.serde.SerdeError):  # maps and opaque types, which onnx_ir has no class for
                value.type = ir.serde.deserialize_type_proto_for_type(proto)
                value.shape = ir.serde.deserialize_type_proto_for_shape(proto)
        return
    tensor = proto.tensor_type
    if value.type is None and tensor.elem_type:
        value.type = ir.TensorType(ir.DataType(tensor.elem_type))
    if tensor.HasField("shape"):
        dims = [
            d.dim_value if d.HasField("dim_value") else names.renamed(d.dim_param or None) for d in tensor.shape.dim
        ]
        if value.is_graph_output():
            # A name that nobody gave has no place in the interface.
            dims = [None if is_made_up(d) else d for d in dims]
        old = value.shape
        if old is not None and len(old) == len(dims):
            for a, b in zip(old, dims, strict=True):
                names.same(a if isinstance(a, int) else a.value, b)
        merge_shape(value, dims)


def merge_shape(value: ir.Value, dims: Iterable[int | str | None]) -> bool:
    """Adds to the shape of `value` what `dims` knows more; returns whether anything was learned."""
    new = list(dims)
    old = value.shape
    if old is None:
        value.shape = ir.Shape(new)
        return True
    if len(old) != len(new):
        return False
    merged = [_better(a if isinstance(a, int) else a.value, b) for a, b in zip(old, new, strict=True)]
    if merged == [d if isinstance(d, int) else d.value for d in old]:
        return False
    value.shape = ir.Shape(merged)
    return True


def _better(old: int | str | None, new: int | str | None) -> int | str | None:
    if isinstance(old, int) or new is None:
        return old
    if isinstance(new, int) or old is None or (is_made_up(old) and not is_made_up(new)):
        return new
    return old


def _infer_dialect(node: ir.Node) -> bool:
    from planish.ir.ops import infer_node

    return infer_node(node)
