"""Where the tokens of a hidden state run through the layers behind it, so that fewer of them may run there.

Starting at a hidden state, every value that holds its tokens is followed, with the axis that they lie along, up to
the state where they are all wanted back. Operators that treat tokens alike need no change; what is read beside them,
such as rotary tables and masks, is cut to the tokens that are left, and Reshapes learn their new size. Whatever else
reads tokens, or mixes them, is a reason to decline.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import onnx_ir as ir

from planish.ir.graphs import constant_array, dims_of, is_op
from planish.passes.base import Decline

_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Neg", "Abs", "Exp", "Log", "Sqrt", "Reciprocal")
_ACTIVATIONS = ("Erf", "Tanh", "Sigmoid", "Relu", "LeakyRelu", "Gelu", "Swish", "HardSigmoid", "HardSwish", "Softplus")
_LOGIC = ("Where", "IsNaN", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Not")
_ELEMENTWISE = frozenset((*_ARITHMETIC, *_ACTIVATIONS, *_LOGIC, "Identity", "Cast", "Mish", "Clip", "Sin", "Cos"))
_DIALECT_ELEMENTWISE = frozenset(("SwiGLU",))
_NORMS = frozenset(("LayerNormalization", "RMSNormalization"))
#: What to say of an operator that is not known here.
_WHEN = "prune-tokens comes behind the fusions and before the lowerings"


@dataclass(frozen=True)
class Cut:
    """An operand beside the tokens that has one entry for each of them along `axis`.

    Attributes:
        rank: of what it is broadcast with, whose first axis is the batch; `axis` counts in that.
    """

    node: ir.Node
    index: int
    axis: int
    rank: int


@dataclass(frozen=True)
class Sizes:
    """A Reshape whose sizes are to be these; 0 copies."""

    node: ir.Node
    sizes: tuple[int, ...]


@dataclass
class TokenFlow:
    """The tokens of `start` on their way to `end`.

    Attributes:
        graph: that both are in.
        start, end: hidden states, (batch, tokens, width).
        readers: the nodes that shall read fewer tokens of `start`; others keep all.
        outputs: outputs of the graph that may have fewer tokens: caches.
        axes: value → the axis of its tokens.
        cuts, sizes: what has to change.
        shapes: Shape nodes of values that hold tokens.
    """

    graph: ir.Graph
    start: ir.Value
    end: ir.Value
    readers: Collection[ir.Node]
    outputs: Collection[ir.Value]
    axes: dict[ir.Value, int] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    sizes: list[Sizes] = field(default_factory=list)
    shapes: list[ir.Node] = field(default_factory=list)

    def trace(self) -> TokenFlow:
        """Fills everything in.

        Raises:
            Decline: tokens are not only treated alike somewhere.
        """
        dims = _dims(self.start)
        if len(dims) != 3:
            raise Decline(
                f"the hidden state '{self.start.name}' has rank {len(dims)}; (batch, tokens, width) is wanted"
            )
        self.axes[self.start] = 1
        for node in self.graph:
            if not any(self._holds(node, v) for v in node.inputs):
                self._refuse_inside(node)
                continue
            if is_op(node, "Shape", "Size"):
                self.shapes.append(node)
                continue
            self._rule(node)(self, node)
            for value in node.outputs:
                if value in self.axes and value.is_graph_output() and value not in self.outputs:
                    raise Decline(f"'{value.name}' is an output of the model and has one entry for each token")
        if self.axes.get(self.end) != 1:
            raise Decline(f"the hidden state '{self.end.name}' does not have the tokens of '{self.start.name}'")
        self._check_shapes()
        return self

    @property
    def tokens(self) -> int | str | None:
        """How many there are."""
        return _dims(self.start)[1]

    def _holds(self, node: ir.Node, value: ir.Value | None) -> bool:
        """Whether a node reads tokens of this operand that are to become fewer."""
        if value is None or value not in self.axes or value is self.end:
            return False
        return value is not self.start or node in self.readers

    def _refuse_inside(self, node: ir.Node) -> None:
        from planish.ir.analyses.stream import reads

        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            inner = next((v for v in reads(node) if v in self.axes and v not in (self.start, self.end)), None)
            if inner is not None:
                raise Decline(f"'{inner.name}' is read inside of {node.op_type} '{node.name}'; {_WHEN}")

    def _rule(self, node: ir.Node) -> Callable[[TokenFlow, ir.Node], None]:
        if node.op_type in _ELEMENTWISE and not node.domain:
            return _elementwise
        if node.domain == "planish" and node.op_type in _DIALECT_ELEMENTWISE:
            return _elementwise
        rule = _RULES.get(node.op_type)
        if rule is None or node.domain:
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise Decline(f"{name} '{node.name}' reads tokens, in a way that is not known; {_WHEN}")
        return rule

    def _check_shapes(self) -> None:
        """Sizes are those of all tokens, for whoever reads them but Reshapes that have new ones."""
        resized = {edit.node for edit in self.sizes}
        for node in self.shapes:
            value = node.inputs[0]
            assert value is not None
            if dims_of(value) != dims_of(self.start) and not _only_resizes(node, resized):
                raise Decline(f"the size of '{value.name}' is read by {node.op_type} '{node.name}'")

    # --- for the rules -----------------------------------------------------------------------------------------

    def at(self, node: ir.Node, value: ir.Value | None) -> int | None:
        """The axis of an operand's tokens, counted from the end; None if it holds none that become fewer."""
        if value is None or not self._holds(node, value):
            return None
        return self.axes[value] - len(_dims(value))

    def give(self, value: ir.Value, axis: int) -> None:
        """Says that a result holds tokens along an axis, counted from the front or the end."""
        rank = len(_dims(value))
        self.axes[value] = axis % rank

    def beside(self, node: ir.Node, index: int, axis: int, rank: int) -> None:
        """An operand without tokens of its own; it is cut where it has an entry for each along an axis from the end."""
        value = node.inputs[index]
        if value is None:
            return
        dims = _dims(value)
        if len(dims) < -axis or dims[axis] == 1:
            return
        if dims[axis] != self.tokens:
            raise Decline(f"'{value.name}' has {dims[axis]} entries beside {self.tokens} tokens, in '{node.name}'")
        self.cuts.append(Cut(node, index, rank + axis, rank))


