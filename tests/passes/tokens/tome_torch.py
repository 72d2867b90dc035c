"""Token merging in torch, as a layer that takes the place of one of transformers: what the pass is held to.

Nothing is shared with the pass: loops over rows and tokens, sizes and members kept as lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Tokens:
    """What merging has done to each row of a batch.

    Attributes:
        members: row → token → the first tokens that it is made of.
        first: row → token → the first token that keeps its place.
    """

    members: list[list[list[int]]] = field(default_factory=list)

    def start(self, x: Tensor) -> None:
        self.members = [[[i] for i in range(x.shape[1])] for _ in range(x.shape[0])]

    def sizes(self) -> Tensor:
        return torch.tensor([[float(len(m)) for m in row] for row in self.members])

    def lowest(self) -> Tensor:
        return torch.tensor([[min(m) for m in row] for row in self.members])

    def unmerge(self, x: Tensor) -> Tensor:
        rows = []
        for b, row in enumerate(self.members):
            where = {i: t for t, members in enumerate(row) for i in members}
            rows.append(x[b, [where[i] for i in range(len(where))]])
        return torch.stack(rows)


def merge(x: Tensor, metric: Tensor, tokens: Tokens, r: int, protected: int) -> Tensor:
    """Bipartite soft matching, a row at a time."""
    merged = []
    for b in range(x.shape[0]):
        free = range(protected, x.shape[1])
        count = min(r, len(free) // 2)
        even, odd = [i for i in free if i % 2 == 0], [i for i in free if i % 2]
        unit = metric[b].double() / metric[b].double().norm(dim=-1, keepdim=True)
        likes = {i: max(odd, key=lambda j, i=i: float(unit[i] @ unit[j])) for i in even}
        order = sorted(even, key=lambda i: -float(unit[i] @ unit[likes[i]]))
        gone = order[:count]
        stay = [*range(min(protected, x.shape[1])), *sorted(set(even) - set(gone)), *odd]
        members = tokens.members[b]
        rows, new = [], []
        for t in stay:
            group = [t, *(i for i in gone if likes[i] == t)]
            weights = torch.tensor([float(len(members[i])) for i in group])
            rows.append((x[b, group] * weights[:, None]).sum(0) / weights.sum())
            new.append([m for i in group for m in members[i]])
        merged.append(torch.stack(rows))
        tokens.members[b] = new
    return torch.stack(merged)


@dataclass(frozen=True)
class Parts:
    """A layer of a vision transformer, taken apart.

    Attributes:
        qkv: normalized hidden state → queries, keys, values.
        out: what is added to the hidden state from what attention gives.
        ffn: hidden state → what is added to it.
        bias: the arguments of the layer → a float bias of (heads, tokens, tokens).
    """

    norm: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    heads: int
    out: Callable[[Tensor], Tensor]
    ffn: Callable[[Tensor], Tensor]
    bias: Callable[[dict[str, Any], int], Tensor] | None = None


class MergingLayer(nn.Module):
    """One layer with merging between its attention and its feed-forward network."""

    def __init__(self, parts: Parts, tokens: Tokens, place: tuple[int, int], r: int, protected: int, log: bool) -> None:
        super().__init__()
        self.parts, self.tokens, self.place = parts, tokens, place
        self.r, self.protected, self.log = r, protected, log
        self.attention_type = "full_attention"

    def forward(self, x: Tensor, *args: Any, **given: Any) -> Tensor:
        number, last = self.place
        if number == 0:
            self.tokens.start(x)
        parts, (batch, count, width) = self.parts, x.shape
        q, k, v = (t.reshape(batch, count, parts.heads, -1).transpose(1, 2) for t in parts.qkv(parts.norm(x)))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if parts.bias is not None:
            bias = parts.bias(given, sum(len(m) for m in self.tokens.members[0]))
            lowest = self.tokens.lowest()
            scores = scores + torch.stack([bias[:, row][:, :, row] for row in lowest])
        if self.log:
            scores = scores + self.tokens.sizes().log()[:, None, None]
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, count, width)
        x = merge(x + parts.out(mixed), k.mean(1), self.tokens, self.r, self.protected)
        x = x + parts.ffn(x)
        return self.tokens.unmerge(x) if number == last else x


def install(
    layers: nn.ModuleList, take: Callable[[nn.Module], Parts], r: list[int], protected: int, *, log: bool = True
) -> None:
    """Puts merging layers in the place of those of a model."""
    tokens, last = Tokens(), len(layers) - 1
    for i, layer in enumerate(list(layers)):
        layers[i] = MergingLayer(take(layer), tokens, (i, last), r[i], protected, log)
