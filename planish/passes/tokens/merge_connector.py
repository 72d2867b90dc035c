"""merge-connector: tokens between a vision tower and a language model merge gradually, and fewer come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from planish.ir.errors import InputError
from planish.ir.graphs import dims_of, is_op
from planish.ir.ledger import Declined
from planish.ir.ops import import_functions
from planish.ir.program import Program
from planish.passes.base import ApproximatePass, Decline, PassContext, PassResult
from planish.passes.registry import register

if TYPE_CHECKING:
    from planish.passes.canonicalize.editing import Editor
    from planish.passes.tokens.merge_sites import Encoder


@register
@dataclass(frozen=True)
class MergeConnector(ApproximatePass):
    """Merges r tokens in each layer of a connector, between self-attention and feed-forward network.

    Gradual merging of SimVLG (EVLGen, arXiv 2310.03291): a BERT-like stack behind the vision tower whose 257 tokens are
    29 after 12 layers. A merged token is the plain mean of those that merge there, whatever they are made of, and
    attention does not count members; the class token never merges. Unlike `merge-tokens`, what comes out has fewer
    tokens: the language model reads them as they are. The paper trains the connector so; without that more is lost.

    Options:
        r: tokens that each layer merges, or a list with a number for each layer.
        protected: tokens in front that never merge.
        stack: name of the stack; by default the last one whose tokens can merge.
        entries: by default all.
    """

    name: ClassVar[str] = "merge-connector"
    selects: ClassVar[bool] = True
    gives_up: ClassVar[str] = "The difference between image tokens that are alike, and their number."
    requires: ClassVar[tuple[str, ...]] = ("shapes", "opset>=18")

    r: int | tuple[int, ...] = 19
    protected: int = 1
    stack: str | None = None
    entries: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for option in ("r", "entries"):
            if isinstance(getattr(self, option), list | tuple):
                object.__setattr__(self, option, tuple(getattr(self, option)))
        numbers = self.r if isinstance(self.r, tuple) else (self.r,)
        if min(numbers, default=0) < 0 or not any(numbers):
            raise InputError(f"r is {self.r}; it must not be negative, and some layer has to merge.")
        if self.protected < 0:
            raise InputError(f"protected is {self.protected}; it must not be negative.")

    def entry_names(self, program: Program) -> list[str]:
        for name in self.entries or ():
            program.entry(name)  # raises for an unknown one
        return list(program.entries if self.entries is None else self.entries)

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Raises InputError: an option does not fit the model."""
        from planish.passes.canonicalize.editing import Editor

        editor, declined, notes = Editor(program, self.name), list[Declined](), list[str]()
        for entry in self.entry_names(program):
            try:
                note = self._merge(self._connector(program.entry(entry), declined), editor)
            except Decline as decline:
                declined.append(Declined(self.name, entry, decline.reason))
                continue
            notes.append(f"{entry}: {note}" if entry != "main" else note)
            import_functions(program.entry(entry))
        return PassResult(editor.fired > 0, editor.fired, declined if not editor.fired else [], notes)

    def _connector(self, model: ir.Model, declined: list[Declined]) -> Encoder:
        from planish.passes.layers.units import stacks_of
        from planish.passes.tokens.merge_sites import encoder_of

        stacks, reasons = stacks_of(model, self.stack)
        if not stacks:
            raise Decline(f"no repeated layers: {'; '.join(reasons)}")
        for stack in reversed(stacks):
            try:
                return encoder_of(model.graph, stack)
            except Decline as decline:
                declined.append(Declined(self.name, stack.name, decline.reason.replace("merge-tokens", self.name)))
        raise Decline("it has no stack whose tokens can merge")

    def _merge(self, encoder: Encoder, editor: Editor) -> str:
        from planish.passes.tokens.merge_edits import Plan, merge_layers
        from planish.passes.tokens.schedule import counts

        _check_readers(encoder.end, self.protected)
        r = counts(self.r, len(encoder.sites), 0.0)
        first, fired = encoder.flow.tokens, editor.fired
        plan = Plan(r, 0.0, self.protected, proportional=False, weighted=False)
        merged = merge_layers(encoder, plan, editor)
        if editor.fired == fired:
            raise Decline(f"of {first} tokens none is to merge")
        _shorten(encoder.end, merged.tokens)
        left = merged.tokens if isinstance(merged.tokens, int) else "fewer"
        return (
            f"{encoder.stack.name}: {first} tokens become {left} in {editor.fired - fired} layers, and so many come out"
        )


def _check_readers(value: ir.Value, protected: int) -> None:
    """Raises Decline: something behind the connector wants all tokens, or knows them by their places."""
    from planish.passes.tokens.merge_tail import named_places, treats_alike

    for node, index in value.uses():
        places = named_places(node, index)
        if (places is not None and all(0 <= p < protected for p in places)) or is_op(node, "Shape"):
            continue
        if not treats_alike(node, index):
            raise Decline(
                f"{node.op_type} '{node.name}' behind the connector reads all tokens of '{value.name}'; merge the "
                "connector by itself, and let the language model take what comes out"
            )
        _check_readers(node.outputs[0], protected)


def _shorten(value: ir.Value, tokens: int | str | None) -> None:
    from planish.passes.tokens.merge_tail import treats_alike

    if value.shape is not None:
        dims: list[int | str | None] = list(dims_of(value) or ())
        dims[1] = tokens
        value.shape = ir.Shape(dims)
    for node, index in value.uses():
        if treats_alike(node, index):
            _shorten(node.outputs[0], tokens)
