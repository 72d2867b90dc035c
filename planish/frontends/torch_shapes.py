"""Dynamic shapes of a torch module: what a user may write, as what torch.export takes; and sizes to try."""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from planish.frontends.torch_inputs import Call, resize
from planish.ir.errors import InputError, unknown

_FORMS = 'a dict {dim: "name"}, a list with one entry a dim, or None'


@dataclass
class DynamicShapes:
    """Dynamic dims in torch.export's form.

    Attributes:
        spec: tree in the structure of the call's arguments by parameter name; None when everything is static.
        names: leaf number → dim → symbol name, or None for an unnamed dynamic dim.
        roots: the symbols from which dims such as ``8 * Dim("w")`` are derived.
    """

    spec: dict[str, Any] | None = None
    names: dict[int, dict[int, str | None]] = field(default_factory=dict)
    roots: set[str] = field(default_factory=set)

    @property
    def dynamic(self) -> bool:
        return any(self.names.values())


def normalize(call: Call, dynamic_shapes: Any) -> DynamicShapes:
    """Reads `dynamic_shapes` in torch.export's format or one of the shorter ones.

    Shorter ones: a string names a symbol (equal names are one symbol), parameters left out are static, a negative
    dim counts from the end, and ``{0: "batch", 1: "sequence"}`` alone holds for every tensor that has these dims.

    Raises:
        InputError: a parameter or a dim that does not exist, or a form that is neither.
    """
    if dynamic_shapes is None:
        return DynamicShapes()
    reader = _Reader(call)
    arguments = call.arguments
    if isinstance(dynamic_shapes, tuple | list):
        if len(dynamic_shapes) > len(arguments):
            raise InputError(
                f"dynamic_shapes has {len(dynamic_shapes)} entries, but only {len(arguments)} inputs were given: "
                f"{', '.join(arguments)}."
            )
        dynamic_shapes = dict(zip(arguments, dynamic_shapes, strict=False))
    if not isinstance(dynamic_shapes, Mapping):
        raise InputError(
            f"dynamic_shapes is a {type(dynamic_shapes).__name__}; write "
            f'{{"{next(iter(arguments))}": {{0: "batch"}}}} (parameter → dim → name).'
        )
    if dynamic_shapes and all(isinstance(key, int) for key in dynamic_shapes):
        dynamic_shapes = {name: _Everywhere(dynamic_shapes) for name in arguments}
    else:
        for name in dynamic_shapes:
            if name not in arguments:
                raise unknown("input in dynamic_shapes", str(name), arguments)
    spec = {name: reader.read(value, dynamic_shapes.get(name), name) for name, value in arguments.items()}
    return DynamicShapes(spec, reader.names, reader.roots)


def _as_children(structure: Any, leaves: Iterator[Any]) -> Any:
    """Shapes of the leaves of a class of its own, such as a key-value cache, nested as its children are."""
    if structure.is_leaf():
        return next(leaves)
    children = [_as_children(child, leaves) for child in structure.children()]
    if structure.type is dict:
        return dict(zip(structure.context, children, strict=True))
    return tuple(children) if structure.type is tuple else children


class _Everywhere(dict[int, Any]):
    """A {dim: name} that holds for every tensor that has the dim."""


