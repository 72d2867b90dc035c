"""merge-around: merges tokens in front of a branch of each layer and gives every one its result behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.errors import InputError, unknown
from planish.ir.graphs import dims_of, is_op
from planish.ir.ledger import Declined
from planish.ir.ops import import_functions
from planish.ir.ops.merge_reference import merged_count
from planish.ir.program import Program
from planish.passes.base import ApproximatePass, Decline, PassContext, PassResult
from planish.passes.registry import register

if TYPE_CHECKING:
    from planish.ir.analyses.layers import Layer, LayerStack, Part
    from planish.passes.canonicalize.editing import Editor
    from planish.passes.tokens.token_flow import TokenFlow

_PARTS = ("attention", "ffn")
#: A branch begins behind these, as long as they are all that reads the stream: norms, and what scales and shifts them.
_BEFORE = ("LayerNormalization", "RMSNormalization", "Mul", "Add", "Sub")


@register
@dataclass(frozen=True)
class MergeAround(ApproximatePass):
    """Merges similar tokens for one branch of a layer only: the residual stream keeps every token in its place.

    For models whose output is dense, as in segmentation and diffusion transformers: tokens that merge in one layer
    part again, so that the output is not blurred by all layers at once. Token Merging for Stable Diffusion (Bolya and
    Hoffman 2023, arXiv:2303.17604): tokens are matched by the hidden state that the branch starts from, once for each
    branch; a merged token is the plain mean, and attention does not count members. Here every second token may merge.

    Options:
        ratio: the share of the tokens that is merged, up to a half.
        r: a number of tokens, in place of `ratio`.
        parts: the branches: ``"attention"``, ``"ffn"``, or both.
        layers: only these layers, counted from 0; by default all.
        protected: tokens in front that never merge, such as a class token.
        stack: name of one stack, of a model with several; by default all.
        entries: by default all.
    """

    name: ClassVar[str] = "merge-around"
    selects: ClassVar[bool] = True
    gives_up: ClassVar[str] = "In some branches, the difference between tokens that are alike."
    requires: ClassVar[tuple[str, ...]] = ("shapes", "opset>=18")

    ratio: float | None = None
    r: int | None = None
    parts: tuple[str, ...] = ("attention",)
    layers: tuple[int, ...] | None = None
    protected: int = 0
    stack: str | None = None
    entries: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for option in ("parts", "layers", "entries"):
            value = getattr(self, option)
            if value is not None:
                object.__setattr__(self, option, (value,) if isinstance(value, str) else tuple(value))
        if (self.ratio is None) == (self.r is None):
            raise InputError(f"give ratio= or r=; {'both are' if self.r is not None else 'neither is'} given.")
        if self.ratio is not None and not 0 < self.ratio <= 0.5:
            raise InputError(f"ratio is {self.ratio:g}; it is above 0 and at most 0.5: every second token may merge.")
        if (self.r is not None and self.r < 1) or self.protected < 0:
            raise InputError(f"r is {self.r} and protected {self.protected}; r is at least 1, protected at least 0.")
        for part in self.parts:
            if part not in _PARTS:
                raise unknown("part", part, _PARTS)

    def entry_names(self, program: Program) -> list[str]:
        for name in self.entries or ():
            program.entry(name)  # raises for an unknown one
        return list(program.entries if self.entries is None else self.entries)

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Raises InputError: an option does not fit the model."""
        from planish.passes.canonicalize.editing import Editor

        editor, declined, notes = Editor(program, self.name), list[Declined](), list[str]()
        for entry in self.entry_names(program):
            model = program.entry(entry)
            for stack in self._stacks(model, entry, declined):
                done = 0
                for layer, part in self._parts(stack):
                    try:
                        self._around(part, editor)
                        done += 1
                    except Decline as decline:
                        declined.append(Declined(self.name, f"{layer.name} ({part.kind})", decline.reason))
                if done:
                    notes.append(f"{entry}: {stack.name}: {self._share()} of the tokens merge around {done} branches")
            if notes:
                import_functions(model)
        return PassResult(editor.fired > 0, editor.fired, declined, notes)

    def _share(self) -> str:
        return f"{self.ratio:.0%}" if self.ratio is not None else str(self.r)

    def _stacks(self, model: ir.Model, entry: str, declined: list[Declined]) -> Sequence[LayerStack]:
        from planish.passes.layers.units import stacks_of

        stacks, reasons = stacks_of(model, self.stack)
        if not stacks:
            declined += [Declined(self.name, entry, f"no repeated layers: {reason}") for reason in reasons]
        return stacks

    def _parts(self, stack: LayerStack) -> list[tuple[Layer, Part]]:
        for index in self.layers or ():
            if index not in range(len(stack)):
                raise InputError(f"layers names layer {index}; '{stack.name}' has the layers 0 to {len(stack) - 1}.")
        chosen = [layer for layer in stack.layers if self.layers is None or layer.index in self.layers]
        return [(layer, part) for layer in chosen for part in layer.parts if part.kind in self.parts]

    def _around(self, part: Part, editor: Editor) -> None:
        """Merges around one branch.

        Raises:
            Decline: it does not treat tokens alike, or their order matters in it.
        """
        from planish.passes.tokens.emitter import Emitter

        flow = _flow_of(part)
        stream, start, tokens = part.stream_in, flow.start, flow.tokens
        count = (
            merged_count(tokens, self.r or 0, self.ratio or 0.0, self.protected) if isinstance(tokens, int) else None
        )
        if count == 0:
            raise Decline(f"of {tokens} tokens none is to merge")
        readers = [(user, index) for user, index in start.uses() if user in flow.readers]
        first = next(node for node in flow.graph if any(node is user for user, _ in readers))
        emit = Emitter(editor, first)
        ones = emit.add("Expand", emit.constant(np.array(1, np.float32)), emit.add("Shape", start, start=0, end=2))
        attributes = {"r": self.r or 0, "ratio": float(self.ratio or 0.0), "protected": self.protected}
        merged, _, index = emit.outputs("planish.MergeTokens", 3, start, stream, ones, **attributes, heads=1)
        merged.type, index.type = start.type, ir.TensorType(ir.DataType.INT64)
        left: int | str = editor.names.fresh("merged_tokens")
        if isinstance(tokens, int):
            left = tokens - (count or 0)
        for value, axis in [*flow.axes.items(), (merged, 1)]:
            dims: list[int | str | None] = list(dims_of(start if value is merged else value) or ())
            if value is not start:
                dims[axis] = left
                value.shape = ir.Shape(dims)
        for user, at in readers:
            user.replace_input_with(at, merged)
        for edit in flow.sizes:
            edit.node.replace_input_with(1, editor.constant(flow.graph, np.array(edit.sizes, np.int64), "token_sizes"))
            edit.node.attributes.pop("allowzero", None)
        whole = Emitter(editor, part.add).add("planish.UnmergeTokens", part.branch, index)
        whole.type, whole.shape = part.branch.type, ir.Shape(list(dims_of(start) or ())[:2] + list(_width(part)))
        for at, operand in enumerate(part.add.inputs):
            if operand is part.branch:
                part.add.replace_input_with(at, whole)
        editor.fired += 1


