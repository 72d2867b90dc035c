"""A plugin of pytest, ``-p tests.every --every N``: of each test function only every N-th case, the first among them.

For tools that slow every test down, such as compute-sanitizer.
"""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N", help="of each test function only every N-th case")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = config.getoption("every")
    seen: Counter[str] = Counter()
    kept, dropped = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        (dropped if seen[function] % every else kept).append(item)
        seen[function] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
