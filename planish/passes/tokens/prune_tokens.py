"""prune-tokens: drops image tokens inside a vision-language model, or patches inside a vision transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from planish.ir.causal_lm import DECODE, PREFILL
from planish.ir.errors import InputError, unknown
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import ApproximatePass, Decline, PassContext, PassResult
from planish.passes.registry import register

if TYPE_CHECKING:
    from planish.passes.tokens.prune_plan import Plan

#: Method → the layers that it prunes before and what it keeps, by its paper.
METHODS: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "feather": ((8, 16), (0.3, 0.09)),
    "fastv": ((3,), (0.25,)),
    "efficientvla": ((2,), (56,)),
    "random": ((8,), (0.3,)),
    "uniform": ((8,), (0.3,)),
}


@register
@dataclass(frozen=True)
class PruneTokens(ApproximatePass):
    """Drops image tokens before some layers of a stack; text, order, and the positions of what is left stay.

    Queries and keys of the layer before say what matters, so that choosing costs next to nothing. The caches of the
    layers behind are shorter, and `decode` knows by how much. Behind the last layer every token is back in its place,
    dropped ones with the hidden state that they were dropped with.

    Runs where attention and rotary embedding are one operator each: behind the fusions, before the lowerings.

    Options:
        method: ``"feather"`` (arXiv 2412.13180): attention of the last text token to the image, without rotary
            embedding, and a grid of tokens that the first stage always keeps. ``"fastv"`` (arXiv 2403.06764): the same
            token's attention as the model has it, no grid. ``"efficientvla"`` (arXiv 2506.10100): what the text
            attends to most, and tokens unlike those. ``"random"``, ``"uniform"``: without looking.
        layers: the layers to prune BEFORE, ascending; by default those of the paper.
        keep: what each stage keeps of the image tokens that it finds: a share below 1, or a number of tokens.
        span: (start, count) of image tokens that lie at the same place in every row, as patches behind a class token.
        image_token: else the id of image tokens in `input_ids`; every row has the same number of them.
        count: of image tokens with `image_token`; by default that of the calibration inputs.
        stride: of the grid that "feather" keeps, in rows and columns of the image; 0: none.
        rows: of the image; by default it is square.
        query: the place of the token that attends, such as 0 for a class token; by default the last of each row.
        rotary: whether scores are those with rotary embedding; by default as the method has it.
        key: how many tokens "efficientvla" compares the others with.
        relevance: the share of further tokens that it takes by relevance, the others by diversity.
        stack: name of the stack; by default the last one, which is the language model.
        entries: by default `prefill` where the program has it, else all.
        seed: for "random".
    """

    name: ClassVar[str] = "prune-tokens"
    gives_up: ClassVar[str] = "What later layers would read from the tokens that are dropped; fine detail goes first."
    order: ClassVar[int] = 30
    selects: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("shapes", "opset>=18")

    method: str = "feather"
    layers: tuple[int, ...] | None = None
    keep: tuple[float, ...] | None = None
    span: tuple[int, int] | None = None
    image_token: int | None = None
    count: int | None = None
    stride: int = 3
    rows: int | None = None
    query: int | None = None
    rotary: bool | None = None
    key: int = 4
    relevance: float = 0.5
    stack: str | None = None
    entries: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        for option in ("layers", "keep", "span", "entries"):
            if getattr(self, option) is not None:
                object.__setattr__(self, option, tuple(getattr(self, option)))
        if (self.span is None) == (self.image_token is None):
            given = "both" if self.span is not None else "neither"
            raise InputError(f"give span=(start, count), or image_token= with its id; {given} is given.")
        if self.span is not None and (len(self.span) != 2 or self.span[0] < 0 or self.span[1] < 1):
            raise InputError(
                f"span is {self.span}; it is (start, count) of the image tokens, with a count of at least 1."
            )
        if self.count is not None and (self.span is not None or self.count < 1):
            raise InputError(f"count is {self.count}; it goes with image_token=, and is at least 1.")
        self._check_stages()
        if self.stride < 0 or (self.rows is not None and self.rows < 1):
            raise InputError(f"stride is {self.stride} and rows is {self.rows}; stride is at least 0, rows at least 1.")
        if self.query is not None and self.span is None:
            raise InputError("query= counts tokens from the front, and image_token= may lie anywhere; give span=.")
        if self.query is not None and (self.query < 0 or self.query in range(self.span[0], sum(self.span))):  # type: ignore[index,arg-type]
            raise InputError(f"query is {self.query}; it is the place of a token that is not of the image.")
        if self.key < 1 or not 0 <= self.relevance <= 1:
            raise InputError(f"key is {self.key} and relevance {self.relevance:g}; at least 1, and from 0 to 1.")

    def _check_stages(self) -> None:
        layers, keep = self.stages
        if len(layers) != len(keep):
            raise InputError(f"layers={list(layers)} are {len(layers)} stages and keep={list(keep)} {len(keep)}.")
        if not layers or list(layers) != sorted(set(layers)):
            raise InputError(f"layers={list(layers)}; give the layers to prune before, ascending.")
        if layers[0] < self.first:
            why = "; the layer before says what matters" if self.first else ""
            raise InputError(f"layers names layer {layers[0]}; the first to prune before is {self.first}{why}.")
        for share in keep:
            if share <= 0 or (share > 1 and share != int(share)):
                raise InputError(f"keep has {share:g}; it is a share up to 1, or a number of tokens.")

    @property
    def stages(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The layers to prune before, and what to keep there."""
        layers, keep = METHODS[self.method]
        return (layers if self.layers is None else self.layers), (keep if self.keep is None else self.keep)

    @property
    def first(self) -> int:
        """The first layer that can be pruned before."""
        return 0 if self.method in ("random", "uniform") else 1

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Raises InputError: an option does not fit the model; the message has the valid range."""
        from planish.passes.tokens.prune_plan import plan_entry

        declined: list[Declined] = []
        plans: list[Plan] = []
        for entry in self.entry_names(program):
            try:
                plans.append(plan_entry(self, program, entry))
            except Decline as decline:
                declined.append(Declined(self.name, entry, decline.reason))
        if not plans:
            return PassResult(False, 0, declined)
        return self._carry_out(program, plans, declined, ctx)

    def entry_names(self, program: Program) -> list[str]:
        """The entries that tokens are dropped in; `decode` only follows."""
        if self.entries is None:
            return [PREFILL] if PREFILL in program.entries else list(program.entries)
        for name in self.entries:
            program.entry(name)  # raises for an unknown one
        if DECODE in self.entries:
            raise InputError(f"entries names '{DECODE}', which reads one token of text; give '{PREFILL}'.")
        return list(self.entries)

    def _carry_out(
        self, program: Program, plans: Sequence[Plan], declined: list[Declined], ctx: PassContext
    ) -> PassResult:
        from planish.ir.infer import infer_shapes
        from planish.passes.canonicalize.editing import Editor
        from planish.passes.canonicalize.eliminate_dead_code import EliminateDeadCode
        from planish.passes.tokens.prune_stages import carry_out

        editor, notes = Editor(program, self.name), list[str]()
        for plan in plans:
            notes.append(carry_out(self, plan, editor))
        EliminateDeadCode().apply(program, ctx)
        for plan in plans:
            infer_shapes(plan.model)
        return PassResult(True, editor.fired, declined, notes)
