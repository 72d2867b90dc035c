"""Vision and audio encoders of transformers, small and with random weights, with their layers taken apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.passes.tokens.tome_torch import Parts

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 48,
    "patch_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Vision:
    """A model of the tests.

    Attributes:
        build: a new module.
        shape: of its input, with a batch of 2.
        layers: module → its layers.
        take: a layer → its parts.
        protected: tokens in front that must not merge.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: Callable[[Any], nn.ModuleList]
    take: Callable[[Any], Parts]
    protected: int

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        module = self.build().eval()
        with torch.no_grad():
            for parameter in module.parameters():  # what starts as zeros or ones would hide a loss; all start small
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return module


def _projections(attention: Any, out: str = "o_proj") -> dict[str, Any]:
    def qkv(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attention.q_proj(h), attention.k_proj(h), attention.v_proj(h)

    return {"qkv": qkv, "heads": 4, "out": getattr(attention, out)}


def _vit(layer: Any) -> Parts:
    return Parts(
        layer.layernorm_before, ffn=lambda x: layer.mlp(layer.layernorm_after(x)), **_projections(layer.attention)
    )


def _beit(layer: Any) -> Parts:
    found = _projections(layer.attention)
    projected = found["out"]
    found["out"] = lambda x: layer.lambda_1 * projected(x)

    def bias(given: dict[str, Any], tokens: int) -> Tensor:
        height, width = given["resolution"]
        found: Tensor = layer.relative_position_bias((height // 8, width // 8), False, dim_size=tokens)[0]
        return found

    return Parts(
        layer.layernorm_before,
        ffn=lambda x: layer.lambda_2 * layer.mlp(layer.layernorm_after(x)),
        bias=bias,
        **found,
    )


def _dino(layer: Any) -> Parts:
    found = _projections(layer.attention)
    projected = found["out"]
    found["out"] = lambda x: layer.layer_scale1(projected(x))
    return Parts(layer.norm1, ffn=lambda x: layer.layer_scale2(layer.mlp(layer.norm2(x))), **found)


def _clip(layer: Any) -> Parts:
    found = _projections(layer.self_attn, "out_proj")
    return Parts(layer.layer_norm1, ffn=lambda x: layer.mlp(layer.layer_norm2(x)), **found)


def _blip(layer: Any) -> Parts:
    def qkv(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = layer.self_attn.qkv(h).chunk(3, -1)
        return q, k, v

    return Parts(layer.layer_norm1, qkv, 4, layer.self_attn.projection, lambda x: layer.mlp(layer.layer_norm2(x)))


def _video(layer: Any) -> Parts:
    inner = layer.attention.attention

    def qkv(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return inner.query(h), inner.key(h), inner.value(h)

    def ffn(x: Tensor) -> Tensor:
        h: Tensor = layer.output.dense(layer.intermediate(layer.layernorm_after(x)))
        return h

    return Parts(layer.layernorm_before, qkv, 4, layer.attention.output.dense, ffn)


def _of(kind: str, config: str | None = None, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        name = config or kind.partition("For")[0].removesuffix("Model") + "Config"
        options = {k: v for k, v in (SIZES | more).items() if v is not None}
        module: nn.Module = getattr(transformers, kind)(getattr(transformers, name)(**options))
        return module

    return build


_IMAGE = (2, 3, 48, 48)
_AST = {"image_size": None, "max_length": 48, "num_mel_bins": 24, "frequency_stride": 8, "time_stride": 8}
VISION: dict[str, Vision] = {
    "ViT": Vision(_of("ViTForImageClassification", num_hidden_layers=3), _IMAGE, lambda m: m.vit.layers, _vit, 1),
    "ViT hidden states": Vision(_of("ViTModel"), _IMAGE, lambda m: m.layers, _vit, 1),
    "DeiT": Vision(
        _of("DeiTForImageClassificationWithTeacher", "DeiTConfig"), _IMAGE, lambda m: m.deit.layers, _vit, 2
    ),
    "BEiT": Vision(
        _of("BeitForImageClassification", use_relative_position_bias=True), _IMAGE, lambda m: m.beit.layers, _beit, 1
    ),
    "DINOv2 with registers": Vision(
        _of("Dinov2WithRegistersForImageClassification", intermediate_size=None, mlp_ratio=2), _IMAGE,
        lambda m: m.dinov2_with_registers.encoder.layer, _dino, 5,
    ),
    "CLIP": Vision(
        _of("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=16), _IMAGE,
        lambda m: m.vision_model.encoder.layers, _clip, 1,
    ),
    "SigLIP": Vision(_of("SiglipVisionModel", "SiglipVisionConfig"), _IMAGE, lambda m: m.encoder.layers, _clip, 0),
    "EVA": Vision(_of("Blip2VisionModel", "Blip2VisionConfig"), _IMAGE, lambda m: m.encoder.layers, _blip, 1),
    "AST": Vision(
        _of("ASTForAudioClassification", **_AST), (2, 48, 24), lambda m: m.audio_spectrogram_transformer.layers, _vit, 2
    ),
    "VideoMAE": Vision(
        _of("VideoMAEForVideoClassification", num_frames=4, tubelet_size=2), (2, 4, 3, 48, 48),
        lambda m: m.videomae.encoder.layer, _video, 0,
    ),
}  # fmt: skip
