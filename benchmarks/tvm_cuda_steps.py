"""Steps of causal language models on tvm-cuda against torch with a static cache: errors and latencies.

    python benchmarks/tvm_cuda_steps.py [--cases gpt2-b1,...] [--json FILE]   # on a GPU; compiles, with TVM and nvcc

A step reads one token a row behind 512 that the cache holds, of 1024 that it has room for. Ours is the graph that
`generate` launches. Torch's is a decoder of the same sizes that writes into a static cache with ``index_copy_`` and
attends to all of it with a mask (scaled_dot_product_attention), compiled, in a CUDA graph;
and transformers' module as it is, with the cache that it grows. Medians of CUDA events. Errors are relative L2 of the
step's logits against transformers' module in float32, on tokens that are drawn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tvm_cuda import median

import planish
from planish.runtime.tvm_generate import TvmCudaEntries

HELD, ROOM = 512, 1024
GPT2 = {"layers": 12, "width": 768, "heads": 12, "groups": 12, "inner": 3072, "words": 50257, "gated": False}
LLAMA = {"layers": 8, "width": 2048, "heads": 16, "groups": 4, "inner": 5632, "words": 32000, "gated": True}
CASES = {f"{name}-b{batch}": (sizes, batch) for name, sizes in (("gpt2", GPT2), ("llama", LLAMA)) for batch in (1, 8)}


def module_of(sizes: dict[str, Any]) -> Any:
    """The module of transformers, float32, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if not sizes["gated"]:
        config: Any = GPT2Config(bos_token_id=0, eos_token_id=0)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        hidden_size=sizes["width"], num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["groups"], intermediate_size=sizes["inner"], vocab_size=sizes["words"],
        max_position_embeddings=4 * ROOM,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Layer(nn.Module):
    """A pre-norm decoder layer over a static cache."""

    def __init__(self, s: dict[str, Any], batch: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.gated = s["heads"], s["groups"], s["width"] // s["heads"], s["gated"]
        norm: Any = nn.RMSNorm if self.gated else nn.LayerNorm
        self.first, self.second = norm(s["width"]), norm(s["width"])
        self.qkv = nn.Linear(s["width"], (self.heads + 2 * self.groups) * self.size, bias=not self.gated)
        self.out = nn.Linear(s["width"], s["width"], bias=not self.gated)
        self.up = nn.Linear(s["width"], s["inner"] * (1 + self.gated), bias=not self.gated)
        self.down = nn.Linear(s["inner"], s["width"], bias=not self.gated)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(batch, self.groups, ROOM, self.size))

    def forward(self, x: torch.Tensor, at: torch.Tensor, mask: torch.Tensor, turn: Any) -> torch.Tensor:
        batch = x.shape[0]
        parts = self.qkv(self.first(x)).view(batch, 1, -1, self.size).transpose(1, 2)
        q, k, v = parts.split([self.heads, self.groups, self.groups], 1)
        if turn is not None:
            q, k = (
                a * turn[0] + torch.cat([-a[..., self.size // 2 :], a[..., : self.size // 2]], -1) * turn[1]
                for a in (q, k)
            )
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=self.gated)
        x = x + self.out(y.transpose(1, 2).reshape(batch, 1, -1))
        h = self.up(self.second(x))
        if self.gated:
            gate, up = h.chunk(2, -1)
            return x + self.down(F.silu(gate) * up)
        return x + self.down(F.gelu(h, approximate="tanh"))


class Static(nn.Module):
    """A decoder's step over static caches."""

    def __init__(self, s: dict[str, Any], batch: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(s["words"], s["width"]), nn.Embedding(ROOM, s["width"])
        self.layers = nn.ModuleList(Layer(s, batch) for _ in range(s["layers"]))
        self.last = (nn.RMSNorm if s["gated"] else nn.LayerNorm)(s["width"])
        self.head, self.gated, self.size = (
            nn.Linear(s["width"], s["words"], bias=False),
            s["gated"],
            s["width"] // s["heads"],
        )
        self.register_buffer(
            "angles", torch.outer(torch.arange(ROOM), 1e4 ** (-torch.arange(0, self.size, 2) / self.size)).repeat(1, 2)
        )

    def forward(self, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        x, mask = self.words(ids), (torch.arange(ROOM, device=ids.device) <= at)[None, None, None]
        turn = None
        if self.gated:
            angle = self.angles[at].float()[None, None]
            turn = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        else:
            x = x + self.places(at)
        for layer in self.layers:
            x = layer(x, at, mask, turn)
        return self.head(self.last(x))


def compare(sizes: dict[str, Any], batch: int, target: str) -> dict[str, float]:
    ids = torch.randint(1, sizes["words"], (batch, HELD + 1), generator=torch.Generator().manual_seed(1))
    row, got = _ours(sizes, ids, target)
    print(f"ours {row['ours']:.3f} ms", flush=True)
    with torch.inference_mode():
        reference = module_of(sizes).cuda()
        want = reference(ids.cuda()).logits[:, -1].cpu().double()
        row["error"] = float((torch.tensor(got).double() - want).norm() / want.norm())
        half = reference.half()
        theirs = half(ids.cuda()).logits[:, -1].cpu().double()
        row["error of torch"] = float((theirs - want).norm() / want.norm())
        past = half(ids[:, :HELD].cuda(), use_cache=True).past_key_values
        last = ids[:, HELD:].cuda()

        def grown() -> None:
            half(last, past_key_values=past, use_cache=True)
            past.crop(HELD - past.get_seq_length())

        row["transformers"] = median(grown)
        static = Static(sizes, batch).half().cuda().eval()
        row["compile+graph"] = _compiled(static, last)
    return row


def _ours(sizes: dict[str, Any], ids: torch.Tensor, target: str) -> tuple[dict[str, float], np.ndarray]:
    exe = planish.optimize(module_of(sizes), target, task="causal-lm", budget=planish.Budget(gates=False))
    ours = TvmCudaEntries(exe.runners["prefill"], exe.runners["decode"], {})  # type: ignore[arg-type]
    ours.start(ids[:, :HELD].numpy(), np.full(len(ids), HELD, np.int64), ROOM - HELD + 1)
    got = ours.step(ids[:, HELD].numpy())
    step = ours._step
    assert step is not None
    step.advance()  # captured; the same token at the same place
    with torch.cuda.stream(torch.cuda.ExternalStream(step.stream.address)):
        took = median(step.advance)
    again = np.empty_like(got)
    step.stream.to_host(again, step.logits.data_ptr())
    ours.close()
    return {"ours": took, "graph differs": float(np.abs(again.astype(np.float64) - got).max())}, got


def _compiled(static: nn.Module, last: torch.Tensor) -> float:
    at = torch.tensor([HELD], device="cuda")
    compiled = torch.compile(static, fullgraph=True)
    for _ in range(3):
        compiled(last, at)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        compiled(last, at)
    return median(graph.replay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--target", default="tvm-cuda:dtype=float16")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.cases.split(","):
        rows.append({"case": name, **compare(*CASES[name], arguments.target)})
        print(name, "  ".join(f"{key} {value:.3g}" for key, value in rows[-1].items() if key != "case"), flush=True)
    print(torch.cuda.get_device_name(0))
    if arguments.json:
        arguments.json.write_text(json.dumps({"card": torch.cuda.get_device_name(0), "steps": rows}, indent=1))


if __name__ == "__main__":
    main()
