"""Reads attention off a graph: from the product with V back through softmax, mask and scale to Q and K.

Exporters write attention in many ways that differ in small steps of a chain, so this is a walk and not a pattern.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import onnx_ir as ir

from planish.ir.graphs import constant_array, is_op
from planish.passes.base import Decline
from planish.passes.fusion.attention_flat import Rows, flat_columns, flat_rows, parted_rows, proved
from planish.passes.fusion.sizes import product, rank, reshaped, scalar, sizes, transposed_with

_MOST_NODES = 64
_MOST_CLAMP = -1e30  # a mask as low as this absorbs every score


@dataclass
class Mask:
    """One masking step. `fill` is None for an addition of `value`; else `value` is a condition, and scores where it
    is not `keep` become `fill`. `expansion` are the nodes that gave it the shape of the scores, which it needs not.
    `flat`: the scores are (B * H, S, L) where it is applied."""

    value: ir.Value
    fill: float | None = None
    keep: bool = True
    expansion: tuple[ir.Node, ...] = ()
    flat: bool = False


@dataclass
class Attention:
    """softmax(scale * q k^T + mask) v, as found: q (B, H, S, D), v (B, H, L, Dv); k (B, H, L, D) after `k_perm`.

    All three have three axes, (B, S, D), where there is one head.

    Attributes:
        masks: masking steps in the order of execution.
        softcap: the scores, scaled, become ``softcap * tanh(scores / softcap)`` before they are masked; 0 for none.
        lowest: scores that are masked become at least this.
        guarded: rows that are NaN (all keys at ``-inf``) become zeros.
        flat: the products have three axes.
        rows: where q, k, v are found if heads were joined to the batch, or were next to it; in place of these three.
        nodes: all between q, k, v, masks and the output, the product with v first. Nobody else uses weights or scores.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    k_perm: tuple[int, ...] | None = None
    scale: float = 1.0
    softcap: float = 0.0
    masks: list[Mask] = field(default_factory=list)
    lowest: float | None = None
    guarded: bool = False
    flat: bool = False
    rows: tuple[Rows, Rows, Rows] | None = None
    nodes: list[ir.Node] = field(default_factory=list)

    @property
    def heads(self) -> object:
        """The number of heads as a term."""
        dims = sizes(self.q) or ()
        return dims[1] if len(dims) == 4 else 1


def softmax_behind(value: ir.Value | None) -> ir.Node | None:
    """The Softmax that `value` comes from through steps that inference leaves alone, or None."""
    steps = _weights(value)
    return steps[0] if steps else None


def match_attention(root: ir.Node) -> Attention:
    """Reads the attention whose last product is the MatMul `root`, whose first operand `softmax_behind` accepts.

    Raises:
        Decline: it is not attention, or attention of a kind that is not understood; the reason says which.
    """
    steps = _weights(root.inputs[0])
    assert steps is not None and root.inputs[1] is not None
    softmax, guarded, nodes = steps
    views = [n for n in nodes if n.op_type == "Reshape"]
    axis = softmax.attributes.get_int("axis", -1)
    if axis not in (-1, (rank(softmax.inputs[0]) or 4) - 1):
        raise Decline(f"the softmax is over axis {axis}, not over the keys")
    scores = _scores(softmax.inputs[0])
    if scores is None:
        raise Decline("the softmax is not over a product of queries and keys")
    product_, steps_after, chain = scores
    found = Attention(product_.inputs[0], product_.inputs[1], root.inputs[1], guarded=guarded)  # type: ignore[arg-type]
    views += [n for n in chain if n.op_type == "Reshape"]
    found.flat = rank(product_.outputs[0]) == 3
    if views and not found.flat:
        raise Decline("the scores are reshaped between products of rank 4")
    _read_steps(found, steps_after)
    expansions = (node for mask in found.masks for node in mask.expansion)
    found.nodes = [root, *nodes, softmax, *chain, product_, *expansions]
    found.q, factor = _unscaled(found.q)
    found.scale *= factor
    if found.flat:
        _read_flat(found, product_, views)
    else:
        _read_keys(found)
        _read_cuts(found)
    _require_private(found)
    found.nodes = _between(root, {found.q, found.k, found.v, *(m.value for m in found.masks)})
    return found


