"""The captured program against the eager module: at the example inputs and at a second shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from planish.frontends.torch_errors import first_line
from planish.frontends.torch_export import eval_mode, quiet
from planish.frontends.torch_inputs import Call, resize
from planish.frontends.torch_names import Signature
from planish.frontends.torch_shapes import DynamicShapes
from planish.ir.compare import compare_outputs, tolerance, worst_of
from planish.ir.errors import InputError
from planish.ir.ledger import ErrorStats
from planish.ir.program import Program

LIMIT = 1e-4
#: Runs a program on arrays by input name; returns arrays by output name.
Run = Callable[[Program, dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class EagerCheck:
    """Runs a module and its captured program on the same inputs and compares the outputs."""

    module: torch.nn.Module
    program: Program
    call: Call
    signature: Signature
    shapes: DynamicShapes

    def __call__(self, run: Run, *, limit: float = LIMIT) -> ErrorStats:
        """Compares at the example inputs and, when shapes are dynamic, at a second shape.

        Args:
            run: how to run a program.
            limit: largest relative L2 error of an output (for half precision, that precision's tolerance).

        Returns:
            the worst error over outputs and shapes.

        Raises:
            InputError: an output is further off than `limit`, or the program fails where the module does not.
        """
        stats = [self._compare(run, self.call, self._eager(self.call), limit, None)]
        second = self._second()
        if second is not None:
            stats.append(self._compare(run, *second, limit, "at the second shape only"))
        return worst_of(stats)

    def arrays(self, call: Call) -> dict[str, np.ndarray]:
        """A call's tensors as arrays by input name."""
        leaves = call.leaves
        return {item.name: to_numpy(leaves[item.leaf]) for item in self.signature.inputs}

    def _compare(self, run: Run, call: Call, expected: dict[str, Any], limit: float, only: str | None) -> ErrorStats:
        inputs = self.arrays(call)
        where = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        hint = (
            "; a size of the example was captured as a constant, or dynamic_shapes names a dim that the module fixes"
            if only
            else ""
        )
        place = f"{only} ({where})" if only else f"at the example inputs ({where})"
        try:
            got = run(self.program, inputs)
        except Exception as error:
            raise InputError(
                f"the program captured from {type(self.module).__name__} fails {place}: {first_line(error)}{hint}."
            ) from error
        stats = compare_outputs(expected, got)
        bound = max(limit, tolerance(expected))
        if stats.relative_l2 <= bound:
            return stats
        again = compare_outputs(expected, self._eager(call))
        if again.relative_l2 > bound:
            raise InputError(
                f"{type(self.module).__name__} is not deterministic: two eager runs on the same inputs differ by "
                f"{again.relative_l2:.2g} relative L2 in output '{again.output}' (limit {bound:.2g}); "
                "remove the random operators from forward."
            )
        if self._fast_path_differs(call, got, bound):
            raise InputError(
                f"{type(self.module).__name__} gives other values on torch's fast path of nn.TransformerEncoder (zeros "
                "where padded) than without it, as captured; build it with enable_nested_tensor=False, or call "
                "torch.backends.mha.set_fastpath_enabled(False) first."
            )
        name = stats.output or ""
        shapes = f"{_shape(expected.get(name))} expected, {_shape(got.get(name))} got"
        raise InputError(
            f"the program captured from {type(self.module).__name__} differs from the module {place}: output '{name}' "
            f"({shapes}) is off by {stats.relative_l2:.3g} relative L2 (limit {bound:.2g}){hint}."
        )

    def _fast_path_differs(self, call: Call, got: dict[str, np.ndarray], bound: float) -> bool:
        """Whether the program equals the module as soon as torch takes no fast path through its encoder layers."""
        if not torch.backends.mha.get_fastpath_enabled():
            return False
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return compare_outputs(self._eager(call), got).relative_l2 <= bound
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    def _eager(self, call: Call) -> dict[str, Any]:
        copy = call.clone()
        with eval_mode(self.module), quiet():
            result = self.module(*copy.args, **copy.kwargs)
        leaves = pytree.tree_leaves(result)
        return {name: to_numpy(leaves[number]) for number, name in self.signature.outputs.items()}

    def _second(self) -> tuple[Call, dict[str, Any]] | None:
        """The example at other sizes that the module itself accepts, and what it gives; None without any to try."""
        failure = ""
        for sizes in candidates(self.signature, self.call):
            call = resize(self.call, sizes)
            try:
                return call, self._eager(call)
            except Exception as error:
                failure = failure or f"{_sizes(self.signature, sizes)}: {first_line(error)}"
        if failure:
            raise InputError(
                f"dynamic_shapes: {type(self.module).__name__} itself fails at every other size that was tried "
                f"({failure}); give the dim its range or multiple, e.g. 32 * torch.export.Dim('h', min=1, max=16)."
            )
        return None


def candidates(signature: Signature, call: Call) -> Iterator[dict[int, dict[int, int]]]:
    """Other sizes of the dynamic dims, as leaf → dim → size, likely ones first.

    All symbols change at once, each within the range that torch.export found; a batch becomes 1 (or 3 when it
    is 1), another dim becomes shorter, and longer when it can not. At last the batch becomes longer too: it may be
    the nodes of a graph, and edges lead to the last of them.
    """
    leaves = call.leaves
    hints = _hints(signature, leaves)
    first = next(iter(hints), None)
    tried: set[tuple[int, ...]] = set()
    for attempt in range(6):
        values: dict[str, int] = {}
        for name, hint in hints.items():
            span = _span(signature, name)
            values[name] = _other(hint, *span, batch=name == first and hint < 64, attempt=attempt)
        key = tuple(values.values())
        if key in tried or key == tuple(hints.values()):
            continue
        tried.add(key)
        sizes = _apply(signature, values, leaves)
        if sizes:
            yield sizes


def _hints(signature: Signature, leaves: list[Any]) -> dict[str, int]:
    """Model symbol → its value in the example, from dims that are a bare symbol, else by solving the dim."""
    hints: dict[str, int] = {}
    for item in signature.inputs:
        for dim, expression in enumerate(item.dims):
            if isinstance(expression, int):
                continue
            for symbol in expression.free_symbols:
                name = signature.symbols.get(str(symbol), str(symbol))
                size = int(leaves[item.leaf].shape[dim])
                if expression.is_Symbol:
                    hints[name] = size
                elif name not in hints and len(expression.free_symbols) == 1:
                    low, high = int(expression.subs(symbol, 0)), int(expression.subs(symbol, 1))
                    if high != low:
                        hints[name] = (size - low) // (high - low)
    return hints


def _span(signature: Signature, name: str) -> tuple[int, int | None]:
    """The range of a model symbol. Torch gives a DYNAMIC dim the lower bound 2 only because it traces that way."""
    spans = [span for s, span in signature.ranges.items() if signature.symbols.get(s, s) == name]
    low = max((s[0] for s in spans), default=0)
    highs = [s[1] for s in spans if s[1] is not None]
    return (1 if low <= 2 else low), (min(highs) if highs else None)


def _other(hint: int, low: int, high: int | None, *, batch: bool, attempt: int) -> int:
    shorter = hint - max(1, hint // 3)
    options = [1, 3, 2, hint + 1] if batch else [shorter, hint // 2, hint + 1, 2 * hint, hint + 2, hint - 1]
    if batch and hint == 1:
        options = [3, 2]
    floor = low if batch else max(low, 2)
    fitting = [o for o in options if o != hint and o >= floor and (high is None or o <= high)]
    if not fitting:
        return hint
    if batch:
        return fitting[0] if attempt < 4 else fitting[-1]
    return fitting[attempt % len(fitting)]


def _apply(signature: Signature, values: dict[str, int], leaves: list[Any]) -> dict[int, dict[int, int]]:
    sizes: dict[int, dict[int, int]] = {}
    for item in signature.inputs:
        for dim, expression in enumerate(item.dims):
            if isinstance(expression, int):
                continue
            at = {s: values.get(signature.symbols.get(str(s), str(s))) for s in expression.free_symbols}
            if any(v is None for v in at.values()):
                continue
            size = int(expression.subs(at))
            if size != leaves[item.leaf].shape[dim]:
                sizes.setdefault(item.leaf, {})[dim] = size
    return sizes


def to_numpy(value: Any) -> np.ndarray:
    """A tensor (of any dtype that ONNX has) or number as an array."""
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        half: np.ndarray = value.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return half
    if value.is_complex():
        value = torch.view_as_real(value)
    array: np.ndarray = value.resolve_conj().resolve_neg().contiguous().numpy()
    return array


def _shape(value: Any) -> str:
    return "nothing" if value is None else f"{np.asarray(value).dtype} {list(np.shape(value))}"


def _sizes(signature: Signature, sizes: dict[int, dict[int, int]]) -> str:
    names = {item.leaf: item.name for item in signature.inputs}
    return ", ".join(f"{names[leaf]} dim {d} = {s}" for leaf, dims in sizes.items() for d, s in dims.items())
