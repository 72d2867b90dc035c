"""What the documentation says in Python is run, page by page, from top to bottom."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from planish.passes import registry

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def restored_registry() -> Iterator[None]:
    registry.names()
    known = dict(registry._passes)
    yield
    registry._passes.clear()
    registry._passes.update(known)


@pytest.mark.usefixtures("restored_registry")
@pytest.mark.parametrize("page", ["pass-author-guide.md"])
def test_the_python_of_a_page_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / page).read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"{page} holds no Python"
    module = ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", module)
    for block in blocks:
        # Blank lines in front make an error point at the line of the page.
        source = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(source, str(DOCS / page), "exec"), module.__dict__)
