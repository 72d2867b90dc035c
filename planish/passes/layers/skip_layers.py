"""skip-layers: leaves whole layers out, or the attention or the feed-forward network of some (arXiv 2404.06954)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from planish.ir.causal_lm import DECODE, PREFILL
from planish.ir.errors import InputError, unknown
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import ApproximatePass, Decline, PassContext, PassResult
from planish.passes.layers.selection import LEAST, RULES, kept_count
from planish.passes.registry import register

if TYPE_CHECKING:
    from planish.ir.analyses.layers import LayerStack

_PARTS = {"layer": "layers", "attention": "attentions", "ffn": "feed-forward networks"}
_HOW = ("rule", "importance")


@dataclass
class _Run:
    """What one run of the pass gathers."""

    program: Program
    ctx: PassContext
    fired: int = 0
    declined: list[Declined] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    too_short: list[str] = field(default_factory=list)
    #: Graphs, and the names of inputs that they have no use for any more.
    inputs: list[tuple[ir.Graph, list[str]]] = field(default_factory=list)
    #: (stack, number of layers) → what was chosen in the first entry; the others follow it.
    chosen: dict[tuple[str, int], dict[int, float]] = field(default_factory=dict)


@register
@dataclass(frozen=True)
class SkipLayers(ApproximatePass):
    """Leaves layers out of a stack: the hidden state passes them by, and their weights and caches are gone.

    Unified Layer Skipping keeps floor(L / speedup) of L layers, the same for every input. The paper fine-tunes the
    model for it and leaves layers out of the decode steps only; here nothing is trained.

    Options:
        speedup: the nominal ratio L / (layers kept), from 1 up. With gates on, and ``measured=True``, more layers
            go until the measured ratio reaches it.
        layers: the layers to REMOVE, counted from 0, in place of `speedup`.
        rule: ``"balanced"`` (distances as equal as can be) or ``"released"`` (the index sets of the paper's code).
        by: ``"rule"``, or ``"importance"``: the layers that change the hidden state least on the calibration
            inputs, measured anew after each one.
        part: ``"layer"``, or only the ``"attention"`` or ``"ffn"`` of the layers; `speedup` then counts those.
        entries: by default `decode` where the program has it, else all.
        stack: name of one stack, of a model with several; by default `speedup` holds for each.
        measured: whether gates may leave out more layers than the nominal ratio says. Not with the released rule.
        nominal: the ratio L / (layers kept) to take in place of `speedup`, which is then what was asked for; gates
            set it when the measured ratio wants more layers gone.
    """

    name: ClassVar[str] = "skip-layers"
    gives_up: ClassVar[str] = "What the layers that are left out compute; the less, the more alike layers are."
    order: ClassVar[int] = 10

    speedup: float | None = None
    layers: tuple[int, ...] | None = None
    rule: str = "balanced"
    by: str = "rule"
    part: str = "layer"
    entries: tuple[str, ...] | None = None
    stack: str | None = None
    measured: bool = True
    nominal: float | None = None

    def __post_init__(self) -> None:
        for option in ("layers", "entries"):
            if getattr(self, option) is not None:
                object.__setattr__(self, option, tuple(getattr(self, option)))
        for option, known in (("rule", RULES), ("by", _HOW), ("part", _PARTS)):
            if getattr(self, option) not in known:
                raise unknown(option, str(getattr(self, option)), known)
        if (self.speedup is None) == (self.layers is None):
            given = "both" if self.speedup is not None else "neither"
            raise InputError(f"give speedup=, or layers= with the layers to remove; {given} is given.")
        if self.speedup is not None and not self.speedup >= 1:
            raise InputError(f"speedup is {self.speedup:g}; it must be at least 1, which keeps all layers.")
        if self.layers is not None and self.by == "importance":
            raise InputError(
                "layers= says which layers to remove, and by='importance' finds them; give one of the two."
            )
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise InputError(f"layers={list(self.layers)} names a layer twice.")

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Raises InputError: an option does not fit the model; the message has the valid range."""
        from planish.passes.layers.units import drop_inputs

        run = _Run(program, ctx)
        for entry in self.entry_names(program):
            self._entry(run, entry)
        if run.too_short and not run.fired:
            raise InputError(run.too_short[0])
        if run.fired:
            from planish.passes.canonicalize.eliminate_dead_code import EliminateDeadCode

            EliminateDeadCode().apply(program, ctx)
            for graph, names in run.inputs:
                drop_inputs(graph, names)
        return PassResult(run.fired > 0, run.fired, run.declined, run.notes)

    def tune(self, program: Program, gain: Callable[[ApproximatePass, float], float]) -> tuple[ApproximatePass, str]:
        """The variant whose measured gain reaches `speedup`; this one if none does."""
        from planish.passes.layers.tuning import tuned

        return tuned(self, program, gain)

    def entry_names(self, program: Program) -> list[str]:
        """The entries that layers are left out of."""
        if self.entries is None:
            return [DECODE] if DECODE in program.entries else list(program.entries)
        for name in self.entries:
            program.entry(name)  # raises for an unknown one
        return list(self.entries)

    @property
    def least(self) -> int:
        """The number of layers that stay in any case: the rules keep the first and the last."""
        return 1 if self.by == "importance" else LEAST

    def removed_share(self, total: int, ratio: float) -> float:
        """The share of `total` layers that goes at a nominal ratio; 0 for a stack that is too short for it."""
        try:
            return 1 - kept_count(total, ratio, least=self.least) / total
        except InputError:
            return 0.0

    def stacks(self, model: ir.Model) -> tuple[list[LayerStack], tuple[str, ...]]:
        """The stacks of a model that the options mean, and why there are no others."""
        from planish.passes.layers.units import stacks_of

        return stacks_of(model, self.stack)

    def _entry(self, run: _Run, entry: str) -> None:
        from planish.passes.layers.units import require_one

        stacks, reasons = self.stacks(run.program.entry(entry))
        if not stacks:
            run.declined += [Declined(self.name, entry, f"no repeated layers: {reason}") for reason in reasons]
        if self.layers is not None:
            require_one(stacks)
        for stack in stacks:
            try:
                self._stack(run, entry, stack)
            except Decline as decline:
                run.declined.append(Declined(self.name, stack.name, decline.reason))

    def _stack(self, run: _Run, entry: str, stack: LayerStack) -> None:
        from planish.passes.canonicalize.editing import Editor
        from planish.passes.layers.units import problem, remove, units_of

        units = units_of(stack, self.part)
        if not units:
            raise Decline(f"its layers have no {_PARTS[self.part]}")
        indices = [unit.index for unit in units]
        chosen = self._choose(run, entry, stack, indices)
        removed = [unit for unit in units if unit.index in chosen]
        if not removed:
            return
        if reason := problem(stack, removed):
            raise Decline(reason)
        editor = Editor(run.program, self.name)
        graph = run.program.entry(entry).graph
        done = remove(graph, stack, removed, editor)
        run.fired += editor.fired
        if entry == DECODE and PREFILL in run.program.entries:
            _forget_caches(run.program.entry(PREFILL).graph, done.outputs)
        run.inputs.append((graph, done.inputs))
        run.notes.append(self._note(entry, stack, len(units), chosen))

    def _choose(self, run: _Run, entry: str, stack: LayerStack, indices: Sequence[int]) -> dict[int, float]:
        """Index of each layer to remove → its importance (0 if that was not measured)."""
        total, what = len(indices), _PARTS[self.part]
        if self.layers is not None:
            return dict.fromkeys(self._named(stack, indices), 0.0)
        try:
            ratio = self.nominal or self.speedup or 1.0
            kept = kept_count(total, ratio, f"{what} of '{stack.name}'", least=self.least)
        except InputError as error:
            run.too_short.append(str(error))
            raise Decline(str(error)) from error
        if self.by == "rule":
            keep = {indices[i] for i in RULES[self.rule](total, kept)}
            return dict.fromkeys((i for i in indices if i not in keep), 0.0)
        known = run.chosen.get((stack.name, len(stack)))
        if known is None:
            known = self._measure(run, entry, stack, total - kept)
            run.chosen[stack.name, len(stack)] = known
        return known

    def _named(self, stack: LayerStack, indices: Sequence[int]) -> tuple[int, ...]:
        assert self.layers is not None
        for index in self.layers:
            if index not in range(len(stack)):
                raise InputError(f"layers names layer {index}; '{stack.name}' has the layers 0 to {len(stack) - 1}.")
            if index not in indices:
                raise InputError(f"layers names layer {index}, which has no {self.part} of its own.")
        if self.part == "layer" and len(self.layers) >= len(stack):
            raise InputError(f"layers names all {len(stack)} layers of '{stack.name}'; leave at least one.")
        return self.layers

    def _measure(self, run: _Run, entry: str, stack: LayerStack, count: int) -> dict[int, float]:
        from planish.passes.layers.importance import least_important

        if run.ctx.run is None:
            raise Decline("importance is measured on calibration inputs, and there is nothing to run them with")

        def find(model: ir.Model) -> LayerStack:
            return next(s for s in self.stacks(model)[0] if s.name == stack.name)

        return least_important(run.program, entry, find, self.part, count, run.ctx.run)

    def _note(self, entry: str, stack: LayerStack, total: int, chosen: dict[int, float]) -> str:
        where = f"{entry}: " if entry != "main" else ""
        listed = ", ".join(map(str, sorted(chosen)))
        ratio = f"{total / (total - len(chosen)):.2f}x nominal" if len(chosen) < total else "all of them"
        text = f"{where}{stack.name}: {len(chosen)} of {total} {_PARTS[self.part]} removed ({listed}), {ratio}"
        if self.by == "importance":
            from planish.passes.layers import importance

            text += f"; importance when chosen: {importance.text(chosen)}"
        if stack.layers[0].form == "normed":
            text += "; a norm or an activation follows the residual sum, so what is left out is not only a branch"
        return text


def _forget_caches(graph: ir.Graph, names: Sequence[str]) -> None:
    """Keys and values of a layer that decode does not have are of no use to anybody after prefill."""
    graph.outputs[:] = [v for v in graph.outputs if v.name not in names]