def _weights(value: ir.Value | None) -> tuple[ir.Node, bool, list[ir.Node]] | None:
    """(softmax, guarded against NaN, nodes between), going back from the weights of the product with v."""
    nodes: list[ir.Node] = []
    guarded = False
    while value is not None:
        node = value.producer()
        if is_op(node, "Softmax"):
            return node, guarded, nodes  # type: ignore[return-value]
        if is_op(node, "Where") and is_op(node.inputs[0].producer(), "IsNaN"):  # type: ignore[union-attr]
            test = node.inputs[0].producer()  # type: ignore[union-attr]
            if test.inputs[0] is not node.inputs[2] or scalar(node.inputs[1]) != 0.0:  # type: ignore[union-attr]
                return None
            guarded, value = True, node.inputs[2]  # type: ignore[union-attr]
            nodes += [node, test]  # type: ignore[list-item]
        elif node is not None and (_is_transparent(node) or _is_view(node)):
            value = node.inputs[0]
            nodes.append(node)
        else:
            return None
    return None


def _is_view(node: ir.Node) -> bool:
    """A Reshape between scores of rank 3 and 4."""
    return is_op(node, "Reshape") and {rank(node.inputs[0]), rank(node.outputs[0])} <= {3, 4}


def _has_axes(value: ir.Value | None) -> bool:
    return rank(value) == 3 or rank(value) == 4


def _is_transparent(node: ir.Node) -> bool:
    """Identity, a Dropout at inference, a Cast that changes nothing."""
    if is_op(node, "Cast"):
        return node.inputs[0] is not None and node.inputs[0].dtype == node.outputs[0].dtype is not None
    if is_op(node, "Dropout"):
        training = node.inputs[2] if len(node.inputs) > 2 else None
        flag = constant_array(training, 1)
        return (training is None or (flag is not None and not flag.any())) and node.outputs[0].uses() != ()
    return is_op(node, "Identity")


