"""Runs and times programs on ONNX Runtime for the gates, on the calibration inputs."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from planish.ir.ledger import Ratio
from planish.ir.program import Calibration, Program
from planish.ir.target import Target
from planish.runtime.measure import speedup
from planish.runtime.ort import OrtRunner, compile_ort

#: Sessions kept: the baseline and one candidate. Each holds a packed copy of the weights, so no more are.
KEPT = 2


class OrtBench:
    """Sessions for the programs of one optimization, and what they give on the calibration inputs.

    Args:
        target: what to compile for.
        calibration: inputs; None if there are none, in which case only :meth:`run_inputs` and
            :meth:`runner` may be called.
    """

    def __init__(self, target: Target, calibration: Calibration | None) -> None:
        self.target, self.calibration = target, calibration
        # Keyed by identity, and holding the program so that an identity is not used twice.
        self._runners: OrderedDict[int, tuple[Program, OrtRunner]] = OrderedDict()

    def runner(self, program: Program) -> OrtRunner:
        """The session of a program's calibrated entry; the two used last are kept."""
        known = self._runners.pop(id(program), None)
        if known is None:
            while len(self._runners) >= KEPT:
                self._runners.popitem(last=False)
            model = program.main if self.calibration is None else program.entry(self.calibration.entry)
            known = (program, compile_ort(model, self.target))
        self._runners[id(program)] = known
        return known[1]

    def run_inputs(self, program: Program, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
        """Outputs by name for one batch of inputs.

        Raises:
            PlanishError: the runtime refuses the program or the inputs.
        """
        return self.runner(program).run(inputs)

    def run(self, program: Program) -> list[dict[str, Any]]:
        """Outputs by name for each calibration batch."""
        assert self.calibration is not None
        return [self.run_inputs(program, batch) for batch in self.calibration.batches]

    def speedup(self, baseline: Program, candidate: Program, *, seconds: float, threshold: float) -> Ratio:
        """Time of `baseline` over time of `candidate` on the first calibration batch, interleaved."""
        assert self.calibration is not None
        batch = self.calibration.batches[0]
        first, second = self.runner(baseline).prepared(batch), self.runner(candidate).prepared(batch)
        clock = "process" if self.target.threads == 1 else "wall"
        return speedup(first, second, seconds=seconds, threshold=threshold, clock=clock)

    def forget(self, program: Program) -> None:
        """Drops the session of a program."""
        self._runners.pop(id(program), None)
