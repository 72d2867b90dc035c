"""merge-tokens: similar tokens of an encoder become one, some in every layer (arXiv 2210.09461)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from planish.ir.errors import InputError, unknown
from planish.ir.ledger import Declined
from planish.ir.ops import import_functions
from planish.ir.program import Program
from planish.passes.base import ApproximatePass, Decline, PassContext, PassResult
from planish.passes.registry import register

if TYPE_CHECKING:
    from planish.passes.canonicalize.editing import Editor
    from planish.passes.tokens.merge_edits import Plan
    from planish.passes.tokens.merge_sites import Encoder

_MATCH = {"bipartite": "", "energy": "Energy"}
_COMBINE = {"mean": "", "max-norm": "MaxNorm"}
#: Margin of PiToMe's energy in the first layer; it falls linearly with depth.
_MARGIN = 0.9


@register
@dataclass(frozen=True)
class MergeTokens(ApproximatePass):
    """Merges tokens between the attention and the feed-forward network of each layer of an encoder.

    Token Merging (ToMe): of the tokens at even places, the r that are most like one at an odd place go into that one.
    Likeness is the cosine of the keys, averaged over heads. Nothing is trained. Class, distillation and register tokens
    are protected. What reads tokens behind the layers gets them back in their places.

    Options:
        r: tokens that each layer merges, or a list with a number for each layer; at most half of the tokens that are
            not protected merge.
        inflection: with one `r`, from -1 (2r in the first layer, none in the last) over 0 to 1 (the reverse).
        ratio: the share of its tokens that each layer merges, in place of `r`.
        speedup: in place of `r`: with gates on, the smallest r whose measured ratio reaches it.
        proportional: a merged token counts in attention as often as it has members. Right for models trained with
            labels; the paper leaves it out for masked autoencoders as they come.
        protected: number of tokens in front that never merge; by default those that are not the input's.
        match: ``"bipartite"``, or ``"energy"`` (PiToMe, arXiv 2405.16148): tokens that many others are like merge.
        combine: ``"mean"``, or ``"max-norm"`` (ToFu, arXiv 2312.01026): the mean, as long as its longest member.
        entries: by default all.
        stack: name of one stack, of a model with several.
    """

    name: ClassVar[str] = "merge-tokens"
    requires: ClassVar[tuple[str, ...]] = ("shapes",)
    gives_up: ClassVar[str] = "The difference between tokens that are alike."
    order: ClassVar[int] = 30
    selects: ClassVar[bool] = True

    r: int | tuple[int, ...] | None = None
    inflection: float = 0.0
    ratio: float | None = None
    speedup: float | None = None
    proportional: bool = True
    protected: int | None = None
    match: str = "bipartite"
    combine: str = "mean"
    entries: tuple[str, ...] | None = None
    stack: str | None = None

    def __post_init__(self) -> None:
        for option in ("r", "entries"):
            if isinstance(getattr(self, option), list | tuple):
                object.__setattr__(self, option, tuple(getattr(self, option)))
        for option, known in (("match", _MATCH), ("combine", _COMBINE)):
            if getattr(self, option) not in known:
                raise unknown(option, str(getattr(self, option)), known)
        given = [name for name in ("r", "ratio", "speedup") if getattr(self, name) is not None]
        if not given or ("ratio" in given and len(given) > 1) or (isinstance(self.r, tuple) and len(given) > 1):
            raise InputError(f"give one of r=, ratio= and speedup=; {' and '.join(given) or 'none'} is given.")
        numbers = self.r if isinstance(self.r, tuple) else (self.r or 0,)
        if min(numbers, default=0) < 0:
            raise InputError(f"r is {min(numbers)}; it must not be negative.")
        if not -1 <= self.inflection <= 1:
            raise InputError(f"inflection is {self.inflection:g}; it goes from -1 to 1.")
        if self.ratio is not None and not 0 <= self.ratio <= 0.5:
            raise InputError(f"ratio is {self.ratio:g}; it goes from 0 to 0.5, since at most half of the tokens merge.")
        if self.speedup is not None and not self.speedup >= 1:
            raise InputError(f"speedup is {self.speedup:g}; it must be at least 1.")

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Raises InputError: an option does not fit the model."""
        from planish.passes.canonicalize.editing import Editor
        from planish.passes.canonicalize.eliminate_dead_code import EliminateDeadCode
        from planish.passes.tokens.recognized import recognize

        if ctx.target.name == "tvm-cpu":
            reason = f"target '{ctx.target}' does not run it; tvm-cuda and those of ONNX Runtime do"
            return PassResult(False, declined=[Declined(self.name, "main", reason)])
        result, found = PassResult(False), list[Declined]()

        def useful(trial: Program) -> bool:
            encoders = [self.encoders(trial, entry) for entry in self.entry_names(trial)]
            found.extend(reason for _, declined in encoders for reason in declined)
            return any(stacks for stacks, _ in encoders)

        recognized = recognize(program, ctx, useful)
        if found and not recognized:
            return PassResult(False, declined=found)
        editor, chosen = Editor(program, self.name), self
        if self.r is None and self.ratio is None:
            from planish.passes.tokens.merge_tuning import predicted

            chosen = predicted(self, program)
        for entry in self.entry_names(program):
            chosen._entry(program, entry, editor, result)
        if editor.fired:
            for entry in self.entry_names(program):
                import_functions(program.entry(entry))
            EliminateDeadCode().apply(program, ctx)
        result.fired, result.modified = editor.fired, editor.fired > 0 or recognized
        return result

    def tune(self, program: Program, gain: Callable[[ApproximatePass, float], float]) -> tuple[ApproximatePass, str]:
        """The smallest r whose measured gain reaches `speedup`; where merging hardly pays, from where on it would."""
        from planish.passes.tokens.merge_tuning import tuned

        return tuned(self, program, gain)

    def entry_names(self, program: Program) -> list[str]:
        if self.entries is None:
            return list(program.entries)
        for name in self.entries:
            program.entry(name)  # raises for an unknown one
        return list(self.entries)

    def encoders(self, program: Program, entry: str) -> tuple[list[Encoder], list[Declined]]:
        """The stacks of an entry whose tokens can merge, and why others can not.

        Raises:
            InputError: there is no stack of the name that was asked for.
        """
        from planish.passes.layers.units import stacks_of
        from planish.passes.tokens.merge_sites import encoder_of

        model = program.entry(entry)
        stacks, reasons = stacks_of(model, self.stack)
        declined = [] if stacks else [Declined(self.name, entry, f"no repeated layers: {why}") for why in reasons]
        found = []
        for stack in stacks:
            try:
                found.append(encoder_of(model.graph, stack))
            except Decline as decline:
                declined.append(Declined(self.name, stack.name, decline.reason))
        return found, declined

    def plan(self, encoder: Encoder) -> Plan:
        """What merges in an encoder.

        Raises:
            InputError: r is a list for another number of layers.
        """
        from planish.passes.tokens.merge_edits import Plan
        from planish.passes.tokens.merge_tail import named_tokens
        from planish.passes.tokens.schedule import counts

        layers = len(encoder.sites)
        protected = self.protected
        if protected is None:
            protected = max(encoder.first, named_tokens(encoder.end))
        r = counts(self.r if self.r is not None else 0, layers, self.inflection)
        op = f"MergeTokens{_MATCH[self.match]}{_COMBINE[self.combine]}"
        margins = [_MARGIN * (1 - layer / layers) for layer in range(layers)] if self.match == "energy" else None
        return Plan(r, self.ratio or 0.0, protected, self.proportional, op, margins)

    def _entry(self, program: Program, entry: str, editor: Editor, result: PassResult) -> None:
        encoders, declined = self.encoders(program, entry)
        result.declined += declined
        for encoder in encoders:
            note = self._encoder(encoder, editor)
            where = f"{entry}: " if entry != "main" else ""
            result.notes += [f"{where}{encoder.stack.name}: {note}"] if note else []

    def _encoder(self, encoder: Encoder, editor: Editor) -> str:
        from planish.passes.tokens.merge_edits import merge_layers
        from planish.passes.tokens.merge_tail import Tail

        plan = self.plan(encoder)
        first, fired = encoder.flow.tokens, editor.fired
        merged = merge_layers(encoder, plan, editor)
        if editor.fired == fired:
            return ""
        tail = Tail(merged, first, plan.protected, editor)
        tail.settle(encoder.end)
        left = merged.tokens if isinstance(merged.tokens, int) else "fewer"
        text = f"{first} tokens become {left} in {editor.fired - fired} of {len(encoder.sites)} layers"
        return "; ".join([text, f"{plan.protected} protected", *tail.notes])