class _Reader:
    def __init__(self, call: Call) -> None:
        # A tensor that is given twice is two leaves: they are told apart by the order in which they are read.
        self._numbers: dict[int, list[int]] = {}
        for number, leaf in enumerate(call.leaves):
            if isinstance(leaf, torch.Tensor):
                self._numbers.setdefault(id(leaf), []).append(number)
        self.names: dict[int, dict[int, str | None]] = {}
        self.roots: set[str] = set()
        self._dims: dict[str, Any] = {}

    def read(self, value: Any, spec: Any, where: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, spec, where)
        if isinstance(value, tuple | list):
            if spec is None or isinstance(spec, _Everywhere):
                return type(value)(self.read(v, spec, f"{where}[{i}]") for i, v in enumerate(value))
            if not isinstance(spec, tuple | list) or len(spec) != len(value):
                raise InputError(f"dynamic_shapes['{where}'] must be a list of {len(value)} entries, one a tensor.")
            pairs = zip(value, spec, strict=True)
            return type(value)(self.read(v, s, f"{where}[{i}]") for i, (v, s) in enumerate(pairs))
        if isinstance(value, dict):
            if spec is not None and not isinstance(spec, Mapping):
                raise InputError(
                    f"dynamic_shapes['{where}'] must be a dict with the keys {', '.join(map(str, value))}."
                )
            inner = {k: spec if isinstance(spec, _Everywhere) else (spec or {}).get(k) for k in value}
            return {key: self.read(v, inner[key], f"{where}.{key}") for key, v in value.items()}
        leaves, structure = pytree.tree_flatten(value)
        if structure.is_leaf():
            return None
        if spec is None or isinstance(spec, _Everywhere):
            spec = [spec] * len(leaves)
        if not isinstance(spec, tuple | list) or len(spec) != len(leaves):
            raise InputError(f"dynamic_shapes['{where}'] must be a list of {len(leaves)} entries, one a tensor.")
        read = [self.read(v, s, f"{where}[{i}]") for i, (v, s) in enumerate(zip(leaves, spec, strict=True))]
        return _as_children(structure, iter(read))

    def _tensor(self, tensor: torch.Tensor, spec: Any, where: str) -> dict[int, Any] | None:
        number = self._numbers[id(tensor)].pop(0)
        if spec is None:
            return None
        if isinstance(spec, tuple | list):
            if len(spec) != tensor.dim():
                raise InputError(
                    f"dynamic_shapes['{where}'] has {len(spec)} entries, but the input has {tensor.dim()} dims "
                    f"{list(tensor.shape)}."
                )
            spec = dict(enumerate(spec))
        if not isinstance(spec, Mapping):
            raise InputError(f"dynamic_shapes['{where}'] is a {type(spec).__name__}; write {_FORMS}.")
        result: dict[int, Any] = {}
        for dim, what in spec.items():
            if isinstance(spec, _Everywhere) and not -tensor.dim() <= dim < tensor.dim():
                continue
            if not isinstance(dim, int) or not -tensor.dim() <= dim < tensor.dim():
                raise InputError(
                    f"dynamic_shapes['{where}']: dim {dim!r} does not exist; the input has {tensor.dim()} dims "
                    f"{list(tensor.shape)}."
                )
            dim %= tensor.dim()
            read = self._dim(what, int(tensor.shape[dim]), f"'{where}' dim {dim}")
            if read is not None:
                result[dim] = read
                root = getattr(read, "root", None)
                name = what if isinstance(what, str) else getattr(root or read, "__name__", None)
                if root is not None and name is not None:
                    self.roots.add(name)
                self.names.setdefault(number, {})[dim] = name
        return result or None

    def _dim(self, what: Any, size: int, where: str) -> Any:
        if what is None or what is Dim.STATIC:
            return None
        if what is Dim.AUTO or what is Dim.DYNAMIC:
            return what
        if isinstance(what, str):
            if not what.isidentifier() or keyword.iskeyword(what):
                raise InputError(f"dynamic_shapes: {where}: '{what}' is not a name; use letters, digits and _.")
            # torch infers the range of a DYNAMIC dim by itself. Dims of one name are separate symbols to torch;
            # that they are equal is the user's promise, and the exporter merges them by name afterwards.
            return self._dims.get(what, Dim.DYNAMIC)
        if isinstance(what, bool) or not (isinstance(what, int) or hasattr(what, "__name__")):
            raise InputError(
                f"dynamic_shapes: {where}: {what!r} is neither a name, a torch.export.Dim, Dim.AUTO nor None."
            )
        if isinstance(what, int):
            if what != size:
                raise InputError(f"dynamic_shapes: {where} is fixed to {what}, but the example has {size}.")
            return None
        lowest, highest = getattr(what, "min", None), getattr(what, "max", None)
        if isinstance(lowest, int) and isinstance(highest, int) and not lowest <= size <= highest:
            raise InputError(
                f"dynamic_shapes: {where}: the example has {size}, outside of "
                f"{what.__name__}'s range {lowest} to {highest}."
            )
        self._dims.setdefault(what.__name__, what)
        return what


def grow(call: Call, shapes: DynamicShapes) -> Call:
    """The call to trace with: dynamic dims of size 0 or 1 become 2, since torch.export takes 0 and 1 for constants."""
    leaves = call.leaves
    small = {
        name for number, dims in shapes.names.items() for dim, name in dims.items() if leaves[number].shape[dim] < 2
    }
    sizes = {
        number: {d: 2 for d, n in dims.items() if n in small and leaves[number].shape[d] < 2}
        for number, dims in shapes.names.items()
    }
    return resize(call, {number: dims for number, dims in sizes.items() if dims})
