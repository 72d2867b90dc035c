"""merge-connector against torch: a vision tower, a BERT-like connector, and what a language model gets of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import Tensor, nn  # noqa: E402

from planish.frontends.torch import capture  # noqa: E402
from planish.ir.errors import InputError  # noqa: E402
from planish.ir.program import Program  # noqa: E402
from planish.passes.base import PassContext, PassResult  # noqa: E402
from planish.passes.defaults import default_pipeline  # noqa: E402
from planish.passes.manager import PassManager  # noqa: E402
from planish.passes.pipeline import parse_pipeline  # noqa: E402
from planish.passes.testing import apply_pass, run_reference  # noqa: E402
from tests.passes.tokens.tome_torch import Tokens, merge  # noqa: E402

BEFORE = default_pipeline("ort-cpu").split(",lower-feed-forward,")[0]
WIDTH, HEADS, LAYERS = 32, 4, 4


class Connected(nn.Module):
    """A vision tower, a connector of BERT's layers, and a projection: what a language model gets of an image."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        vision = transformers.CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
        bert = transformers.BertConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=48,
            vocab_size=8,
            initializer_range=0.3,
        )
        self.tower = transformers.CLIPVisionModel(vision)
        self.linear = nn.Linear(48, WIDTH)
        self.connector = transformers.BertModel(bert, add_pooling_layer=False)
        self.project = nn.Linear(WIDTH, 20)

    def forward(self, pixels: Tensor) -> Tensor:
        seen = self.linear(self.tower(pixels).last_hidden_state)
        return self.project(self.connector(inputs_embeds=seen).last_hidden_state)

    @torch.no_grad()
    def merging(self, pixels: Tensor, r: list[int]) -> Tensor:
        """The same with r tokens merged in each layer: plain means, no count in attention."""
        x = self.connector.embeddings(inputs_embeds=self.linear(self.tower(pixels).last_hidden_state))
        for layer, count in zip(self.connector.encoder.layer, r, strict=True):
            own = layer.attention.self
            q, k, v = (p(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for p in (own.query, own.key, own.value))
            y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = layer.attention.output(y, x)
            tokens = Tokens()
            tokens.start(x)  # every token counts as one again
            x = merge(x, k.mean(1), tokens, count, 1) if count else x
            x = layer.output(layer.intermediate(x), x)
        return self.project(x)


class Reads(nn.Module):
    """A connector with text behind its tokens, in one graph."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        return torch.cat([self.inner(pixels), text], 1)


def built() -> Any:
    torch.manual_seed(1)
    return Connected().eval()


def fused(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> Program:
    program = capture(module, inputs, shapes).program
    PassManager(parse_pipeline(BEFORE)).apply(program, PassContext(program.target))
    return program


@pytest.fixture(scope="module")
def program() -> Program:
    return fused(built(), (torch.randn(2, 3, 32, 32),), {"pixels": {0: "batch"}})


def merged(program: Program, options: str) -> tuple[Program, PassResult]:
    copy = program.clone()
    return copy, apply_pass(f"merge-connector{{{options}}}", copy)


@pytest.mark.parametrize("options, r, left", [("r=3", [3] * 4, 5), ("r=[5, 0, 2, 9]", [5, 0, 2, 9], 6)])
def test_fewer_tokens_come_out(program: Program, options: str, r: list[int], left: int) -> None:
    after, result = merged(program, options)
    assert result.fired == sum(map(bool, r)) and not result.declined
    assert result.notes == [
        f"connector.encoder.layer: 17 tokens become {left} in {result.fired} layers, and so many come out"
    ]
    assert [spec.shape for spec in after.outputs()] == [("batch", left, 20)]
    pixels = torch.randn(3, 3, 32, 32)
    (got,) = run_reference(after, {"pixels": pixels.numpy()}).values()
    np.testing.assert_allclose(got, built().merging(pixels, r), rtol=1e-4, atol=1e-5)
    kinds = ("Attention", "MatMul", "LayerNormalization", "Gelu")
    before, counts = ({k: sum(n.op_type == k for n in p.nodes()) for k in kinds} for p in (program, after))
    assert counts == before


def test_the_numbers_of_the_paper() -> None:
    """257 tokens, 12 layers, 19 in each: 29."""
    from planish.ir.ops.merge_reference import merged_count

    tokens = 257
    for _ in range(12):
        tokens -= merged_count(tokens, 19, 0.0, 1)
    assert tokens == 29


def test_declines(program: Program) -> None:
    text = fused(Reads(built()), (torch.randn(2, 3, 32, 32), torch.randn(2, 3, 20)), None)
    _, result = merged(text, "r=3")
    assert not result.fired
    assert any("merge the connector by itself" in d.reason for d in result.declined)
    _, result = merged(program, "r=3,protected=16")
    assert not result.fired and "none is to merge" in result.declined[-1].reason


def test_options(program: Program) -> None:
    for options in ("r=-1", "r=0", "r=[0, 0]", "protected=-1"):
        with pytest.raises(InputError, match="must not be negative"):
            parse_pipeline(f"merge-connector{{{options}}}")
    with pytest.raises(Exception, match="stack 'bert'"):
        merged(program, "stack='bert'")
    with pytest.raises(Exception, match="4 layers"):
        merged(program, "r=[1, 2]")
