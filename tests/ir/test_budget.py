from __future__ import annotations

from typing import Any

import pytest

from planish.ir.budget import Budget
from planish.ir.errors import InputError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error": -1.0}, "budget.error is -1.0"),
        ({"error": float("nan")}, "budget.error is nan"),
        ({"min_gain": "fast"}, "budget.min_gain is 'fast'"),
        ({"seconds": float("inf")}, "budget.seconds is inf"),
        ({"error": 1.0, "metric": 3}, "must be a function of (expected, got), not int"),
        ({"metric": lambda a, b: 0.0}, "without budget.error"),
    ],
)
def test_a_wrong_budget_is_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Budget(**options)
    assert message in str(caught.value)


def test_a_budget_may_be_empty_or_full() -> None:
    assert Budget().gates
    assert Budget(error=0, metric=lambda a, b: 0.0, min_gain=1.02, seconds=5).error == 0
