"""What commands decide by themselves: limits from text, and which runs count as failed."""

from __future__ import annotations

from typing import Any

import pytest

import planish
from planish.cli import commands
from planish.ir.ledger import ErrorStats, Ledger, LedgerEntry
from planish.runtime.report import Report, Stats


def report_with(**entry: Any) -> Report:
    stats = Stats(1, {"Add": 1}, 0)
    kind = entry.pop("kind", "exact")
    return Report("m", "ort-cpu", "", stats, stats, Ledger([LedgerEntry("p", kind, **entry)]))


@pytest.mark.parametrize(
    ("entry", "named", "failed"),
    [
        ({"kept": True}, True, []),
        ({"kept": False}, True, ["p"]),  # asked for by name, and not in the result
        ({"kept": False, "verdict": "rolled back: slower"}, False, []),
        ({"kept": False, "error_original": ErrorStats(1.0, 1.0, 0.0)}, False, ["p"]),
        ({"kept": False, "reproducer": "folder"}, False, ["p"]),
        ({"kept": False, "kind": "approximate", "error_original": ErrorStats(1.0, 1.0, 0.0)}, False, []),
    ],
)
def test_what_makes_optimize_exit_with_one(entry: dict[str, Any], named: bool, failed: list[str]) -> None:
    assert commands.failed_passes(report_with(**entry), named) == failed


def test_budgets_and_dims_parse() -> None:
    budget = commands.parse_budget("error=1e-3, min_gain=1.02,seconds=30")
    assert (budget.error, budget.min_gain, budget.seconds, budget.gates) == (1e-3, 1.02, 30.0, True)
    assert commands.parse_budget(None, gates=False) == planish.Budget(gates=False)
    assert commands.parse_dims(["batch=4", "seq = 8"]) == {"batch": 4, "seq": 8}
