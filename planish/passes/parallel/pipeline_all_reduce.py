"""pipeline-all-reduce: whatever works row by row runs in chunks of rows, so that each sum overlaps with another chunk.

Two chunks are enough: while one is on its way between the ranks, the other is computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from planish.ir.errors import InputError
from planish.ir.graphs import constant_tensor, dims_of, is_op
from planish.ir.parallel import is_all_reduce
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.canonicalize.editing import Editor
from planish.passes.parallel.chunks import Bounds, Chunker, resized
from planish.passes.parallel.turns import in_turn
from planish.passes.registry import register

#: Work on each number by itself.
_ELEMENTWISE = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Sum",
    "Pow",
    "Sqrt",
    "Exp",
    "Neg",
    "Abs",
    "Cast",
    "Identity",
    "Gelu",
    "Erf",
}
_ELEMENTWISE |= {"Tanh", "Relu", "Sigmoid", "LeakyRelu", "Elu", "HardSwish", "Softplus", "Mish", "Swish", "SwiGLU"}
_ELEMENTWISE |= {"QuickGelu", "FastGelu", "BiasGelu"}
#: Work on each row by itself: operands behind the first ones (as many as the number says) are the same for all rows.
_BY_ROW = {"RMSNormalization": 1, "LayerNormalization": 1, "MatMul": 1, "Gemm": 1, "AllReduce": 1}
_BY_ROW |= {"SkipSimplifiedLayerNormalization": 2, "SkipLayerNormalization": 2}
_DOMAINS = ("", "planish", "com.microsoft")
_ROWS = -2
#: Metadata of a sum that is of one chunk of several.
_CHUNK = "planish.row_chunk"


@register
@dataclass(frozen=True)
class PipelineAllReduce(ExactPass):
    """Computes in chunks all between the ranks' sums that works row by row: projections, norms, feed-forward networks.

    Chunk 1 is computed while the sum of chunk 0 is on its way, then chunk 0 goes on while that of chunk 1 is. Attention
    and what else mixes rows gets all of them, once: nothing is computed twice, and every form of attention may stay.

    Options:
        chunks: how many.
        least: rows that a chunk has at least. Where the length is symbolic it is that of the calibration inputs, and
            any length remains right.
    """

    name: ClassVar[str] = "pipeline-all-reduce"

    chunks: int = 2
    least: int = 1024

    def __post_init__(self) -> None:
        for option, low in (("chunks", 2), ("least", 1)):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise InputError(f"{option} is {value!r}; it is a number from {low} on.")

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        editor, sizes = Editor(program, self.name), program.sizes()
        for model in program.entries.values():
            waiting = [node for node in model.graph if is_all_reduce(node) and not _is_chunk(node)]
            while waiting:
                first, lead = waiting[0], _lead(waiting[0].inputs[0])
                alike = [node for node in waiting if _lead(node.inputs[0]) == lead]
                waiting = [node for node in waiting if node not in set(alike)]
                try:
                    self._judge(lead, sizes)
                    chunked = _between(model.graph, alike, lead)
                    maker = Chunker(editor, model.graph, self.chunks, next(n for n in model.graph if n in chunked))
                    _Split(maker, first, chunked, lead).run()
                    editor.fired += len(alike)
                except Decline as decline:
                    for node in alike:
                        editor.decline(node, decline.reason)
        return editor.result()

    def _judge(self, lead: tuple[int | str | None, ...], sizes: dict[str, int]) -> None:
        """Raises Decline: there are not rows enough, or their number is not known."""
        length = lead[-1] if lead else None
        if isinstance(length, str):
            known = sizes.get(length)
            if known is None:
                raise Decline(f"the length '{length}' is not known: no calibration inputs say it")
            length = known
        if length is None:
            raise Decline("the number of rows is not known")
        if length < self.chunks * self.least:
            raise Decline(f"it sums {length} rows, and {self.chunks} chunks of at least {self.least} take more")


def _is_chunk(node: ir.Node) -> bool:
    """Whether a sum is one of several chunks already, by this pass or by tile-all-reduce."""
    below = [user for value in node.outputs for user, _ in value.uses()]
    return _CHUNK in node.metadata_props or any(is_op(user, "Concat") for user in below)


def _lead(value: ir.Value | None) -> tuple[int | str | None, ...]:
    """The sizes of a value but the last: (batch, rows), or (rows,)."""
    dims = dims_of(value)
    return dims[:-1] if dims is not None and len(dims) in (2, 3) else ()


def _same_for_all(value: ir.Value | None) -> bool:
    """Whether an operand is the same for all rows."""
    dims = dims_of(value)
    return value is None or (dims is not None and (len(dims) < 2 or dims[_ROWS] == 1))


def _by_row(node: ir.Node, lead: tuple[int | str | None, ...]) -> bool:
    """Whether a node computes each row of its outputs from the same row of its inputs, and what is one for all."""
    if node.domain not in _DOMAINS or any(v.is_graph_output() and _lead(v) != lead for v in node.outputs):
        return False
    used = [v for v in node.outputs if v.uses() or v.is_graph_output()]
    if not used or any(_lead(v) != lead for v in used):
        return False
    if node.op_type in _ELEMENTWISE:
        return all(_lead(v) == lead or _same_for_all(v) for v in node.inputs)
    count = _BY_ROW.get(node.op_type)
    if count is None or any(_lead(v) != lead for v in node.inputs[:count]):
        return False
    if node.op_type.endswith("Normalization"):
        rank, axis = len(lead) + 1, node.attributes.get_int("axis", -1)
        return axis in (-1, rank - 1) and all(_same_for_all(v) for v in node.inputs[count:])
    if node.op_type == "Gemm":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return not node.attributes.get_int("transA", 0) and _weight(node.inputs[1]) and _same_for_all(bias)
    return node.op_type == "AllReduce" or _weight(node.inputs[1])


def _weight(value: ir.Value | None) -> bool:
    return constant_tensor(value) is not None and len(dims_of(value) or ()) == 2


def _between(graph: ir.Graph, reduces: list[ir.Node], lead: tuple[int | str | None, ...]) -> set[ir.Node]:
    """The sums, and the nodes above and below them as far as they work row by row."""
    possible = {node for node in graph if _by_row(node, lead)}
    if any(node not in possible for node in reduces):
        raise Decline("what it sums is not of the form (batch, rows, width)")
    found: set[ir.Node] = set()
    for up in (True, False):
        seen, pending = set(reduces), list(reduces)
        while pending:
            for node in _neighbours(pending.pop(), up):
                if node in possible and node not in seen:
                    seen.add(node)
                    pending.append(node)
        found |= seen
    return found


def _neighbours(node: ir.Node, up: bool) -> Iterable[ir.Node]:
    if up:
        return [above for v in node.inputs if v is not None and (above := v.producer()) is not None]
    return [user for v in node.outputs for user, _ in v.uses()]


@dataclass
class _Split:
    """One graph's nodes, in chunks.

    Args:
        at: one of the sums; its operand has the rows that are counted.
        nodes: that are computed in chunks.
    """

    maker: Chunker
    at: ir.Node
    nodes: set[ir.Node]
    lead: tuple[int | str | None, ...]
    parts: dict[ir.Value, list[ir.Value]] = field(default_factory=dict)
    chunk_of: dict[ir.Node, int] = field(default_factory=dict)

    def run(self) -> None:
        graph, maker = self.maker.graph, self.maker
        order = [node for node in graph if node in self.nodes]
        reads = [value for node in order for value in node.inputs if value is not None]
        entering = next(value for value in reads if self._rows(value) and value.producer() not in self.nodes)
        self.axis = len(self.lead) - 1
        bounds = maker.bounds(entering, self.axis)
        for node in order:
            for index in range(maker.chunks):
                self._copy(node, bounds, index)
        for node in order:
            for value in node.outputs:
                if value.is_graph_output() or any(user not in self.nodes for user, _ in value.uses()):
                    self._join(node, value, bounds)
        for node in reversed(order):
            maker.editor.remove(node)
        in_turn(graph, self.chunk_of)

    def _rows(self, value: ir.Value | None) -> bool:
        return value is not None and _lead(value) == self.lead and not _same_for_all(value)

    def _part(self, value: ir.Value | None, bounds: Bounds, index: int) -> ir.Value | None:
        """What chunk `index` reads of an operand."""
        if value is None or not (value in self.parts or self._rows(value)):
            return value
        if value not in self.parts:
            cuts = zip(bounds.begins, bounds.ends, bounds.sizes, strict=True)
            first = next(n for n in self.maker.graph if n in self.nodes and value in n.inputs)
            self.parts[value] = [self.maker.cut(first, value, self.axis, *where) for where in cuts]
            for number, part in enumerate(self.parts[value]):
                self.chunk_of[part.producer()] = number  # type: ignore[index]
        return self.parts[value][index]

    def _copy(self, node: ir.Node, bounds: Bounds, index: int) -> None:
        names = self.maker.editor.names
        inputs = [self._part(value, bounds, index) for value in node.inputs]
        name = names.fresh(f"{node.name}_chunk")
        made = ir.node(
            node.op_type,
            inputs,
            dict(node.attributes),
            domain=node.domain,
            name=name,
            version=node.version,
            num_outputs=len(node.outputs),
        )
        for old, new in zip(node.outputs, made.outputs, strict=True):
            new.name = names.fresh(f"{old.name}_chunk") if old.name else ""
            new.type, new.shape = old.type, resized(old, self.axis, bounds.sizes[index])
            self.parts.setdefault(old, []).append(new)
        assert node.graph is not None
        node.graph.insert_before(node, made)
        self.maker.editor.mark(made, [node])
        if is_all_reduce(made):
            made.metadata_props[_CHUNK] = str(index)
        self.chunk_of[made] = index

    def _join(self, node: ir.Node, value: ir.Value, bounds: Bounds) -> None:
        """All rows of a value, for those who read them at once."""
        inside = [(user, index) for user, index in value.uses() if user in self.nodes]
        whole = self.maker.joined(node, self.parts[value], self.axis, value, bounds)
        self.maker.editor.replace(value, whole)
        for user, index in inside:  # which go with it
            user.replace_input_with(index, value)
