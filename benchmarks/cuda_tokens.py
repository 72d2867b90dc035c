"""Token merging on a GPU: vision transformers with and without, as CUDA graphs, and the kernels by themselves.

    python benchmarks/cuda_tokens.py [--json FILE] [--models B,L] [--batch 64] [--compile]

All nets are the same modules of torch in float16: one product for queries, keys and values, torch's attention or
ours, layer_norm, gelu. "torch" merges with the operators of torch (ToMe with topk), "ours" with one kernel, and with
attention that takes the bias by size. CUDA events, medians, interleaved. Errors are those of four images against
float64 that merges the same tokens.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cuda_attention import graph, times

from planish.ir.ops.merge_reference import merged_count
from planish.runtime.cuda.attention import attention
from planish.runtime.cuda.token_merge import Norm, add_norm, merge_tokens

Tensor = torch.Tensor
SIZE, TOKENS, PATCH = 64, 197, 16
MODELS = {"B": (12, 768, (13, 16)), "L": (24, 1024, (8,))}


@dataclass
class Layer:
    """Weights as torch's linear wants them, (out, in)."""

    norm1: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]


@dataclass
class Net:
    """Weights of a vision transformer of 224 x 224 images in patches of 16 x 16."""

    patches: tuple[Tensor, Tensor]
    first: Tensor  # the class token, (1, 1, width)
    position: Tensor
    layers: list[Layer]
    norm: tuple[Tensor, Tensor]

    def to(self, dtype: torch.dtype) -> Net:
        def pair(p: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return p[0].to(dtype), p[1].to(dtype)

        layers = [Layer(*(pair(getattr(old, n)) for n in Layer.__dataclass_fields__)) for old in self.layers]
        return Net(pair(self.patches), self.first.to(dtype), self.position.to(dtype), layers, pair(self.norm))


def make(depth: int, width: int) -> Net:
    """Random weights, as wide as a trained net's."""

    def linear(n: int, k: int, std: float = 0.04) -> tuple[Tensor, Tensor]:
        return torch.randn(n, k, device="cuda") * std, torch.randn(n, device="cuda") * 0.02

    def norm() -> tuple[Tensor, Tensor]:
        return 1 + torch.randn(width, device="cuda") * 0.1, torch.randn(width, device="cuda") * 0.1

    layers = [
        Layer(norm(), linear(3 * width, width), linear(width, width), norm(), linear(4 * width, width),
              linear(width, 4 * width))
        for _ in range(depth)
    ]  # fmt: skip
    first, position = torch.randn(1, 1, width, device="cuda"), torch.randn(1, TOKENS, width, device="cuda") * 0.5
    return Net(linear(width, 3 * PATCH**2), first, position, layers, norm())


def normal(x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *weights, eps=1e-6)


def begin(net: Net, images: Tensor) -> Tensor:
    """(batch, 3, 224, 224) → (batch, 197, width)."""
    weight, bias = net.patches
    x = F.conv2d(images, weight.view(-1, 3, PATCH, PATCH), bias, stride=PATCH).flatten(2).transpose(1, 2)
    return (torch.cat([net.first.expand(len(x), 1, -1), x], 1) + net.position).contiguous()


def torch_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor | None) -> Tensor:
    mask = None
    if sizes is not None:
        batch, tokens = sizes.shape
        mask = sizes.log().to(q.dtype)[:, None, None].expand(batch, 1, tokens, tokens)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)


