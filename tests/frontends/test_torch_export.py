"""What the ONNX exporter does not take as it comes, and what is done about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import planish
from planish.ir.budget import Budget


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *self.parts)


CASES: dict[str, tuple[Callable[..., Any], tuple[nn.Module, ...]]] = {
    "composite operators that no table lists": (lambda x, n: n(x), (nn.BatchNorm1d(6),)),
    "numpy_T": (lambda x: x @ x[0].T, ()),
    "bounds of two kinds": (lambda x: x.clamp(-1, 0.5), ()),
    "an integer bound by name": (lambda x: x.clamp(max=1, min=-0.25), ()),
}


@pytest.mark.parametrize("name", CASES)
def test_operators(name: str) -> None:
    function, modules = CASES[name]
    module = Function(function, *modules).eval()
    x = torch.randn(2, 6, 6)
    exe = planish.optimize(module, example_inputs=(x,), dynamic_shapes={0: "b"}, passes="", budget=Budget(gates=False))
    for batch in (2, 3):
        x = torch.randn(batch, 6, 6)
        with torch.no_grad():
            torch.testing.assert_close(exe(x), module(x))


def test_numbers_among_the_outputs_are_left_out() -> None:
    module = Function(lambda x: {"y": x + 1, "nothing": None, "count": 3, "name": "n", "pair": (x, 2.5)})
    x = torch.randn(2, 3)
    exe = planish.optimize(module, example_inputs=(x,), passes="", budget=Budget(gates=False))
    outputs = exe.run({"x": x})
    assert list(outputs) == ["y", "pair_0"]
    torch.testing.assert_close(outputs["y"], x + 1)
    torch.testing.assert_close(outputs["pair_0"], x)


def test_a_key_value_cache_as_input() -> None:
    """A class that torch.export knows as a tree: its tensors are inputs, and dynamic where all inputs are."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()

    def feeds(batch: int) -> dict[str, Any]:
        cache = transformers.DynamicCache(config=config)
        for layer in range(2):
            cache.update(torch.randn(batch, 2, 5, 4), torch.randn(batch, 2, 5, 4), layer)
        return {"input_ids": torch.randint(0, 50, (batch, 1)), "past_key_values": cache}

    exe = planish.optimize(
        model, example_inputs=feeds(2), dynamic_shapes={0: "batch"}, passes="", budget=Budget(gates=False)
    )
    assert [spec.shape for spec in exe.inputs] == [("batch", 1), *[("batch", 2, 5, 4)] * 4]
    given = feeds(3)
    layers = given["past_key_values"].layers
    tensors = [layer.keys.clone() for layer in layers] + [layer.values.clone() for layer in layers]
    got = exe(given["input_ids"], *tensors)
    with torch.no_grad():
        expected = model(**given)
    torch.testing.assert_close(got[0], expected.logits, rtol=1e-4, atol=1e-5)


def test_assertions_about_values_and_casts_that_are_outputs() -> None:
    """What a vision-language model does with its image features: checks their number, and gives them back."""

    def forward(x: torch.Tensor) -> Any:
        torch._check_tensor_all(x < 100)
        features = x.relu().to(torch.device("cpu"), torch.float32)
        return {"y": features + 1, "features": features}

    x = torch.randn(2, 3)
    exe = planish.optimize(Function(forward), example_inputs=(x,), passes="", budget=Budget(gates=False))
    outputs = exe.run({"x": x})
    torch.testing.assert_close(outputs["y"], x.relu() + 1)
    torch.testing.assert_close(outputs["features"], x.relu())


@pytest.mark.parametrize("cache", [False, True])
def test_llava(cache: bool) -> None:
    import transformers

    text = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**text, image_size=16, patch_size=8, projection_dim=8)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**text, vocab_size=20),
        image_token_index=19,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 2, 19, 19, 19, 19, 3], [4, 19, 19, 19, 19, 5, 6]])
    given = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    exe = planish.optimize(model, example_inputs={**given, "use_cache": cache}, passes="", budget=Budget(gates=False))
    outputs = exe.run(given)
    with torch.no_grad():
        torch.testing.assert_close(outputs["logits"], model(**given).logits, rtol=1e-4, atol=1e-5)
    assert sum("past_key_values" in name for name in outputs) == (4 if cache else 0)
