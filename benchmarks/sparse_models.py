"""Whole models for benchmarks/sparse_attention.py: their dense pipeline, and the one with sparse passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import planish
from planish.passes.defaults import default_pipeline

WINDOWED = ("fuse-block-sparse", "lower-window-attention", "lower-block-sparse")
SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "attn_implementation": "sdpa",
}
TOLERANCE = 1e-5


class Prompt(torch.nn.Module):
    """A decoder without its cache: token ids and their mask to hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return found.last_hidden_state  # type: ignore[no-any-return]


class Model:
    """Sides of a row (:class:`benchmarks.sparse_attention.Row`) that are executables."""

    def __init__(self, model: Any, length: int) -> None:
        torch.manual_seed(0)
        self.module = Prompt(model).eval()
        self.ids = torch.randint(1, 1000, (1, length))
        self.mask = torch.ones(1, length, dtype=torch.int64)
        self.runs: dict[str, Callable[[], object]] = {}
        self.ideal: dict[str, float] = {}
        self.error = 0.0
        self.want: np.ndarray | None = None

    def side(self, name: str, target: str, left_out: tuple[str, ...] = (), approximate: str | None = None) -> None:
        """The target's pipeline without some passes. Exact ones must give what the eager module gives."""
        example = (torch.randint(1, 1000, (2, 40)), torch.ones(2, 40, dtype=torch.int64))
        shapes = ({0: "batch", 1: "sequence"},) * 2
        more: dict[str, Any] = {"approximate": approximate}
        if not approximate:
            pipeline = [item for item in default_pipeline(target).split(",") if item not in left_out]
            more = {"passes": ",".join(pipeline)}
        exe = planish.optimize(
            self.module,
            f"{target}{',' if ':' in target else ':'}threads=1",  # processor time counts every thread
            example_inputs=example,
            dynamic_shapes=shapes,
            budget=planish.Budget(gates=False),
            **more,
        )
        feeds = {"input_ids": self.ids.numpy(), "attention_mask": self.mask.numpy()}
        (got,) = exe.run(feeds).values()
        if not approximate:
            if self.want is None:
                with torch.no_grad():
                    self.want = self.module(self.ids, self.mask).numpy()
            error = float(np.linalg.norm(np.asarray(got) - self.want) / np.linalg.norm(self.want))
            if error > TOLERANCE:
                raise SystemExit(f"{name} is wrong: relative error {error:.1e}")
            self.error = max(self.error, error)
        self.runs[name] = lambda: exe.run(feeds)


def mistral(window: int, length: int, target: str) -> Model:
    """Mistral's shape with its own window; exact."""
    from transformers import MistralConfig, MistralModel

    made = Model(MistralModel(MistralConfig(**SIZES, sliding_window=window)), length)
    made.side("dense", target, WINDOWED)
    made.side("fuse-block-sparse", target)
    return made


def llama(length: int, target: str) -> Model:
    """Llama's shape, dense, and with S2's pattern put on it; what that costs in quality is another matter."""
    from transformers import LlamaConfig, LlamaModel

    made = Model(LlamaModel(LlamaConfig(**SIZES)), length)
    made.side("dense", target)
    made.side("shard-attention", target, approximate=f"shard-attention{{local=16,stride=8,max_length={length}}}")
    return made


MODELS: dict[str, Callable[[], Model]] = {
    **{
        f"Mistral, window {window}, prompt of {length}, {target}": (
            lambda window=window, length=length, target=target: mistral(window, length, target)
        )
        for window, length in ((1024, 4096), (1024, 8192), (4096, 8192))
        for target in ("ort-cpu", "ort-cpu:kernels")
    },
    **{
        f"Llama with S2, prompt of 8192, {target}": lambda target=target: llama(8192, target)
        for target in ("ort-cpu", "ort-cpu:kernels")
    },
}