def torch_merge(x: Tensor, keys: Tensor, sizes: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """ToMe by torch's operators; the first token stays."""
    metric = keys.mean(2)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    if sizes is None:
        sizes = torch.ones(x.shape[:2], device=x.device)
    scores = metric[:, 2::2] @ metric[:, 1::2].transpose(1, 2)
    best, to = scores.max(-1)
    order = best.topk(best.shape[1], -1).indices
    going, staying = order[:, :count], order[:, count:]
    goal = to.gather(1, going)

    def merged(item: Tensor) -> Tensor:
        a, b = item[:, 2::2], item[:, 1::2]

        def rows(of: Tensor) -> Tensor:
            return a.gather(1, of[..., None].expand(-1, -1, item.shape[2]))

        summed = b.scatter_add(1, goal[..., None].expand(-1, -1, item.shape[2]), rows(going))
        return torch.cat([item[:, :1], rows(staying), summed], 1)

    total = merged(sizes[..., None])
    return (merged(x * sizes[..., None].to(x.dtype)) / total.to(x.dtype)), total[..., 0]


def run(
    net: Net, images: Tensor, r: int, how: str, proportional: bool = True, seen: list[Tensor] | None = None
) -> Tensor:
    """Hidden states behind the last norm. `how`: torch, ours, or mixed (torch's attention, our merges, no bias)."""
    x = begin(net, images)
    sizes = bias = None
    for layer in net.layers:
        q, k, v = F.linear(normal(x, layer.norm1), *layer.qkv).view(*x.shape[:2], 3, -1, SIZE).unbind(2)
        if how == "ours":
            mixed = attention(q, k, v, causal=False, bias=bias if proportional else None)
        else:
            mixed = torch_attention(q, k, v, sizes if proportional else None)
        x = x + F.linear(mixed.reshape(x.shape), *layer.out)
        if count := merged_count(x.shape[1], r, 0, 1):
            if how == "torch":
                x, sizes = torch_merge(x, k, sizes, count)
            else:
                made = merge_tokens(
                    x, k, sizes, r=r, protected=1, index=seen is not None, logs=how == "ours" and proportional
                )
                x, sizes, bias = made.tokens, made.sizes, made.logs
                if seen is not None:
                    seen.append(made.where)
        x = x + F.linear(F.gelu(F.linear(normal(x, layer.norm2), *layer.up)), *layer.down)
    return normal(x, net.norm)


def run_fused(net: Net, images: Tensor, r: int, proportional: bool = True, seen: list[Tensor] | None = None) -> Tensor:
    """The same with residual sums and norms in one kernel each, which merges too; without a bias torch's attention."""
    x = begin(net, images)
    sizes = bias = None
    normed = normal(x, net.layers[0].norm1)
    for number, layer in enumerate(net.layers):
        q, k, v = F.linear(normed, *layer.qkv).view(*x.shape[:2], 3, -1, SIZE).unbind(2)
        mixed = attention(q, k, v, causal=False, bias=bias) if bias is not None else torch_attention(q, k, v, None)
        out = F.linear(mixed.reshape(x.shape), *layer.out)
        norm = Norm(*layer.norm2, 1e-6)
        if merged_count(x.shape[1], r, 0, 1):
            wanted = {"index": seen is not None, "logs": proportional}
            made = merge_tokens(x, k, sizes, r=r, protected=1, added=out, norm=norm, **wanted)
            x, sizes, bias, normed = made.tokens, made.sizes, made.logs, made.normed
            if seen is not None:
                seen.append(made.where)
        else:
            x, normed = add_norm(x, out, norm)
        down = F.linear(F.gelu(F.linear(normed, *layer.up)), *layer.down)
        after = net.layers[number + 1].norm1 if number + 1 < len(net.layers) else net.norm
        x, normed = add_norm(x, down, Norm(*after, 1e-6))
    return normed


def exact(net: Net, images: Tensor, indices: list[Tensor]) -> Tensor:
    """The net in its own precision, merging as `indices` say."""
    x = begin(net, images)
    sizes = torch.ones(x.shape[:2], device="cuda", dtype=x.dtype)
    for number, layer in enumerate(net.layers):
        q, k, v = F.linear(normal(x, layer.norm1), *layer.qkv).view(*x.shape[:2], 3, -1, SIZE).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / SIZE**0.5 + sizes.log()[:, None, None]
        x = x + F.linear(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2), *layer.out)
        if number < len(indices):
            index = indices[number]
            left = int(index.max()) + 1
            total = x.new_zeros(len(x), left).scatter_add(1, index, sizes)
            share = (sizes / total.gather(1, index))[..., None]
            x = x.new_zeros(len(x), left, x.shape[2]).scatter_add(1, index[..., None].expand_as(x), x * share)
            sizes = total
        x = x + F.linear(F.gelu(F.linear(normal(x, layer.norm2), *layer.up)), *layer.down)
    return normal(x, net.norm)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def model_rows(name: str, batch: int, compiled: bool) -> list[dict[str, Any]]:
    """Milliseconds of a model without merging and with, errors of what is ours."""
    depth, width, rs = MODELS[name]
    whole = make(depth, width)
    net = whole.to(torch.float16)
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.float16)
    wide = whole.to(torch.float64)
    few = images[:4]
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    calls["plain"] = graph(lambda i: run(net, images, 0, "torch"), 1)
    calls["plain, our attention"] = graph(lambda i: run(net, images, 0, "ours"), 1)
    plain = exact(wide, few.double(), [])
    calls["plain, sums with norms"] = graph(lambda i: run_fused(net, images, 0), 1)
    errors["plain, sums with norms"] = relative(run_fused(net, few, 0), plain)
    errors["plain"] = relative(run(net, few, 0, "torch"), plain)
    errors["plain, our attention"] = relative(run(net, few, 0, "ours"), plain)
    for r in rs:

        def forced(how: str, r: int = r, proportional: bool = True) -> float:
            seen: list[Tensor] = []
            got = run(net, few, r, how, proportional, seen)
            return relative(got, exact(wide, few.double(), seen))

        seen: list[Tensor] = []
        got = run_fused(net, few, r, True, seen)
        errors[f"r={r} ours, sums with norms"] = relative(got, exact(wide, few.double(), seen))
        calls[f"r={r} ours, sums with norms"] = graph(lambda i, r=r: run_fused(net, images, r), 1)
        calls[f"r={r} ours, sums with norms, no bias"] = graph(lambda i, r=r: run_fused(net, images, r, False), 1)
        errors[f"r={r} ours"] = forced("ours")
        calls[f"r={r} ours"] = graph(lambda i, r=r: run(net, images, r, "ours"), 1)
        calls[f"r={r} ours, no bias"] = graph(lambda i, r=r: run(net, images, r, "ours", False), 1)
        calls[f"r={r} our merge, torch attention, no bias"] = graph(
            lambda i, r=r: run(net, images, r, "mixed", False), 1
        )
        calls[f"r={r} torch"] = graph(lambda i, r=r: run(net, images, r, "torch"), 1)
        calls[f"r={r} torch, no bias"] = graph(lambda i, r=r: run(net, images, r, "torch", False), 1)
        calls[f"r={r} torch, eager"] = lambda r=r: run(net, images, r, "torch")
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        for r in (0, rs[-1]):
            try:
                call = torch.compile(lambda r=r: run(net, images, r, "torch"), dynamic=False)
                call()
                calls[f"r={r} torch.compile"] = graph(lambda i, call=call: call(), 1)
            except Exception:
                traceback.print_exc(limit=3)
    with torch.inference_mode():
        found = times(calls, 15)
    base, best = min(found["plain"], found["plain, our attention"]), found["plain, sums with norms"]
    return [
        {"model": f"ViT-{name}/16", "batch": batch, "how": how, "ms": ms, "images_s": batch / ms * 1000,
         "ratio": base / ms, "ratio_fused": best / ms, "error": errors.get(how)}
        for how, ms in found.items()
    ]  # fmt: skip


