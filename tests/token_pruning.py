"""Token pruning in plain torch, row by row, and the small models that it is tried on."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

IMAGE = 99


@functools.cache
def llava(layers: int = 4) -> Any:
    """A LLaVA of random weights: 16 image tokens, a language model of four heads over two of keys and values."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=64,
        eos_token_id=None,
        # Large weights, so that attention is far from uniform and a wrong token shows.
        initializer_range=0.3,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


class Encoder(torch.nn.Module):
    """A small vision transformer behind its patches: (batch, 17, 32) to its first token, (batch, 32)."""

    def __init__(self) -> None:
        super().__init__()
        layer = functools.partial(torch.nn.Linear, 32)
        self.layers = torch.nn.ModuleList()
        for _ in range(3):
            parts = {"norm1": torch.nn.LayerNorm(32), "norm2": torch.nn.LayerNorm(32), "down": torch.nn.Linear(48, 32)}
            parts |= {"up": layer(48), **{name: layer(32) for name in ("q", "k", "v", "out")}}
            self.layers.append(Layer(parts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]

    def some(self, x: torch.Tensor, start: int, kept: list[int]) -> torch.Tensor:
        """With only these tokens from a layer on."""
        for index, layer in enumerate(self.layers):
            x = layer(x[:, kept] if index == start else x)
        return x[:, 0]

    def seen(self, x: torch.Tensor, last: int) -> torch.Tensor:
        """The attention of the first token in layer `last` to the others, a mean over heads."""
        for layer in self.layers[:last]:
            x = layer(x)
        q, k, _ = self.layers[last].qkv(x)
        return (q[:, :, :1] @ k[:, :, 1:].transpose(2, 3) / 4).softmax(-1).mean(1)[0, 0]


class Layer(torch.nn.ModuleDict):
    """Of two heads of 16."""

    def qkv(self, x: torch.Tensor) -> list[torch.Tensor]:
        own = self["norm1"](x)
        return [self[name](own).unflatten(2, (2, 16)).transpose(1, 2) for name in ("q", "k", "v")]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = torch.nn.functional.scaled_dot_product_attention(*self.qkv(x)).transpose(1, 2).flatten(2)
        x = x + self["out"](attended)
        return x + self["down"](torch.nn.functional.gelu(self["up"](self["norm2"](x))))


def finder() -> Encoder:
    """An encoder whose attention is far from uniform."""
    torch.manual_seed(5)
    model = Encoder().eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("q.weight", "k.weight")):
            parameter.data.mul_(4)
    return model


@dataclass(frozen=True)
class Recipe:
    """What to drop; options as those of the pass."""

    method: str
    layers: tuple[int, ...]
    keep: tuple[float, ...]
    stride: int = 2
    key: int = 2
    relevance: float = 0.5

    def __str__(self) -> str:
        options = f"method='{self.method}',layers={list(self.layers)},keep={list(self.keep)}"
        return f"{options},stride={self.stride},key={self.key},relevance={self.relevance}"


@dataclass
class Row:
    """One row on its way through the language model.

    Attributes:
        hidden: (1, tokens, width) behind the last layer, every token at its place.
        cache: of each layer, as long as the layer had tokens.
        dropped: places of the tokens that each stage dropped.
    """

    hidden: Any = None
    cache: Any = None
    dropped: list[list[int]] = field(default_factory=list)


@torch.no_grad()
def prefill(model: Any, embeds: torch.Tensor, image: list[int], recipe: Recipe) -> Row:
    """Runs (1, tokens, width) through the layers; `image` has the places of image tokens."""
    from transformers import DynamicCache

    lm = model.model.language_model
    row, places, hidden = Row(cache=DynamicCache()), torch.arange(embeds.shape[1]), embeds
    rotary = lm.rotary_emb(embeds, places[None])
    left_image, whole, before = list(image), [], None
    for index, layer in enumerate(lm.layers):
        if index in recipe.layers:
            stage = recipe.layers.index(index)
            scores = _attention(*before, rotary, places, left_image, recipe.method)
            kept = _choose(recipe, stage, scores, hidden[0, [places.tolist().index(p) for p in left_image]])
            gone = {p for at, p in enumerate(left_image) if at not in kept}
            row.dropped.append(sorted(gone))
            stay = [at for at, p in enumerate(places.tolist()) if p not in gone]
            whole.append((hidden, stay))
            hidden, places = hidden[:, stay], places[stay]
            left_image = [p for p in left_image if p not in gone]
        before = layer, hidden
        here = tuple(table[:, places] for table in rotary)
        hidden = layer(hidden, attention_mask=None, position_embeddings=here, past_key_values=row.cache, use_cache=True)
    for full, stay in reversed(whole):
        hidden = full.index_copy(1, torch.tensor(stay), hidden)
    row.hidden = hidden
    return row


@torch.no_grad()
def step(model: Any, row: Row, token: int, position: int) -> torch.Tensor:
    """Logits after one more token, which is appended to the caches."""
    lm = model.model.language_model
    hidden = lm.embed_tokens(torch.tensor([[token]]))
    rotary = lm.rotary_emb(hidden, torch.tensor([[position]]))
    for layer in lm.layers:
        hidden = layer(
            hidden, attention_mask=None, position_embeddings=rotary, past_key_values=row.cache, use_cache=True
        )
    return head(model, hidden)[0, -1]


@torch.no_grad()
def head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model.lm_head(model.model.language_model.norm(hidden))
    return result


def _attention(layer: Any, hidden: Any, rotary: Any, places: Any, image: list[int], method: str) -> torch.Tensor:
    """Of each image token."""
    own, attention = layer.input_layernorm(hidden), layer.self_attn
    size = attention.head_dim
    q = attention.q_proj(own).unflatten(2, (-1, size)).transpose(1, 2)
    k = attention.k_proj(own).unflatten(2, (-1, size)).transpose(1, 2)
    if method != "feather":
        # What this layer saw: its tokens are those of `hidden`.
        q, k = apply_rotary_pos_emb(q, k, *(table[:, places] for table in rotary))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ k.transpose(2, 3))[0] / math.sqrt(size)  # (heads, tokens, tokens)
    at = [places.tolist().index(p) for p in image]
    if method == "fastv":
        return scores[:, -1].softmax(-1).mean(0)[at]
    shares = scores[:, :, at].softmax(-1).mean(0)
    return shares[-1] if method == "feather" else shares[max(at) + 1 :].sum(0)


def _choose(recipe: Recipe, stage: int, scores: torch.Tensor, tokens: torch.Tensor) -> set[int]:
    """Which of the image tokens that are left stay."""
    count, share = len(scores), recipe.keep[stage]
    wanted = math.floor(count * share) if share < 1 else int(share)
    best = scores.argsort(descending=True).tolist()
    if recipe.method == "efficientvla":
        first = recipe.key + math.floor(recipe.relevance * (wanted - recipe.key))
        unit = tokens / tokens.norm(dim=-1, keepdim=True)
        alike = (unit @ unit[best[: recipe.key]].T).max(1).values
        others = sorted(best[first:], key=lambda at: alike[at].item())
        return {*best[:first], *others[: wanted - first]}
    grid: set[int] = set()
    if recipe.method == "feather" and stage == 0 and recipe.stride:
        side = math.isqrt(count)
        grid = {at for at in range(count) if at // side % recipe.stride == 0 and at % side % recipe.stride == 0}
    return grid | set([at for at in best if at not in grid][:wanted])
