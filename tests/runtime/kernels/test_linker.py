"""What is said where there is no compiler, a broken one, or no TVM."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from planish.ir.errors import InputError, PlanishError, UnsupportedError
from planish.runtime.kernels import linker, template

SOURCE = '#include "number.h"\n__attribute__((visibility("default"))) int number(void) { return NUMBER + EXTRA; }\n'


def number(folder: Path) -> int:
    """Links a library and calls it."""
    (folder / "number.h").write_text("#define NUMBER 40\n")
    (folder / "a.c").write_text(SOURCE)
    linker.link([folder / "a.c"], [], folder / "a.so", [folder], ["EXTRA=2"])
    return int(ctypes.CDLL(str(folder / "a.so")).number())


def require_compiler() -> None:
    try:
        linker.compiler()
    except UnsupportedError as error:
        pytest.skip(str(error))


def test_a_library(tmp_path: Path) -> None:
    require_compiler()
    assert number(tmp_path) == 42


def test_zig_is_the_last_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(linker.shutil, "which", lambda name: None)
    assert linker.compiler() == (sys.executable, "-m", "ziglang", "cc")
    assert number(tmp_path) == 42


def test_what_cc_says_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_compiler()
    found = " ".join(linker.compiler())
    monkeypatch.setenv("CC", f"{found} -DUNUSED=1")
    assert linker.compiler() == (*found.split(), "-DUNUSED=1")
    assert number(tmp_path) == 42


@pytest.mark.parametrize("command", ["no-such-compiler -O3", "/no/such/cc", "'unbalanced"])
def test_cc_is_nonsense(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", command)
    with pytest.raises(InputError, match="CC is .*, which is not a command; unset it, or name a C compiler"):
        linker.compiler()


def test_an_empty_cc_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    require_compiler()
    monkeypatch.delenv("CC", raising=False)
    want = linker.compiler()
    for empty in ("", "  "):
        monkeypatch.setenv("CC", empty)
        assert linker.compiler() == want


def test_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(linker.shutil, "which", lambda name: None)
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="none was found .cc, gcc, clang.*pip install 'planish.native.'"):
        linker.compiler()


def test_the_first_error_is_told(tmp_path: Path) -> None:
    require_compiler()
    (tmp_path / "a.c").write_text("int f(void) { return no_such_name; }\n")
    with pytest.raises(PlanishError, match="linking kernels with .* failed: .*no_such_name") as caught:
        linker.link([tmp_path / "a.c"], [], tmp_path / "a.so", [], [])
    assert "\n" not in str(caught.value)


def test_a_compiler_that_does_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.c").write_text("int f;\n")
    for command, message in (("false", "failed: no message"), ("true", "failed: it wrote no library")):
        monkeypatch.setenv("CC", command)
        with pytest.raises(PlanishError, match=message):
            linker.link([tmp_path / "a.c"], [], tmp_path / "a.so", [], [])


def test_a_compiler_that_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow").write_text("#!/bin/sh\nexec sleep 60\n")
    os.chmod(tmp_path / "slow", 0o755)
    monkeypatch.setenv("CC", str(tmp_path / "slow"))
    monkeypatch.setattr(linker, "_SECONDS", 0.2)
    with pytest.raises(PlanishError, match="linking kernels failed: .*timed out after 0.2 seconds"):
        linker.link([], [], tmp_path / "a.so", [], [])


def test_tvm_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(UnsupportedError, match="which can not be imported .*pip install 'planish.tvm.'"):
        template.import_tvm()