def _scores(value: ir.Value | None) -> tuple[ir.Node, list[tuple[str, object]], list[ir.Node]] | None:
    """(product, steps in order of execution, their nodes), going back from the input of the softmax."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if is_op(node, "MatMul"):
        return node, [], []
    options: list[tuple[int, str, object]] = []
    if _is_transparent(node) or _is_view(node):
        options = [(0, "same", None)]
    elif is_op(node, "Max") and len(node.inputs) == 2:
        options = [(i, "clamp", scalar(node.inputs[1 - i])) for i in (0, 1)]
    elif is_op(node, "Tanh"):
        options = [(0, "tanh", True)]
    elif is_op(node, "Mul"):
        options = [(i, "scale", scalar(node.inputs[1 - i])) for i in (0, 1)]
    elif is_op(node, "Div"):
        divisor = scalar(node.inputs[1])
        options = [(0, "scale", 1.0 / divisor if divisor else None)]
    elif is_op(node, "Add"):
        options = [(i, "mask", _mask(node.inputs[1 - i], node.inputs[i])) for i in (0, 1)]
    elif is_op(node, "Where"):
        fills = scalar(node.inputs[2]), scalar(node.inputs[1])
        options = [
            (i, "mask", _mask(node.inputs[0], node.inputs[i], fill, keep) if fill is not None else None)
            for i, fill, keep in ((1, fills[0], True), (2, fills[1], False))
        ]
    for index, kind, detail in options:
        if kind != "same" and detail is None:
            continue
        found = _scores(node.inputs[index])
        if found is not None:
            return found[0], [*found[1], (kind, detail)], [node, *found[2]]
    return None


def _mask(value: ir.Value | None, scores: ir.Value | None, fill: float | None = None, keep: bool = True) -> Mask:
    """The masking step, with `value` as it was before it was expanded to the shape of the scores."""
    assert value is not None
    node = value.producer()
    shape = node.inputs[1].producer() if is_op(node, "Expand") else None  # type: ignore[union-attr]
    flat = rank(scores) == 3
    if is_op(shape, "Shape") and shape.inputs[0] is scores and not shape.attributes:  # type: ignore[union-attr]
        return Mask(node.inputs[0], fill, keep, (node, shape), flat)  # type: ignore
    return Mask(value, fill, keep, flat=flat)


def _read_steps(found: Attention, steps: list[tuple[str, object]]) -> None:
    capped = False
    for kind, detail in steps:
        if kind == "mask":
            assert isinstance(detail, Mask)
            if found.lowest is not None:
                raise Decline("the scores are masked after they are clamped")
            found.masks.append(detail)
        elif kind == "clamp":
            assert isinstance(detail, float)
            if detail > _MOST_CLAMP:
                raise Decline(f"the scores are clamped at {detail:g}, which may be a score")
            found.lowest = max(detail, found.lowest if found.lowest is not None else detail)
        elif kind == "scale":
            if found.masks:
                raise Decline("the scores are scaled after they are masked")
            assert isinstance(detail, float)
            if capped:
                found.softcap *= detail
            else:
                found.scale *= detail
        elif kind == "tanh":
            if found.masks or capped:
                raise Decline("the scores go through a Tanh " + ("twice" if capped else "after they are masked"))
            capped, found.softcap = True, 1.0
    if capped:
        if found.softcap <= 0:
            raise Decline(f"the scores are capped by {found.softcap:g}, and Attention takes positive caps")
        # cap * tanh(scale * x): Attention divides by the cap before the Tanh.
        found.scale *= found.softcap


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """`value` without multiplications by numbers, and their product."""
    factor = 1.0
    while True:
        node = value.producer()
        if is_op(node, "Mul"):
            numbers = [scalar(v) for v in node.inputs]  # type: ignore[union-attr]
            at = next((i for i in (0, 1) if numbers[1 - i] is not None and _has_axes(node.inputs[i])), None)  # type: ignore[union-attr]
            if at is None:
                return value, factor
            factor, value = factor * float(numbers[1 - at] or 0.0), node.inputs[at]  # type: ignore
        elif is_op(node, "Div") and scalar(node.inputs[1]) and _has_axes(node.inputs[0]):  # type: ignore[union-attr]
            factor, value = factor / float(scalar(node.inputs[1]) or 1.0), node.inputs[0]  # type: ignore
        elif is_op(node, "Identity"):
            value = node.inputs[0]  # type: ignore
        else:
            return value, factor


def _read_keys(found: Attention) -> None:
    value, factor = _unscaled(found.k)
    node = value.producer()
    if transposed_with(node, 0, 1, 3, 2):
        value, more = _unscaled(node.inputs[0])  # type: ignore
        factor *= more
    elif transposed_with(node, 0, 2, 3, 1):
        value, found.k_perm = node.inputs[0], (0, 2, 1, 3)  # type: ignore
    else:
        flat = _flattened_transpose(node)
        if flat is None:
            raise Decline("the keys do not reach the product through a transpose")
        value, more = _unscaled(flat)
        factor *= more
    found.k, found.scale = value, found.scale * factor


def _read_flat(found: Attention, product_: ir.Node, views: list[ir.Node]) -> None:
    """Finds q, k, v of rank 4 from those of rank 3; without heads in sight, those of rank 3 are of one head."""
    keys, factor = _unscaled(found.k)
    q, k, v = flat_rows(found.q), flat_columns(keys), flat_rows(found.v)
    found.scale *= factor
    if q is None or k is None or v is None or not q.dims[1] == k.dims[1] == v.dims[1]:
        _read_one_head(
            found, keys, views, "not seen to be batch times heads" if None in (q, k, v) else "not of as many heads"
        )
        return
    # Each may have several names.
    before = keys.producer().inputs[0] if transposed_with(keys.producer(), 0, 2, 1) else None  # type: ignore[union-attr]
    read = (((found.q, 1), (product_.outputs[0], 1)), ((found.v, 1), (keys, 2), (before, 1), (product_.outputs[0], 2)))
    rows, columns = ({dims[axis] for dims, axis in ((sizes(v), a) for v, a in side) if dims} for side in read)
    batch, heads = {q.dims[0], k.dims[0], v.dims[0]}, q.dims[1]
    rows, columns = rows | {q.dims[2]}, columns | {k.dims[2], v.dims[2]}
    for view in views:
        front = (batch, {heads}) if rank(view.outputs[0]) == 4 else ({product(b, heads) for b in batch},)
        if not proved(view, (*front, rows, columns)):
            raise Decline(f"the Reshape '{view.name}' is not seen to part scores into heads or to join them")
    found.rows = (q, k, v)
    found.q, found.k, found.v = q.source, k.source, v.source


def _read_one_head(found: Attention, keys: ir.Value, views: list[ir.Node], why: str) -> None:
    if views:
        raise Decline(f"the scores are reshaped, and the first axis of queries, keys and values is {why}")
    node = keys.producer()
    if transposed_with(node, 1, 2, 0):
        found.k_perm = (1, 0, 2)
    elif not transposed_with(node, 0, 2, 1):
        raise Decline("the keys do not reach the product through a transpose")
    found.k, factor = _unscaled(node.inputs[0])  # type: ignore
    found.scale *= factor


def _read_cuts(found: Attention) -> None:
    """Sees q, k, v of rank 4 that were cut out of (length, batch, hidden), all three of them."""
    if found.k_perm is not None:
        return
    rows = parted_rows(found.q), parted_rows(found.k), parted_rows(found.v)
    if rows[0] is not None and rows[1] is not None and rows[2] is not None:
        found.rows = rows[0], rows[1], rows[2]
        found.q, found.k, found.v = (r.source for r in found.rows)


def _flattened_transpose(node: ir.Node | None) -> ir.Value | None:
    """K of ``Reshape(Transpose(Reshape(K, (-1, L, D)), 0 2 1), (B, H, D, L))``, which torch writes at opset 18."""
    if not is_op(node, "Reshape"):
        return None
    swap = node.inputs[0].producer()  # type: ignore[union-attr]
    if not transposed_with(swap, 0, 2, 1):
        return None
    flatten = swap.inputs[0].producer()  # type: ignore[union-attr]
    if not is_op(flatten, "Reshape"):
        return None
    key = flatten.inputs[0]  # type: ignore[union-attr]
    dims, inner, outer = sizes(key), reshaped(flatten), reshaped(node)  # type: ignore[arg-type]
    if dims is None or inner is None or outer is None or len(dims) != 4 or len(inner) != 3 or len(outer) != 4:
        return None
    batch, heads, length, depth = dims
    # In each case one item may be left to the runtime: the others determine it.
    wanted = (batch, heads, depth, length)
    unknown = sum(a is None for a in outer)
    same = all(a is None or a == b for a, b in zip(outer, wanted, strict=True))
    return key if inner[1:] == (length, depth) and same and unknown <= 1 else None


def _between(root: ir.Node, stops: set[ir.Value]) -> list[ir.Node]:
    """Nodes that `root` is computed by from `stops`, `root` first; no further where that gets large."""
    found: dict[ir.Node, None] = {root: None}
    queue = deque([root])
    while queue and len(found) < _MOST_NODES:
        for value in queue.popleft().inputs:
            node = value.producer() if value is not None and value not in stops else None
            if node is not None and node.graph is root.graph and node not in found:
                found[node] = None
                queue.append(node)
    return list(found)


def _require_private(found: Attention) -> None:
    inside = set(found.nodes)
    for node in found.nodes[1:]:
        for value in node.outputs:
            if value.is_graph_output() or any(user not in inside for user in value.consumers()):
                raise Decline(f"'{value.name}', a step between scores and output, is used elsewhere")


__all__ = ["Attention", "Mask", "match_attention", "softmax_behind"]
