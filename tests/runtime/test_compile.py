"""Memory that a target allows: asked for before anything is made, measured without where only passes make it fit."""

from __future__ import annotations

import numpy as np
import pytest

import planish
from planish.ir.program import Calibration
from planish.ir.target import Target
from planish.passes.testing import program_of
from planish.runtime.compile import measured_on, require_memory
from planish.runtime.offload.account import MemoryBudgetError

OFF = planish.Budget(gates=False)
# A weight of 64 KiB; at 64 rows x takes 32 KiB, y and z as much, all at once.
TEXT = """<ir_version: 10, opset_import: ["" : 23]>
g (float[n, 128] x) => (float[n, 128] z)
<float[128, 128] w = {0.5}> { y = MatMul(x, w)  z = Tanh(y) }"""


def program(rows: int = 64):
    made = program_of(TEXT.replace("{0.5}", "{" + ", ".join(["0.5"] * 128 * 128) + "}"))
    made.calibration = Calibration([{"x": np.ones((rows, 128), np.float32)}])
    return made


def allowed(kib: int, rest: str = "") -> Target:
    return Target.parse(f"ort-cuda:memory={kib}KiB{rest}")


def test_by_how_much_it_does_not_fit():
    require_memory(program(), allowed(160))
    require_memory(program(1), allowed(66))
    with pytest.raises(MemoryBudgetError) as caught:
        require_memory(program(), allowed(128))
    text = str(caught.value)
    assert "weights take 64 KiB and activations 96 KiB, 32 KiB more than the budget of 128 KiB" in text
    assert "dtype=float16 halves" in text and "smaller inputs" in text and "memory=1MiB is the least" in text
    with pytest.raises(MemoryBudgetError, match="quantize-weights makes weights smaller") as caught:
        require_memory(program(), allowed(32, ",dtype=float16"))
    assert "halves" not in str(caught.value)
    require_memory(program(), Target.parse("ort-cuda"))
    require_memory(program(), Target.parse("ort-cpu"))


def test_what_passes_may_make_fit_is_measured_without_the_limit():
    assert measured_on(program(), allowed(160)) == allowed(160)
    assert measured_on(program(), allowed(128, ",dtype=float16")) == Target.parse("ort-cuda:dtype=float16")
    for other in ("ort-cuda", "ort-cpu", "tvm-cuda:memory=1KiB"):
        assert measured_on(program(), Target.parse(other)) == Target.parse(other)


def test_optimize_says_it_before_anything_is_exported():
    inputs = {"calibration": [{"x": np.ones((64, 128), np.float32)}], "budget": OFF}
    with pytest.raises(MemoryBudgetError, match="32 KiB more"):
        planish.optimize(program().main, "ort-cuda:sm_80,memory=128KiB", **inputs)
    exe = planish.optimize(program().main, "ort-cuda:sm_80,memory=128KiB,dtype=float16", **inputs)
    assert exe.program is not None and exe.program.weight_bytes() == 128 * 128 * 2
    assert any("beyond the memory of the target" in note for note in exe.report.ledger.notes)
