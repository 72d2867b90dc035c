"""cancel-transposes: moves Transposes through what computes in any order of axes, where fewer are left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from planish.ir.graphs import dims_of, is_op
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import ExactPass, PassContext, PassResult
from planish.passes.canonicalize.editing import Editor
from planish.passes.canonicalize.layout import Perm, absorbs, composed, inverse, is_trivial, operands, rank_of, rewrite
from planish.passes.opset import needs_opset
from planish.passes.registry import register

_MOST_PEELED = 24  # nodes of a region of which leaving one out is tried
_MOST_SWEEPS = 4
_OPSET = 13


@register
@dataclass(frozen=True)
class CancelTransposes(ExactPass):
    """Computes regions between Transposes in the order of axes that their inputs already have.

    A region is what elementwise operators, reductions, Softmax, LayerNormalization, Concat, Split, Slice and Pad
    connect. In the other order the Transposes into it and out of it fall away, or merge, and what else enters or
    leaves needs one; it is moved only if that makes fewer that move data. Time is linear in the graph.
    """

    name: ClassVar[str] = "cancel-transposes"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        editor = Editor(program, self.name)
        for model in program.entries.values():
            opset = model.graph.opset_imports.get("", 1)
            if opset < _OPSET:  # Softmax flattened its operand, and Slice had no inputs
                editor.declined.append(Declined(self.name, model.graph.name or "main", needs_opset(_OPSET, opset)))
                continue
            for graph in list(model.graphs()):
                for _ in range(_MOST_SWEEPS):
                    before = editor.fired
                    _sweep(graph, editor)
                    if editor.fired == before:
                        break
        return editor.result()


def _sweep(graph: ir.Graph, editor: Editor) -> None:
    seen: set[tuple[ir.Node, Perm]] = set()
    order: dict[ir.Node, int] | None = None
    for node in [n for n in graph if is_op(n, "Transpose")]:
        perm = _perm(node)
        if node.graph is not graph or perm is None:
            continue
        for user in list(node.outputs[0].consumers()):
            if (user, perm) in seen or user.graph is not graph or operands(user, perm) is None:
                continue
            region = _Region.around(user, perm, seen)
            if region.gain() <= 0:
                region.peel()
            if region.nodes and region.gain() > 0:
                order = order or {n: k for k, n in enumerate(graph)}
                region.move(editor, order)
                editor.fired += 1


def _perm(node: ir.Node) -> Perm | None:
    found = node.attributes.get_ints("perm", None)  # type: ignore[arg-type]
    rank = rank_of(node.inputs[0])
    if found is None:
        return None if rank is None else tuple(reversed(range(rank)))
    return tuple(found)


def _transpose_before(value: ir.Value) -> tuple[ir.Value, Perm] | None:
    node = value.producer()
    if node is None or not is_op(node, "Transpose"):
        return None
    perm, source = _perm(node), node.inputs[0]
    return None if perm is None or source is None else (source, perm)


@dataclass
class _Region:
    """Nodes that can be computed on operands before their Transpose by `perm`."""

    perm: Perm
    nodes: dict[ir.Node, list[int]] = field(default_factory=dict)

    @classmethod
    def around(cls, start: ir.Node, perm: Perm, seen: set[tuple[ir.Node, Perm]]) -> _Region:
        """All that is connected to `start` over values that may change their order of axes."""
        region, stack = cls(perm), [start]
        spread: set[ir.Value] = set()  # a mask may feed every node, and is followed once
        while stack:
            node = stack.pop()
            if (node, perm) in seen or node.graph is not start.graph:
                continue
            seen.add((node, perm))
            found = operands(node, perm)
            if found is None:
                continue
            region.nodes[node] = found
            for value in (*(node.inputs[k] for k in found), *node.outputs):
                if value is None or value in spread:
                    continue
                spread.add(value)
                producer = value.producer()
                stack += [*value.consumers(), *([] if producer is None else [producer])]
        return region

    def entering(self) -> list[ir.Value]:
        """Operands from outside, each once."""
        values = (node.inputs[k] for node, found in self.nodes.items() for k in found)
        return list(dict.fromkeys(v for v in values if v is not None and v.producer() not in self.nodes))

    def _enters_as(self, value: ir.Value) -> tuple[ir.Value, Perm]:
        """(source, permutation) of which the operand in the new order is the Transpose."""
        source, perm = _transpose_before(value) or (value, ())
        if not perm or source.producer() in self.nodes:  # what the region computes changes its own order
            source, perm = value, tuple(range(len(self.perm)))
        return source, composed(perm, inverse(self.perm))

    def gain(self) -> int:
        """How many Transposes that move data the graph loses, if the region is moved."""
        total = 0
        for value in self.entering():
            source, perm = self._enters_as(value)
            total -= not is_trivial(perm, dims_of(source))
            node = value.producer()
            if node is not None and source is not value and self._only_reader_of(value):
                total += not is_trivial(_perm(node) or (), dims_of(source))
        return total + sum(self._leaving_gain(value) for node in self.nodes for value in node.outputs)

    def _leaving_gain(self, value: ir.Value) -> int:
        total, plain = 0, value.is_graph_output()
        old, new = dims_of(value), self._dims(value)
        for user in value.consumers():
            if user in self.nodes:
                continue
            perm = self._merged(user, value)
            if perm is not None:
                total += (not is_trivial(_perm(user) or (), old)) - (not is_trivial(perm, new))
            elif not self._absorbed(user, value):
                plain = True
        return total - (plain and not is_trivial(self.perm, new))

    def _merged(self, user: ir.Node, value: ir.Value) -> Perm | None:
        """The permutation that a Transpose behind the region gets; None for other users."""
        perm = _perm(user) if is_op(user, "Transpose") and user.graph is value.graph else None
        return None if perm is None else composed(self.perm, perm)

    def _absorbed(self, user: ir.Node, value: ir.Value) -> bool:
        return user.graph is value.graph and absorbs(user, self.perm)

    def _only_reader_of(self, value: ir.Value) -> bool:
        return not value.is_graph_output() and all(user in self.nodes for user in value.consumers())

    def _dims(self, value: ir.Value) -> list[int | str | None] | None:
        """The shape that a value of the region gets."""
        dims = dims_of(value)
        return None if dims is None else [dims[k] for k in inverse(self.perm)]

    def peel(self) -> None:
        """Leaves nodes out, one after the other, as long as that helps."""
        if len(self.nodes) > _MOST_PEELED:
            return
        best = self.gain()
        for node in list(self.nodes):
            found = self.nodes.pop(node)
            gain = self.gain()
            if gain < best or not self.nodes:
                self.nodes[node] = found
            else:
                best = gain

    def move(self, editor: Editor, order: dict[ir.Node, int]) -> None:
        """Rewrites the region; `order` numbers the nodes of the graph."""
        entering = {}
        for value in self.entering():
            first = min((user for user in value.consumers() if user in self.nodes), key=order.__getitem__)
            entering[value] = self._moved_in(value, first, editor)
        for node, found in self.nodes.items():
            for k in found:
                operand = node.inputs[k]
                if operand is not None and operand in entering:
                    node.replace_input_with(k, entering[operand])
            editor.mark(node, [node])
            rewrite(node, self.perm, editor)
        for value in entering:
            _drop_dead(value, editor)
        for node in self.nodes:
            for value in node.outputs:
                self._move_out(node, value, editor)

    def _moved_in(self, value: ir.Value, first: ir.Node, editor: Editor) -> ir.Value:
        source, perm = self._enters_as(value)
        if list(perm) == sorted(perm):
            return source
        new = editor.node(first, "Transpose", [source], {"perm": list(perm)})
        new.type = value.type
        dims = dims_of(source)
        new.shape = None if dims is None else ir.Shape([dims[k] for k in perm])
        return new

    def _move_out(self, node: ir.Node, value: ir.Value, editor: Editor) -> None:
        old, new = value.shape, self._dims(value)
        outside = [(user, index) for user, index in value.uses() if user not in self.nodes]
        merged = {user: self._merged(user, value) for user, _ in outside}
        back = self._back(node, value, editor) if value.is_graph_output() else None
        value.shape = None if new is None else ir.Shape(new)
        for user, index in outside:
            perm = merged[user]
            if perm is not None:
                self._merge(user, perm, value, editor)
            elif self._absorbed(user, value):
                rewrite(user, self.perm, editor)
                editor.mark(user, [user])
            else:
                back = back or self._back(node, value, editor, old)
                user.replace_input_with(index, back)

    def _merge(self, user: ir.Node, perm: Perm, value: ir.Value, editor: Editor) -> None:
        result = user.outputs[0]
        # An output of the graph keeps its name, so a Transpose that does nothing may have to stay.
        if list(perm) != sorted(perm) or (result.is_graph_output() and value.is_graph_output()):
            user.attributes["perm"] = ir.AttrInt64s("perm", list(perm))
            editor.mark(user, [user])
            return
        editor.replace(result, value)
        editor.remove(user)

    def _back(self, node: ir.Node, value: ir.Value, editor: Editor, shape: ir.Shape | None = None) -> ir.Value:
        """A Transpose back to the old order behind `node`; it takes the place of `value` among the outputs."""
        name, fresh = editor.names.fresh("Transpose_planish"), editor.names.fresh(f"{value.name}_back")
        new = ir.node("Transpose", [value], attributes={"perm": list(self.perm)}, name=name)
        back, graph = new.outputs[0], node.graph
        assert graph is not None
        back.name, back.type = fresh, value.type
        back.shape = value.shape if shape is None else shape
        graph.insert_after(node, new)
        editor.mark(new, [node])
        if value.is_graph_output():
            graph.outputs[:] = [back if v is value else v for v in graph.outputs]
            back.name, value.name = value.name, fresh
        return back


def _drop_dead(value: ir.Value, editor: Editor) -> None:
    node = value.producer()
    if node is not None and is_op(node, "Transpose") and not value.uses() and not value.is_graph_output():
        editor.remove(node)
