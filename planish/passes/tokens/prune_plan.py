"""What prune-tokens is going to do to an entry, found before anything is changed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from planish.ir.analyses.layers import Layer, LayerStack, find_layers
from planish.ir.causal_lm import DECODE, IDS, LENGTHS, PREFILL
from planish.ir.errors import InputError, unknown
from planish.ir.graphs import dims_of, is_op
from planish.ir.program import Program
from planish.passes.base import Decline
from planish.passes.tokens.token_flow import TokenFlow
from planish.passes.tokens.token_scores import Attended, Image, find_attended

if TYPE_CHECKING:
    from planish.passes.tokens.prune_tokens import PruneTokens

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Stage:
    """Dropping tokens before one layer.

    Attributes:
        layer: its index.
        flow: of the hidden state that it takes.
        attended: queries and keys that scores come from; None where they come from nothing.
        before, kept: image tokens that it finds and leaves.
        grid: places, among the image tokens, of those that stay whatever their score.
    """

    layer: int
    flow: TokenFlow
    attended: Attended | None
    before: int
    kept: int
    grid: tuple[int, ...] = ()

    @property
    def dropped(self) -> int:
        return self.before - self.kept


@dataclass
class Plan:
    """An entry and its stages.

    Attributes:
        ids: the input that image tokens are found in; None where they lie at one place.
        lengths: the input with the tokens of each row, where rows are padded behind them.
        image: where the image tokens lie.
        followers: stage by number → attentions of `decode` whose caches are shorter after it.
        caches: values of `decode` that are these caches.
    """

    entry: str
    model: ir.Model
    stack: str
    image: Image
    stages: list[Stage] = field(default_factory=list)
    ids: ir.Value | None = None
    lengths: ir.Value | None = None
    followers: dict[int, list[ir.Node]] = field(default_factory=dict)
    caches: dict[int, list[ir.Value]] = field(default_factory=dict)


def plan_entry(options: PruneTokens, program: Program, entry: str) -> Plan:
    """Finds the stack, the image tokens, and what has to change.

    Raises:
        InputError: an option does not fit the model.
        Decline: the model does not allow it.
    """
    model = program.entry(entry)
    stack = _stack(options, model)
    layers, keep = options.stages
    last = len(stack) - 1
    if layers[-1] > last:
        raise InputError(
            f"layers names layer {layers[-1]}; '{stack.name}' has the layers 0 to {last}, of which "
            f"{options.first} to {last} can be pruned before."
        )
    if stack.tied:
        raise Decline(f"the layers of '{stack.name}' share their weights")
    plan = Plan(entry, model, stack.name, _image(options, program, entry, stack))
    if options.image_token is not None:
        plan.ids = _ids(model, stack)
    plan.lengths = next((v for v in model.graph.inputs if v.name == LENGTHS and entry == PREFILL), None)
    count = plan.image.count
    for number, (index, share) in enumerate(zip(layers, keep, strict=True)):
        stage = _stage(options, stack, index, count, share, first=number == 0)
        plan.stages.append(stage)
        count = stage.kept
    if entry == PREFILL and DECODE in program.entries:
        _plan_decode(plan, program.entry(DECODE))
    return plan


def _stack(options: PruneTokens, model: ir.Model) -> LayerStack:
    found = find_layers(model)
    if not found.stacks:
        raise Decline(f"no repeated layers: {'; '.join(found.declined)}")
    if options.stack is None:
        return found.stacks[-1]
    stack = next((s for s in found.stacks if s.name == options.stack), None)
    if stack is None:
        raise unknown("stack", options.stack, [s.name for s in found.stacks])
    return stack


def _stage(options: PruneTokens, stack: LayerStack, index: int, count: int, share: float, *, first: bool) -> Stage:
    layer, behind = stack.layers[index], stack.layers[index:]
    if layer.hidden_in.dtype not in (None, ir.DataType.FLOAT):
        raise Decline(f"the hidden state '{layer.hidden_in.name}' is not float32")
    caches = {v for other in behind for v in other.cache_outputs}
    graph = layer.nodes[0].graph
    assert isinstance(graph, ir.Graph)
    flow = TokenFlow(graph, layer.hidden_in, stack.layers[-1].hidden_out, set(layer.nodes), caches).trace()
    attended = None
    if options.method not in ("random", "uniform"):
        rotary = options.method != "feather" if options.rotary is None else options.rotary
        attended = find_attended(stack.layers[index - 1], rotary=rotary)
    grid = _grid(options, count) if first and options.method == "feather" else ()
    kept = int(count * share + 1e-9) if share < 1 else int(share)
    kept = min(kept + len(grid), count)
    if kept < 1:
        raise InputError(f"keep={share:g} of {count} image tokens leaves none before layer {index}.")
    if kept >= count:
        raise Decline(f"all of {count} image tokens stay before layer {index}")
    if options.method == "efficientvla" and options.key > kept:
        raise InputError(f"key is {options.key}; {kept} tokens are kept before layer {index}.")
    return Stage(index, flow, attended, count, kept, grid)


def _grid(options: PruneTokens, count: int) -> tuple[int, ...]:
    if not options.stride:
        return ()
    rows = options.rows or math.isqrt(count)
    if count % rows or (options.rows is None and rows * rows != count):
        raise InputError(
            f"{count} image tokens are no {'square' if options.rows is None else f'{rows} rows'}; give rows=."
        )
    columns, step = count // rows, options.stride
    return tuple(r * columns + c for r in range(0, rows, step) for c in range(0, columns, step))


# --- image tokens --------------------------------------------------------------------------------------------------


def _image(options: PruneTokens, program: Program, entry: str, stack: LayerStack) -> Image:
    if options.span is None:
        return Image(options.count or _calibrated(options, program, entry))
    start, count = options.span
    tokens = (dims_of(stack.layers[0].hidden_in) or (None, None))[1]
    if isinstance(tokens, int) and start + count > tokens:
        raise InputError(f"span={options.span} ends at {start + count}; rows of '{stack.name}' have {tokens} tokens.")
    return Image(count, start)


def _calibrated(options: PruneTokens, program: Program, entry: str) -> int:
    parts = program.calibration.parts if program.calibration is not None else []
    batches = [np.asarray(b[IDS]) for part in parts if part.entry == entry for b in part.batches if IDS in b]
    counts = sorted({int(n) for ids in batches for n in (ids == options.image_token).sum(-1)})
    if not counts:
        raise InputError("image_token= needs count=: there are no calibration inputs to count in.")
    if len(counts) > 1 or not counts[0]:
        found = " and ".join(map(str, counts))
        raise InputError(f"rows of the calibration inputs have {found} image tokens; every row must have as many.")
    return counts[0]


def _ids(model: ir.Model, stack: LayerStack) -> ir.Value:
    tokens = (dims_of(stack.layers[0].hidden_in) or ())[:2]
    found = [v for v in model.graph.inputs if v.dtype == ir.DataType.INT64 and dims_of(v) == tokens]
    found = [v for v in found if v.name == IDS] or found
    if len(found) != 1:
        raise Decline(f"no input with the ids of {tokens} tokens; give span=")
    return found[0]


# --- decode --------------------------------------------------------------------------------------------------------


def _plan_decode(plan: Plan, model: ir.Model) -> None:
    """The attentions whose caches are shorter."""
    stacks = [s for s in find_layers(model).stacks if s.name == plan.stack]
    if len(stacks) != 1:
        raise Decline(f"'{DECODE}' has no stack '{plan.stack}'")
    starts = [stage.layer for stage in plan.stages]
    if len(stacks[0]) <= starts[-1]:
        raise Decline(f"'{DECODE}' has {len(stacks[0])} layers; prune-tokens comes before skip-layers")
    for layer in stacks[0].layers[starts[0] :]:
        number = sum(layer.index >= start for start in starts) - 1
        plan.followers.setdefault(number, []).append(_over_cache(layer))
        plan.caches.setdefault(number, []).extend((*layer.cache_inputs, *layer.cache_outputs))


def _over_cache(layer: Layer) -> ir.Node:
    found = [n for n in layer.nodes if is_op(n, "Attention") or n.op_type == "GroupQueryAttention"]
    if len(found) != 1:
        raise Decline(f"'{DECODE}': '{layer.name}' does not attend by one operator")
    node = found[0]
    operands = [*node.inputs, *[None] * 12]
    if node.domain != MICROSOFT:
        if operands[3] is not None:
            raise Decline(f"'{DECODE}': '{layer.name}' has a mask over its cache")
    elif operands[5] is None or any(v is not None for v in operands[9:11]):
        raise Decline(f"'{DECODE}': '{layer.name}' has a bias by position, and no longer knows positions of its keys")
    elif node.attributes.get_int("local_window_size", -1) > 0:
        raise Decline(f"'{DECODE}': '{layer.name}' attends in a window, and no longer knows positions of its keys")
    return node
