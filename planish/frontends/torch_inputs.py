"""Example inputs of a torch module: bound to its forward, flattened, and resized to other sizes of dynamic dims."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from planish.ir.errors import InputError, did_you_mean

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Call:
    """One call of a module's forward.

    Attributes:
        args: positional arguments; used only when forward takes ``*args`` or positional-only parameters.
        kwargs: keyword arguments, in the order of forward's parameters.
        arguments: the same by parameter, as ``inspect.BoundArguments`` groups them.
        signature: forward's signature, in which each input that ``**kwargs`` takes is a parameter of its own.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: dict[str, Any]
    signature: inspect.Signature

    @property
    def leaves(self) -> list[Any]:
        """Tensors and scalars in the order in which torch.export numbers them."""
        return pytree.tree_leaves((self.args, self.kwargs))  # type: ignore[no-any-return]

    def replace(self, leaves: Sequence[Any]) -> Call:
        """The same call with other leaves."""
        spec = pytree.tree_structure((self.args, self.kwargs))
        args, kwargs = pytree.tree_unflatten(list(leaves), spec)
        return Call(args, kwargs, self.arguments, self.signature)

    def clone(self) -> Call:
        """The same call on tensors of its own, so that a forward that writes to its inputs leaves the user's alone."""
        return self.replace([x.detach().clone() if isinstance(x, torch.Tensor) else x for x in self.leaves])


def bind(module: torch.nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None = None) -> Call:
    """Binds example inputs to the parameters of `module.forward`.

    Args:
        module: the module whose forward is called.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
            NumPy arrays stand for tensors; None, numbers and strings are constants of the captured graph.
        kwargs: further keyword arguments.

    Raises:
        InputError: the arguments do not fit forward, a value is of a kind that can not be an input,
            or a tensor is not on the CPU.
    """
    signature = inspect.signature(module.forward)
    named: dict[str, Any] = dict(kwargs or {})
    if isinstance(example_inputs, Mapping):
        positional: tuple[Any, ...] = ()
        named = {**example_inputs, **named}
    elif isinstance(example_inputs, tuple | list):
        positional = tuple(example_inputs)
    elif example_inputs is None:
        positional = ()
    else:
        positional = (example_inputs,)
    try:
        signature = _spread(signature, signature.bind(*positional, **named).arguments)
        bound = signature.bind(*positional, **named)
    except TypeError as error:
        raise InputError(_misfit(module, signature, positional, named, error)) from None
    arguments = {name: _to_tensors(name, value) for name, value in bound.arguments.items()}
    if not any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(arguments)):
        raise InputError(
            f"example_inputs hold no tensor; {type(module).__name__}.forward{_short(signature)} needs at least one."
        )
    return _call(signature, arguments)


def _spread(signature: inspect.Signature, arguments: Mapping[str, Any]) -> inspect.Signature:
    """The signature with a keyword parameter for each input that ``**kwargs`` takes."""
    parameters = []
    for name, parameter in signature.parameters.items():
        if parameter.kind == inspect.Parameter.VAR_KEYWORD and arguments.get(name):
            parameters += [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in arguments[name]]
        else:
            parameters.append(parameter)
    return signature.replace(parameters=parameters)


def _call(signature: inspect.Signature, arguments: dict[str, Any]) -> Call:
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    starred = {name for name in arguments if kinds[name] == inspect.Parameter.VAR_POSITIONAL and arguments[name]}
    by_position = bool(starred) or any(kinds[n] == inspect.Parameter.POSITIONAL_ONLY for n in arguments)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, value in arguments.items():
        if kinds[name] == inspect.Parameter.VAR_POSITIONAL:
            args.extend(value)
        elif by_position and kinds[name] != inspect.Parameter.KEYWORD_ONLY:
            args.append(value)
        else:
            kwargs[name] = value
    return Call(tuple(args), kwargs, arguments, signature)


