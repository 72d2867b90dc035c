"""Every architecture of the README's table, small: captured, optimized, equal to eager at two shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import planish  # noqa: E402
from planish.frontends.torch import capture  # noqa: E402
from planish.ir.compare import compare_outputs  # noqa: E402
from planish.ir.errors import UnsupportedError  # noqa: E402
from planish.ir.program import Program  # noqa: E402
from planish.ir.verify import verify  # noqa: E402
from planish.runtime.ort import compile_ort  # noqa: E402
from tests.architectures import ARCHITECTURES, Architecture  # noqa: E402

LIMIT = 1e-4


def run(program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return compile_ort(program.main, program.target, optimize=False).run(inputs)


def eager(module: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: value.numpy() for name, value in module(**inputs).items() if value is not None}


@pytest.fixture(params=ARCHITECTURES.values(), ids=[name.replace(" ", "-") for name in ARCHITECTURES])
def architecture(request: Any) -> Architecture:
    return request.param  # type: ignore[no-any-return]


def test_optimized_equals_eager_at_two_shapes(architecture: Architecture) -> None:
    module = architecture.build(True)
    example = architecture.example(module)
    captured = capture(module, example, architecture.dynamic_shapes, "ort-cpu:threads=1")
    verify(captured.program, full=True)
    assert {name for spec in captured.program.inputs() for name in spec.shape or () if isinstance(name, str)} == {
        name for dims in architecture.dynamic_shapes.values() for name in dims.values()
    }
    executable = planish.optimize(
        module,
        "ort-cpu:threads=1",
        example_inputs=example,
        dynamic_shapes=architecture.dynamic_shapes,
        budget=planish.Budget(gates=False),
    )
    for inputs in (example, architecture.other(module)):
        arrays = {name: value.numpy() for name, value in inputs.items()}
        expected = eager(module, inputs)
        assert compare_outputs(expected, run(captured.program, arrays)).relative_l2 < LIMIT
        assert compare_outputs(expected, executable.run(arrays)).relative_l2 < LIMIT


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_rotary_models_run_at_every_batch(name: str, batch: int) -> None:
    architecture = ARCHITECTURES[name]
    module = architecture.build(True)
    captured = capture(module, architecture.example(module), architecture.dynamic_shapes)
    inputs = architecture.inputs(module, batch, 9)
    got = run(captured.program, {key: value.numpy() for key, value in inputs.items()})
    assert compare_outputs(eager(module, inputs), got).relative_l2 < LIMIT


def test_the_check_runs_eager_and_captured_at_two_shapes() -> None:
    architecture = ARCHITECTURES["BERT"]
    module = architecture.build(True)
    seen: list[tuple[int, ...]] = []

    def watched(program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(inputs["input_ids"].shape)
        return run(program, inputs)

    captured = capture(module, architecture.example(module), architecture.dynamic_shapes)
    assert captured.check(watched).relative_l2 < LIMIT
    assert len(seen) == 2 and all(a != b for a, b in zip(*seen, strict=True))


def test_a_key_value_cache_is_inputs_and_outputs() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    module = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32)).eval()
    ids = torch.randint(0, 50, (2, 6))
    prefill = capture(module, {"input_ids": ids}, {0: "batch", 1: "sequence"})
    names = [spec.name for spec in prefill.program.outputs()]
    assert names == ["logits"] + [f"past_key_values_{layer}_{part}" for layer in (0, 1) for part in (0, 1)]
    assert prefill.check(run).relative_l2 < LIMIT
    with torch.no_grad():
        cache = module(ids).past_key_values
    decode = capture(module, {"input_ids": ids[:, :1], "past_key_values": cache})
    assert len(decode.program.inputs()) == 5
    assert decode.check(run).relative_l2 < LIMIT


def _falcon() -> tuple[Any, Any]:
    from transformers import FalconConfig, FalconModel

    config = FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, use_cache=False)
    return FalconModel(config), torch.randint(0, 100, (2, 8))


def _swin() -> tuple[Any, Any]:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    return SwinModel(config), torch.randn(2, 3, 32, 32)


def _beit() -> tuple[Any, Any]:
    from transformers import BeitConfig, BeitModel

    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BeitModel(BeitConfig(**tiny, image_size=32, patch_size=8)), torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("build", [_falcon, _swin, _beit])
def test_what_the_exporter_alone_does_not_take(build: Any) -> None:
    """These fail in torch.onnx.export with its own decompositions."""
    module, example = build()
    captured = capture(module, example, {0: "batch"})
    assert captured.check(run).relative_l2 < LIMIT


def test_a_model_with_data_dependent_control_flow_says_where() -> None:
    """A mixture of experts whose experts run only on the tokens that chose them."""

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(8, 2)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Any) -> Any:
            chosen = self.gate(x).argmax(-1)
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                if (chosen == number).any():
                    out = out + expert(x) * (chosen == number).unsqueeze(-1)
            return out

    with pytest.raises(
        UnsupportedError, match=r"data-dependent control flow at .*test_architectures.py:\d+, in forward"
    ):
        capture(Experts(), torch.randn(4, 8))
