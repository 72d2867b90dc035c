"""Attention over products of rank 3, as modules of older libraries compute it."""

from __future__ import annotations

import torch

LOWEST = torch.finfo(torch.float32).min


class Bmm(torch.nn.Module):
    """Heads joined to the batch; a mask is added at rank 4, where scores may be clamped as well."""

    def __init__(self, clamped: bool = True) -> None:
        super().__init__()
        self.heads, self.depth, self.clamped = 2, 8, clamped
        self.q, self.k, self.v, self.out = (torch.nn.Linear(16, 16) for _ in range(4))

    def split(self, x: torch.Tensor, length: int, batch: int) -> torch.Tensor:
        return x.view(batch, length, self.heads, self.depth).transpose(1, 2).contiguous()

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, hidden = x.size()
        joined = (batch * self.heads, -1, self.depth)
        q = self.split(self.q(x) * self.depth**-0.5, length, batch).view(*joined)
        k = self.split(self.k(x), -1, batch).view(*joined)
        v = self.split(self.v(x), -1, batch).view(*joined)
        scores = torch.bmm(q, k.transpose(1, 2))
        if attention_mask is not None:
            mask = causal_mask(attention_mask, length)
            scores = scores.view(batch, self.heads, length, k.size(1)) + mask
            if self.clamped:
                scores = torch.max(scores, torch.tensor(LOWEST))
            scores = scores.view(batch * self.heads, length, k.size(1))
        weights = torch.nn.functional.softmax(scores, dim=-1)
        output = torch.bmm(torch.nn.functional.dropout(weights, 0.1, self.training), v)
        output = output.view(batch, self.heads, length, self.depth).transpose(1, 2).reshape(batch, length, hidden)
        return self.out(output)


def causal_mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros where queries may look; elsewhere the lowest float, or twice that where padding follows the query."""
    batch = attention_mask.shape[0]
    causal = torch.full((length, length), LOWEST).triu(1)[None, None].expand(batch, 1, length, length)
    off = 1.0 - attention_mask[:, None, None, :].to(torch.float32)
    return causal + off.masked_fill(off.to(torch.bool), LOWEST).expand(batch, 1, length, length)


class Torch(torch.nn.Module):
    """torch.nn.MultiheadAttention of one input; the weights are computed with `weights`, and given with `given`."""

    def __init__(self, batch_first: bool, weights: bool, given: bool = False) -> None:
        super().__init__()
        self.inner = torch.nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.weights, self.given = weights, given

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        output, weights = self.inner(x, x, x, need_weights=self.weights)
        return (output, weights) if self.given else output


class OneHead(torch.nn.Module):
    """Queries, keys and values without heads, as autoencoders of images have in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        nothing = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
        scores = torch.baddbmm(nothing, q, k.transpose(-1, -2), beta=0, alpha=16**-0.5)
        return torch.bmm(scores.softmax(-1), v)