def _dims(value: ir.Value) -> tuple[int | str | None, ...]:
    dims = dims_of(value)
    if dims is None:
        raise Decline(f"the shape of '{value.name}' is not known")
    return dims


def _only_resizes(node: ir.Node, resized: Collection[ir.Node]) -> bool:
    """Whether sizes are read by Reshapes that get new ones, and nothing else."""
    pending, seen = [node], {node}
    while pending:
        for value in pending.pop().outputs:
            if value.is_graph_output():
                return False
            for user, index in value.uses():
                if user in resized and index == 1:
                    continue
                if not is_op(user, "Concat", "Gather", "Squeeze", "Unsqueeze", "Mul", "Cast", "Slice", "Div"):
                    return False
                if user not in seen:
                    seen.add(user)
                    pending.append(user)
    return True


def _elementwise(flow: TokenFlow, node: ir.Node) -> None:
    places = {at for v in node.inputs if (at := flow.at(node, v)) is not None}
    if len(places) > 1:
        raise Decline(f"{node.op_type} '{node.name}' takes tokens along two axes")
    axis, rank = places.pop(), len(_dims(node.outputs[0]))
    for index, value in enumerate(node.inputs):
        if value is not None and flow.at(node, value) is None:
            flow.beside(node, index, axis, rank)
    flow.give(node.outputs[0], axis)


def _matmul(flow: TokenFlow, node: ir.Node) -> None:
    left, right = node.inputs
    axis = flow.at(node, left)
    if axis is None or flow.at(node, right) is not None:
        raise Decline(f"MatMul '{node.name}' multiplies tokens with each other; attention is to be one operator")
    if axis != -2 or len(_dims(node.outputs[0])) < 2 or right is None or len(_dims(right)) != 2:
        raise Decline(f"MatMul '{node.name}' sums over tokens")
    flow.give(node.outputs[0], axis)


def _norm(flow: TokenFlow, node: ir.Node) -> None:
    axis, first = flow.at(node, node.inputs[0]), node.attributes.get_int("axis", -1)
    rank = len(_dims(node.outputs[0]))
    if axis is None or axis >= (first - rank if first >= 0 else first):
        raise Decline(f"{node.op_type} '{node.name}' normalizes over tokens")
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise Decline(f"the statistics of {node.op_type} '{node.name}' are read")
    flow.give(node.outputs[0], axis)


def _reshape(flow: TokenFlow, node: ir.Node) -> None:
    source, result = node.inputs[0], node.outputs[0]
    axis = flow.at(node, source)
    if source is None or axis is None:
        raise Decline(f"Reshape '{node.name}' takes its sizes from tokens")
    before, after = _dims(source), _dims(result)
    axis += len(before)
    if before[: axis + 1] != after[: axis + 1] or None in before[:axis]:
        raise Decline(f"Reshape '{node.name}' of {before} to {after} does not leave the tokens an axis of their own")
    rest = [d if isinstance(d, int) else -1 for d in after[axis + 1 :]]
    if rest.count(-1) > 1 or 0 in rest:
        raise Decline(f"the sizes of Reshape '{node.name}' are not known")
    flow.sizes.append(Sizes(node, (*(0,) * (axis + 1), *rest)))
    flow.give(result, axis)


