"""Names of a captured model as its user knows them: inputs, outputs, symbolic dims, weights; metadata kept short."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch.export.graph_signature import ConstantArgument, OutputKind, SymIntArgument, TensorArgument

from planish.frontends.torch_errors import user_source
from planish.frontends.torch_inputs import Call
from planish.frontends.torch_shapes import DynamicShapes
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.spec import RANGE

_STACK = "pkg.torch.onnx.stack_trace"
_DROPPED = ("pkg.torch.onnx.fx_node", _STACK, "namespace")
SOURCE = "planish.source"


@dataclass(frozen=True)
class InputLeaf:
    """A tensor input: its leaf number in the call, its name in the model, its dims as torch's expressions."""

    leaf: int
    name: str
    dims: tuple[Any, ...]


@dataclass(frozen=True)
class Signature:
    """How leaves of a call and of its result map to names.

    Attributes:
        inputs: the tensor inputs, in order.
        outputs: leaf number in forward's result → output name; None, numbers and the like are left out.
        symbols: torch's symbol name → symbol name in the model.
        ranges: torch's symbol name → (smallest, largest or None).
    """

    inputs: tuple[InputLeaf, ...]
    outputs: dict[int, str]
    symbols: dict[str, str]
    ranges: dict[str, tuple[int, int | None]]

    def range_of(self, expression: Any) -> tuple[int, int | None]:
        """Smallest and largest size of a dim that depends on one symbol; (1, None) where nothing is known."""
        if isinstance(expression, int) or len(expression.free_symbols) != 1:
            return 1, None
        (symbol,) = expression.free_symbols
        low, high = self.ranges.get(str(symbol), (1, None))

        def at(size: int) -> int | None:
            return _bound(expression.subs(symbol, size))

        # A derived dim such as 8 * Dim("w") grows with its symbol; one that does not is left unlimited.
        if None in (one := at(1), two := at(2)) or (one or 0) >= (two or 0):
            return 1, None
        # Torch's lower bound 2 says only how it traces, not what the module takes.
        return (at(low) or 1) if low > 2 else 1, None if high is None else at(high)


