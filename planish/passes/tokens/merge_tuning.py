"""How many tokens have to merge for the measured ratio to be the asked one, and from where on merging pays at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from planish.ir.analyses.cost import cost
from planish.ir.analyses.sizes import Sizes
from planish.ir.graphs import is_op
from planish.ir.ops import OpCost
from planish.ir.ops.merge_reference import merged_count
from planish.ir.program import Program
from planish.passes.base import ApproximatePass
from planish.passes.layers.tuning import Search
from planish.passes.tokens.merge_edits import Plan
from planish.passes.tokens.merge_sites import Encoder

if TYPE_CHECKING:
    from planish.passes.tokens.merge_tokens import MergeTokens

Gain = Callable[[ApproximatePass, float], float]
#: Merging takes about as long as so many operations in each layer, at the least: below a saving of this, whether it
#: pays is measured ahead of the gates, and the report says from where on it would.
SMALL = 1 << 23


def tuned(p: MergeTokens, program: Program, gain: Gain) -> tuple[ApproximatePass, str]:
    """The variant to gate, and what to note."""
    work = _work(p, program)
    if work is None:
        return p, ""
    if p.speedup is not None and p.r is None:
        return _fastest_enough(p, work, gain)
    return p, _break_even(p, work, gain)


def predicted(p: MergeTokens, program: Program) -> MergeTokens:
    """The variant that should reach `speedup` by its operations, where nothing is measured."""
    work = _work(p, program)
    variants = [] if work is None else _variants(p, work)
    if work is None or not variants:
        return replace(p, r=0)
    return next((v for v in variants if _ratio(work.saved(v), work) >= (p.speedup or 1)), variants[-1])


@dataclass(frozen=True)
class _Work:
    """The entry of the most operations, and its encoders with the number of tokens that each starts with."""

    encoders: list[tuple[Encoder, int]]
    costs: Mapping[str, OpCost]
    whole: int

    def saved(self, p: MergeTokens) -> int:
        """Operations that merging leaves out; what it takes itself is not counted."""
        return sum(_saved(encoder, p.plan(encoder), tokens, self.costs) for encoder, tokens in self.encoders)


def _work(p: MergeTokens, program: Program) -> _Work | None:
    found = None
    for entry in p.entry_names(program):
        model = program.entry(entry)
        sizes = Sizes(model, program.sizes())
        encoders = []
        for encoder in p.encoders(program, entry)[0]:
            shape = sizes.shape(encoder.start)
            encoders += [] if shape is None else [(encoder, shape[1])]
        whole = cost(model, dims=program.sizes())
        if encoders and (found is None or whole.flops > found.whole):
            found = _Work(encoders, whole.nodes, whole.flops)
    return found


def _saved(encoder: Encoder, plan: Plan, tokens: int, costs: Mapping[str, OpCost]) -> int:
    """The products of a layer are as many as its tokens; those of its attention as their square."""
    total, now = 0.0, tokens
    for number, site in enumerate(encoder.sites):
        after = now - merged_count(now, plan.r[number], plan.ratio, plan.protected)
        inner = {node for part in site.layer.parts if part.kind == "attention" for node in part.nodes}
        for node in site.layer.nodes:
            share = (now if node in inner else after) / tokens
            total += _flops(node, costs) * (1 - share * (share if is_op(node, "Attention") else 1))
        now = after
    return int(total)


def _flops(node: ir.Node, costs: Mapping[str, OpCost]) -> int:
    return costs.get(node.name or "", OpCost(0, 0)).flops


def _fastest_enough(p: MergeTokens, work: _Work, gain: Gain) -> tuple[ApproximatePass, str]:
    assert p.speedup is not None
    variants = _variants(p, work)
    if not variants:
        return replace(p, r=0), ""
    saved = [work.saved(variant) for variant in variants]
    search = Search([part / max(work.whole, 1) for part in saved], p.speedup)
    ratios = [_ratio(part, work) for part in saved]
    while (index := search.following()) is not None:
        search.enter(index, gain(variants[index], p.speedup))
    taken = search.enough
    if taken is None:
        most = len(variants)
        text = _text(most, ratios[-1], search.measured[most - 1])
        return variants[-1], f"{p.name}: speedup={p.speedup:g} can not be measured here: at most {text}, which is taken"
    text = _text(taken + 1, ratios[taken], search.measured[taken])
    return variants[taken], f"{p.name}: {text} for the asked {p.speedup:g}x"


def _variants(p: MergeTokens, work: _Work) -> list[MergeTokens]:
    """Every r up to half of the tokens."""
    most = max((tokens - p.plan(encoder).protected) // 2 for encoder, tokens in work.encoders)
    return [replace(p, r=r) for r in range(1, most + 1)]


def _ratio(saved: int, work: _Work) -> float:
    return work.whole / max(work.whole - saved, 1)


def _text(r: int, predicted: float, measured: float) -> str:
    return f"r={r}, {predicted:.3g}x predicted, {measured:.3g}x measured"


def _break_even(p: MergeTokens, work: _Work, gain: Gain) -> str:
    """How many tokens it would take for merging to pay, where that is in doubt.

    The time of a run grows with its tokens, and so does what merging the same share of them saves; what a merge takes
    hardly grows. One measurement tells both.
    """
    saved = work.saved(p)
    layers = sum(len(encoder.sites) for encoder, _ in work.encoders)
    if not saved or saved >= SMALL * layers:
        return ""
    ratio = gain(p, 1.0)
    if ratio >= 1:
        return ""
    tokens, share = work.encoders[0][1], saved / work.whole
    overhead = 1 / ratio - 1 + share
    even = -(-tokens * overhead // share)
    text = f"{share:.0%} of the operations go, and merging takes {overhead:.0%} of the time of a run without"
    return f"{p.name} does not pay at {tokens} tokens: {text}; break-even is at about {even:.0f} tokens of this width"
