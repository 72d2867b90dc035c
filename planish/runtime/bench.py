"""Runs and times programs on their target for the gates, on the calibration inputs."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.ir.causal_lm import PREFILL, PRUNED_TOKENS
from planish.ir.ledger import Ratio
from planish.ir.program import Calibration, Program
from planish.ir.target import Target
from planish.runtime.caches import fitting, shorter_cache
from planish.runtime.compile import compile_entry, shared_weights
from planish.runtime.executable import CompiledEntry
from planish.runtime.measure import speedup

if TYPE_CHECKING:
    from planish.runtime.shared_weights import SharedWeights

#: Programs kept compiled: the baseline and one candidate. Each holds a packed copy of the weights, so no more are.
KEPT = 2


class Bench:
    """Compiled entries for the programs of one optimization, and what they give on the calibration inputs.

    Args:
        target: what to compile for.
        calibration: inputs; None if there are none, in which case only :meth:`run_inputs` and
            :meth:`runner` may be called.
    """

    def __init__(self, target: Target, calibration: Calibration | None) -> None:
        self.target, self.calibration = target, calibration
        # Keyed by identity, and holding the program so that an identity is not used twice.
        self._runners: OrderedDict[int, tuple[Program, dict[str, CompiledEntry], SharedWeights | None]] = OrderedDict()

    def runner(self, program: Program, entry: str | None = None) -> CompiledEntry:
        """The compiled entry, by default the calibrated one; those of the two programs used last are kept."""
        known = self._runners.pop(id(program), None)
        if known is None:
            while len(self._runners) >= KEPT:
                self._runners.popitem(last=False)
            known = (program, {}, shared_weights(program, self.target))
        self._runners[id(program)] = known
        if entry is None:
            entry = program.default_entry if self.calibration is None else self.calibration.entry
        if entry not in known[1]:
            known[1][entry] = compile_entry(program, entry, self.target, known[2])
        return known[1][entry]

    def run_inputs(self, program: Program, inputs: dict[str, np.ndarray], entry: str | None = None) -> dict[str, Any]:
        """Outputs by name for one batch of inputs.

        Raises:
            PlanishError: the runtime refuses the program or the inputs.
        """
        return self.runner(program, entry).run(inputs)

    def run(self, program: Program) -> list[dict[str, Any]]:
        """Outputs by name for each calibration batch, entry by entry."""
        assert self.calibration is not None
        return [
            self.run_inputs(program, self._fitting(program, batch, part.entry), part.entry)
            for part in self.calibration.parts
            for batch in part.batches
        ]

    def run_entry(self, program: Program, entry: str) -> list[dict[str, Any]]:
        """Outputs by name for each calibration batch of one entry."""
        parts = self.calibration.parts if self.calibration is not None else []
        batches = [batch for part in parts if part.entry == entry for batch in part.batches]
        return [self.run_inputs(program, self._fitting(program, batch, entry), entry) for batch in batches]

    def speedup(
        self, baseline: Program, candidate: Program, *, seconds: float, threshold: float, entry: str | None = None
    ) -> Ratio:
        """Time of `baseline` over time of `candidate` on an entry's first calibration batch, interleaved."""
        assert self.calibration is not None
        part = next(p for p in self.calibration.parts if entry in (None, p.entry))
        steps = [
            self.runner(program, part.entry).prepared(self._fitting(program, part.batches[0], part.entry))
            for program in (baseline, candidate)
        ]
        # Processor time says nothing of what a GPU does.
        clock = "process" if self.target.threads == 1 and self.target.device == "cpu" else "wall"
        return speedup(*steps, seconds=seconds, threshold=threshold, clock=clock)

    def _fitting(self, program: Program, batch: dict[str, np.ndarray], entry: str) -> dict[str, np.ndarray]:
        names = {spec.name for spec in self.runner(program, entry).inputs}
        found = fitting(program.entry(entry).graph, names, batch)
        inputs = program.entry(entry).graph.inputs
        pruned = {v.name: int(v.metadata_props[PRUNED_TOKENS]) for v in inputs if PRUNED_TOKENS in v.metadata_props}
        if pruned and (first := self._prefilled(program, batch, entry)) is not None:
            for name, dropped in pruned.items():
                assert name is not None
                present = first[name.replace("past", "present", 1)]
                whole = batch[name.removesuffix("_scale")]  # the scales of a cache in 8 bits are as long as it is
                found[name] = shorter_cache(present, whole, dropped)
        return found

    def _prefilled(self, program: Program, batch: dict[str, np.ndarray], entry: str) -> dict[str, Any] | None:
        """What `prefill` gives on the prompts that a batch of `decode` goes on from; None if there are none."""
        parts = {part.entry: part.batches for part in (self.calibration.parts if self.calibration else [])}
        at = next((i for i, known in enumerate(parts.get(entry, [])) if known is batch), None)
        if at is None or at >= len(parts.get(PREFILL, [])):
            return None
        return self.run_inputs(program, self._fitting(program, parts[PREFILL][at], PREFILL), PREFILL)

    def forget(self, program: Program) -> None:
        """Drops what was compiled of a program."""
        self._runners.pop(id(program), None)
