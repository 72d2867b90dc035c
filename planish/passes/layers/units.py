"""What skip-layers leaves out, one at a time: a layer, or one branch of a layer. Whether it may, and how it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from planish.ir.analyses.layers import Layer, LayerStack, Part, find_layers
from planish.ir.errors import InputError, unknown
from planish.ir.graphs import dims_of, is_op, subgraphs_of
from planish.passes.base import Decline
from planish.passes.canonicalize.editing import Editor

#: Option `part` → kinds of parts that it means.
KINDS = {"layer": (), "attention": ("attention",), "ffn": ("ffn", "moe")}


@dataclass(frozen=True)
class Unit:
    """Something that can be left out. `part` is None for a whole layer.

    Attributes:
        index: position of the layer in its stack.
        before, after: the stream without and with it, for its importance: for a part, `after` less the branch is
            the stream without it.
    """

    index: int
    layer: Layer
    part: Part | None = None

    @property
    def after(self) -> ir.Value:
        return self.layer.hidden_out if self.part is None else self.part.stream_out

    @property
    def before(self) -> ir.Value:
        return self.layer.hidden_in if self.part is None else self.part.branch


def stacks_of(model: ir.Model, name: str | None) -> tuple[list[LayerStack], tuple[str, ...]]:
    """The stacks of a model, or the one of that name, and why there are no others.

    Raises:
        InputError: the model has stacks, and none of that name.
    """
    found = find_layers(model)
    if name is None or not found.stacks:
        return list(found.stacks), found.declined
    if name not in [s.name for s in found.stacks]:
        raise unknown("stack", name, [s.name for s in found.stacks])
    return [s for s in found.stacks if s.name == name], found.declined


def require_one(stacks: Sequence[LayerStack]) -> None:
    """Raises InputError: layers are named by number, and it is not said of which stack."""
    if len(stacks) > 1:
        names = ", ".join(f"'{s.name}' ({len(s)} layers)" for s in stacks)
        raise InputError(f"the model has several stacks: {names}; say which with stack=.")


def units_of(stack: LayerStack, part: str) -> list[Unit]:
    """One unit for each layer that has such a part, in order; its index is the layer's."""
    if part == "layer":
        return [Unit(layer.index, layer) for layer in stack.layers]
    found = ((layer, p) for layer in stack.layers for p in layer.parts if p.kind in KINDS[part])
    return [Unit(layer.index, layer, p) for layer, p in found]


def problem(stack: LayerStack, units: Sequence[Unit]) -> str:
    """Why units of a stack must not be left out, or an empty string."""
    if stack.tied:
        return f"the layers of '{stack.name}' share their weights; one is the others run again"
    for unit in units:
        layer = unit.layer
        if layer.other_outputs:
            return f"'{layer.name}' makes the output '{layer.other_outputs[0].name}' of the model"
        if layer.form == "plain" and unit.part is None:
            return f"'{layer.name}' is not of the form hidden state + f(hidden state), with or without a norm after it"
        if reason := _used_elsewhere(stack, layer):
            return reason
        if unit.part is not None and unit.part.parallel and unit.part.shared_bias:
            return f"a bias of '{layer.name}' is added together with two branches; it is not known whose it is"
    return ""


def _used_elsewhere(stack: LayerStack, layer: Layer) -> str:
    inside = set(layer.nodes)
    follower = stack.layers[layer.index + 1] if layer.index + 1 < len(stack.layers) else None
    expected = set(follower.nodes) if follower is not None else None
    for node in layer.nodes:
        for value in node.outputs:
            for user, _ in value.uses():
                outer = _outermost(user, node.graph)
                if outer in inside or is_op(outer, "Shape", "Size"):
                    continue
                if value is not layer.hidden_out:
                    return f"'{value.name}' of '{layer.name}' is read outside of the layer, by '{outer.name}'"
                if expected is not None and outer not in expected:
                    return f"the hidden state after '{layer.name}' is also read by '{outer.name}', outside of the stack"
    if follower is not None and layer.hidden_out.is_graph_output():
        return f"the hidden state after '{layer.name}' is the output '{layer.hidden_out.name}' of the model"
    return ""


