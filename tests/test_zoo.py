"""Tiny models of many kinds, optimized without gates (which could hide a wrong pass) and compared with eager torch.

The architectures of the README's table are in ``test_architectures.py``; here are others, each for what it has that
those have not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planish
from planish.ir.budget import Budget
from planish.runtime.artifact import verify_artifact

Feeds = dict[str, torch.Tensor]
Case = tuple[nn.Module, Callable[[int, int], Feeds], dict[str, dict[int, str]]]
TEXT: dict[int, str] = {0: "batch", 1: "length"}


class Function(nn.Module):
    """A module from a function of x and submodules."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *self.parts)


def _function(function: Callable[..., Any], *parts: nn.Module, shape: tuple[int, ...] = (5, 16)) -> Case:
    return Function(function, *parts), lambda b, s: {"x": torch.randn(b, *shape)}, {"x": {0: "batch"}}


def _gelus(x: torch.Tensor) -> torch.Tensor:
    half, root = 0.5 * x, 2**0.5
    tanh = half * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))
    return F.gelu(x) + F.gelu(x, approximate="tanh") + tanh + half * (1 + torch.erf(x / root))


def _windows(x: torch.Tensor, attention: nn.Module) -> torch.Tensor:
    b, h, w, c = x.shape
    x = torch.roll(x, (-1, -1), (1, 2)).view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    x = attention(x, x, x, need_weights=False)[0].view(b, h // 2, w // 2, 2, 2, c)
    return torch.roll(x.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c), (1, 1), (1, 2))


def _outputs(x: torch.Tensor) -> dict[str, Any]:
    y = x + 1
    return {"same": x, "twice": (y, y), "constant": torch.ones(3), "nothing": None, "number": 4}


MODULES: dict[str, Callable[[], Case]] = {
    "gelus that share a product": lambda: _function(_gelus),
    "two-dimensional layer norm": lambda: _function(lambda x, n: n(x), nn.LayerNorm((5, 16))),
    "layer norm of an unbiased deviation": lambda: _function(
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
    ),
    "root mean square of two dims": lambda: _function(
        lambda x: x * torch.rsqrt((x * x).mean((-2, -1), keepdim=True) + 1e-6)
    ),
    "swish of one row times all": lambda: _function(lambda x: F.silu(x[:, :1]) * x),
    "softmax over queries": lambda: _function(lambda x: (x @ x.transpose(-1, -2) / 4).softmax(-2) @ x),
    "weights of attention as output": lambda: _function(
        lambda x: (lambda p: (p, p @ x))((x @ x.transpose(-1, -2) / 4).softmax(-1))
    ),
    "shifted windows": lambda: _function(_windows, nn.MultiheadAttention(8, 2, batch_first=True), shape=(4, 6, 8)),
    "convolution, batch norm": lambda: _function(
        lambda x, c, n: F.relu6(n(c(x))), nn.Conv1d(5, 8, 3, stride=2, padding=1), nn.BatchNorm1d(8)
    ),
    "recurrent": lambda: _function(lambda x, r: r(x), nn.LSTM(16, 6, bidirectional=True, batch_first=True)),
    "a branch on a value": lambda: _function(
        lambda x, m: torch.cond(x.sum() > 0, lambda v: m(v), lambda v: F.gelu(m(v)) * 2, (x,)), nn.Linear(16, 16)
    ),
    "outputs that are inputs and constants": lambda: _function(_outputs),
    "sorts and gathers": lambda: _function(
        lambda x: (x.topk(3, dim=1), x.argmax(-1), x.gather(1, x.argsort(1)), x.cumsum(1), x.tril())
    ),
}


def _text(vocabulary: int = 99) -> Callable[[int, int], Feeds]:
    def make(b: int, s: int) -> Feeds:
        mask = torch.ones(b, s, dtype=torch.int64)
        mask[1:2, max(1, s - 2) :] = 0
        return {"input_ids": torch.randint(3, vocabulary, (b, s)), "attention_mask": mask}

    return make


def _decoder(name: str, attention: str, **options: Any) -> Case:
    import transformers

    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 37, "max_position_embeddings": 64, "use_cache": False}
    config = getattr(transformers, f"{name}Config")(**sizes | options)
    config._attn_implementation = attention
    model = getattr(transformers, f"{name}Model")(config)
    return model, _text(), {"input_ids": TEXT, "attention_mask": TEXT}


def _image(model: Any, size: int = 32) -> Case:
    return model, lambda b, s: {"pixel_values": torch.randn(b, 3, size, size)}, {"pixel_values": {0: "batch"}}


def _swin() -> Case:
    import transformers

    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=2
    )
    return _image(transformers.SwinModel(config))


def _segformer() -> Case:
    import transformers

    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )
    return _image(transformers.SegformerForSemanticSegmentation(config))


def _wav2vec2() -> Case:
    import transformers

    config = transformers.Wav2Vec2Config(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=37,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    model = transformers.Wav2Vec2Model(config)
    return model, lambda b, s: {"input_values": torch.randn(b, 40 * s)}, {"input_values": {0: "batch", 1: "samples"}}


def _bloom() -> Case:
    import transformers

    config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4, use_cache=False)
    config._attn_implementation = "eager"
    return transformers.BloomModel(config), _text(), {"input_ids": TEXT, "attention_mask": TEXT}


ARCHITECTURES: dict[str, Callable[[], Case]] = {
    "Mistral, sliding window": lambda: _decoder("Mistral", "sdpa", num_key_value_heads=2, sliding_window=4),
    "Gemma 2, soft capped": lambda: _decoder("Gemma2", "eager", num_key_value_heads=2, head_dim=8, sliding_window=4),
    "Qwen3, normed heads": lambda: _decoder("Qwen3", "sdpa", num_key_value_heads=2, head_dim=8),
    "Phi, partial rotary, parallel": lambda: _decoder("Phi", "eager"),
    "BLOOM, ALiBi": _bloom,
    "Swin, windows": _swin,
    "SegFormer, reduced keys": _segformer,
    "Wav2Vec2, weight norm": _wav2vec2,
}


def _check(case: Callable[[], Case], sizes: tuple[tuple[int, int], ...], folder: Path | None = None) -> None:
    torch.manual_seed(0)
    module, make, shapes = case()
    module.eval()
    example = make(2, 9)
    exe = planish.optimize(
        module,
        "ort-cpu:threads=1",
        example_inputs=example,
        dynamic_shapes=shapes,
        budget=Budget(gates=False),
    )
    assert exe.report is not None
    assert [e.verdict for e in exe.report.ledger.entries if "rolled back" in e.verdict] == []
    for feeds in (example, *(make(*size) for size in sizes)):
        with torch.no_grad():
            leaves = torch.utils._pytree.tree_leaves(module(**feeds))
        expected = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        got = list(exe.run(feeds).values())
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    if folder is not None:
        loaded = planish.load(exe.export(folder / "artifact"))
        torch.testing.assert_close(list(loaded.run(example).values()), list(exe.run(example).values()))
        assert verify_artifact(folder / "artifact").ok


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, tmp_path: Path) -> None:
    _check(MODULES[name], ((3, 9), (1, 9), (0, 9)), tmp_path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    _check(ARCHITECTURES[name], ((3, 7), (1, 12)))