def _transpose(flow: TokenFlow, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    rank = len(_dims(source))
    perm = node.attributes.get_ints("perm") or tuple(range(rank))[::-1]
    flow.give(node.outputs[0], list(perm).index(flow.axes[source]))


def _views(flow: TokenFlow, node: ir.Node) -> None:
    """Unsqueeze and Squeeze."""
    source, axes = node.inputs[0], constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if source is None or flow.at(node, source) is None or axes is None:
        raise Decline(f"the axes of {node.op_type} '{node.name}' are not known")
    rank = max(len(_dims(source)), len(_dims(node.outputs[0])))
    gone = {int(a) % rank for a in axes}
    left = [a for a in range(rank) if a not in gone]
    if node.op_type == "Unsqueeze":
        flow.give(node.outputs[0], left[flow.axes[source]])
    elif flow.axes[source] in gone:
        raise Decline(f"Squeeze '{node.name}' takes the axis of the tokens away")
    else:
        flow.give(node.outputs[0], left.index(flow.axes[source]))


def _slice(flow: TokenFlow, node: ir.Node) -> None:
    """Slice and Split along other axes."""
    source = node.inputs[0]
    if source is None or flow.at(node, source) is None:
        raise Decline(f"{node.op_type} '{node.name}' takes its bounds from tokens")
    rank = len(_dims(source))
    if node.op_type == "Split":
        axes: list[int] | None = [node.attributes.get_int("axis", 0)]
    else:
        found = constant_array(node.inputs[3]) if len(node.inputs) > 3 else None
        axes = None if found is None else [int(a) for a in found]
    if axes is None or flow.axes[source] in {a % rank for a in axes}:
        raise Decline(f"{node.op_type} '{node.name}' picks tokens by their place")
    for value in node.outputs:
        flow.give(value, flow.axes[source])


def _concat(flow: TokenFlow, node: ir.Node) -> None:
    rank = len(_dims(node.outputs[0]))
    places = {flow.at(node, v) for v in node.inputs}
    axis = next(a for a in places if a is not None)
    if len(places) > 1 or node.attributes.get_int("axis") % rank == axis % rank:
        raise Decline(f"Concat '{node.name}' puts something beside the tokens")
    flow.give(node.outputs[0], axis)


def _rotary(flow: TokenFlow, node: ir.Node) -> None:
    x, positions = node.inputs[0], node.inputs[3] if len(node.inputs) > 3 else None
    axis = flow.at(node, x)
    if x is None or axis is None or axis != (-2 if len(_dims(x)) == 4 else 1 - 3):
        raise Decline(f"RotaryEmbedding '{node.name}' does not rotate tokens")
    if positions is not None:
        flow.beside(node, 3, -1, 2)
    else:
        for index in (1, 2):
            flow.beside(node, index, -2, 3)
    flow.give(node.outputs[0], axis)


def _attention(flow: TokenFlow, node: ir.Node) -> None:
    operands = [*node.inputs, *[None] * 7]
    if any(v is not None for v in operands[4:7]):
        raise Decline(f"Attention '{node.name}' reads a cache, or lengths of its own")
    q, keys = flow.at(node, operands[0]), [flow.at(node, v) for v in operands[1:3]]
    if q is None or None in keys:
        raise Decline(f"Attention '{node.name}' takes tokens and something else")
    if q != -2 or set(keys) != {-2}:
        raise Decline(f"Attention '{node.name}' attends along another axis than that of the tokens")
    if operands[3] is not None:
        for axis in (-2, -1):
            flow.beside(node, 3, axis, 4)
    for value in node.outputs[:3]:
        flow.give(value, -2)
    if any(v.uses() or v.is_graph_output() for v in node.outputs[3:]):
        raise Decline(f"the scores of Attention '{node.name}' are read")


_RULES: dict[str, Callable[[TokenFlow, ir.Node], None]] = {
    "MatMul": _matmul,
    **dict.fromkeys(_NORMS, _norm),
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _views,
    "Squeeze": _views,
    "Slice": _slice,
    "Split": _slice,
    "Concat": _concat,
    "RotaryEmbedding": _rotary,
    "Attention": _attention,
}
