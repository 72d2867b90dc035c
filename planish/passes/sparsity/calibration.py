"""How much of each head's attention falls on the blocks that a pattern keeps, on the calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.ir.block_sparsity import Dense, Heads, Mixed, Pattern
from planish.ir.program import Program
from planish.passes.base import Decline
from planish.passes.layers.importance import PADDING, observe, padding_inputs, tokens
from planish.passes.sparsity.sites import Site, attentions

Run = Callable[[Program, str], list[dict[str, Any]]]
_QUERY, _KEY = "planish_query_{}", "planish_key_{}"


@dataclass
class Mass:
    """Attention by blocks, of one attention.

    Attributes:
        weights: (query heads, rows, rows) float64: sum over the queries of a row of their weights on a block.
        queries: (rows,) number of queries in each row.
    """

    weights: np.ndarray
    queries: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.queries)

    def kept(self, pattern: Pattern, heads: Heads) -> np.ndarray:
        """(query heads,) share of the weights that a pattern keeps, in the rows that it cuts; NaN if it cuts none."""
        layout = pattern.layout(self.rows * pattern.block, heads)
        seen = layout.masks()[layout.head_layout]
        cut = (layout.allowed() & ~seen).any(axis=2) & (self.queries > 0)
        total = (cut * self.queries).sum(axis=1)
        kept = (np.where(seen, self.weights, 0).sum(axis=2) * cut).sum(axis=1)
        share: np.ndarray = np.divide(kept, total, out=np.full(len(total), np.nan), where=total > 0)
        return share


def measure(program: Program, entry: str, sites: Sequence[Site], block: int, run: Run) -> dict[int, Mass]:
    """Attention of sites by blocks of so many tokens, by index, on the calibration inputs of an entry."""
    trial = Program({entry: program.entry(entry).clone()}, program.target, dict(program.provenance))
    graph = trial.entry(entry).graph
    nodes = list(attentions(graph))
    for site in sites:
        for name, index in ((_QUERY, 0), (_KEY, 1)):
            value = nodes[site.index].inputs[index]
            assert value is not None
            observe(graph, value, name.format(site.index))
    for name in padding_inputs(graph, entry):
        observe(graph, next(v for v in graph.inputs if v.name == name), PADDING.format(name))
    found: dict[int, Mass] = {}
    for batch in run(trial, entry):
        for site in sites:
            q, k = (_by_head(batch[n.format(site.index)], site, i) for i, n in enumerate((_QUERY, _KEY)))
            real = tokens(batch, (q.shape[0], q.shape[2]))
            mass = by_blocks(q, k, real, site.scale, block, causal=site.causal)
            known = found.get(site.index)
            found[site.index] = mass if known is None else _sum(known, mass)
    return found


def _by_head(value: Any, site: Site, index: int) -> np.ndarray:
    array = np.asarray(value, np.float32)
    if array.ndim == 4:
        return array
    heads = site.heads.query if index == 0 else site.heads.kv
    return array.reshape(*array.shape[:2], heads, site.size).transpose(0, 2, 1, 3)


def by_blocks(q: np.ndarray, k: np.ndarray, real: np.ndarray, scale: float, block: int, *, causal: bool) -> Mass:
    """Attention weights summed over blocks.

    Args:
        q: (batch, query heads, length, size).
        k: (batch, key-value heads, length, size).
        real: (batch, length) bool: what is no padding; padding is no query and no key.
    """
    batch, heads, length, _ = q.shape
    rows = -(-length // block)
    group = heads // k.shape[1]
    starts = np.arange(rows) * block
    weights, queries = np.zeros((heads, rows, rows)), np.zeros(rows)
    earlier = np.tril(np.ones((length, length), bool)) if causal else np.ones((length, length), bool)
    for b in range(batch):
        queries += np.add.reduceat(real[b].astype(np.float64), starts)
        for h in range(heads):
            scores = (q[b, h] @ k[b, h // group].T) * np.float32(scale)
            seen = earlier & real[b][None]
            scores = np.where(seen, scores, np.float32(-np.inf))
            top = np.max(scores, axis=1, keepdims=True)
            scores = np.exp(scores - np.where(np.isfinite(top), top, 0))
            total = scores.sum(axis=1, keepdims=True)
            shares = np.divide(scores, total, out=np.zeros_like(scores), where=(total > 0) & real[b][:, None])
            weights[h] += np.add.reduceat(np.add.reduceat(shares.astype(np.float64), starts, axis=0), starts, axis=1)
    return Mass(weights, queries)


def _sum(one: Mass, two: Mass) -> Mass:
    big, small = (one, two) if one.rows >= two.rows else (two, one)
    n = small.rows
    big.weights[:, :n, :n] += small.weights
    big.queries[:n] += small.queries
    return big


def choose(mass: Mass, candidates: Sequence[Pattern], heads: Heads, keep: float) -> tuple[Mixed, list[str]]:
    """For each query head the candidate of the least density that keeps the given share, or dense attention.

    Returns:
        The pattern, and a word for each head.

    Raises:
        Decline: no candidate cuts anything at the length of the calibration inputs.
    """
    first = candidates[0]
    length = mass.rows * first.block
    costs = [pattern.layout(length, heads).density() for pattern in candidates]
    order = [i for i in np.argsort(costs, kind="stable") if costs[i] < 1]
    if not order:
        raise Decline(
            f"the calibration inputs have at most {length} tokens, at which every candidate is dense: give longer ones"
        )
    kept = {i: mass.kept(candidates[i], heads) for i in order}
    dense = len(candidates)
    choice, words = [], []
    for head in range(heads.query):
        chosen = next((i for i in order if kept[i][head] >= keep), dense)
        choice.append(int(chosen))
        words.append("dense" if chosen == dense else f"{label(candidates[chosen])} {kept[chosen][head]:.3f}")
    every = (*candidates, Dense(block=first.block, causal=first.causal))
    return Mixed(block=first.block, causal=first.causal, patterns=every, choice=tuple(choice)), words


def label(pattern: Pattern) -> str:
    """The pattern's name with the size of its window."""
    return f"{pattern.name}({getattr(pattern, 'local', '')})"
