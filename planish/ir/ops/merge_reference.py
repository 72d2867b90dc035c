"""Float64 references of token merging: which tokens merge, by which rule of ties, and what they become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Norms are not taken to be less than this: a token whose metric is zero has no direction, and similarity 0.
TINY = 1e-12


@dataclass(frozen=True)
class Matching:
    """Which tokens merge.

    Attributes:
        kept: (batch, kept) tokens that stay, in the order of the output.
        sources: (batch, r) tokens that go.
        targets: (batch, r) positions in the output that `sources` go to.
    """

    kept: np.ndarray
    sources: np.ndarray
    targets: np.ndarray


def merged_count(tokens: int, r: int, ratio: float, protected: int) -> int:
    """How many tokens go: r + floor(ratio · tokens), and at most half of those that are not protected."""
    asked = r + int(np.floor(np.float32(ratio) * np.float32(tokens)))
    return max(min(asked, (tokens - protected) // 2), 0)


def directions(keys: np.ndarray, heads: int) -> np.ndarray:
    """The mean over heads of (batch, tokens, heads · size), of length 1."""
    batch, tokens, width = keys.shape
    mean = np.asarray(keys, np.float64).reshape(batch, tokens, heads, width // heads).mean(2)
    norm = np.sqrt(np.square(mean).sum(-1, keepdims=True))
    return np.asarray(mean / np.maximum(norm, TINY))


def _descending(values: np.ndarray) -> np.ndarray:
    """Indices along the last axis, the highest first; of equal ones the lower index."""
    return np.argsort(-values, axis=-1, kind="stable")


def bipartite(keys: np.ndarray, heads: int, protected: int, count: int) -> Matching:
    """Bipartite soft matching (Bolya et al. 2023, arXiv:2210.09461).

    Tokens from `protected` on at even positions (A) look for the most similar one at odd positions (B); the `count`
    most similar of A go. In the output are the protected tokens, then what is left of A, then B, each in order.
    """
    batch, tokens, _ = keys.shape
    front = min(protected, tokens)
    a = np.arange(protected + protected % 2, tokens, 2)
    b = np.arange(protected + 1 - protected % 2, tokens, 2)
    unit = directions(keys, heads)
    kept, sources, targets = [], [], []
    for row in unit:
        scores = row[a] @ row[b].T
        best = scores.max(1) if len(b) else np.zeros(len(a))
        order = _descending(best)
        going, staying = order[:count], np.sort(order[count:])
        chosen = scores[going].argmax(1) if count else np.zeros(0, np.int64)
        kept.append(np.concatenate([np.arange(front), a[staying], b]))
        sources.append(a[going])
        targets.append(front + len(staying) + chosen)
    return _matching(kept, sources, targets, batch, (tokens, count))


def by_energy(keys: np.ndarray, heads: int, protected: int, count: int, margin: float, alpha: float) -> Matching:
    """Merging by energy (Tran et al. 2024, arXiv:2405.16148).

    The energy of a token is the mean over all tokens that are not protected of ELU(similarity - margin). Of the
    2 · `count` tokens of the highest energy those of even rank go, each to the most similar one of odd rank. What
    stays keeps its order.
    """
    batch, tokens, _ = keys.shape
    unit = directions(keys, heads)
    kept, sources, targets = [], [], []
    for row in unit:
        free = row[protected:]
        scores = free @ free.T
        away = scores - margin
        energy = np.where(away > 0, away, alpha * np.expm1(np.minimum(away, 0))).mean(-1) if len(free) else away[:, 0:0]
        order = _descending(energy)[: 2 * count] if count else np.zeros(0, np.int64)
        a, b = order[0::2], order[1::2]
        chosen = b[scores[a][:, b].argmax(1)] if count else b
        stays = np.ones(tokens, bool)
        stays[a + protected] = False
        kept.append(np.flatnonzero(stays))
        sources.append(a + protected)
        targets.append((np.cumsum(stays) - 1)[chosen + protected])
    return _matching(kept, sources, targets, batch, (tokens, count))


def _matching(
    kept: list[np.ndarray], sources: list[np.ndarray], targets: list[np.ndarray], batch: int, sizes: tuple[int, int]
) -> Matching:
    tokens, count = sizes
    shapes = (tokens - count, count, count)
    rows = (kept, sources, targets)
    return Matching(*(np.array(r, np.int64).reshape(batch, n) for r, n in zip(rows, shapes, strict=True)))


def merge(x: np.ndarray, sizes: np.ndarray, matching: Matching, max_norm: bool) -> tuple[np.ndarray, ...]:
    """Tokens, their sizes, and where each token went.

    A merged token is the mean of its members by size. With `max_norm` it is then scaled to the norm of the longest
    member (Kim et al. 2024, arXiv:2312.01026).
    """
    x, sizes = np.asarray(x, np.float64), np.asarray(sizes, np.float64)
    batch, tokens, _ = x.shape
    rows = np.arange(batch)[:, None]
    kept, sources, targets = matching.kept, matching.sources, matching.targets
    total = sizes[rows, kept]
    np.add.at(total, (rows, targets), sizes[rows, sources])
    y = x[rows, kept] * (sizes[rows, kept] / total)[..., None]
    share = sizes[rows, sources] / total[rows, targets]
    np.add.at(y, (rows, targets), x[rows, sources] * share[..., None])
    if max_norm:
        norms = np.linalg.norm(x, axis=-1)
        longest = norms[rows, kept]
        np.maximum.at(longest, (rows, targets), norms[rows, sources])
        y *= (longest / np.maximum(np.linalg.norm(y, axis=-1), TINY))[..., None]
    where = np.zeros((batch, tokens), np.int64)
    where[rows, kept] = np.arange(kept.shape[1])
    where[rows, sources] = targets
    return y, total, where


def reference(energy: bool, max_norm: bool) -> Callable[..., tuple[np.ndarray, ...]]:
    """The reference of an operator of the family; all take the attributes of their schema."""

    def compute(
        x: np.ndarray, keys: np.ndarray, sizes: np.ndarray,
        r: int = 0, ratio: float = 0.0, protected: int = 0, heads: int = 1, margin: float = 0.0, alpha: float = 1.0,
    ) -> tuple[np.ndarray, ...]:  # fmt: skip
        count = merged_count(x.shape[1], r, ratio, protected)
        if energy:
            matching = by_energy(keys, heads, protected, count, margin, alpha)
        else:
            matching = bipartite(keys, heads, protected, count)
        return merge(x, sizes, matching, max_norm)

    return compute