def _outermost(node: ir.Node, graph: ir.Graph | ir.Function | None) -> ir.Node:
    """The node of `graph` that `node` is inside of; `node` itself if it is in the graph."""
    if node.graph is graph or graph is None:
        return node
    for outer in graph:
        if any(node in set(inner.all_nodes()) for inner in subgraphs_of(outer)):
            return outer
    return node


@dataclass
class Removal:
    """What leaving units out did to a graph.

    Attributes:
        inputs, outputs: names of caches that are not part of the interface any more.
        moved: value that was left out → the one that its users read now.
    """

    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    moved: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def now(self, value: ir.Value) -> ir.Value:
        """What is read in place of `value`."""
        while value in self.moved:
            value = self.moved[value]
        return value


def remove(graph: ir.Graph, stack: LayerStack, units: Sequence[Unit], editor: Editor) -> Removal:
    """Leaves units out of a graph, the last first; nodes that nothing needs any more stay until they are cleaned up.

    Raises:
        Decline: an output of the model can not be made of what is left. Nothing was changed then.
    """
    gone = {unit.index for unit in units}
    first = min(units, key=lambda unit: unit.index, default=None)
    if first is not None and _ends_in_output(units) and first.before.is_graph_input():
        raise Decline(f"'{first.after.name}' is an output of the model, and '{first.before.name}' is an input of it")
    done = Removal()
    for unit in sorted(units, key=lambda unit: -unit.index):
        if unit.part is None:
            _keep_sizes(graph, unit.layer)
            old, new = unit.layer.hidden_out, unit.layer.hidden_in
        else:
            old, new = _without_part(unit.part, editor)
        editor.replace(old, new)
        done.moved[old] = new
        editor.fired += 1
        if unit.part is None or unit.part.kind == "attention":
            kept = next((layer for layer in stack.layers if layer.index not in gone), None)
            _remove_caches(graph, unit.layer, kept, done)
    return done


def _ends_in_output(units: Sequence[Unit]) -> bool:
    return any(unit.after.is_graph_output() for unit in units)


def _without_part(part: Part, editor: Editor) -> tuple[ir.Value, ir.Value]:
    """The value that a part changes, and what it is without the part."""
    if not part.parallel:
        return part.stream_out, part.rest
    others = [v for v in part.add.inputs if v is not None and v is not part.branch]
    if len(others) == 1:
        return part.add.outputs[0], others[0]
    return part.add.outputs[0], editor.node(part.add, "Sum", others, like=part.add.outputs[0])


def _keep_sizes(graph: ir.Graph, layer: Layer) -> None:
    """Sizes that others read off the inside of a layer are read off its input, where that has them too."""
    inside = set(layer.nodes)
    for node in graph:
        value = node.inputs[0] if is_op(node, "Shape", "Size") else None
        if value is None or node in inside or value.producer() not in inside or value is layer.hidden_out:
            continue
        dims = dims_of(value)
        if dims is not None and None not in dims and dims == dims_of(layer.hidden_in):
            node.replace_input_with(0, layer.hidden_in)


def _remove_caches(graph: ir.Graph, layer: Layer, kept: Layer | None, done: Removal) -> None:
    outputs = set(layer.cache_outputs)
    graph.outputs[:] = [v for v in graph.outputs if v not in outputs]
    done.outputs += [v.name or "" for v in layer.cache_outputs]
    inside = set(layer.nodes)
    for number, value in enumerate(layer.cache_inputs):
        sizes = [(user, at) for user, at in value.uses() if is_op(user, "Shape", "Size") and user not in inside]
        if sizes and kept is None:
            continue  # its size is still asked for, and no other cache has it
        for user, at in sizes:
            assert kept is not None
            user.replace_input_with(at, kept.cache_inputs[number])
        done.inputs.append(value.name or "")


def drop_inputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Takes inputs out of the interface of a graph; only those that nothing reads."""
    graph.inputs[:] = [v for v in graph.inputs if v.name not in names or v.uses() or v.is_graph_output()]


__all__ = ["KINDS", "Unit", "drop_inputs", "problem", "remove", "require_one", "stacks_of", "units_of"]
