"""Dependencies between the rooms of the house point one way, and loading an artifact imports little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import planish

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "planish"
#: What a room may import of planish, besides itself and `planish.version`: frontends, passes and runtime stand side
#: by side and never import each other.
ALLOWED = {
    "ir": set(),
    "runtime": {"ir"},
    "passes": {"ir"},
    "frontends": {"ir"},
    "driver": {"ir", "passes", "frontends", "runtime"},
    # The public face of relational layers: a driver of its own.
    "relational": {"ir", "passes", "frontends", "runtime"},
    "cli": {"ir", "passes", "frontends", "runtime", "driver"},
}
#: Modules at the top of the package; everything else lies in a room. Drivers of their own: offload, of memory budgets;
#: parallel, of several devices.
TOP = {"__init__", "capture", "driver", "offload", "parallel", "version"}
#: Packages that these rooms import only inside functions.
LAZY = {
    "ir": {"torch", "onnxscript", "onnxruntime", "rich", "jinja2", "plotly", "transformers"},
    "runtime": {"torch", "onnxscript", "rich", "jinja2", "plotly", "transformers"},
    "passes": {"torch", "rich", "jinja2", "plotly", "transformers"},
}
#: Packages that these rooms do not import at all.
NEVER = {"ir": {"torch", "onnxruntime", "onnxscript"}, "runtime": {"onnxscript"}}


def room(name: str) -> str:
    """The room of what is named after ``planish.``: ``passes.manager`` is in passes, ``__init__`` is the driver's."""
    first = name.split(".")[0]
    return first if first in ALLOWED else "driver"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(module, whether at import time, line) of each import; those under TYPE_CHECKING are not imports."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool, int]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, at_import)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_import, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or "", at_import, node.lineno
            if node.module == "planish":
                for alias in node.names:
                    yield f"planish.{alias.name}", at_import, node.lineno
        inner = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_the_top_level_is_the_driver_and_the_rooms() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ALLOWED) - {"driver"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_rooms_import_only_what_lies_below(path: Path) -> None:
    own = room(module_name(path))
    public = {"__version__", *planish.__all__}
    for module, at_import, line in imports(path):
        top, _, rest = module.partition(".")
        where = f"{path.relative_to(ROOT)}:{line}"
        if top == "planish" and rest and rest != "version" and rest not in public:
            other = room(rest)
            assert other == own or other in ALLOWED[own], f"{where}: {own} imports planish.{rest}"
        assert top not in NEVER.get(own, ()), f"{where}: {own} imports {top}"
        if at_import:
            assert top not in LAZY.get(own, ()), f"{where}: {own} imports {top} when it is imported"


def test_no_import_cycles_at_import_time() -> None:
    names = {".".join(("planish", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in MODULES}
    graph = {name: {m for m, at_import, _ in imports(path) if at_import and m in names} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def _loaded(code: str, *names: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*[n for n in {names!r} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


def test_import_planish_is_light() -> None:
    heavy = ("numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "torch", "planish.driver", "planish.passes")
    assert not _loaded("import planish", *heavy)


def test_load_imports_neither_torch_nor_the_passes() -> None:
    """What it imports even for a folder that is no artifact; test_artifact.py does the same for one that is."""
    code = """
import planish
try:
    planish.load("no-such-folder")
except planish.PlanishError as error:
    assert "does not exist" in str(error)
"""
    heavy = (
        "torch",
        "onnxscript",
        "onnx_ir",
        "onnx",
        "planish.passes",
        "planish.frontends",
        "planish.driver",
        "rich",
    )
    assert not _loaded(code, *heavy)


def test_ir_and_runtime_import_without_torch_and_onnxscript() -> None:
    modules = [
        ".".join(("planish", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for p in MODULES
        if room(module_name(p)) in ("ir", "runtime")
    ]
    code = f"""
import importlib, importlib.abc
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'onnxscript', 'transformers'):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
for name in {modules!r}:
    importlib.import_module(name)
"""
    assert not _loaded(code, "torch", "onnxscript")
