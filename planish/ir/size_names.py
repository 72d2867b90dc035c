"""Names that onnx's inference makes up for sizes it can not express, kept equal where sizes are proved equal.

onnx numbers them anew in every run and leaves the name that a value has, so that two names of one size, from two
runs, would never meet. Here a run starts without them, its names get numbers of their own, and what a value was
called before and what it is called now are one size.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

MADE_UP = "unk__"
Size = int | str


def is_made_up(size: object) -> bool:
    """Whether `size` is a name that nobody gave."""
    return isinstance(size, str) and size.startswith(MADE_UP)


class SizeNames:
    """The made-up names of one run of inference over one model."""

    def __init__(self, model: ir.Model, proto: onnx.ModelProto) -> None:
        """Takes the made-up names out of `proto`, which is `model`; where onnx has no rule they stay."""
        self._parents: dict[str, Size] = {}
        self._kept: set[str] = set()
        self._forget(proto.graph)
        numbers = [_number(name) for value in _values(model) for name in _names(value)]
        self._first = max(numbers, default=-1) + 1

    def _forget(self, graph: onnx.GraphProto) -> None:
        own = {name for node in graph.node if node.domain for name in node.output} | {v.name for v in graph.input}
        for info in (*graph.input, *graph.output, *graph.value_info):
            for dim in info.type.tensor_type.shape.dim:
                if is_made_up(dim.dim_param):
                    if info.name in own:
                        self._kept.add(dim.dim_param)
                    else:
                        dim.ClearField("value")
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    self._forget(attribute.g)

    def renamed(self, name: str | None) -> str | None:
        """A name that came out of this run, as one that the model has nowhere else."""
        if name is None or not is_made_up(name) or name in self._kept:
            return name
        number = _number(name)
        return name if number < 0 else f"{MADE_UP}{self._first + number}"

    def same(self, old: Size | None, new: Size | None) -> None:
        """Notes that `old` and `new` are one size, if one of them is a made-up name."""
        if old is None or new is None:
            return
        a, b = self._root(old), self._root(new)
        if a == b:
            return
        if is_made_up(a) and (not is_made_up(b) or _number(b) < _number(a)):
            self._parents[str(a)] = b
        elif is_made_up(b):
            self._parents[str(b)] = a

    def _root(self, size: Size) -> Size:
        path = []
        while isinstance(size, str) and size in self._parents:
            path.append(size)
            size = self._parents[size]
        for name in path:
            self._parents[name] = size
        return size

    def apply(self, model: ir.Model) -> None:
        """Gives every value of `model` the one name or number of its sizes."""
        if not self._parents:
            return
        for value in _values(model):
            if not any(name in self._parents for name in _names(value)):
                continue
            assert value.shape is not None
            sizes = [d if isinstance(d, int) else d.value for d in value.shape]
            value.shape = ir.Shape([self._root(s) if isinstance(s, str) else s for s in sizes])


def _number(name: object) -> int:
    tail = str(name)[len(MADE_UP) :]
    return int(tail) if tail.isdecimal() else -1


def _names(value: ir.Value) -> Iterator[str]:
    for dim in value.shape or ():
        if isinstance(dim, ir.SymbolicDim) and is_made_up(dim.value):
            yield str(dim.value)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        for node in graph:
            yield from node.outputs
