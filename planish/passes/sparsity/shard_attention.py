"""shard-attention: lets each head see a part of the context, by a pattern of blocks (arXiv:2407.17678)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from planish.ir.block_sparsity import BlockMask, Layout, LocalPattern, Pattern, make_pattern, slot_plan
from planish.ir.causal_lm import DECODE, PREFILL, TASK
from planish.ir.errors import InputError, unknown
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.base import ApproximatePass, Decline, PassContext, PassResult
from planish.passes.registry import register

if TYPE_CHECKING:
    from planish.passes.sparsity.building import Bounds
    from planish.passes.sparsity.sites import Site
    from planish.passes.sparsity.splice import Splicer

_DECODE = ("pattern", "dense")
_LONGEST = 32768
#: Generated kernels take blocks of a multiple of so many tokens.
KERNEL_BLOCK = 16
_CUDA_BLOCK = 64
_POSITIONS = "max_positions"
_PATTERN_OPTIONS = (
    "block", "local", "stride", "step", "offset", "share_kv", "same", "dense_heads", "dense_every", "sinks",
    "global_blocks", "random", "seed", "mask",
)  # fmt: skip


@dataclass
class _Run:
    """What one run of the pass gathers."""

    program: Program
    ctx: PassContext
    splicer: Splicer
    chosen: dict[int, Pattern] = field(default_factory=dict)
    fired: int = 0
    declined: list[Declined] = field(default_factory=list)
    notes: dict[str, list[int]] = field(default_factory=dict)
    layouts: dict[Any, Layout] = field(default_factory=dict)

    def note(self, text: str, index: int) -> None:
        self.notes.setdefault(text, []).append(index)

    def layout(self, pattern: Pattern, length: int, site: Site) -> Layout:
        key = (pattern, length, site.heads)
        if key not in self.layouts:
            self.layouts[key] = pattern.layout(length, site.heads)
        return self.layouts[key]


@register
@dataclass(frozen=True)
class ShardAttention(ApproximatePass):
    """Replaces dense attention by block-sparse attention: each head sees a window and its own shard of the rest.

    Runs where attention is one operator: after fuse-attention and merge-attention-heads, before what lowers
    attention. Patterns must come from training: one imposed on a model that was trained dense is lossy, and
    `keep_mass` says where it is least so.

    At lengths where the pattern cuts nothing, attention stays dense: by the length when the model runs, where that is
    dynamic. A step over a cache (``decode``) sees the pattern from its position.

    Options:
        pattern: ``"s2"``, ``"sliding-window"``, ``"sink-window"``, ``"strided"``, ``"longformer"``, ``"bigbird"`` or
            ``"mask"``.
        block, local, stride, step, offset, share_kv, same, dense_heads, dense_every, sinks, global_blocks, random,
            seed, mask: of the pattern, each with its default (:mod:`planish.ir.block_sparsity`).
        layers: the attentions to shard, counted from 0; None: all.
        min_length: up to so many tokens attention stays dense; None: as long as the pattern cuts nothing.
        max_length: tokens that the lists cover; longer inputs are dense. None: the model's positions, if known, else
            32768.
        keep_mass: each head gets the cheapest of `pattern` and a sink window, both with windows of 1, 2, 4 … `local`
            blocks, that keeps this share of its attention on the calibration inputs; else it stays dense.
        evict: the caches of ``decode`` keep only blocks that some later token sees; for KV-efficient patterns.
        decode: ``"pattern"``, or ``"dense"``: steps see the whole cache.
    """

    name: ClassVar[str] = "shard-attention"
    gives_up: ClassVar[str] = "What heads attend to outside of their blocks."

    pattern: str = "s2"
    block: int | None = None
    local: int | None = None
    stride: int | None = None
    step: int | None = None
    offset: int | None = None
    share_kv: bool | None = None
    same: bool | None = None
    dense_heads: int | None = None
    dense_every: int | None = None
    sinks: int | None = None
    global_blocks: int | None = None
    random: int | None = None
    seed: int | None = None
    mask: tuple[tuple[str, ...], ...] | None = None
    layers: tuple[int, ...] | None = None
    min_length: int | None = None
    max_length: int | None = None
    keep_mass: float | None = None
    evict: bool = False
    decode: str = "pattern"

    def __post_init__(self) -> None:
        if self.pattern == "mixed":
            raise InputError("pattern 'mixed' is what keep_mass= makes; give keep_mass=.")
        self._pattern(causal=True)
        if self.decode not in _DECODE:
            raise unknown("decode", self.decode, _DECODE)
        for name, least in (("min_length", 0), ("max_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; it is a number of tokens, {least} or more.")
        if self.keep_mass is not None and not 0 < self.keep_mass <= 1:
            raise InputError(f"keep_mass is {self.keep_mass:g}; it is a share, above 0 and up to 1.")
        if self.keep_mass is not None and self.pattern == "mask":
            raise InputError("keep_mass= chooses among windows, which a mask has none of.")
        if self.evict and (self.keep_mass is not None or self.decode == "dense" or self.min_length):
            names = ("keep_mass", "min_length")
            what = next((f"{name}=" for name in names if getattr(self, name)), "decode='dense'")
            raise InputError(f"evict=True frees what the pattern does not see, and {what} may ask for it later.")

    def _pattern(self, *, causal: bool) -> Pattern:
        given = {name: getattr(self, name) for name in _PATTERN_OPTIONS if getattr(self, name) is not None}
        return make_pattern(self.pattern, given | {"causal": causal})

    def entry_names(self, program: Program) -> list[str]:
        return [name for name in program.entries if name != DECODE] or list(program.entries)

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Raises InputError: an option does not fit the model, or the pattern can not be evicted."""
        from planish.ir.infer import infer_shapes
        from planish.passes.sparsity.sites import attentions, find_sites
        from planish.passes.sparsity.splice import Splicer

        known = {v: (v.type, v.shape) for m in program.entries.values() for n in m.graph for v in n.outputs}
        for model in program.entries.values():
            infer_shapes(model)  # fusions leave values of unknown sizes
        entries = self.entry_names(program) if self.decode == "dense" else list(program.entries)
        count = max(len(list(attentions(program.entry(entry).graph))) for entry in entries)
        self._check_layers(count)
        run = _Run(program, ctx, Splicer(program, self.name))
        sites, why = find_sites(program, entries)
        wanted = range(count) if self.layers is None else self.layers
        for index in wanted:
            if index in why:
                node, reason = why[index]
                run.declined.append(Declined(self.name, node.name or node.op_type, reason))
        self._choose(run, {i: sites[i] for i in wanted if i in sites})
        for index, pattern in run.chosen.items():
            try:
                self._shard(run, sites[index], pattern)
            except Decline as decline:
                node = sites[index][0].node
                run.declined.append(Declined(self.name, node.name or node.op_type, decline.reason))
        if not run.fired:  # then nothing has changed, what was inferred included
            for value, (kind, shape) in known.items():
                value.type, value.shape = kind, shape
        elif ctx.target.name == "ort-cpu" and not ctx.target.kernels:  # the gate measures what this pass leaves
            from planish.passes.lowering.lower_block_sparse import LowerBlockSparse

            run.declined += LowerBlockSparse().apply(program, ctx).declined
        notes = [f"{_listed(indices)}: {text}" for text, indices in run.notes.items()]
        return PassResult(run.fired > 0, run.fired, run.declined, notes)

    def _check_layers(self, count: int) -> None:
        for index in self.layers or ():
            if index not in range(count):
                has = f"attentions 0 to {count - 1}" if count else "no attention that is one operator"
                raise InputError(f"layers names attention {index}; the model has {has}.")

    # --- which pattern -----------------------------------------------------------------------------------------

    def _choose(self, run: _Run, sites: dict[int, list[Site]]) -> None:
        """Fills `run.chosen`: the pattern of each attention that is not to stay dense."""
        dense = [i for i in sites if self._pattern(causal=True).is_dense(i)]
        if dense:
            run.notes["dense in the pattern (dense_every)"] = dense
        left = {i: found for i, found in sites.items() if i not in dense}
        if self.keep_mass is None:
            run.chosen = {i: self._pattern(causal=found[0].causal) for i, found in left.items()}
            return
        from planish.passes.sparsity.calibration import choose, measure

        if not left:
            return
        if run.ctx.run is None:
            reason = "keep_mass is measured on calibration inputs, and there is nothing to run them with"
            run.declined += [Declined(self.name, f[0].node.name or "attention", reason) for f in left.values()]
            return
        prompts = [next((s for s in found if not s.past), None) for found in left.values()]
        measured = [site for site in prompts if site is not None]
        block = self._pattern(causal=True).block
        masses = measure(run.program, measured[0].entry, measured, block, run.ctx.run) if measured else {}
        for index, found in left.items():
            if index not in masses:
                reason = "keep_mass is measured on prompts, and it has a past"
                run.declined.append(Declined(self.name, found[0].node.name or "attention", reason))
                continue
            try:
                candidates = self._candidates(causal=found[0].causal)
                pattern, words = choose(masses[index], candidates, found[0].heads, self.keep_mass)
            except Decline as decline:
                run.declined.append(Declined(self.name, found[0].node.name or "attention", decline.reason))
                continue
            run.note(f"by head, with the share of its attention kept: {', '.join(words)}", index)
            if not all(word == "dense" for word in words):
                run.chosen[index] = pattern

    def _candidates(self, *, causal: bool) -> list[Pattern]:
        own = self._pattern(causal=causal)
        widest = getattr(own, "local", 1)
        sizes = [1 << n for n in range(widest.bit_length()) if 1 << n < widest] + [widest]
        sink = make_pattern("sink-window", {"block": own.block, "causal": causal})
        bases = [own] if own.name == "sink-window" else [sink, own]
        return [replace(base, local=size) for size in sizes for base in bases]  # type: ignore[call-arg]

    # --- how ---------------------------------------------------------------------------------------------------

    def _shard(self, run: _Run, sites: list[Site], pattern: Pattern) -> None:
        from planish.passes.sparsity.building import prompt, step

        target = run.ctx.target
        self._check_target(target, pattern.block)
        plans = [(site, *self._covered(run, site, pattern)) for site in sites]
        if self.evict:
            self._evict(run, sites, pattern)
        for site, layout, bounds in plans:
            if site.past and self.evict:
                continue

            def make(op: Any, site: Site = site, layout: Layout = layout, bounds: Bounds = bounds) -> list[ir.Value]:
                if site.past:
                    return step(op, site, layout, bounds, lists=target.name == "ort-cuda")
                return [prompt(op, site, layout, bounds, target.kernels)]

            model = run.program.entry(site.entry)
            made = run.splicer.build(model, site.node, make, [site.node])
            run.splicer.replace(site.node, made)
            run.fired += 1
        site, layout, bounds = plans[0]
        text = f"{pattern.name}: {layout.summary()}"
        if not isinstance(site.length, int):
            text += f"; dense up to {bounds.least} tokens"
        run.note(text, site.index)
        tokens = run.program.sizes().get(site.length) if isinstance(site.length, str) else None
        if tokens is not None and tokens <= bounds.least:
            run.note(
                f"the calibration inputs have {tokens} tokens, where it is dense: they show neither its error nor its "
                f"gain; give some of more than {bounds.least}",
                site.index,
            )

    def _covered(self, run: _Run, site: Site, pattern: Pattern) -> tuple[Layout, Bounds]:
        """The lists for a site, and the lengths at which they are used.

        Raises:
            Decline: the pattern cuts nothing at the site's length, or at any that the lists cover.
        """
        from planish.passes.sparsity.building import Bounds

        longest = self._longest(run.program, pattern)
        length = site.length if isinstance(site.length, int) else longest
        if length > longest:
            raise Decline(f"it has {length} tokens, and the lists cover {longest}")
        layout = run.layout(pattern, length, site)
        cuts = layout.dense_rows() * layout.block
        least = cuts if self.min_length is None else self.min_length
        if length <= cuts:
            raise Decline(f"it has at most {length} tokens, and at that length the pattern is dense")
        if length <= least:
            raise Decline(f"it has at most {length} tokens, and up to {least} it stays dense")
        return layout, Bounds(least, longest)

    def _check_target(self, target: Target, block: int) -> None:
        if target.name == "tvm-cpu":
            raise Decline(f"target '{target}' has no form of block-sparse attention")
        if target.name == "tvm-cuda" and block % _CUDA_BLOCK:
            raise Decline(f"block is {block}; CUDA kernels take multiples of {_CUDA_BLOCK}")
        if target.name == "ort-cpu" and target.kernels and block % KERNEL_BLOCK:
            raise Decline(f"block is {block}; generated kernels take multiples of {KERNEL_BLOCK}")
        if target.name == "ort-cuda" and target.kernels and block % _CUDA_BLOCK:
            raise Decline(f"block is {block}; CUDA kernels take multiples of {_CUDA_BLOCK}")

    def _longest(self, program: Program, pattern: Pattern) -> int:
        known = program.provenance.get(_POSITIONS, "")
        longest = self.max_length or (int(known) if known.isdecimal() else _LONGEST)
        if isinstance(pattern, BlockMask):
            longest = min(longest, len(pattern.mask[0]) * pattern.block)
        return longest

    def _evict(self, run: _Run, sites: list[Site], pattern: Pattern) -> None:
        from planish.passes.sparsity.eviction import evict
        from planish.passes.sparsity.sites import lengths_of

        by_entry = {site.entry: site for site in sites}
        program = run.program
        if program.provenance.get("task") != TASK or {PREFILL, DECODE} - set(by_entry):
            raise Decline("evict=True is for programs of task='causal-lm', with prefill and decode")
        if lengths_of(program.entry(PREFILL).graph) is None:
            raise Decline("evict=True needs the lengths of prompts, which prefill does not read")
        site = by_entry[DECODE]
        plan = slot_plan(pattern, site.heads)
        assert isinstance(pattern, LocalPattern)
        kinds = [pattern.kind(head, site.heads) for head in range(site.heads.query)]
        evict(run.splicer, site, by_entry[PREFILL], plan, tuple(k if isinstance(k, int) else 0 for k in kinds))
        run.fired += 1
        longest = self._longest(program, pattern)
        program.provenance[_POSITIONS] = str(longest)  # a longer prompt would be dense
        slots = plan.capacity(longest)
        run.note(f"caches of {longest} tokens keep {slots} ({slots / longest:.3f} of the memory)", site.index)


def _listed(indices: list[int]) -> str:
    """``attentions 0 to 3, 5``."""
    parts: list[list[int]] = []
    for index in sorted(indices):
        if parts and parts[-1][-1] == index - 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    text = ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]} to {p[-1]}" for p in parts)
    return f"attention{'s' * (len(indices) > 1)} {text}"
