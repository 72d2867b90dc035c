"""prune-heads: takes whole attention heads out of the weights (arXiv 1905.10650)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from planish.ir.errors import InputError, unknown
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import ApproximatePass, Decline, PassContext, PassResult
from planish.passes.registry import register

if TYPE_CHECKING:
    from planish.passes.layers.head_sites import Site, StackSites

_HOW = ("importance",)
Chosen = dict[int, tuple[int, ...]]


@register
@dataclass(frozen=True)
class PruneHeads(ApproximatePass):
    """Removes attention heads: their columns of the weights of queries, keys and values, their rows of the output's.

    The result is that of the model with these rows set to zero, by smaller products. Query heads that share a head of
    keys and values (grouped-query attention) go together, and take it with them. All entries lose the same heads,
    since they share their weights; caches have as many heads fewer. A layer that loses all heads loses its attention.

    Runs where attention is one operator: after fuse-attention, share-kv-heads and unpack-qkv, at best before what
    lowers attention.

    Options:
        heads: layer → the query heads to REMOVE, both counted from 0.
        keep: how many query heads each layer keeps, a multiple of those that share a head of keys and values.
        ratio: share of the query heads to remove, from 0 to below 1, in place of `keep`; rounded down.
        by: what `keep` and `ratio` go by: ``"importance"``, the norm of what a head adds to the output of its
            attention, summed over the positions of the calibration inputs that are no padding.
        uniform: every layer loses as many heads. Else `ratio` holds for the stack, and a layer may lose all.
        stack: name of one stack, of a model with several.
    """

    name: ClassVar[str] = "prune-heads"
    gives_up: ClassVar[str] = "What the heads that are removed add to the output of their attention."
    order: ClassVar[int] = 20

    heads: dict[int, tuple[int, ...]] | None = field(default=None, hash=False)
    keep: int | None = None
    ratio: float | None = None
    by: str = "importance"
    uniform: bool = True
    stack: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("heads", "keep", "ratio") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(f"give one of heads=, keep= and ratio=; {' and '.join(given) or 'none'} is given.")
        if self.by not in _HOW:
            raise unknown("by", self.by, _HOW)
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise InputError(f"ratio is {self.ratio:g}; it is from 0, which keeps all heads, to below 1.")
        if self.keep is not None and self.keep < 1:
            raise InputError(f"keep is {self.keep}; keep at least 1 head, or use skip-layers{{part='attention'}}.")
        if self.keep is not None and not self.uniform:
            raise InputError("keep= is for each layer, and uniform=False chooses between layers; give ratio=.")
        if self.heads is not None:
            object.__setattr__(self, "heads", {layer: tuple(named) for layer, named in self.heads.items()})
            twice = next((layer for layer, named in self.heads.items() if len(set(named)) < len(named)), None)
            if twice is not None:
                raise InputError(f"heads names a head of layer {twice} twice: {list(self.heads[twice])}.")

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Raises InputError: an option does not fit the model; the message has the valid range."""
        from planish.ir.infer import infer_shapes
        from planish.passes.layers.head_sites import find_sites

        known = _facts(program)
        for model in program.entries.values():
            infer_shapes(model)  # fusions leave values of unknown sizes
        stacks, declined = find_sites(program, self.stack, self.heads is not None, self.name)
        fired, notes = 0, list[str]()
        for stack in stacks:
            if not stack.attended:
                declined.append(Declined(self.name, stack.name, "its layers have no attention"))
                continue
            try:
                chosen = self._choose(program, stack, ctx)
                count, note = self._remove(program, stack, chosen, ctx) if chosen else (0, "")
            except Decline as decline:
                declined.append(Declined(self.name, stack.name, decline.reason))
                continue
            fired += count
            notes += [note] if note else []
        if not fired:  # then nothing has changed, what was inferred included
            for value, (kind, shape) in known.items():
                value.type, value.shape = kind, shape
        return PassResult(fired > 0, fired, declined, notes)

    # --- which -------------------------------------------------------------------------------------------------

    def _choose(self, program: Program, stack: StackSites, ctx: PassContext) -> Chosen:
        """Layer → the heads that it loses."""
        if self.heads is not None:
            return self._named(stack)
        from planish.passes.layers.head_sites import importances

        sites = stack.sites
        counts = {site.index: self._count(site) for site in sites}
        if not any(counts.values()) and (self.uniform or not sites):
            return {}
        if ctx.run is None:
            raise Decline("importance is measured on calibration inputs, and there is nothing to run them with")
        entry = program.default_entry
        measured = importances(program, entry, sites, ctx.run)
        ranked = [
            (float(measured[site.index][list(unit)].mean()), site.index, unit)
            for site in sites
            for unit in _units(site)
        ]
        ranked.sort()
        limit = int((self.ratio or 0) * sum(site.heads for site in sites) + 1e-9)
        chosen: Chosen = {}
        for _, index, unit in ranked:
            gone = len(chosen.get(index, ())) + len(unit)
            everywhere = sum(map(len, chosen.values())) + len(unit)
            if gone <= counts[index] if self.uniform else everywhere <= limit:
                chosen[index] = tuple(sorted((*chosen.get(index, ()), *unit)))
        return chosen

    def _count(self, site: Site) -> int:
        """How many query heads a layer loses at most."""
        size = len(_units(site)[0])
        if self.ratio is not None:
            return int(self.ratio * site.heads / size + 1e-9) * size
        assert self.keep is not None
        if self.keep > site.heads or self.keep % size:
            steps = f"a multiple of {size} " if size > 1 else ""
            raise InputError(f"keep is {self.keep}; '{site.name}' has {site.heads} heads: {steps}from {size} to that.")
        return site.heads - self.keep

    def _named(self, stack: StackSites) -> Chosen:
        assert self.heads is not None
        sites = {site.index: site for site in stack.sites}
        chosen: Chosen = {}
        for index, named in self.heads.items():
            if index not in range(stack.layers):
                raise InputError(f"heads names layer {index}; '{stack.name}' has the layers 0 to {stack.layers - 1}.")
            if index not in stack.attended:
                raise InputError(f"heads names layer {index}, which has no attention of its own.")
            if index not in sites or not named:
                continue  # the reason why it is left alone is known already
            site = sites[index]
            for head in named:
                if head not in range(site.heads):
                    raise InputError(
                        f"heads names head {head} of layer {index}, which has the heads 0 to {site.heads - 1}."
                    )
            _require_groups(site, named)
            chosen[index] = tuple(sorted(named))
        return chosen

    # --- how ---------------------------------------------------------------------------------------------------

    def _remove(self, program: Program, stack: StackSites, chosen: Chosen, ctx: PassContext) -> tuple[int, str]:
        from planish.passes.canonicalize.editing import Editor
        from planish.passes.canonicalize.eliminate_dead_code import EliminateDeadCode
        from planish.passes.layers.head_edits import Memo, cut_heads
        from planish.passes.layers.units import drop_inputs, problem, remove

        sites = {site.index: site for site in stack.sites}
        whole = [sites[index] for index, gone in chosen.items() if len(gone) == sites[index].heads]
        for site in whole:
            for layers, unit in site.units.values():
                if reason := problem(layers, [unit]):
                    raise Decline(reason)
        before, editor, memo = program.weight_bytes(), Editor(program, self.name), Memo()
        for index, gone in chosen.items():
            site = sites[index]
            if site not in whole:
                for flow in site.flows.values():
                    cut_heads(flow, _kept(site, gone), editor, memo)
        inputs = []
        for entry, model in program.entries.items():
            if whole:
                units = [site.units[entry][1] for site in whole]
                inputs.append((model.graph, remove(model.graph, whole[0].units[entry][0], units, editor).inputs))
        EliminateDeadCode().apply(program, ctx)
        for graph, names in inputs:
            drop_inputs(graph, names)
        count = sum(map(len, chosen.values()))
        total = sum(site.heads for site in stack.sites)
        listed = "; ".join(f"{index}: {', '.join(map(str, gone))}" for index, gone in sorted(chosen.items()))
        note = f"{stack.name}: {count} of {total} heads removed ({listed})"
        return count, f"{note}, weights {before} to {program.weight_bytes()} bytes"


