"""simplify-shapes: shape arithmetic by numbers and names instead of by nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_tensor, dims_of, is_op, subgraphs_of
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.canonicalize.editing import Editor
from planish.passes.canonicalize.facts import SHAPE_OPS, Facts, Item, Vector, same_item
from planish.passes.registry import register

_MIN_OPSET = 15  # Shape has start and end


@register
@dataclass(frozen=True)
class SimplifyShapes(ExactPass):
    """Computes with the known sizes of shapes.

    * A vector of sizes that are all known becomes a constant.
    * A single symbolic size is read by one ``Shape(x, start=i, end=i+1)`` from the input of the graph that has a
      size of this name, or else from the first value read, so that equal sizes have one producer.
    * A Reshape to computed sizes gets a constant target of numbers, 0 (copied) and at most one -1, where that is
      right for every size, also for an empty batch.
    """

    name: ClassVar[str] = "simplify-shapes"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        editor = Editor(program, self.name)
        for model in program.entries.values():
            if model.opset_imports.get("", 1) >= _MIN_OPSET:
                _Simplifier(editor, Facts()).graph(model.graph)
        return editor.result()


@dataclass
class _Simplifier:
    editor: Editor
    facts: Facts
    # Names of sizes hold within one graph: the body of a Loop may use a name of the outside for another size.
    homes: dict[str, tuple[ir.Value, int]] = field(default_factory=dict)
    readers: dict[tuple[str, bool], ir.Value] = field(default_factory=dict)
    axes: ir.Value | None = None

    def graph(self, graph: ir.Graph) -> None:
        for value in graph.inputs:
            if isinstance(value.type, ir.TensorType):
                for axis, dim in enumerate(dims_of(value) or ()):
                    if isinstance(dim, str):
                        self.homes.setdefault(dim, (value, axis))
        for node in graph:
            for inner in subgraphs_of(node) if node.attributes else ():
                _Simplifier(self.editor, self.facts).graph(inner)
            if node.domain:
                continue
            found = self.facts.visit(node) if node.op_type in SHAPE_OPS else None
            if node.op_type == "Shape":
                self._settle(node.inputs[0])
            try:
                if found is not None and self._replace(node, found):
                    self.editor.fired += 1
                elif node.op_type == "Reshape":
                    self.editor.fired += self._reshape(node)
            except Decline as decline:
                self.editor.decline(node, decline.reason)

    def _settle(self, value: ir.Value | None) -> None:
        """Lets sizes that no input has be read from the first value whose sizes are read."""
        for axis, dim in enumerate(dims_of(value) or ()):
            if isinstance(dim, str) and value is not None:
                self.homes.setdefault(dim, (value, axis))

    def _replace(self, node: ir.Node, found: Vector) -> bool:
        old = node.outputs[0]
        if not old.uses() or old.is_graph_output() or all(constant_tensor(v) is not None for v in node.inputs):
            return False  # dead, part of the interface, or for fold-constants
        ints = found.ints
        if ints is not None:
            new = self._number(node, ints, found.scalar)
        elif len(found.items) == 1 and isinstance(found.items[0], str):
            new = self._symbol(node, found.items[0], found.scalar)
        else:
            new = None
        if new is None:
            return False
        self.editor.replace(old, new)
        self.editor.remove(node)
        return True

    def _number(self, node: ir.Node, ints: tuple[int, ...], scalar: bool) -> ir.Value | None:
        dtype = node.outputs[0].dtype or (ir.DataType.INT64 if node.op_type in ("Shape", "Size") else None)
        if dtype is None or node.graph is None:
            return None
        array = np.array(ints, dtype=dtype.numpy()).reshape(() if scalar else -1)
        return self.editor.constant(node.graph, array, node.outputs[0].name or "sizes")

    def _symbol(self, node: ir.Node, symbol: str, scalar: bool) -> ir.Value | None:
        """The one reader of a size; None where `node` is it, or where it would have another type."""
        old = node.outputs[0]
        if old.dtype != ir.DataType.INT64 or symbol not in self.homes:
            return None
        if scalar and all(is_op(user, "Unsqueeze") for user in old.consumers()):
            return None  # these become readers themselves, and `node` is dead then
        home, axis = self.homes[symbol]
        key = (symbol, scalar)
        if key in self.readers:
            return self.readers[key]
        if _reads(node, home, axis, scalar):
            self.readers[key] = node.outputs[0]
            return None
        if scalar:
            vector = self.readers.get((symbol, False)) or self._reader(node, symbol, home, axis)
            if self.axes is None:
                self.axes = self.editor.constant(node.graph, np.array([0], np.int64), "axes")  # type: ignore[arg-type]
            new = self.editor.node(node, "Squeeze", [vector, self.axes])
            new.type, new.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([])
            self.facts.visit(new.producer())  # type: ignore[arg-type]
            self.readers[key] = new
            return new
        return self._reader(node, symbol, home, axis)

    def _reader(self, node: ir.Node, symbol: str, home: ir.Value, axis: int) -> ir.Value:
        new = self.editor.node(node, "Shape", [home], {"start": axis, "end": axis + 1})
        new.type, new.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        self.facts.visit(new.producer())  # type: ignore[arg-type]
        self.readers[(symbol, False)] = new
        return new

    def _reshape(self, node: ir.Node) -> bool:
        if len(node.inputs) < 2 or constant_tensor(node.inputs[1]) is not None:
            return False
        target = self.facts.vector(node.inputs[1])
        if target is None or target.scalar:
            raise Decline("the sizes that the tensor is reshaped to are not known")
        source, output = dims_of(node.inputs[0]), dims_of(node.outputs[0])
        keeps_zeros = bool(node.attributes.get_int("allowzero", 0))
        items = _inferred(source, target.items, keeps_zeros)
        sizes, keeps_zeros = _target(source, items, output, keeps_zeros)
        _name(node.outputs[0], source, items, keeps_zeros)
        assert node.graph is not None
        new = self.editor.constant(node.graph, np.array(sizes, np.int64), f"{node.name}_sizes")
        node.replace_input_with(1, new)
        if not keeps_zeros:
            node.attributes.pop("allowzero", None)
        self.editor.mark(node, [node])
        return True


def _reads(node: ir.Node, home: ir.Value, axis: int, scalar: bool) -> bool:
    """Whether `node` has the one form in which a size is read."""
    if scalar:
        inner = node.inputs[0].producer() if is_op(node, "Squeeze") and node.inputs[0] is not None else None
        return inner is not None and _reads(inner, home, axis, False)
    attributes = node.attributes
    return (
        is_op(node, "Shape")
        and node.inputs[0] is home
        and attributes.get_int("start", 0) == axis
        and attributes.get_int("end", None) == axis + 1
    )


def _inferred(source: tuple[Item, ...] | None, items: tuple[Item, ...], keeps_zeros: bool) -> tuple[Item, ...]:
    """`items` with a -1 replaced by the size that it stands for, if the others leave one number or one name of it."""
    if source is None or items.count(-1) != 1 or None in source or (keeps_zeros and 0 in items):
        return items
    others = [source[i] if item == 0 and i < len(source) else item for i, item in enumerate(items) if item != -1]
    rest = [i for i in source if isinstance(i, str)]
    for item in others:
        if isinstance(item, str):
            if item not in rest:
                return items
            rest.remove(item)
    known = [[i for i in sizes if isinstance(i, int)] for sizes in (source, others)]
    total, given = math.prod(known[0]), math.prod(known[1])
    if None in others or given < 1 or total < 1 or total % given:
        return items
    found: list[Item] = [*rest, *([total // given] if total > given or not rest else [])]
    # A size of zero among the others is refused at run time, so that the -1 has this size wherever there is a result.
    return tuple(found[0] if item == -1 else item for item in items) if len(found) == 1 else items


def _name(value: ir.Value, source: tuple[Item, ...] | None, items: tuple[Item, ...], keeps_zeros: bool) -> None:
    """Lets a result that is no output of the graph have the names of the sizes it is reshaped to."""
    old = dims_of(value)
    if value.is_graph_output() or (old is not None and len(old) != len(items)):
        return
    new: list[Item] = []
    for axis, item in enumerate(items):
        if item == 0 and not keeps_zeros:
            item = source[axis] if source is not None and axis < len(source) else None
        before = old[axis] if old is not None else None
        new.append(before if item is None or item == -1 or isinstance(before, int) else item)
    if tuple(new) != old:
        value.shape = ir.Shape(new)


def _target(
    source: tuple[Item, ...] | None, items: tuple[Item, ...], output: tuple[Item, ...] | None, keeps_zeros: bool
) -> tuple[list[int], bool]:
    """The constant target of a Reshape from `source` to `items`, and whether its zeros are sizes (allowzero).

    Raises:
        Decline: no constant says it. A -1 next to a copied size is not used: with an empty batch it would have
            no answer.
    """
    explicit_zero = keeps_zeros and 0 in items
    sizes: list[int | None] = []
    for axis, item in enumerate(items):
        known = output[axis] if output is not None and len(output) == len(items) else None
        size = item if isinstance(item, int) else known if isinstance(known, int) and known > 0 else None
        if size is None and not explicit_zero and source is not None and axis < len(source):
            copied = same_item(item, source[axis]) or same_item(known, source[axis])
            size = 0 if copied else None
        sizes.append(size)
    open_axes = [axis for axis, size in enumerate(sizes) if size is None]
    if len(open_axes) > 1:
        raise Decline(f"{len(open_axes)} of the {len(sizes)} sizes are neither known nor copied from the input")
    if open_axes:
        if any(s is not None and s < 1 for s in sizes):
            raise Decline("one size is open next to a copied or unknown one: with an empty batch it has no answer")
        sizes[open_axes[0]] = -1
    return [s for s in sizes if s is not None], explicit_zero
