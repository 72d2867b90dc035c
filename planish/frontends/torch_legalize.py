"""What the ONNX exporter writes and ONNX Runtime does not take, put right without changing a value."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import is_op

_ONES = "planish_rotary_ones"


def legalize(model: ir.Model) -> int:
    """Makes an exported model one that ONNX Runtime runs, in place. Returns the number of nodes that changed."""
    return expand_rotary_caches(model)


def expand_rotary_caches(model: ir.Model) -> int:
    """Gives the caches of RotaryEmbedding the batch size of what they rotate.

    The exporter computes cos and sin once for all rows, as [1, sequence, half], which the operator of opset 23 does
    not allow for a batch above 1 (3-D caches are [batch, sequence, half]), and which ONNX Runtime 1.31 refuses
    when it runs. Caches that several nodes share are expanded once.
    """
    changed = 0
    expanded: dict[object, ir.Value] = {}
    targets: dict[object, ir.Value] = {}
    for node in list(model.graph.all_nodes()):
        if not is_op(node, "RotaryEmbedding") or _has_positions(node):
            continue
        x = node.inputs[0]
        caches = node.inputs[1:3]
        if x is None or any(c is None or not _may_differ(x, c) for c in caches):
            continue
        for index, cache in enumerate(caches, start=1):
            assert cache is not None
            key = (id(node.graph), _batch(x), _identity(cache))
            if key not in expanded:
                expanded[key] = _expand(model, node, x, cache, targets)
            node.replace_input_with(index, expanded[key])
        changed += 1
    return changed


def _has_positions(node: ir.Node) -> bool:
    return len(node.inputs) > 3 and node.inputs[3] is not None


def _may_differ(x: ir.Value, cache: ir.Value) -> bool:
    """Whether the first dims of x and of the cache are not known to be equal."""
    if cache.shape is None or x.shape is None:
        return True
    if len(cache.shape) != 3:
        return False
    batch, own = x.shape[0], cache.shape[0]
    if isinstance(batch, int) or isinstance(own, int):
        return batch != own
    return batch.value is None or batch.value != own.value


def _batch(x: ir.Value) -> object:
    """Equal for values whose first dims are known to be the same."""
    batch = x.shape[0] if x.shape is not None else None
    symbol = batch.value if isinstance(batch, ir.SymbolicDim) else batch
    return ("unknown", id(x)) if symbol is None else symbol


def _identity(value: ir.Value) -> object:
    """Equal for values that are the same function of the same values: the exporter repeats Cos and Sin per layer."""
    node = value.producer()
    if node is None or node.op_type not in ("Cos", "Sin"):
        return id(value)
    return node.op_type, id(node.inputs[0])


def _expand(model: ir.Model, user: ir.Node, x: ir.Value, cache: ir.Value, targets: dict[object, ir.Value]) -> ir.Value:
    graph = user.graph
    assert graph is not None
    key = (id(graph), _batch(x))
    if key not in targets:
        targets[key] = _target(model, user, x)
    expand = ir.node("Expand", [cache, targets[key]], metadata_props=dict(user.metadata_props))
    result = expand.outputs[0]
    result.type = cache.type or x.type
    result.shape = _shape(user, x, cache)
    graph.insert_before(user, expand)
    return result


def _target(model: ir.Model, user: ir.Node, x: ir.Value) -> ir.Value:
    """The shape [batch of x, 1, 1] to expand a cache to."""
    graph = user.graph
    assert graph is not None
    tail = model.graph.initializers.get(_ONES)
    if tail is None:
        tensor = ir.tensor(np.ones(2, dtype=np.int64), name=_ONES)
        tail = ir.Value(name=_ONES, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
        tail.const_value = tensor
        model.graph.register_initializer(tail)
    scopes = dict(user.metadata_props)
    batch = ir.node("Shape", [x], {"start": 0, "end": 1}, metadata_props=scopes)
    target = ir.node("Concat", [batch.outputs[0], tail], {"axis": 0}, metadata_props=scopes)
    for node, size in ((batch, 1), (target, 3)):
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        node.outputs[0].shape = ir.Shape([size])
    graph.insert_before(user, [batch, target])
    return target.outputs[0]


def _shape(user: ir.Node, x: ir.Value, cache: ir.Value) -> ir.Shape | None:
    if x.shape is None:
        return None
    if cache.shape is not None:
        return ir.Shape([x.shape[0], *list(cache.shape)[1:]])
    if len(x.shape) != 4:
        return None
    width = user.attributes.get_int("rotary_embedding_dim", 0) or x.shape[3]
    return ir.Shape([x.shape[0], x.shape[2], width // 2 if isinstance(width, int) else None])
