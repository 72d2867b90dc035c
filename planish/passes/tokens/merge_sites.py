"""Where tokens can merge in a stack of layers: between the attention and the feed-forward network of each."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from planish.ir.analyses.layers import Layer, LayerStack
from planish.ir.analyses.stream import reads
from planish.ir.graphs import constant_array, dims_of, is_op
from planish.passes.base import Decline
from planish.passes.fusion.mask_allows import mask_allows
from planish.passes.fusion.mask_values import bounds
from planish.passes.fusion.sizes import sizes
from planish.passes.lowering.mask_parts import mask_parts
from planish.passes.tokens.token_flow import TokenFlow

#: A bias below this hides a key, and is no bias.
_HIDES = -1e4
_BEFORE = "; merge-tokens comes behind the fusions and before the lowerings"


@dataclass(frozen=True)
class Site:
    """One layer.

    Attributes:
        attention: its Attention node.
        at: the hidden state between attention and feed-forward network.
        heads: of the keys; 0 where they are an axis of their own.
        bias: a float mask that says something of positions, which merged tokens have to share; else None.
    """

    layer: Layer
    attention: ir.Node
    at: ir.Value
    heads: int
    bias: ir.Value | None


@dataclass(frozen=True)
class Encoder:
    """A stack whose tokens can merge.

    Attributes:
        sites: one for each layer, in order.
        flow: where its tokens run.
        first: tokens in front of the others that are none of the input's: class, distillation, registers.
    """

    stack: LayerStack
    sites: tuple[Site, ...]
    flow: TokenFlow
    first: int

    @property
    def start(self) -> ir.Value:
        return self.stack.layers[0].hidden_in

    @property
    def end(self) -> ir.Value:
        return self.stack.layers[-1].hidden_out


def encoder_of(graph: ir.Graph, stack: LayerStack) -> Encoder:
    """What merging needs to know of a stack.

    Raises:
        Decline: its tokens can not merge; the reason names the layer or the node.
    """
    sites = tuple(_site(layer) for layer in stack.layers)
    start, end = stack.layers[0].hidden_in, stack.layers[-1].hidden_out
    if any(value.dtype != ir.DataType.FLOAT for value in (start, end)):
        raise Decline("it is not float32, which alone token merging is for")
    if any(len(dims_of(value) or ()) != 3 for value in (start, end)):
        raise Decline(f"its hidden state is {_shape(start)}, and (batch, tokens, width) is wanted")
    readers = {node for layer in stack.layers for node in layer.nodes}
    flow = TokenFlow(graph, start, end, readers, (end,))
    try:
        flow.trace()
    except Decline as decline:
        raise Decline(decline.reason.replace("prune-tokens", "merge-tokens")) from decline
    _require_no_positions(flow)
    first, behind = special_tokens(start)
    if behind:
        raise Decline(f"{behind} tokens stand behind those of the input, and only those in front can be protected")
    return Encoder(stack, sites, flow, first)


def _site(layer: Layer) -> Site:
    kinds = [part.kind for part in layer.parts]
    if "cross-attention" in kinds:
        raise Decline(f"'{layer.name}' attends to another sequence too, so it is no encoder's")
    if "conv" in kinds:
        raise Decline(f"'{layer.name}' has a convolution over its tokens, for which they must stay in their places")
    if "attention" not in kinds or not {"ffn", "moe"} & set(kinds):
        raise Decline(f"'{layer.name}' is made of {', '.join(kinds) or 'nothing known'}; it needs attention and then a "
                      "feed-forward network")  # fmt: skip
    attention = layer.parts[kinds.index("attention")]
    following = next(part for part in layer.parts if part.kind in ("ffn", "moe"))
    if attention.parallel or following.parallel:
        raise Decline(f"attention and feed-forward network of '{layer.name}' run side by side: nothing is in between")
    if layer.cache_inputs or layer.cache_outputs:
        raise Decline(f"'{layer.name}' has a key-value cache, so it is a decoder's")
    nodes = [node for node in attention.nodes if "Attention" in node.op_type]
    if len(nodes) != 1 or not is_op(nodes[0], "Attention"):
        found = f"{nodes[0].domain}::{nodes[0].op_type}" if len(nodes) == 1 else f"{len(nodes)} operators"
        raise Decline(f"the attention of '{layer.name}' is {found}, not one Attention of ONNX{_BEFORE}")
    return _checked(layer, nodes[0], following.stream_in)


def _checked(layer: Layer, node: ir.Node, at: ir.Value) -> Site:
    _require_global(layer, node)
    operands = [*node.inputs, *[None] * 6]
    if any(v is not None for v in operands[4:]) or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise Decline(f"the attention of '{layer.name}' has a cache, or its scores are read")
    keys, mask = dims_of(operands[1]), None if _hides_nothing(operands[3]) else operands[3]
    if node.attributes.get_int("is_causal", 0) or (mask is not None and mask_allows(mask) is not None):
        raise Decline(f"the attention of '{layer.name}' is causal: a token must not learn of later ones by merging")
    heads = node.attributes.get_int("kv_num_heads", 0) if keys is not None and len(keys) == 3 else 0
    if keys is None or (len(keys) == 3 and not heads):
        raise Decline(f"the shape of the keys of '{layer.name}' is not known")
    return Site(layer, node, at, heads, None if mask is None else _bias(layer, node, mask))


def _hides_nothing(mask: ir.Value | None) -> bool:
    """Whether a mask is a constant that lets every query see every key, as exporters of fixed shapes write."""
    array = constant_array(mask, 1 << 24)
    return array is not None and bool(array.all() if array.dtype == bool else not array.any())


def _bias(layer: Layer, node: ir.Node, mask: ir.Value) -> ir.Value | None:
    """None for a mask that hides nothing; the mask if it is a bias by position."""
    q, k = (sizes(value) for value in node.inputs[:2])
    try:
        parts = None if q is None or k is None else mask_parts(mask, q[-2], k[-2])
    except Decline:
        parts = None
    if parts is not None and parts.causal:
        raise Decline(f"the attention of '{layer.name}' is causal: a token must not learn of later ones by merging")
    if parts is not None and not parts.keys:
        return None
    if _by_input(mask):
        raise Decline(
            f"the mask '{mask.name}' of '{layer.name}' depends on the inputs: tokens that it hides would merge"
        )
    known = bounds(mask)
    if mask.dtype != ir.DataType.FLOAT or (known is not None and (known.infinite or known.low < _HIDES)):
        raise Decline(f"the mask '{mask.name}' of '{layer.name}' hides tokens from each other by their places")
    return mask


def _by_input(value: ir.Value) -> bool:
    """Whether a value depends on more of the inputs than their sizes."""
    pending, seen = [value], {value}
    while pending:
        at = pending.pop()
        node = at.producer()
        if node is None:
            if at.is_graph_input() and at.const_value is None:
                return True
            continue
        if is_op(node, "Shape", "Size"):
            continue
        new = [v for v in reads(node) if v not in seen]
        seen.update(new)
        pending += new
    return False


def _require_global(layer: Layer, attention: ir.Node) -> None:
    """Declines attention over windows: its batch is not that of the hidden state."""
    state, q = dims_of(layer.hidden_in), dims_of(attention.inputs[0])
    if state is None or q is None or len(state) != 3 or len(q) not in (3, 4):
        return
    tokens = q[1 if len(q) == 3 else 2]
    if (state[0], state[1]) != (q[0], tokens):
        raise Decline(
            f"the attention of '{layer.name}' is over {tokens} of {state[1]} tokens: windows, or a grid, whose places "
            "merging would not leave"
        )


def _require_no_positions(flow: TokenFlow) -> None:
    for cut in flow.cuts:
        if not (is_op(cut.node, "Attention") and cut.index == 3):
            value = cut.node.inputs[cut.index]
            raise Decline(
                f"{cut.node.op_type} '{cut.node.name}' reads '{value.name if value is not None else ''}' by the places "
                "of tokens, and merged ones have none"
            )


def special_tokens(hidden: ir.Value) -> tuple[int, int]:
    """How many tokens stand in front of and behind those of the input, from how the sequence is put together."""
    value: ir.Value | None = hidden
    for _ in range(8):
        node = value.producer() if value is not None else None
        if is_op(node, "Concat"):
            assert node is not None
            rank = len(dims_of(node.outputs[0]) or ())
            return _around(node) if node.attributes.get_int("axis") % max(rank, 1) == 1 else (0, 0)
        if not is_op(node, "Add", "Mul", "LayerNormalization", "Identity", "Cast"):
            return 0, 0
        assert node is not None
        value = max((v for v in node.inputs if v is not None), key=lambda v: constant_array(v) is None and _long(v))
    return 0, 0


def _long(value: ir.Value) -> float:
    dims = dims_of(value) or ()
    tokens = dims[1] if len(dims) == 3 else 0
    return float(tokens) if isinstance(tokens, int) else float("inf")


def _around(concat: ir.Node) -> tuple[int, int]:
    lengths = [_long(v) for v in concat.inputs if v is not None]
    main = max(range(len(lengths)), key=lambda i: (lengths[i], i))
    front, behind = sum(lengths[:main]), sum(lengths[main + 1 :])
    if front + behind == float("inf"):
        raise Decline("the sequence is put together of several parts of unknown lengths")
    return int(front), int(behind)


def _shape(value: ir.Value) -> str:
    dims = dims_of(value)
    return "of unknown shape" if dims is None else str(list(dims))


__all__ = ["Encoder", "Site", "encoder_of", "special_tokens"]