def _facts(program: Program) -> dict[ir.Value, tuple[ir.TypeProtocol | None, ir.Shape | None]]:
    values = [v for node in program.nodes() for v in node.outputs]
    return {v: (v.type, v.shape.copy() if v.shape is not None else None) for v in values}


def _units(site: Site) -> list[tuple[int, ...]]:
    """What goes together: query heads that share a head of keys and values; if all do, single ones."""
    size = site.group if site.group < site.heads else 1
    return [tuple(range(start, start + size)) for start in range(0, site.heads, size)]


def _groups(site: Site, gone: Sequence[int]) -> list[list[int]]:
    """For each head of keys and values, the query heads that are left of those that read it."""
    size = site.group
    return [[h for h in range(start, start + size) if h not in set(gone)] for start in range(0, site.heads, size)]


def _require_groups(site: Site, gone: Sequence[int]) -> None:
    left = _groups(site, gone)
    if len({len(group) for group in left if group}) > 1:
        at, group = next((i, g) for i, g in enumerate(left) if 0 < len(g) < site.group)
        first = at * site.group
        raise InputError(
            f"heads of layer {site.index}: query heads {first} to {first + site.group - 1} read key/value head {at}, "
            f"and {len(group)} of them would be left; name all of them, or as many of every other group."
        )


def _kept(site: Site, gone: Sequence[int]) -> dict[str, list[int]]:
    left = _groups(site, gone)
    return {"q": [head for group in left for head in group], "kv": [i for i, group in enumerate(left) if group]}
