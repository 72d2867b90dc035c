"""Padding through operators that sum: reductions, softmax, products, norms, convolutions, recurrent layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from planish.ir.analyses import padding_attention as attention
from planish.ir.analyses import padding_indices as indices
from planish.ir.analyses import padding_views as views
from planish.ir.analyses.padding_elementwise import NAMES, elementwise
from planish.ir.analyses.padding_facts import LOWEST, Fact, Held, Known, Mixes, Size, Span, State
from planish.ir.graphs import constant_array

if TYPE_CHECKING:
    from planish.ir.analyses.padding import Flow, Rule


def rule_of(node: ir.Node) -> Rule | None:
    """The rule of an operator, or None."""
    if node.op_type in NAMES and node.domain in ("", "com.microsoft", "planish"):
        return elementwise
    return _RULES.get((node.domain, node.op_type))


def shape_operands(node: ir.Node) -> tuple[int, ...]:
    """Operands of which only the result's sizes depend, which are known otherwise."""
    return () if node.domain else _SHAPES.get(node.op_type, ())


# --- reductions -----------------------------------------------------------------------------------------------------


def _reduce(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x = views.first(args)
    rank = x.rank
    if rank is None:
        raise Mixes("the rank of its operand is not known")
    axes = _axes(node, args)
    keep = bool(node.attributes.get_int("keepdims", 1))
    if axes is None:
        if not x.spans and rank:
            return [flow._clean(node.outputs[0], x.state)]
        raise Mixes("its axes are not known")
    if not axes and bool(node.attributes.get_int("noop_with_empty_axes", 0)):
        return [x.forget()]
    over = {axis % rank for axis in axes} if axes else set(range(rank))
    for axis in over & x.spans.keys():
        _require_neutral(flow, node, x, x.spans[axis].fact)
    zero = node.op_type in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2")
    kept = [axis for axis in range(rank) if keep or axis not in over]
    sizes = tuple(None if x.sizes is None else views.ones(flow) if a in over else x.sizes[a] for a in kept)
    spans = {
        kept.index(axis): replace(span, fact=span.fact if zero and span.fact == Known(0.0) else Fact.ANY)
        for axis, span in x.spans.items()
        if axis not in over
    }
    finite = node.op_type in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceSumSquare")
    state = x.state if finite and x.state is State.FINITE else State.ANY
    return [Held(sizes, spans, state)]


def _require_neutral(flow: Flow, node: ir.Node, x: Held, fact: Fact | Known) -> None:
    """Raises Mixes unless a reduction gives the same with and without the padded elements."""
    op, value = node.op_type, fact.value if isinstance(fact, Known) else None
    neutral = {
        "ReduceSum": 0.0, "ReduceL1": 0.0, "ReduceL2": 0.0, "ReduceSumSquare": 0.0, "ReduceProd": 1.0,
        "ReduceMax": -math.inf, "ReduceMin": math.inf, "ReduceLogSumExp": -math.inf,
    }.get(op)  # fmt: skip
    if op == "ReduceMean":
        raise Mixes(f"averages over {flow.dim}, padding included")
    if value is None or value != neutral:
        known = "is not known" if value is None else f"is {value:g}"
        raise Mixes(f"reduces over {flow.dim}, and its operand {known} in the padding")


def _arg(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """ArgMax, ArgMin and TopK."""
    x = views.first(args)
    axis = x.axis_of(node.attributes.get_int("axis", -1 if node.op_type == "TopK" else 0))
    if axis in x.spans:
        raise Mixes(f"picks among all of {flow.dim}, padding included")
    made: list[Held | None] = []
    for value in node.outputs:
        sizes = flow.declared(value)
        keep = node.op_type == "TopK" or bool(node.attributes.get_int("keepdims", 1))
        spans = {a - (not keep and a > axis): replace(s, fact=Fact.ANY) for a, s in x.spans.items()}
        index = (node.op_type != "TopK" or len(made) == 1) and x.state is not State.ANY
        made.append(Held(sizes, spans, x.state, below=x.size(axis) if index else None))
    return made


def _cumsum(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x, axis = views.first(args), constant_array(node.inputs[1])
    if axis is None:
        raise Mixes("its axis is not known")
    at = x.axis_of(int(axis.reshape(-1)[0]))
    if at in x.spans and bool(node.attributes.get_int("reverse", 0)) and x.spans[at].fact != Known(0.0):
        raise Mixes(f"sums from the end of {flow.dim}, where the padding is")
    if at in x.spans and not x.spans[at].plain:
        raise Mixes(f"sums over an axis with more than {flow.dim}")
    made = x.forget()
    return [replace(made, affine=x.affine if x.constant == 0 else None)]


def _softmax(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x = views.first(args)
    old = (node.version or flow.graph.opset_imports.get("", 13)) < 13
    axis = x.axis_of(node.attributes.get_int("axis", 1 if old else -1))
    over = set(range(axis, x.rank or 0)) if old else {axis}
    spans = {a: replace(s, fact=Fact.ANY) for a, s in x.spans.items()}
    for at in over & x.spans.keys():
        if not hidden(x.spans[at].fact) or node.op_type == "Hardmax":
            raise Mixes(f"spreads over {flow.dim}, and its scores are not known to be hidden in the padding")
        flow.assumes.add(attention.SEEN)
        spans[at] = replace(x.spans[at], fact=Known(0.0) if node.op_type == "Softmax" else Fact.ANY)
    seen = all(s.fact is Fact.FREE for a, s in x.spans.items() if a not in over)
    seen = seen or (x.diagonal and over == {(x.rank or 0) - 1})
    finite = x.state is State.FINITE or (x.state is State.OPEN and seen)
    return [Held(x.sizes, spans, State.FINITE if finite and node.op_type == "Softmax" else State.ANY)]


def hidden(fact: Fact | Known) -> bool:
    """Whether softmax makes zero of such scores."""
    return fact is Fact.LOW or (isinstance(fact, Known) and fact.value <= LOWEST)


# --- products -------------------------------------------------------------------------------------------------------


def _matmul(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    a, b = args[0], args[1]
    assert a is not None and b is not None
    if any(node.attributes.get_int(name, 0) for name in ("transBatchA", "transBatchB")):
        raise Mixes("transposes its batch")
    if node.attributes.get_int("transA", 0):
        a = views.permuted(a, [*range((a.rank or 2) - 2), (a.rank or 2) - 1, (a.rank or 2) - 2])
    if node.attributes.get_int("transB", 0):
        b = views.permuted(b, [*range((b.rank or 2) - 2), (b.rank or 2) - 1, (b.rank or 2) - 2])
    made = product(flow, a, b)
    if len(args) > 2 and args[2] is not None:
        made = elementwise(flow, ir.node("Add", [None, None]), [made, args[2].forget()])[0] or made
    return [made]


def product(flow: Flow, a: Held, b: Held) -> Held:
    """What is known of ``a @ b``."""
    if a.rank is None or b.rank is None or min(a.rank, b.rank) < 2:
        raise Mixes("the rank of an operand is not known, or 1")
    inner_a, inner_b = a.spans.get(a.rank - 1), b.spans.get(b.rank - 2)
    if inner_a is not None or inner_b is not None:
        if inner_a is None or inner_b is None or not inner_a.like(inner_b):
            raise Mixes(f"sums over {flow.dim} of one operand only")
        left = inner_a.fact == Known(0.0) and b.state is State.FINITE
        right = inner_b.fact == Known(0.0) and a.state is State.FINITE
        if not left and not right:
            raise Mixes(f"sums over {flow.dim}, and no operand is known to be zero in the padding, the other finite")
    rank = max(a.rank, b.rank)
    spans: dict[int, Span] = {}
    sizes: list[Size | None] = []
    for axis in range(rank):
        # Where each operand has this axis of the result; the last of `a` and the last but one of `b` are summed.
        at = axis - rank + a.rank if axis < rank - 1 else None
        bt = axis - rank + b.rank if axis != rank - 2 else None
        pairs = [(x, k) for x, k in ((a, at), (b, bt)) if k is not None and k >= 0]
        carried = [x.spans[k] for x, k in pairs if k in x.spans]
        sizes.append(views.widest([x.size(k) for x, k in pairs]))
        if not carried:
            continue
        others = [x.size(k) for x, k in pairs if k not in x.spans]
        if any(not s.like(carried[0]) for s in carried) or any(n is None or {*n} != {1} for n in others):
            raise Mixes("its operands carry the dimension in different ways")
        spans[axis] = replace(carried[0], fact=Fact.ANY)
    finite = a.state is State.FINITE and b.state is State.FINITE
    return Held(tuple(sizes), spans, State.FINITE if finite else State.ANY)


def _rows(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """A product with weights that are no plain matrix: over the last axis of the first operand."""
    x = views.first(args)
    if x.rank is None or x.rank - 1 in x.spans or any(a is not None and a.spans for a in args[1:]):
        raise Mixes("sums over it, or has it in its weights")
    spans = {axis: replace(s, fact=Fact.ANY) for axis, s in x.spans.items()}
    return [Held(flow.declared(node.outputs[0]), spans, x.state if x.state is State.FINITE else State.ANY)]


# --- norms ----------------------------------------------------------------------------------------------------------


def _norm(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x = views.first(args)
    axis = x.axis_of(node.attributes.get_int("axis", -1))
    if any(at >= axis for at in x.spans):
        raise Mixes(f"normalizes over {flow.dim}")
    made = x.forget(State.FINITE if x.state is State.FINITE else State.ANY)
    return [made] + [_unused(value) for value in node.outputs[1:]]


def _skip_norm(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    """SkipLayerNormalization and SkipSimplifiedLayerNormalization: outputs 0 and 3."""
    bias = args[4 if node.op_type == "SkipLayerNormalization" else 3 :]
    total = elementwise(flow, ir.node("Sum", [None, None]), [args[0], args[1], *bias])[0]
    assert total is not None
    if (total.rank or 1) - 1 in total.spans:
        raise Mixes(f"normalizes over {flow.dim}")
    total = total.forget(State.FINITE if total.state is State.FINITE else State.ANY)
    return [total, *[_unused(value) for value in node.outputs[1:3]], total]


def _unused(value: ir.Value) -> Held | None:
    return Held(None) if not value.uses() and not value.is_graph_output() else None


def _batch_norm(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x = views.first(args)
    if node.attributes.get_int("training_mode", 0):
        raise Mixes(f"takes its statistics of this batch, over {flow.dim}")
    if 1 in x.spans:
        raise Mixes(f"has a scale for each entry of {flow.dim}")
    return [x.forget()]


# --- convolutions, pooling and recurrence ---------------------------------------------------------------------------


def _batched(leading: int) -> Rule:
    """Operators that treat each entry along their first axes alone."""

    def rule(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
        x = views.first(args)
        if any(axis >= leading for axis in x.spans) or any(a is not None and a.spans for a in args[1:]):
            raise Mixes(f"works across {flow.dim}")
        spans = {axis: replace(s, fact=Fact.ANY) for axis, s in x.spans.items()}
        state = x.state if x.state is State.FINITE else State.ANY
        for value in node.outputs:
            sizes = flow.declared(value)
            if sizes is None or any(sizes[axis] != x.size(axis) for axis in spans):
                raise Mixes(f"changes the size of {flow.dim}")
        return [Held(flow.declared(value), spans, state) for value in node.outputs]

    return rule


def _recurrent(flow: Flow, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
    x = views.first(args)
    if node.attributes.get_int("layout", 0):
        raise Mixes("has its batch first")
    if any(a is not None and a.spans for a in args[1:4]):
        raise Mixes(f"has {flow.dim} in its weights")
    states = [a for a in args[4:] if a is not None]
    finite = State.FINITE if all(a.state is State.FINITE for a in (x, *states)) else State.ANY
    if 1 in x.spans and 0 not in x.spans:
        span = replace(x.spans[1], fact=Fact.ANY)
        places = (2, 1, 1)
        return [Held(flow.declared(v), {places[k]: span}, finite) for k, v in enumerate(node.outputs)]
    if set(x.spans) != {0} or any(a.spans for a in states) or (len(args) > 4 and args[4] is not None):
        raise Mixes(f"reads {flow.dim} in a way that is not known")
    if node.attributes.get_string("direction", "forward") != "forward":
        raise Mixes(f"goes back from the end of {flow.dim}, where the padding is")
    every = Held(flow.declared(node.outputs[0]), {0: replace(x.spans[0], fact=Fact.ANY)}, finite)
    last = f"{node.op_type} '{node.name}': its last state is that behind the padding of {flow.dim}"
    return [every] + [Held(flow.declared(value), state=State.ANY, mixed=last) for value in node.outputs[1:]]


# --- helpers and the table ------------------------------------------------------------------------------------------


def _axes(node: ir.Node, args: Sequence[Held | None]) -> list[int] | None:
    """Axes of an attribute or an operand; empty: all; None: not known."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return [int(axis) for axis in attribute.value]
    if len(args) > 1 and args[1] is not None:
        array = constant_array(node.inputs[1])
        return None if array is None else [int(axis) for axis in np.atleast_1d(array)]
    return []


_SHAPES: dict[str, tuple[int, ...]] = {
    "Reshape": (1,), "Expand": (1,), "ConstantOfShape": (0,), "Range": (1,), "Slice": (2,), "Shape": (0,), "Size": (0,),
}  # fmt: skip
_BATCHED: dict[int, tuple[str, ...]] = {
    1: (
        "Conv",
        "ConvTranspose",
        "InstanceNormalization",
        "GroupNormalization",
        "LRN",
        "DepthToSpace",
        "SpaceToDepth",
        "Resize",
    ),
    2: ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
}
_REDUCTIONS = ["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp"]
_RULES: dict[tuple[str, str], Callable[..., Sequence[Held | None]]] = {
    **{("", f"Reduce{name}"): _reduce for name in _REDUCTIONS},
    **{("", name): _batched(leading) for leading, names in _BATCHED.items() for name in names},
    **{("", name): _arg for name in ("ArgMax", "ArgMin", "TopK")},
    **{("", name): _softmax for name in ("Softmax", "LogSoftmax", "Hardmax")},
    **{("", name): _recurrent for name in ("LSTM", "GRU", "RNN")},
    **{("", name): _norm for name in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")},
    ("com.microsoft", "SkipLayerNormalization"): _skip_norm,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _skip_norm,
    ("", "BatchNormalization"): _batch_norm,
    ("", "CumSum"): _cumsum,
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _matmul,
    ("com.microsoft", "FusedMatMul"): _matmul,
    ("com.microsoft", "MatMulNBits"): _rows,
    **{("", name): rule for name, rule in (*views.RULES.items(), *indices.RULES.items())},
    **attention.RULES,
}
