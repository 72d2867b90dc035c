"""Whether a symbolic dimension of a graph's inputs can be padded: a proof that what is kept of each output stays.

Abstract interpretation, once per dimension. Of each value it is known which axes carry the dimension, and what is
known of the elements beyond the real size: nothing, a number, so low that softmax hides it. Where such elements would
enter a kept one, as in a sum over the dimension or an attention that sees padded keys, they have to be neutral there;
else the value is mixed, and so is what depends on it. A mixed output is why a dimension is not padded. What an operator
does that has no rule here is not known, and mixes.

The proof is about numbers, not about rounding: a kernel may sum in another order at another size. It holds under what
`Proof.assumes` lists. Two proved dimensions may be padded together: each proof holds at any size of the other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from planish.ir.analyses.padding_facts import Fact, Held, Known, Mixes, Size, Span, State, of_array
from planish.ir.analyses.padding_sizes import Numbers, constant_numbers, evaluate, sizes_by
from planish.ir.analyses.stream import reads
from planish.ir.graphs import constant_tensor, dims_of, is_op, subgraphs_of
from planish.ir.infer import infer_shapes
from planish.ir.input_sizes import evaluate_dim
from planish.ir.spec import TensorSpec

#: Sizes of the dimension at the samples, and first sizes of other symbols: primes, so that products tell them apart.
_SAMPLES = (10007, 10037, 10007)
_OTHERS = (20011, 20011, 20021)
_MOST_FILLS = 24
_FUNCTION = re.compile(r"\w\(|[%?]|//")
_INTEGERS = frozenset((ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL))
Rule = Callable[["Flow", ir.Node, Sequence[Held | None]], "Sequence[Held | None]"]


@dataclass(frozen=True)
class Proof:
    """What padding one dimension takes.

    Attributes:
        dim: the symbol.
        reason: why it must not be padded; empty: it may.
        fills: input that carries it → what it is to be padded with; None: anything.
        outputs: output → (axis, entries in front of those of the dimension) for each axis that carries it.
        least, limit: the sizes that it holds for; None: no limit.
        assumes: what has to hold of the inputs, which the graph does not say.
    """

    dim: str
    reason: str = ""
    fills: Mapping[str, float | None] = field(default_factory=dict)
    outputs: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    least: int = 1
    limit: int | None = None
    assumes: tuple[str, ...] = ()


def padding(model: ir.Model, dim: str, fixed: Mapping[str, float | None] | None = None) -> Proof:
    """Decides whether the symbol `dim` of the inputs of `model` may be padded, and with what.

    Args:
        fixed: input → what it is padded with in any case.
    """
    return _Search(model, dim, fixed or {}).run()


class _Search:
    """Looks for fills with which a dimension can be padded."""

    def __init__(self, model: ir.Model, dim: str, fixed: Mapping[str, float | None]) -> None:
        self.fixed = {name: fill for name, fill in fixed.items() if fill is not None}
        self.model = model.clone()
        infer_shapes(self.model)
        self.dim = dim
        self.constants: dict[ir.Value, Held] = {}
        graph = self.model.graph
        self.carriers = [
            v for v in graph.inputs if v.name not in graph.initializers and any(d == dim for d in dims_of(v) or ())
        ]

    def run(self) -> Proof:
        first = None
        for fills in itertools.islice(self._candidates(), _MOST_FILLS):
            flow, reason = self._try(fills)
            first = first or reason
            if not reason:
                return self._relaxed(flow, fills)
        return Proof(self.dim, first or f"no input has a dimension '{self.dim}'")

    def _candidates(self) -> Iterator[dict[str, float | None]]:
        """Zeros first, then ones and the numbers that an input is compared with."""
        if not self.carriers:
            return
        choices: list[list[float | None]] = []
        for value in self.carriers:
            own: list[float | None] = [self.fixed.get(value.name or "", 0.0)]
            if value.dtype in _INTEGERS and value.name not in self.fixed:
                own += [n for n in (*_compared(value), 1.0) if n not in own]
            choices.append(own)
        names = [value.name or "" for value in self.carriers]
        yield from (dict(zip(names, combination, strict=True)) for combination in itertools.product(*choices))

    def _relaxed(self, flow: Flow, fills: dict[str, float | None]) -> Proof:
        """The proof, with whatever needs no certain number left open."""
        for name in fills.keys() - self.fixed.keys():
            loose = fills | {name: None}
            other, reason = self._try(loose)
            if not reason:
                flow, fills = other, loose
        outputs = {}
        for value in self.model.graph.outputs:
            spans = flow.held(value).spans  # type: ignore[union-attr]
            outputs[value.name or ""] = tuple((axis, span.plus) for axis, span in sorted(spans.items()))
        return Proof(self.dim, "", fills, outputs, flow.least, flow.limit, tuple(sorted(flow.assumes)))

    def _try(self, fills: Mapping[str, float | None]) -> tuple[Flow, str]:
        flow = Flow(self.model, self.dim, fills, self.constants)
        flow.run()
        for value in self.model.graph.outputs:
            held = flow.held(value)
            assert held is not None
            if held.mixed:
                return flow, held.mixed
            if any(not span.plain for span in held.spans.values()):
                return flow, f"output '{value.name}' has it in an axis with other things"
        return flow, ""


def _compared(value: ir.Value) -> list[float]:
    """Numbers that an input is compared with: ids of padding."""
    found = []
    for node in value.consumers():
        if is_op(node, "Equal", "Less", "Greater"):
            for other in node.inputs:
                tensor = constant_tensor(other)
                if tensor is not None and tensor.size == 1:
                    found.append(float(np.asarray(tensor.numpy()).reshape(-1)[0]))
    return found


class Flow:
    """One dimension on its way through a graph, padded by given numbers.

    Attributes:
        dim: the symbol.
        least, limit: sizes for which the proof holds.
        assumes: as of a proof.
    """

    def __init__(
        self,
        model: ir.Model,
        dim: str,
        fills: Mapping[str, float | None],
        constants: dict[ir.Value, Held] | None = None,
    ) -> None:
        self.graph, self.dim, self.fills = model.graph, dim, fills
        self.least, self.limit = 1, None  # type: int, int | None
        self.assumes: set[str] = set()
        self._held: dict[ir.Value, Held] = {}
        self._constants = constants if constants is not None else {}
        symbols = {d for v in self.graph.inputs for d in dims_of(v) or () if isinstance(d, str)}
        others = sorted(s for s in symbols if s != dim and s.isidentifier())
        self.samples = [
            {dim: size, **{s: _prime(base + 100 * k) for k, s in enumerate(others)}}
            for size, base in zip(_SAMPLES, _OTHERS, strict=True)
        ]
        self._sizes: dict[str, Size | None] = {}
        self._numbers: dict[ir.Value, Numbers | None] = {}
        self._computed: dict[ir.Value, tuple[Size | None, ...]] = {}

    def run(self) -> None:
        """Visits every node of the graph."""
        for value in self.graph.inputs:
            if value.name not in self.graph.initializers:
                self._held[value] = self._input(value)
        for node in self.graph:
            results = self._visit(node)
            for value, held in itertools.zip_longest(node.outputs, results):
                if value is not None:
                    self._held[value] = held or self._mixed(value, f"{describe(node)} gives it in an unknown way")

    def held(self, value: ir.Value | None) -> Held | None:
        """What is known of a value; None for an operand that is left out."""
        if value is None:
            return None
        if value not in self._held:
            known = self._constants.get(value)
            if known is None:
                tensor = constant_tensor(value)
                known = Held(self.declared(value)) if tensor is None else self._constant(tensor)
                known = self._constants[value] = replace(known, dtype=_dtype(value))
            self._held[value] = known
        return self._held[value]

    def _constant(self, tensor: ir.TensorProtocol) -> Held:
        if tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8:
            return Held(tuple((int(n),) * len(self.samples) for n in tensor.shape.numpy()))
        return of_array(np.asarray(tensor.numpy()), len(self.samples))

    # --- sizes ---------------------------------------------------------------------------------------------------

    def declared(self, value: ir.Value) -> tuple[Size | None, ...] | None:
        """The sizes that inference found, or that operands give."""
        if value in self._computed:
            return self._computed[value]
        dims = dims_of(value)
        return None if dims is None else tuple(self._evaluate(d) for d in dims)

    def numbers(self, value: ir.Value | None) -> Numbers | None:
        """The elements of a tensor that is computed of sizes, at each sample."""
        if value is None:
            return None
        if value not in self._numbers:
            self._numbers[value] = constant_numbers(value, len(self.samples))
        return self._numbers[value]

    def _count(self, node: ir.Node, args: Sequence[Held | None]) -> None:
        """Finds what a node says of sizes."""
        known = [self.numbers(value) for value in node.inputs]
        if is_op(node, "Shape") and args[0] is not None and args[0].sizes is not None:
            sizes = args[0].sizes
            asked = sizes[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(sizes))]
            if None not in asked:
                rows = zip(*(n for n in asked if n is not None), strict=True) if asked else [()] * len(self.samples)
                self._numbers[node.outputs[0]] = tuple(np.array(row, np.int64) for row in rows)
        elif any(v is not None for v in known):
            self._numbers[node.outputs[0]] = evaluate(node, known, self.graph.opset_imports.get("", 13))
        declared = self.declared(node.outputs[0]) if len(node.outputs) == 1 else ()
        if declared is None or None in declared:
            found = sizes_by(node, None if not args or args[0] is None else args[0].sizes, known) if args else None
            if found is not None:
                self._computed[node.outputs[0]] = tuple(found)

    def _evaluate(self, dim: int | str | None) -> Size | None:
        if dim is None or isinstance(dim, int):
            return None if dim is None else (dim,) * len(self.samples)
        if dim not in self._sizes:
            # A minimum of a size and a number is not the same function of it everywhere.
            found = [None if _FUNCTION.search(dim) else evaluate_dim(dim, sample) for sample in self.samples]
            self._sizes[dim] = None if None in found else tuple(int(n) for n in found if n is not None)
        return self._sizes[dim]

    def carries(self, size: Size | None) -> bool:
        """Whether a size changes with that of the dimension."""
        return size is not None and size[0] != size[1]

    def plus(self, size: Size) -> int:
        """By how many entries an axis is longer than the dimension.

        Raises:
            Mixes: it is something else.
        """
        more = {n - sample[self.dim] for n, sample in zip(size, self.samples, strict=True)}
        if len(more) != 1:
            raise Mixes(f"an axis has a size that is made of {self.dim} and others")
        return more.pop()

    def span(self, size: Size, fact: Fact | Known = Fact.ANY) -> Span:
        """A plain axis of this size."""
        one = (1,) * len(self.samples)
        return Span(one, one, self.plus(size), fact)

    def bound(self, limit: int) -> None:
        """The proof holds for sizes up to this."""
        self.limit = limit if self.limit is None else min(limit, self.limit)

    # --- nodes ---------------------------------------------------------------------------------------------------

    def _input(self, value: ir.Value) -> Held:
        sizes = self.declared(value)
        if sizes is None:
            return Held(None, dtype=_dtype(value), data=True)
        fill = self.fills.get(value.name or "", 0.0)
        spec = TensorSpec.of(value)
        spans = {}
        for axis, size in enumerate(sizes):
            if not self.carries(size):
                continue
            if spec.shape is None or spec.shape[axis] != self.dim:
                return self._mixed(value, f"input '{value.name}' has {self.dim} in a size that is computed from it")
            spans[axis] = self.span(size, Fact.ANY if fill is None else Known(fill))  # type: ignore[arg-type]
            low, high = (spec.ranges and spec.ranges[axis]) or (1, None)
            self.least = max(self.least, low)
            if high is not None:
                self.bound(high)
        loose = fill is None and bool(spans)
        return Held(sizes, spans, State.ANY if loose else State.FINITE, dtype=_dtype(value), data=True)

    def _visit(self, node: ir.Node) -> Sequence[Held | None]:
        args = [self.held(value) for value in node.inputs]
        try:
            if any(True for _ in subgraphs_of(node)):
                inner = [self.held(value) for value in reads(node)]
                if any(a is not None and (a.spans or a.mixed) for a in inner):
                    raise Mixes("holds graphs of its own")
                return [self._clean(value, State.ANY) for value in node.outputs]
            self._count(node, args)
            results = self._apply(node, args)
            self._check(results)
        except Mixes as reason:
            return [self._mixed(value, f"{describe(node)}: {reason}") for value in node.outputs]
        data = any(a is not None and a.data for k, a in enumerate(args) if k not in _shape_operands(node))
        return [
            held and replace(held, dtype=_dtype(value), data=data)
            for value, held in zip(node.outputs, results, strict=False)
        ]

    def _check(self, results: Sequence[Held | None]) -> None:
        """What has the size of the dimension carries it."""
        for held in results:
            for axis, size in enumerate((held.sizes or ()) if held is not None and not held.mixed else ()):
                if held is not None and self.carries(size) != (axis in held.spans) and (size or axis in held.spans):
                    raise Mixes(f"has a size of {self.dim} in a way that is not known")

    def _apply(self, node: ir.Node, args: Sequence[Held | None]) -> Sequence[Held | None]:
        from planish.ir.analyses.padding_rules import rule_of

        rule = rule_of(node)
        sizes_only = _shape_operands(node)
        known = [a for k, a in enumerate(args) if a is not None and k not in sizes_only]
        for arg in known:
            if arg.mixed:  # the first cause, not every node behind it
                return [self._mixed(value, arg.mixed) for value in node.outputs]
        clean = not any(a.spans for a in known)
        try:
            if rule is None:
                raise Mixes("has no rule")
            return rule(self, node, args)
        except Mixes:
            grows = any(self.carries(n) for value in node.outputs for n in self.declared(value) or ())
            unclear = any(a is not None and (a.mixed or a.spans) for a in args)
            if not clean or grows or unclear or node.op_type.startswith(("Random", "Bernoulli", "Multinomial")):
                raise
            return [self._clean(value, max((a.state for a in known), default=State.FINITE)) for value in node.outputs]

    def _clean(self, value: ir.Value, state: State) -> Held:
        """A value that does not depend on the dimension."""
        return Held(self.declared(value), state=state)

    def _mixed(self, value: ir.Value, reason: str) -> Held:
        return Held(self.declared(value), state=State.ANY, mixed=reason, dtype=_dtype(value))


def _shape_operands(node: ir.Node) -> tuple[int, ...]:
    from planish.ir.analyses.padding_rules import shape_operands

    return shape_operands(node)


def describe(node: ir.Node) -> str:
    """``"ReduceMean 'pool'"``."""
    name = node.name or (node.outputs[0].name if node.outputs else "")
    return f"{node.op_type} '{name}'"


def _dtype(value: ir.Value) -> str:
    return "" if value.dtype is None else value.dtype.name


def _prime(above: int) -> int:
    n = above
    while any(n % k == 0 for k in range(2, int(n**0.5) + 1)):
        n += 1
    return n
