"""Confined files: every way out of a folder that a hostile name can try, for reading and for writing."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.errors import InputError, UnsafeModelError
from planish.ir.external import (
    MAX_LOCATION,
    MappedTensor,
    checked_write_path,
    open_confined,
    parse_location,
    resolve,
    tensor_bytes,
    tensor_from_buffer,
)

HOSTILE = [
    "",
    "/etc/passwd",
    "//etc/passwd",
    "..",
    "../secret",
    "a/../../secret",
    "a/..",
    "./../secret",
    "~/secret",
    "..\\secret",
    "a\\b",
    "C:/secret",
    "C:secret",
    "c:\\secret",
    "\\\\server\\share",
    "w.bin\0.txt",
    "w\n.bin",
    ".",
    "./",
    "folder/",
    "nul",
    "COM1.bin",
    "w.bin:stream",
    "x" * (MAX_LOCATION + 1),
    "\ud800",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "model"
    (base / "sub").mkdir(parents=True)
    (base / "w.bin").write_bytes(bytes(range(100)))
    (base / "sub" / "w.bin").write_bytes(b"inner")
    (tmp_path / "secret").write_bytes(b"secret")
    return base


@pytest.mark.parametrize("location", HOSTILE)
def test_hostile_names_are_refused_for_reading_and_writing(folder: Path, location: str) -> None:
    for action in (open_confined, checked_write_path):
        with pytest.raises(UnsafeModelError) as caught:
            action(folder, location)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["w.bin", "./w.bin", "sub/w.bin", "sub//w.bin", "./sub/./w.bin"])
def test_plain_names_open(folder: Path, location: str) -> None:
    with open_confined(folder, location) as file:
        assert file.read() == Path(folder, location).read_bytes()
    assert Path(resolve(folder, location)) == Path(os.path.normpath(folder / location))


def test_dots_inside_a_name_are_no_parent() -> None:
    assert parse_location("a..b/..c/d..") == ("a..b", "..c", "d..")


def test_an_empty_base_is_not_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for action in (open_confined, checked_write_path):
        with pytest.raises(UnsafeModelError, match="base folder"):
            action("", "w.bin")
    with open_confined(".", "w.bin") as file:
        assert file.size == 100


@pytest.mark.parametrize("target", ["../secret", "w.bin", "/dev/zero", "missing", "loop"])
def test_links_to_files_are_refused(folder: Path, target: str) -> None:
    (folder / "loop").symlink_to(target)
    for action in (open_confined, checked_write_path):
        with pytest.raises(UnsafeModelError, match="link"):
            action(folder, "loop")


def test_links_to_folders_are_refused(folder: Path) -> None:
    (folder / "out").symlink_to("..")
    (folder / "in").symlink_to("sub")
    for location in ("out/secret", "in/w.bin"):
        for action in (open_confined, checked_write_path):
            with pytest.raises(UnsafeModelError, match="link"):
                action(folder, location)


def test_the_base_itself_may_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    with open_confined(tmp_path / "alias", "w.bin") as file:
        assert file.size == 100


def test_hard_links_are_refused(folder: Path, tmp_path: Path) -> None:
    os.link(tmp_path / "secret", folder / "hard")
    for action in (open_confined, checked_write_path):
        with pytest.raises(UnsafeModelError, match="2 hard links"):
            action(folder, "hard")


@pytest.mark.timeout(10)
def test_pipes_folders_and_sockets_are_refused_without_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)  # socket paths are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("pipe", "sub", "socket"):
            for action in (open_confined, checked_write_path):
                with pytest.raises(UnsafeModelError, match=r"pipe|folder|socket"):
                    action(folder, name)


def test_a_link_put_in_place_after_a_check_is_still_refused(folder: Path) -> None:
    # What is checked is the opened file: a name that was good a moment ago does not help.
    resolve(folder, "w.bin")
    (folder / "w.bin").unlink()
    (folder / "w.bin").symlink_to("../secret")
    with pytest.raises(UnsafeModelError):
        open_confined(folder, "w.bin")


def test_what_is_missing_is_named_with_a_suggestion(folder: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist.*Did you mean 'w.bin'"):
        open_confined(folder, "w.bim")
    with pytest.raises(InputError, match="does not exist"):
        open_confined(folder / "no", "w.bin")
    with pytest.raises(InputError, match="does not exist"):
        checked_write_path(folder, "no/w.bin")


@pytest.mark.parametrize(("offset", "length"), [(101, 0), (0, 101), (100, 1), (-1, 1), (0, -1), (1 << 62, 1 << 62)])
def test_ranges_outside_the_file_are_refused_with_both_numbers(folder: Path, offset: int, length: int) -> None:
    with pytest.raises(InputError, match="has 100 bytes"):
        resolve(folder, "w.bin", offset, length)
    with open_confined(folder, "w.bin") as file, pytest.raises(InputError, match="100"):
        file.read(offset, length)


def test_write_paths(folder: Path) -> None:
    assert checked_write_path(folder, "new.bin") == str(folder / "new.bin")
    assert checked_write_path(folder, "sub/w.bin") == str(folder / "sub" / "w.bin")
    with pytest.raises(InputError, match="not a folder"):
        checked_write_path(folder, "w.bin/x")


def test_mapped_tensor_reads_lazily_and_shares_the_map(folder: Path) -> None:
    file = open_confined(folder, "w.bin")
    a = MappedTensor(file, 4, ir.DataType.INT16, (2, 3), "a")
    b = MappedTensor(file, 3, ir.DataType.INT16, (2,), "b")  # unaligned
    assert file._map is None
    np.testing.assert_array_equal(a.numpy(), np.frombuffer(bytes(range(4, 16)), "<i2").reshape(2, 3))
    np.testing.assert_array_equal(b.numpy(), np.frombuffer(bytes(range(3, 7)), "<i2"))
    assert np.shares_memory(a.numpy(), a.buffer()) and not a.numpy().flags.writeable
    assert b.numpy().flags.aligned
    assert a.tobytes() == bytes(range(4, 16)) and a.nbytes == 12


def test_a_file_that_became_shorter_is_an_error_and_no_bus_error(folder: Path) -> None:
    tensor = MappedTensor(open_confined(folder, "w.bin"), 0, ir.DataType.UINT8, (100,), "a")
    os.truncate(folder / "w.bin", 10)
    with pytest.raises(InputError, match="became shorter"):
        tensor.numpy()


@pytest.mark.parametrize(("dtype", "shape", "size"), [("INT4", (3,), 2), ("UINT2", (5,), 2), ("FLOAT6E2M3", (4,), 3)])
def test_sub_byte_tensors(dtype: str, shape: tuple[int, ...], size: int) -> None:
    kind = ir.DataType[dtype]
    assert tensor_bytes(kind, shape) == size
    tensor = tensor_from_buffer(np.arange(1, size + 1, dtype=np.uint8), kind, shape, "t")
    assert tensor.numpy().shape == shape and tensor.tobytes() == bytes(range(1, size + 1))


def test_empty_tensor(folder: Path) -> None:
    tensor = MappedTensor(open_confined(folder, "w.bin"), 100, ir.DataType.FLOAT, (0, 5), "e")
    assert tensor.numpy().shape == (0, 5) and tensor.tobytes() == b""
