"""Not one case of the ONNX backend suite that passes on plain ONNX Runtime fails through `planish.optimize`."""

from __future__ import annotations

import pytest
from suite import Result, cases, run_cases

SHARDS = 24
#: With gates on, a case takes some ten times as long; a sample shows that the gates themselves do no harm.
GATED_EVERY = 20


def no_regressions(result: Result) -> None:
    assert not result.regressions, "\n".join(f"{name}: {reason}" for name, reason in result.regressions)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_gates_off(shard: int) -> None:
    result = run_cases(cases()[shard::SHARDS])
    no_regressions(result)
    # The suite itself must be there, and the passes must have something to do.
    assert result.plain > 40
    assert result.changed > 0


@pytest.mark.parametrize("shard", range(2))
def test_gates_on_for_a_sample(shard: int) -> None:
    result = run_cases(cases()[shard * GATED_EVERY // 2 :: GATED_EVERY][: len(cases()) // GATED_EVERY], gates=True)
    no_regressions(result)
