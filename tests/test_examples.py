"""Every file in examples/ runs, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
#: Arguments that shorten the measuring; what an example shows is the same.
ARGUMENTS = {
    "demo_minilm.py": ["--seconds", "2", "--out", "{out}"],
    "needle_s2.py": ["--small", "--svg", "{out}.svg", "--json", "{out}.json"],
    "skip_layers_quality.py": ["--small", "--threads", "1", "--svg", "{out}.svg"],
    "token_quality.py": ["--small", "--threads", "1", "--svg", "{out}.svg"],
}
#: A line that shows the example came to its end with the right result.
SHOWS = {
    "needle_s2.py": "The worst depth of the model trained with S2: found",
    "demo_minilm.py": "The similar pair stays the closer one.",
    "skip_layers_quality.py": "The claim that balanced beats contiguous",
    "token_quality.py": "Right classes and middles found, between the measured points:",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name: str, tmp_path: Path) -> None:
    arguments = [a.format(out=tmp_path / "artifact") for a in ARGUMENTS.get(name, [])]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert SHOWS.get(name, "") in done.stdout