def _width(part: Part) -> tuple[int | str | None, ...]:
    return (dims_of(part.branch) or ())[2:]


def _flow_of(part: Part) -> TokenFlow:
    """The tokens of a branch, from where all of it reads them."""
    from planish.passes.tokens.token_flow import TokenFlow

    inside = set(part.nodes)
    start = part.stream_in
    while True:
        users = {user for user, _ in start.uses() if user in inside}
        user = users.pop() if len(users) == 1 else None
        if user is None or not is_op(user, *_BEFORE) or user.outputs[0] is part.branch:
            break
        if len(dims_of(user.outputs[0]) or ()) != 3 or user.outputs[0].is_graph_output():
            break
        start = user.outputs[0]
    if any(user is not part.add for user, _ in part.branch.uses()):
        raise Decline(f"'{part.branch.name}' is read elsewhere too")
    if start.dtype != ir.DataType.FLOAT:
        raise Decline(f"'{start.name}' is not float32")
    graph = part.add.graph
    assert isinstance(graph, ir.Graph)
    try:
        flow = TokenFlow(graph, start, part.branch, inside, ()).trace()
    except Decline as decline:
        raise Decline(decline.reason.replace("prune-tokens", "merge-around")) from decline
    for node in part.nodes:
        if is_op(node, "Attention") and node.attributes.get_int("is_causal", 0) == 1:
            raise Decline(f"Attention '{node.name}' is causal: a token must not learn of later ones by merging")
    if flow.cuts:
        node, index = flow.cuts[0].node, flow.cuts[0].index
        value = node.inputs[index]
        name = value.name if value is not None else "?"
        raise Decline(f"{node.op_type} '{node.name}' reads '{name}' by the places of tokens, and merged ones have none")
    if dims_of(part.stream_in) is None or (dims_of(part.stream_in) or ())[:2] != (dims_of(start) or ())[:2]:
        raise Decline(f"'{start.name}' does not have the tokens of '{part.stream_in.name}'")
    return flow