def _misfit(
    module: torch.nn.Module,
    signature: inspect.Signature,
    positional: tuple[Any, ...],
    named: dict[str, Any],
    error: TypeError,
) -> str:
    hint = next((did_you_mean(n, signature.parameters) for n in named if n not in signature.parameters), "")
    given = [type(x).__name__ for x in positional] + list(named)
    return (
        f"example_inputs ({', '.join(given) or 'none'}) do not fit {type(module).__name__}.forward"
        f"{_short(signature)}: {error}.{hint}"
    )


def _short(signature: inspect.Signature) -> str:
    parts = []
    for name, parameter in signature.parameters.items():
        kind = parameter.kind
        star = "*" * ((kind == inspect.Parameter.VAR_POSITIONAL) + 2 * (kind == inspect.Parameter.VAR_KEYWORD))
        default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
        parts.append(star + name + default)
    shown = parts[:10] + (["…"] if len(parts) > 10 else [])
    return f"({', '.join(shown)})"


def _to_tensors(name: str, value: Any) -> Any:
    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic):
            return torch.from_numpy(np.ascontiguousarray(leaf).copy()).reshape(np.shape(leaf))
        if isinstance(leaf, torch.Tensor):
            if leaf.device.type != "cpu":
                raise InputError(
                    f"example input '{name}' is on device '{leaf.device}'; planish captures on the CPU: "
                    f"pass {name}.cpu()."
                )
            return leaf
        if isinstance(leaf, _CONSTANTS):
            return leaf
        raise InputError(
            f"example input '{name}' holds a {type(leaf).__name__}; pass tensors, NumPy arrays, "
            "numbers, None, or tuples, lists and dicts of them."
        )

    return pytree.tree_map(convert, value)


def resize(call: Call, sizes: Mapping[int, Mapping[int, int]]) -> Call:
    """Resizes tensors of a call along some dims, keeping every value one that the example already holds.

    A longer dim repeats the example, a shorter one is a window of it: ids, positions and masks stay in range.
    The repeated part is rolled along another dim, so that it does not equal the original (masks are not: a mask
    rolled could hide a whole row).

    Args:
        call: the example.
        sizes: leaf number → dim → new size.
    """
    leaves = list(call.leaves)
    at_end = _window_at_end(leaves, sizes)
    for number, dims in sizes.items():
        tensor = leaves[number]
        for dim, size in dims.items():
            tensor = _resize_dim(tensor, dim, size, at_end)
        leaves[number] = tensor.clone()
    return call.replace(leaves)


def _resize_dim(tensor: torch.Tensor, dim: int, size: int, at_end: bool) -> torch.Tensor:
    old = tensor.shape[dim]
    if size <= old:
        return tensor.narrow(dim, old - size if at_end else 0, size)
    if old == 0:
        shape = list(tensor.shape)
        shape[dim] = size
        return torch.zeros(shape, dtype=tensor.dtype)
    other = max((d for d in range(tensor.dim()) if d != dim), key=lambda d: tensor.shape[d], default=None)
    roll = other is not None and not is_mask(tensor)
    copies = [tensor] + [torch.roll(tensor, k, dims=other) if roll else tensor for k in range(1, -(-size // old))]
    return torch.cat(copies, dim=dim).narrow(dim, 0, size)


def is_mask(tensor: torch.Tensor) -> bool:
    """Bool, or integers that are all 0 or 1."""
    if tensor.dtype == torch.bool:
        return True
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return False
    return bool(((tensor == 0) | (tensor == 1)).all())


def _window_at_end(leaves: Sequence[Any], sizes: Mapping[int, Mapping[int, int]]) -> bool:
    """Whether a shorter window must be the last part: the first part would hide a whole row of a left-padded mask."""
    for number, dims in sizes.items():
        tensor = leaves[number]
        if not is_mask(tensor) or not bool(tensor.any()):
            continue
        for dim, size in dims.items():
            if 0 < size < tensor.shape[dim] and tensor.dim() > 1 and dim == tensor.dim() - 1:
                seen = tensor.narrow(dim, 0, size).any(dim=dim)
                if bool((tensor.any(dim=dim) & ~seen).any()):
                    return True
    return False
