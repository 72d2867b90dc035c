"""Bisection from the command line, and the catalogue of passes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from planish.cli import debugging
from planish.ir.errors import InputError
from tests.cli.command_line import as_json


def checker(folder: Path, bad_op: str) -> str:
    """A check that fails on models that hold `bad_op`."""
    script = folder / "check.py"
    script.write_text(
        "import sys, onnx\n"
        "ops = [n.op_type for n in onnx.load(sys.argv[1]).graph.node]\n"
        f"print('this goes to stderr')\nsys.exit('{bad_op}' in ops)\n"
    )
    return f"{sys.executable} {script}"


def test_bisect_finds_the_pass_with_a_command(model: Path, call: Any) -> None:
    check = checker(model.parent, "Gelu")
    code, out, err = call("bisect", "model.onnx", "--check", f"{check} {{model}}", "-o", "repro", "--json")
    found = as_json(out)
    assert code == 1 and found["culprit"] == "fuse-gelu" and "stderr" in err
    assert {p.name for p in Path(found["reproducer"]).iterdir()} >= {"before.onnx", "pipeline.txt", "error.txt"}
    code, out, _ = call("bisect", "model.onnx", "--check", f'{check} "$PLANISH_MODEL"')
    assert code == 1 and "fuse-gelu" in out


def test_bisect_says_when_nothing_breaks_or_all_is_broken(model: Path, call: Any) -> None:
    code, out, _ = call("bisect", "model.onnx")
    assert code == 0 and "holds after all passes" in out
    code, out, _ = call("bisect", "model.onnx", "--check", "false")
    assert code == 2 and "before any pass" in out


@pytest.mark.parametrize(("command", "words"), [("exit 125", "125"), ("no-such-command", "127"), ("exit 200", "200")])
def test_bisect_keeps_the_contract_on_exit_codes(model: Path, call: Any, command: str, words: str) -> None:
    code, _, err = call("bisect", "model.onnx", "--check", command)
    assert code == 2 and words in err


def test_a_pass_that_does_not_import_is_listed_as_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from planish.passes import registry

    def get(name: str) -> Any:
        raise InputError(f"pass '{name}' can not be loaded")

    monkeypatch.setattr(registry, "get", get)
    assert {item["kind"] for item in debugging.describe_passes()} == {"broken"}
