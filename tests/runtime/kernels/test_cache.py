"""Compiled templates are kept once, under a hash of what they are made from, and only in a folder of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from planish.runtime.kernels import cache
from planish.runtime.kernels.norms import RmsNorm

pytest.importorskip("tvm")


def _writes(path: Path) -> None:
    path.write_bytes(b"compiled")


def _never(path: Path) -> None:
    raise AssertionError("it was compiled again")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_a_template_is_compiled_once(folder: Path, tmp_path: Path) -> None:
    cache.cached(RmsNorm(), _writes, tmp_path / "a.o")
    cache.cached(RmsNorm(), _never, tmp_path / "b.o")
    assert (tmp_path / "b.o").read_bytes() == b"compiled"
    assert [path.suffix for path in folder.iterdir()] == [".o"]
    with pytest.raises(AssertionError, match="compiled again"):
        cache.cached(RmsNorm(residual=True), _never, tmp_path / "c.o")


def test_another_source_is_another_object(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.cached(RmsNorm(), _writes, tmp_path / "a.o")
    monkeypatch.setattr(cache, "_sources", lambda: "changed")
    with pytest.raises(AssertionError, match="compiled again"):
        cache.cached(RmsNorm(), _never, tmp_path / "b.o")


def test_nothing_is_kept_where_others_can_write(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    cache.cached(RmsNorm(), _writes, tmp_path / "a.o")
    assert not list(folder.iterdir())
    with pytest.raises(AssertionError, match="compiled again"):
        cache.cached(RmsNorm(), _never, tmp_path / "b.o")


def test_keeping_can_be_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, "")
    cache.cached(RmsNorm(), _writes, tmp_path / "a.o")
    with pytest.raises(AssertionError, match="compiled again"):
        cache.cached(RmsNorm(), _never, tmp_path / "b.o")


def test_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    cache.cached(RmsNorm(), _writes, tmp_path / "a.o")
    (kept,) = folder.iterdir()
    kept.unlink()
    kept.symlink_to(tmp_path / "a.o")
    with pytest.raises(AssertionError, match="compiled again"):
        cache.cached(RmsNorm(), _never, tmp_path / "b.o")