def kernel_row(tokens: int, r: int, batch: int, heads: int) -> dict[str, Any]:
    """Microseconds of merging and of attention by themselves; each call has inputs of its own."""
    width = heads * SIZE
    copies = max(2, (200 << 20) // (batch * tokens * width * 8) + 1)
    qkv = torch.randn(copies, batch, tokens, 3, heads, SIZE, device="cuda", dtype=torch.float16)
    x = torch.randn(copies, batch, tokens, width, device="cuda", dtype=torch.float16)
    sizes = torch.rand(batch, tokens, device="cuda") * 3 + 1
    bias, count = sizes.log(), merged_count(tokens, r, 0, 1)

    def merge(i: int) -> Any:
        return merge_tokens(x[i], qkv[i, :, :, 1], sizes, r=r, protected=1, index=False, logs=True)

    each: dict[str, Callable[[int], Any]] = {
        "merge": merge,
        "merge, torch": lambda i: torch_merge(x[i], qkv[i, :, :, 1], sizes, count),
        "copy": lambda i: (x[i].clone(), qkv[i, :, :, 1].clone()),
        "attention": lambda i: attention(*qkv[i].unbind(2), causal=False),
        "attention, bias": lambda i: attention(*qkv[i].unbind(2), causal=False, bias=bias),
        "SDPA": lambda i: torch_attention(*qkv[i].unbind(2), None),
        "SDPA, mask": lambda i: torch_attention(*qkv[i].unbind(2), sizes),
    }
    calls = {name: graph(call, copies) for name, call in each.items()}
    found = {name: ms / copies * 1000 for name, ms in times(calls, 11).items()}
    return {"tokens": tokens, "r": r, "heads": heads, "batch": batch, **found}


def table(rows: list[dict[str, Any]], kernels: list[dict[str, Any]]) -> str:
    lines = [
        "| model | | ms | images/s | times as fast | as with sums and norms | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = f"{row['error']:.1e}" if row["error"] is not None else ""
        cells = (
            row["model"],
            row["how"],
            f"{row['ms']:.3f}",
            f"{row['images_s']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_fused']:.2f}",
            error,
        )
        lines.append(f"| {' | '.join(cells)} |")
    if kernels:
        names = [n for n in kernels[0] if n not in ("r", "batch")]
        lines += ["", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += ["| " + " | ".join(f"{row[n]:.4g}" for n in names) + " |" for row in kernels]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", default="B,L")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes a minute")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        kernels = [kernel_row(tokens, 16, arguments.batch, 12) for tokens in (197, 101, 37)]
    for name in arguments.models.split(","):
        with torch.inference_mode():
            rows += model_rows(name, arguments.batch, arguments.compile)
        print(table(rows, kernels), flush=True)
    if arguments.json:
        made = {"gpu": torch.cuda.get_device_name(), "rows": rows, "kernels": kernels}
        arguments.json.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
