"""Where the heads of an attention run: from the columns of the weights that make them to the rows that read them.

Starting at an attention operator, every value that holds its heads is followed both ways, through views, norms of
single heads, rotary embeddings and elementwise operators, until each end is a weight matrix, or a cache of the layer.
Whatever else reads heads, or mixes them, is a reason to decline.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import onnx_ir as ir

from planish.ir.graphs import constant_array, constant_tensor, dims_of
from planish.passes.base import Decline
from planish.passes.layers.head_views import Layout, through_reshape

MICROSOFT = "com.microsoft"
_ELEMENTWISE = ("Identity", "Cast", "Add", "Sub", "Mul", "Div", "Where", "IsNaN", "Sigmoid", "Neg", "Max", "Min")
_NORMS = ("RMSNormalization", "LayerNormalization", "LpNormalization")


@dataclass(frozen=True)
class Operator:
    """What is where in an attention operator.

    Attributes:
        q_heads, kv_heads: attributes with the number of heads.
        past, present: positions of the caches among inputs and outputs.
        mask: position of the additive or boolean mask, (..., heads or 1, queries, keys).
        per_head: positions of vectors of one number a query head.
        refused: positions of inputs that are not understood, with what they are.
    """

    q_heads: str
    kv_heads: str
    past: tuple[int, ...]
    present: tuple[int, ...]
    mask: int
    per_head: tuple[int, ...] = ()
    refused: tuple[tuple[int, str], ...] = ()


OPERATORS = {
    ("", "Attention"): Operator("q_num_heads", "kv_num_heads", (4, 5), (1, 2), 3),
    (MICROSOFT, "MultiHeadAttention"): Operator(
        "num_heads", "num_heads", (6, 7), (1, 2), 5, refused=((3, "a bias of queries, keys and values together"),)
    ),
    (MICROSOFT, "GroupQueryAttention"): Operator("num_heads", "kv_num_heads", (3, 4), (1, 2), 10, (11,)),
}


@dataclass(frozen=True)
class Cut:
    """An operand that is a constant with heads along `layout.axis`. `matrix`: it is multiplied by."""

    node: ir.Node
    index: int
    layout: Layout
    matrix: bool = False


@dataclass(frozen=True)
class Count:
    """An attribute of a node that is a number of heads."""

    node: ir.Node
    name: str
    role: str


@dataclass(frozen=True)
class Size:
    """The sizes that a Reshape makes: number `position` of them, counted from the end, holds heads."""

    node: ir.Node
    position: int
    layout: Layout


@dataclass(frozen=True)
class Pick:
    """An operand that is computed, with heads along an axis, and is cut in front of the node."""

    node: ir.Node
    index: int
    layout: Layout


@dataclass
class HeadFlow:
    """The heads of one attention. `counts` are its heads by role: ``"q"`` and ``"kv"``.

    Attributes:
        caches: inputs and outputs of the graph that may change their number of heads.
        projections: the cuts of what reads the result of the attention, the first is its output projection.
    """

    graph: ir.Graph
    node: ir.Node
    caches: Collection[ir.Value]
    counts: dict[str, int] = field(default_factory=dict)
    layouts: dict[ir.Value, Layout] = field(default_factory=dict)
    edits: dict[Cut | Count | Size | Pick, None] = field(default_factory=dict)
    _pending: list[ir.Value] = field(default_factory=list)

    @property
    def projections(self) -> list[Cut]:
        return [e for e in self.edits if isinstance(e, Cut) and e.matrix and e.index == 1 and self.reads(e.node)]

    def reads(self, node: ir.Node) -> bool:
        """Whether the node takes query heads and does not hand them on."""
        value = node.inputs[0]
        return value in self.layouts and self.layouts[value].role == "q" and node.outputs[0] not in self.layouts

    # --- following -------------------------------------------------------------------------------------------

    def trace(self) -> HeadFlow:
        """Fills everything in.

        Raises:
            Decline: heads can not be told apart somewhere.
        """
        self._attention()
        while self._pending:
            value = self._pending.pop()
            if (value.is_graph_input() or value.is_graph_output()) and value not in self.caches:
                what = "an input" if value.is_graph_input() else "an output"
                raise Decline(f"'{value.name}' holds heads and is {what} of the model")
            producer = value.producer()
            if producer is not None:
                self._visit(producer, value)
            elif not value.is_graph_input():
                raise Decline(f"'{value.name}' holds heads and is a constant")
            for user, _ in value.uses():
                if user.graph is not self.graph:
                    raise Decline(f"'{value.name}' is read inside of a branch; prune-heads comes before the lowerings")
                self._visit(user, value)
        if not self.projections:
            raise Decline("no product with a weight matrix reads the result of the attention")
        return self

    def meet(self, value: ir.Value | None, layout: Layout) -> None:
        """Says that a value holds heads in this way."""
        dims = dims_of(value)
        if value is None or dims is None or len(dims) < -layout.axis or dims[layout.axis] != layout.size:
            name = value.name if value is not None else "?"
            raise Decline(f"'{name}' is not seen to hold {layout.heads} heads")
        if value not in self.layouts:
            self.layouts[value] = layout
            self._pending.append(value)
        elif self.layouts[value] != layout:
            raise Decline(f"'{value.name}' holds heads in two ways")

    def _visit(self, node: ir.Node, at: ir.Value) -> None:
        if node is self.node:
            return
        rule = _RULES.get(node.op_type)
        if rule is None or (node.domain and node.op_type != "RotaryEmbedding"):
            raise Decline(f"{node.op_type} '{node.name}' works on heads, in a way that is not known")
        rule(self, node, at)

    # --- the attention itself --------------------------------------------------------------------------------

    def _attention(self) -> None:
        node = self.node
        where = OPERATORS[node.domain, node.op_type]
        for index, what in where.refused:
            if _operand(node, index) is not None:
                raise Decline(f"'{node.name}' has {what}")
        if any(_operand(node, i) is None for i in range(3)):
            raise Decline(f"queries, keys and values of '{node.name}' are packed in one operand")
        self.counts = {"q": self._heads(0, where.q_heads), "kv": self._heads(1, where.kv_heads)}
        if self.counts["q"] % self.counts["kv"]:
            raise Decline(f"{self.counts['q']} query heads do not share {self.counts['kv']} key/value heads evenly")
        # One product may make all three: where each head has its own keys and values, they are one and the same.
        shared = "q" if self.counts["q"] == self.counts["kv"] else "kv"
        for index, role in ((0, "q"), (1, shared), (2, shared)):
            self.meet(node.inputs[index], self._layout(node.inputs[index], role))
        self.meet(node.outputs[0], self._layout(node.outputs[0], "q"))
        for index in where.past:
            if (past := _operand(node, index)) is not None:
                self.meet(past, Layout(-3, self.counts["kv"], 1, shared))
        for index in where.present:
            if len(node.outputs) > index and _used(node.outputs[index]):
                self.meet(node.outputs[index], Layout(-3, self.counts["kv"], 1, shared))
        if node.op_type == "Attention" and len(node.outputs) > 3 and _used(node.outputs[3]):
            raise Decline(f"the scores of '{node.name}' are read")
        for name, role in ((where.q_heads, "q"), (where.kv_heads, "kv")):
            if name in node.attributes:
                self.edits[Count(node, name, role)] = None
        self._masks(where)

    def _heads(self, index: int, name: str) -> int:
        value = self.node.inputs[index]
        dims = dims_of(value)
        count = dims[1] if dims is not None and len(dims) == 4 else self.node.attributes.get_int(name, 0)
        if not isinstance(count, int) or count < 1:
            raise Decline(f"the number of heads of '{self.node.name}' is not known")
        return count

    def _layout(self, value: ir.Value | None, role: str) -> Layout:
        dims, heads = dims_of(value), self.counts[role]
        if dims is not None and len(dims) == 4:
            return Layout(-3, heads, 1, role)
        width = dims[-1] if dims else None
        if dims is None or len(dims) != 3 or not isinstance(width, int) or width % heads:
            raise Decline(f"the sizes of '{value.name if value is not None else '?'}' are not known")
        return Layout(-1, heads, width // heads, role)

    def _masks(self, where: Operator) -> None:
        mask, heads = _operand(self.node, where.mask), self.counts["q"]
        if mask is not None:
            dims = dims_of(mask)
            if dims is None or (len(dims) > 2 and not isinstance(dims[-3], int)):
                raise Decline(f"it is not known whether the mask '{mask.name}' differs between heads")
            if len(dims) > 2 and dims[-3] != 1:
                self._part(self.node, where.mask, Layout(-3, heads, 1, "q"))
        for index in where.per_head:
            if _operand(self.node, index) is not None:
                self._part(self.node, index, Layout(-1, heads, 1, "q"))

    def _part(self, node: ir.Node, index: int, layout: Layout) -> None:
        value = node.inputs[index]
        dims = dims_of(value)
        if dims is None or dims[layout.axis] != layout.size:
            raise Decline(f"'{value.name if value is not None else '?'}' is not seen to hold {layout.heads} heads")
        self.edits[(Cut if constant_tensor(value) is not None else Pick)(node, index, layout)] = None


def _operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


# --- operators that heads pass --------------------------------------------------------------------------------


def _elementwise(flow: HeadFlow, node: ir.Node, at: ir.Value) -> None:
    layout = flow.layouts[at]
    for index, value in enumerate(node.inputs):
        dims = dims_of(value)
        if value is None or dims is None:
            raise Decline(f"the sizes of an operand of {node.op_type} '{node.name}' are not known")
        if len(dims) < -layout.axis or dims[layout.axis] == 1:
            continue  # the same for all heads
        if constant_tensor(value) is None:
            flow.meet(value, layout)
        elif dims[layout.axis] == layout.size:
            flow.edits[Cut(node, index, layout)] = None
        else:
            raise Decline(f"'{value.name}' is not seen to hold {layout.heads} heads")
    flow.meet(node.outputs[0], layout)


def _norm(flow: HeadFlow, node: ir.Node, at: ir.Value) -> None:
    layout, rank = flow.layouts[at], len(dims_of(at) or ())
    axis = node.attributes.get_int("axis", -1)
    if (axis if axis < 0 else axis - rank) <= layout.axis:
        raise Decline(f"{node.op_type} '{node.name}' takes a mean over all heads")
    if any(_used(v) for v in node.outputs[1:]):
        raise Decline(f"the statistics of {node.op_type} '{node.name}' are read")
    flow.meet(node.inputs[0], layout)
    flow.meet(node.outputs[0], layout)


def _rotary(flow: HeadFlow, node: ir.Node, at: ir.Value) -> None:
    layout = flow.layouts[at]
    if at is not node.inputs[0] and at is not node.outputs[0]:
        raise Decline(f"the tables of RotaryEmbedding '{node.name}' hold heads")
    if node.attributes.get_int("num_heads", 0) > 0:
        flow.edits[Count(node, "num_heads", layout.role)] = None
    elif len(dims_of(at) or ()) != 4:
        raise Decline(f"RotaryEmbedding '{node.name}' does not say how many heads there are")
    flow.meet(node.inputs[0], layout)
    flow.meet(node.outputs[0], layout)


def _transpose(flow: HeadFlow, node: ir.Node, at: ir.Value) -> None:
    layout, rank = flow.layouts[at], len(dims_of(at) or ())
    perm = list(node.attributes.get_ints("perm", range(rank)[::-1]))
    there = perm.index(layout.axis + rank) if at is node.inputs[0] else perm[layout.axis + rank]
    forward, back = (node.outputs[0], node.inputs[0])
    flow.meet(forward if at is back else back, layout.at(there - rank))


def _reshape(flow: HeadFlow, node: ir.Node, at: ir.Value) -> None:
    source, made = node.inputs[0], node.outputs[0]
    if at is not source and at is not made:
        raise Decline(f"the sizes of Reshape '{node.name}' hold heads")
    there = made if at is source else source
    assert there is not None
    layout = through_reshape(flow.layouts[at], dims_of(at), dims_of(there))
    if layout is None:
        raise Decline(f"Reshape '{node.name}' is not seen to keep heads apart")
    flow.meet(there, layout)
    out = flow.layouts[made]
    flow.edits[Size(node, out.axis, out)] = None


def _concat(flow: HeadFlow, node: ir.Node, at: ir.Value) -> None:
    layout, rank = flow.layouts[at], len(dims_of(at) or ())
    axis = node.attributes.get_int("axis")
    if (axis if axis < 0 else axis - rank) == layout.axis:
        raise Decline(f"Concat '{node.name}' joins heads with others")
    for value in (*node.inputs, *node.outputs):
        flow.meet(value, layout)


def _shape(flow: HeadFlow, node: ir.Node, at: ir.Value) -> None:
    layout, rank = flow.layouts[at], len(dims_of(at) or ())
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)
    if layout.axis + rank in range(rank)[start:end] and _used(node.outputs[0]):
        raise Decline(f"the number of heads is read off '{at.name}'")


def _matmul(flow: HeadFlow, node: ir.Node, at: ir.Value) -> None:
    layout, weight = flow.layouts[at], node.inputs[1]
    if layout.axis != -1 or at is weight or constant_tensor(weight) is None or len(dims_of(weight) or ()) != 2:
        raise Decline(f"MatMul '{node.name}' works on heads, and is no product with a weight matrix")
    axis = -1 if at is node.outputs[0] else -2
    flow.edits[Cut(node, 1, layout.at(axis), matrix=True)] = None


def _gemm(flow: HeadFlow, node: ir.Node, at: ir.Value) -> None:
    layout, weight = flow.layouts[at], node.inputs[1]
    known = node.attributes
    if layout.axis != -1 or at is weight or constant_tensor(weight) is None or known.get_int("transA", 0) != 0:
        raise Decline(f"Gemm '{node.name}' works on heads, and is no product with a weight matrix")
    made = at is node.outputs[0]
    axis = -1 if made != (known.get_int("transB", 0) != 0) else -2
    flow.edits[Cut(node, 1, layout.at(axis), matrix=True)] = None
    bias = _operand(node, 2)
    if not made or bias is None:
        return
    dims = dims_of(bias)
    if constant_array(bias) is None or dims is None:
        raise Decline(f"the bias of Gemm '{node.name}' is no constant")
    if dims and dims[-1] != 1:
        flow.edits[Cut(node, 2, layout)] = None


def _slice(flow: HeadFlow, node: ir.Node, at: ir.Value) -> None:
    layout, rank = flow.layouts[at], len(dims_of(at) or ())
    axes = constant_array(_operand(node, 3))
    if axes is None or any((int(a) if a < 0 else int(a) - rank) == layout.axis for a in axes):
        raise Decline(f"Slice '{node.name}' is not seen to keep all heads")
    flow.meet(node.inputs[0], layout)
    flow.meet(node.outputs[0], layout)


def _gather(flow: HeadFlow, node: ir.Node, at: ir.Value) -> None:
    source, made = node.inputs[0], node.outputs[0]
    rank = len(dims_of(source) or ())
    axis = node.attributes.get_int("axis", 0)
    axis = axis if axis < 0 else axis - rank
    known = flow.layouts[at].axis
    if dims_of(node.inputs[1]) != () or (at is not source and at is not made) or source is None:
        raise Decline(f"Gather '{node.name}' is not seen to keep all heads")
    # Axes in front of the one that goes are one nearer to the end without it.
    before = known if at is source else (known - 1 if known - 1 < axis else known)
    if before == axis:
        raise Decline(f"Gather '{node.name}' picks a head")
    flow.meet(source, flow.layouts[at].at(before))
    flow.meet(made, flow.layouts[at].at(before + 1 if before < axis else before))


def _split(flow: HeadFlow, node: ir.Node, at: ir.Value) -> None:
    layout, rank = flow.layouts[at], len(dims_of(at) or ())
    axis = node.attributes.get_int("axis", 0)
    if (axis if axis < 0 else axis - rank) == layout.axis:
        raise Decline("queries, keys and values come out of one product; run unpack-qkv first")
    for value in (node.inputs[0], *node.outputs):
        flow.meet(value, layout)


_RULES: dict[str, Callable[[HeadFlow, ir.Node, ir.Value], None]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_NORMS, _norm),
    "RotaryEmbedding": _rotary,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Concat": _concat,
    "Shape": _shape,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Slice": _slice,
    "Gather": _gather,
    "Split": _split,
}
