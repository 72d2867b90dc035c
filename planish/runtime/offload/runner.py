"""A causal language model under a memory budget, as `Executable` and `generate` ask for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from planish.ir.causal_lm import IDS, LENGTHS, LOGITS
from planish.ir.machine import Needs
from planish.ir.spec import ElementType, TensorSpec
from planish.runtime.checks import InputChecks
from planish.runtime.offload.engine import Engine
from planish.runtime.offload.plan import Plan, Request
from planish.runtime.offload.planned import PlannedDevice
from planish.runtime.offload.planner import least_bytes
from planish.runtime.offload.table import milliseconds
from planish.runtime.tensors import to_arrays, to_torch


class BudgetRunner:
    """The entry ``prefill`` of a model whose weights and caches are where a budget lets them be.

    `run` gives the logits of each row's last token; caches stay with the engine, so there are no ``present_…``.

    Attributes:
        inputs, outputs: what `run` takes and gives.
        notes: what a report should mention.
        offline: the machine at hand has no such GPU: it can be exported, and not run.
        request: that a plan was checked with when this was made.
        plan: of the last generation; before the first, of `request`.
        steps: seconds that each step of the last generation took.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self.engine, self.request = engine, request
        self.offline = isinstance(engine.device, PlannedDevice)
        self.inputs = [
            TensorSpec(IDS, ElementType.INT64, ("batch", "sequence")),
            TensorSpec(LENGTHS, ElementType.INT64, ("batch",)),
        ]
        logits = engine.parts.value(LOGITS)
        assert logits.dtype is not None
        kind = ElementType(int(logits.dtype))
        self.outputs = [TensorSpec(LOGITS, kind, ("batch", engine.parts.vocabulary))]
        self.plan: Plan = engine.plan(request)
        self.steps: list[float] = []
        self.notes = self.plan.table().splitlines()
        if not engine.measured:
            self.notes.append("rates of the machine are assumed, not measured")
        self._checks = InputChecks(self.inputs, frozenset())

    @property
    def vocabulary(self) -> int:
        """Size of the logits."""
        return self.engine.parts.vocabulary

    def needs(self) -> Needs:
        """What a machine must have: a GPU with the least that the request takes, and room for weights beside it."""
        facts = self.engine.parts.facts()
        return Needs(
            gpus=1, providers=("CUDAExecutionProvider",), memory=least_bytes(facts, self.request),
            host_memory=facts.weights,
        )  # fmt: skip

    def start(self, prompts: np.ndarray, lengths: np.ndarray, new: int) -> np.ndarray:
        """Reads prompts (batch, sequence), padded on the right; returns the logits of each row's last token.

        Args:
            new: tokens that will be asked for at most.

        Raises:
            MemoryBudgetError: this does not fit.
            UnsupportedError: this was made for another machine.
        """
        self.steps.clear()
        self.plan = self.engine.plan(Request(len(prompts), int(lengths.max()), new))
        return self.engine.prompt([row[:length] for row, length in zip(prompts, lengths, strict=True)], self.plan)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Reads one token a row, (batch) int64; returns the logits of the next, (batch, vocabulary)."""
        started = time.perf_counter()
        logits = self.engine.step(tokens)
        self.steps.append(time.perf_counter() - started)
        return logits

    def table(self) -> str:
        """The plan of the last generation, and what its steps took beside what was estimated."""
        text = self.plan.table()
        if self.steps:
            took = milliseconds(float(np.median(self.steps)))
            text += f"\n  a step took {took}, the median of {len(self.steps)}"
        return text

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
