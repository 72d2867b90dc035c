"""What the documentation says is run: Python page by page from top to bottom, and the `$ planish` commands."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from planish.cli import invoke
from planish.passes import registry

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)")
# A benchmark takes the time it is given.
SHORTER = {"bench": ["--seconds", "0.5"]}

MODEL = """<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 8] x) => (float[batch, 8] y) <float half = {0.5}, float one = {1}, float root = {1.4142135}> {
  h = MatMul(x, w)
  d = Div(h, root)
  e = Erf(d)
  s = Add(e, one)
  m = Mul(h, s)
  y = Mul(m, half)
}"""


def blocks(page: str, python: bool) -> list[tuple[int, str]]:
    """The blocks of a page with the line before their first one."""
    text = (ROOT / page).read_text()
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in FENCE.finditer(text) if (m[1] == "python") == python]


def commands(page: str) -> list[list[str]]:
    lines = [line for _, block in blocks(page, python=False) for line in block.splitlines()]
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("$ planish ")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the pages take for the reader's own."""
    monkeypatch.chdir(tmp_path)
    model = onnx.parser.parse_model(MODEL)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(8, dtype=np.float32), "w"))
    onnx.save(model, "model.onnx")
    np.savez("x.npz", x=np.ones((4, 8), np.float32))
    return tmp_path


@pytest.fixture
def restored_registry() -> Iterator[None]:
    registry.names()
    known = dict(registry._passes)
    yield
    registry._passes.clear()
    registry._passes.update(known)


@pytest.mark.usefixtures("folder", "restored_registry")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, python=True)])
def test_the_python_of_a_page_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.passes.gates.DEFAULT_SECONDS", 1.0)
    module = ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", module)
    if page == "README.md":  # its first lines are about "a model" and "an input"
        import planish

        module.__dict__.update(planish=planish, model="model.onnx", x=np.ones((4, 8), np.float32))
    for line, block in blocks(page, python=True):
        if page == "README.md":
            shutil.rmtree("artifact", ignore_errors=True)  # its two examples make the same folder
        # Blank lines in front make an error point at the line of the page.
        exec(compile("\n" * line + block, str(ROOT / page), "exec"), module.__dict__)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_of_a_page_work(page: str) -> None:
    for arguments in commands(page):
        if "artifact/" in arguments:
            shutil.rmtree("artifact", ignore_errors=True)
            if arguments[0] != "optimize":
                assert invoke(["optimize", "model.onnx", "--no-gates", "-o", "artifact/"]) == 0
        assert invoke([*arguments, *SHORTER.get(arguments[0], [])]) == 0, f"{page}: planish {shlex.join(arguments)}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in LINK.findall((ROOT / page).read_text()):
        if "://" not in link:
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}"


def test_every_page_is_in_the_index_and_the_navigation() -> None:
    index, navigation = (ROOT / "docs/index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in navigation, f"mkdocs.yml does not name {page.name}"
        assert page.name == "index.md" or f"({page.name})" in index, f"docs/index.md does not link {page.name}"


def test_numbers_on_the_pages_are_those_of_the_code() -> None:
    from planish.frontends import onnx_checks, onnx_tensors
    from planish.ir import compare, confined
    from planish.passes import gates
    from planish.passes.canonicalize.fold_constants import FoldConstants
    from planish.runtime import artifact_writer, manifest, measure, tensorfile

    assert (onnx_checks.MAX_NODES, onnx_checks.MAX_EXPANDED, onnx_checks.MAX_DEPTH) == (10**6, 10**7, 32)
    assert (onnx_checks.MAX_NAME, confined.MAX_LOCATION, onnx_tensors.MAX_ELEMENTS) == (65536, 1024, 2**48)
    assert (onnx_tensors.MAX_SPARSE_RATIO, onnx_tensors.MAX_SPARSE_BYTES) == (1000, 64 << 20)
    assert (manifest.MAX_BYTES, manifest.SCHEMA, tensorfile._MAX_HEADER) == (64 << 20, 1, 100 << 20)
    assert (FoldConstants.max_bytes, FoldConstants.max_growth) == (1 << 20, 64 << 20)
    assert (artifact_writer.GOLDEN_SAMPLES, artifact_writer.GOLDEN_BYTES) == (2, 16 << 20)
    assert compare._TOLERANCE == {"float64": 1e-10, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
    assert (gates.DEFAULT_APPROXIMATE_ERROR, gates.DEFAULT_SECONDS, gates.SLOWER) == (1e-2, 12.0, 0.99)
    assert (measure.SAMPLE_SECONDS, measure.RESOLUTION) == (0.002, 0.01)
    assert (measure.FINAL_LEVEL, measure.EARLY_LEVEL) == (0.95, 0.998)
