"""What is behind the layers finds each token where it was: gathered back, or, in a mean, by the sizes of merged ones.

A token that was merged is given the hidden state of what it was merged into. Pooling then needs no gathering: a mean
over tokens is the mean over merged ones weighted by their sizes, and protected tokens are where they were.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from planish.ir.graphs import constant_array, dims_of, is_op
from planish.passes.canonicalize.editing import Editor
from planish.passes.tokens.emitter import Behind, Emitter
from planish.passes.tokens.merge_edits import Merged

_ALIKE = frozenset(["Identity", "Cast", "Gelu", "Relu", "Tanh", "Sigmoid", "Add", "Mul", "Sub", "Div"])
_NORMS = ("LayerNormalization", "RMSNormalization")


def named_tokens(end: ir.Value) -> int:
    """How many tokens in front are read by their places behind the layers; 0 if none is."""
    found, pending = 0, [end]
    while pending:
        for node, index in pending.pop().uses():
            places = named_places(node, index)
            if places is not None and min(places, default=0) >= 0:
                found = max([found, *(p + 1 for p in places)])
            elif treats_alike(node, index):
                pending.append(node.outputs[0])
    return found


@dataclass
class Tail:
    """The readers of an encoder's last hidden state.

    Attributes:
        merged: the tokens that are left.
        first: the tokens that there were.
        protected: tokens in front that are as they were.
        notes: what was done, in words.
    """

    merged: Merged
    first: int | str | None
    protected: int
    editor: Editor
    notes: list[str] = field(default_factory=list)

    def settle(self, value: ir.Value) -> None:
        """Lets every reader of `value`, which holds merged tokens, find what it wants."""
        unmerged: ir.Value | None = None
        uses = list(value.uses())
        if value.is_graph_output():
            unmerged = self._unmerge(value)
            self._output(value, unmerged)
        for node, index in uses:
            if not self._settle(value, node, index):
                unmerged = unmerged or self._unmerge(value)
                node.replace_input_with(index, unmerged)

    def _settle(self, value: ir.Value, node: ir.Node, index: int) -> bool:
        places = named_places(node, index)
        if places is not None and all(0 <= p < self.protected for p in places):
            return True
        if is_op(node, "Shape") and (node.attributes.get_int("start", 0), node.attributes.get_int("end", -1)) == (0, 1):
            return True
        if _averages(node):
            self._mean(node, 0)
            return True
        start = _from(node)
        if start is not None and start <= self.protected:
            users = [user for user, _ in node.outputs[0].uses()]
            if users and all(_averages(user) for user in users) and not node.outputs[0].is_graph_output():
                self._resize(node.outputs[0], start)
                for user in users:
                    self._mean(user, start)
                return True
        if treats_alike(node, index):
            self._resize(node.outputs[0], 0)
            self.settle(node.outputs[0])
            return True
        return False

    def _unmerge(self, value: ir.Value) -> ir.Value:
        producer = value.producer()
        assert producer is not None
        emit = Behind(self.editor, producer)
        whole = emit.add("planish.UnmergeTokens", value, self.merged.index)
        dims = dims_of(value) or (None,) * 3
        whole.type, whole.shape = value.type, ir.Shape([dims[0], self.first, dims[2]])
        if (note := "tokens are given back behind the layers") not in self.notes:
            self.notes.append(note)
        return whole

    def _output(self, value: ir.Value, whole: ir.Value) -> None:
        """`whole` is the output of the graph that `value` was, with its name."""
        graph = value.graph
        assert isinstance(graph, ir.Graph)
        graph.outputs[:] = [whole if v is value else v for v in graph.outputs]
        whole.name, value.name = value.name, self.editor.names.fresh(f"{value.name}_merged")

    def _mean(self, node: ir.Node, start: int) -> None:
        """Weights a mean over tokens, of which `start` in front are left out, by their sizes."""
        emit = Emitter(self.editor, node)
        x, sizes = node.inputs[0], self.merged.sizes
        if start:
            sizes = emit.add("Slice", sizes, emit.ints(start), emit.ints(2**62), emit.ints(1))
        total = emit.add("ReduceSum", sizes, emit.ints(1), keepdims=1)
        weights = emit.add("Unsqueeze", emit.add("Div", sizes, total), emit.ints(1))
        mean = emit.add("MatMul", weights, x)
        old = node.outputs[0]
        if not node.attributes.get_int("keepdims", 1):
            mean = emit.add("Squeeze", mean, emit.ints(1))
        mean.type, mean.shape = old.type, old.shape
        self.editor.replace(old, mean)
        if (note := "the mean over tokens is weighted by their sizes") not in self.notes:
            self.notes.append(note)

    def _resize(self, value: ir.Value, without: int) -> None:
        tokens = self.merged.tokens
        if value.shape is not None:
            left = tokens - without if isinstance(tokens, int) else (None if without else tokens)
            value.shape = ir.Shape([left if axis == 1 else d for axis, d in enumerate(value.shape)])


def named_places(node: ir.Node, index: int) -> tuple[int, ...] | None:
    """The tokens that a Gather or a Slice reads by their places; None for anything else."""
    if index == 0 and is_op(node, "Gather") and node.attributes.get_int("axis", 0) in (1, -2):
        picked = constant_array(node.inputs[1])
        return None if picked is None else tuple(int(i) for i in picked.reshape(-1))
    bounds = _bounds(node) if index == 0 else None
    if bounds is None or bounds[0] < 0 or not 0 <= bounds[1] < 64:
        return None
    return tuple(range(*bounds))


def _bounds(node: ir.Node) -> tuple[int, int] | None:
    """Start and end of a Slice over tokens with step 1."""
    if not is_op(node, "Slice") or len(node.inputs) < 4:
        return None
    start, end, axes, *steps = (constant_array(v) for v in node.inputs[1:] if v is not None)
    if start is None or end is None or axes is None or any(s is None or (s != 1).any() for s in steps):
        return None
    return (int(start[0]), int(end[0])) if axes.tolist() in ([1], [-2]) else None


def _from(node: ir.Node) -> int | None:
    """Where a Slice starts that takes all tokens from there on."""
    bounds, dims = _bounds(node), dims_of(node.inputs[0]) if node.inputs else None
    if bounds is None or bounds[0] < 0:
        return None
    tokens = dims[1] if dims is not None and isinstance(dims[1], int) else 2**31 - 1
    return bounds[0] if bounds[1] >= tokens else None


def _averages(node: ir.Node) -> bool:
    axes = constant_array(node.inputs[1]) if is_op(node, "ReduceMean") and len(node.inputs) > 1 else None
    return axes is not None and axes.tolist() in ([1], [-2])


def treats_alike(node: ir.Node, index: int) -> bool:
    """Whether a node does the same to every token, and reads nothing else that has a token's place."""
    if is_op(node, *_NORMS):
        return index == 0 and len(node.outputs) == 1 and node.attributes.get_int("axis", -1) in (-1, 2)
    if is_op(node, "MatMul"):
        return index == 0 and len(dims_of(node.inputs[1]) or ()) == 2
    if not is_op(node, *_ALIKE):
        return False
    others = [v for i, v in enumerate(node.inputs) if i != index and v is not None]
    dims = [dims_of(v) for v in others]
    return all(d is not None and (len(d) < 2 or d[-2] == 1) for d in dims) and node.inputs[index] not in others


__all__ = ["Tail", "named_places", "named_tokens", "treats_alike"]