def read_signature(exported: torch.export.ExportedProgram, call: Call, shapes: DynamicShapes) -> Signature:
    """Reads names and symbols off an exported program.

    Raises:
        InputError: two names that the user gave are always the same size in the module.
    """
    values = {n.name: n.meta.get("val") for n in exported.graph_module.graph.nodes if n.op == "placeholder"}
    inputs = []
    specs = [s for s in exported.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    for number, (spec, leaf) in enumerate(zip(specs, call.leaves, strict=True)):
        if isinstance(spec.arg, TensorArgument):
            dims = tuple(d.node.expr if isinstance(d, torch.SymInt) else int(d) for d in values[spec.arg.name].shape)
            inputs.append(InputLeaf(number, spec.arg.name, dims))
        elif isinstance(leaf, torch.Tensor):
            raise UnsupportedError(f"input {number} became a {type(spec.arg).__name__}; planish takes tensors.")
    symbols = _symbols(inputs, shapes)
    ranges = {}
    for symbol, span in exported.range_constraints.items():
        ranges[str(symbol)] = (_bound(span.lower) or 0, _bound(span.upper))
    return Signature(tuple(inputs), _outputs(exported), symbols, ranges)


def _bound(value: Any) -> int | None:
    """An end of a range; torch's and sympy's infinities have no integer value."""
    return int(value) if isinstance(value, int) or getattr(value, "is_Integer", False) else None


def _symbols(inputs: list[InputLeaf], shapes: DynamicShapes) -> dict[str, str]:
    names: dict[str, str] = {}
    for item in inputs:
        for dim, expression in enumerate(item.dims):
            given = shapes.names.get(item.leaf, {}).get(dim)
            if isinstance(expression, int) or not expression.is_Symbol or given is None:
                continue
            known = names.setdefault(str(expression), given)
            if known != given:
                raise InputError(
                    f"dynamic_shapes: '{known}' and '{given}' are always the same size in this module; "
                    "give them one name."
                )
    taken = set(names.values())
    for item in inputs:
        for dim, expression in enumerate(item.dims):
            for symbol in () if isinstance(expression, int) else sorted(map(str, expression.free_symbols)):
                given = shapes.names.get(item.leaf, {}).get(dim)
                name = f"{given}_base" if given else f"{item.name}_dim_{dim}"
                name = given if given in shapes.roots else name
                if symbol not in names and name not in taken:
                    names[symbol] = name
                    taken.add(name)
    return names


def _outputs(exported: torch.export.ExportedProgram) -> dict[int, str]:
    names = list(leaf_names(exported.call_spec.out_spec))
    specs = [s for s in exported.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    outputs: dict[int, str] = {}
    for number, (spec, name) in enumerate(zip(specs, names, strict=True)):
        if isinstance(spec.arg, TensorArgument | SymIntArgument) and not isinstance(spec.arg, ConstantArgument):
            outputs[number] = name
    return outputs


def leaf_names(spec: Any) -> list[str]:
    """Names of the leaves of forward's result: fields of a ModelOutput, dict or named tuple, else ``output_<i>``.

    What is nested is joined by ``_``: ``past_key_values_0_1``.
    """
    found: list[list[str]] = []

    def walk(node: Any, path: list[str]) -> None:
        if node.is_leaf():
            found.append(path)
            return
        for key, child in zip(_keys(node), node.children(), strict=True):
            walk(child, [*path, key])

    walk(spec, [])
    names: list[str] = []
    for path in found:
        name = re.sub(r"\W", "_", "_".join(path)) or "0"
        name = f"output_{name}" if name[0].isdigit() else name
        while name in names:
            name += "_"
        names.append(name)
    return names


def _keys(node: Any) -> list[str]:
    """Names of a container's children."""
    count = len(node.children())
    context, kind = node.context, node.type
    if hasattr(context, "_fields"):
        return [str(f) for f in context._fields]
    if hasattr(kind, "_fields"):
        return [str(f) for f in kind._fields]
    keys = context
    if isinstance(keys, list | tuple) and len(keys) == 2 and isinstance(keys[0], list | tuple):
        keys = keys[-1] if len(keys[-1]) == count else keys[0]
    if isinstance(keys, list | tuple) and len(keys) == count and all(isinstance(k, str | int) for k in keys):
        return [str(k) for k in keys]
    return [str(i) for i in range(count)]


def apply_names(model: ir.Model, signature: Signature) -> None:
    """Names inputs, outputs and symbolic dims of an exported model, in place."""
    graph = model.graph
    _rename_dims(model, signature.symbols)
    taken = {v.name: v for v in _values(graph)}
    for value, item in zip(graph.inputs, signature.inputs, strict=True):
        _free(taken, item.name, value)
        value.name = item.name
        for dim, expression in enumerate(item.dims):
            low, high = signature.range_of(expression)
            if high is not None or low > 1:
                value.metadata_props[f"{RANGE}.{dim}"] = f"{low}..{'' if high is None else high}"
    seen: set[int] = set()
    for index, name in enumerate(signature.outputs.values()):
        value = graph.outputs[index]
        if id(value) in seen or value.is_graph_input() or value.is_initializer():
            # An output that is an input, a weight or another output: a runtime wants a node of its own.
            node = ir.node("Identity", [value])
            copy = node.outputs[0]
            copy.shape, copy.type = value.shape, value.type
            graph.append(node)
            graph.outputs[index] = value = copy
        seen.add(id(value))
        _free(taken, name, value)
        value.name = name
    del graph.outputs[len(signature.outputs) :]


def _free(taken: dict[str | None, ir.Value], name: str, owner: ir.Value) -> None:
    other = taken.get(name)
    if other is not None and other is not owner:
        fresh = next(f"{name}_{i}" for i in range(1, 1 << 30) if f"{name}_{i}" not in taken)
        other.name = fresh
        taken[fresh] = other
    taken[name] = owner


def _values(graph: ir.Graph) -> list[ir.Value]:
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        values.extend(node.outputs)
    return values


def _rename_dims(model: ir.Model, symbols: dict[str, str]) -> None:
    if not symbols:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b")
    for value in _values(model.graph):
        if value.shape is None or all(isinstance(d, int) for d in value.shape):
            continue
        dims = [
            d if isinstance(d, int) or d.value is None else pattern.sub(lambda m: symbols[m[1]], d.value)
            for d in value.shape
        ]
        value.shape = ir.Shape(dims)


def share_weights(model: ir.Model) -> None:
    """Makes initializers NumPy views of torch's memory, and one initializer of weights that are tied."""
    graph = model.graph
    owner: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        raw = getattr(tensor, "raw", None)
        if tensor is None or not isinstance(raw, torch.Tensor):
            continue
        key = (raw.data_ptr(), tuple(raw.shape), raw.stride(), raw.dtype)
        if raw.numel() and key in owner and not value.is_graph_output():
            value.replace_all_uses_with(owner[key])
            del graph.initializers[name]
            continue
        owner[key] = value
        value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)


def shorten_metadata(model: ir.Model) -> None:
    """Replaces stack traces by the one source line that matters: they are larger than the graph itself."""
    for node in model.graph.all_nodes():
        source = user_source(node.metadata_props.get(_STACK))
        for key in _DROPPED:
            node.metadata_props.pop(key, None)
        if source:
            node.metadata_props[SOURCE] = _package_path(source)


def _package_path(source: str) -> str:
    """The path from the package on: a model file must not tell where it was made."""
    path = source.replace("\\", "/")
    for mark in ("site-packages/", "dist-packages/"):
        if mark in path:
            return path.split(mark)[-1]
    return "/".join(path.split("/")[-2:])
