"""A causal language model under a memory budget, as `Executable` and `generate` ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from planish.ir.causal_lm import IDS, LENGTHS, LOGITS
from planish.ir.spec import ElementType, TensorSpec
from planish.runtime.checks import InputChecks
from planish.runtime.offload.engine import Engine
from planish.runtime.offload.plan import Plan, Request
from planish.runtime.tensors import to_arrays, to_torch


class BudgetRunner:
    """The entry ``prefill`` of a model whose weights and caches are where a budget lets them be.

    `run` gives the logits of each row's last token; caches stay with the engine, so there are no ``present_…``.

    Attributes:
        inputs, outputs: what `run` takes and gives.
        notes: what a report should mention.
        plan: of the last generation; None before the first.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.inputs = [
            TensorSpec(IDS, ElementType.INT64, ("batch", "sequence")),
            TensorSpec(LENGTHS, ElementType.INT64, ("batch",)),
        ]
        logits = engine.parts.value(LOGITS)
        assert logits.dtype is not None
        kind = ElementType(int(logits.dtype))
        self.outputs = [TensorSpec(LOGITS, kind, ("batch", engine.parts.vocabulary))]
        self.notes: list[str] = []
        self.plan: Plan | None = None
        self._checks = InputChecks(self.inputs, frozenset())

    @property
    def vocabulary(self) -> int:
        """Size of the logits."""
        return self.engine.parts.vocabulary

    def start(self, prompts: np.ndarray, lengths: np.ndarray, new: int) -> np.ndarray:
        """Reads prompts (batch, sequence), padded on the right; returns the logits of each row's last token.

        Args:
            new: tokens that will be asked for at most.

        Raises:
            MemoryBudgetError: this does not fit.
        """
        self.plan = self.engine.plan(Request(len(prompts), int(lengths.max()), new))
        return self.engine.prompt([row[:length] for row, length in zip(prompts, lengths, strict=True)], self.plan)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Reads one token a row, (batch) int64; returns the logits of the next, (batch, vocabulary)."""
        return self.engine.step(tokens)

    def close(self) -> None:
        """Ends a generation: gives back everything but weights."""
        self.engine.close()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Logits of prompts, by name.

        Raises:
            InputError: an input is unknown, missing, or of another dtype or shape.
            MemoryBudgetError: this does not fit.
        """
        arrays, as_torch = to_arrays(feeds)
        self._checks(arrays)
        logits = self.start(arrays[IDS], arrays[LENGTHS], 1)
        self.close()
        return {LOGITS: to_torch(logits) if as_torch else logits}
