"""Damaged files: whatever bytes change, loading gives a program or one InputError line; never a crash or a hang.

The mutations run in this process (a Python traceback is a failure); a share runs in a process of its own, since a
crash of the parser or the checker, which are C++, would take this one with it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from planish.frontends import onnx_wire
from planish.frontends.onnx import load_onnx
from planish.ir.errors import InputError
from planish.ir.hashing import structural_hash
from planish.ir.program import Program
from planish.ir.serialize import to_proto_without_weights
from tests.frontends.onnx_models import external, external_folder, plain, rich


def _weighty() -> onnx.ModelProto:
    proto = plain()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(600, np.float32), "w"))
    return proto


def _sparse() -> onnx.ModelProto:
    values = onnx.numpy_helper.from_array(np.array([5, 7], np.float32), "s")
    proto = plain()
    indices = onnx.numpy_helper.from_array(np.array([[1, 1], [0, 6]]), "i")
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [2, 8]))
    return proto


def _old() -> onnx.ModelProto:
    text = """<ir_version: 3, opset_import: ["" : 9]> main (float[2, 8] x) => (float[a, b] y) {
        c = Clip <min = 0.0, max = 1.0> (x) s = Softmax <axis = 1> (c) r = ReduceSum <axes = [0], keepdims = 1> (s)
        p = Pad <pads = [0, 0, 0, 1]> (r) y = Dropout <ratio = 0.5> (p) }"""
    return onnx.parser.parse_model(text)


SEEDS = [m.SerializeToString() for m in (plain(), rich(), external(), _weighty(), _sparse(), _old())]

EDIT = st.tuples(
    st.sampled_from(["flip", "set", "insert", "delete", "truncate", "duplicate", "swap"]),
    st.integers(0, 1 << 16),
    st.integers(0, 255),
    st.binary(min_size=1, max_size=12),
)


def mutate(data: bytes, edits: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, where, byte, extra in edits:
        if not data:
            return data
        at = where % len(data)
        end = at + 1 + byte % 16
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ (1 << byte % 8)]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + bytes([byte]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + extra + data[at:]
        elif kind == "delete":
            data = data[:at] + data[end:]
        elif kind == "truncate":
            data = data[:at]
        elif kind == "duplicate":
            data = data[:end] + data[at:end] + data[end:]
        else:
            data = data[:at] + data[at:end][::-1] + data[end:]
    return data


def outcome(source: bytes | Path, base_dir: Path | None = None) -> Program | None:
    """The program, or None for a clean refusal; anything else fails the test."""
    try:
        program = load_onnx(source, base_dir=base_dir)
    except InputError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 2000
        return None
    # What was loaded is whole: it can be hashed (all weights are read), serialized, and loaded again to the same.
    proto, _ = to_proto_without_weights(program.main, threshold=1 << 40)
    again = load_onnx(proto, base_dir=base_dir)
    assert structural_hash(again) == structural_hash(program)
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    external_folder(folder)
    return folder


COMMON = settings(
    deadline=5000, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True
)


@COMMON
@given(seed=st.sampled_from(range(len(SEEDS))), edits=st.lists(EDIT, min_size=1, max_size=4))
def test_mutated_bytes(folder: Path, seed: int, edits: list[tuple[str, int, int, bytes]]) -> None:
    outcome(mutate(SEEDS[seed], edits), folder)


@settings(COMMON, max_examples=150)
@given(seed=st.sampled_from(range(len(SEEDS))), edits=st.lists(EDIT, min_size=1, max_size=3))
def test_mutated_files_through_the_splitter(folder: Path, seed: int, edits: list[tuple[str, int, int, bytes]]) -> None:
    data = mutate(SEEDS[seed], edits)
    (folder / "mutated.onnx").write_bytes(data)
    threshold = onnx_wire.MIN_FILE
    onnx_wire.MIN_FILE = 1
    try:
        split = outcome(folder / "mutated.onnx")
    finally:
        onnx_wire.MIN_FILE = threshold
    parsed = outcome(data, folder)
    # Both readers of the wire format must agree on what the bytes mean.
    assert (split is None) == (parsed is None)
    if split is not None and parsed is not None:
        assert structural_hash(split) == structural_hash(parsed)


@settings(COMMON, max_examples=150)
@given(data=st.binary(max_size=300))
@example(data=b"")
@example(data=b"\x08\x08")
@example(data=b"\x3a\x00")
@example(data=b"\x0b" * 200)
@example(data=b"\x3a\xff\xff\xff\xff\x0f")
def test_arbitrary_bytes(data: bytes) -> None:
    outcome(data)


@settings(COMMON, max_examples=150)
@given(
    location=st.text(max_size=20) | st.sampled_from(["w.bin", "./w.bin", "m.onnx", "../w.bin", "/dev/zero", "sub/.."]),
    offset=st.integers(-(1 << 70), 1 << 70) | st.integers(0, 400) | st.text(max_size=5),
    length=st.none() | st.integers(-(1 << 70), 1 << 70) | st.just(256),
    dims=st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(0, 9), max_size=4) | st.just([8, 8]),
    dtype=st.integers(-5, 40) | st.just(1),
)
def test_arbitrary_external_data(
    folder: Path, location: str, offset: int | str, length: int | None, dims: list[int], dtype: int
) -> None:
    try:
        proto = external(location=location, offset=offset, length=length)
    except (ValueError, UnicodeEncodeError):
        return  # not a string that protobuf holds
    tensor = proto.graph.initializer[0]
    del tensor.dims[:]
    tensor.dims.extend(dims)
    tensor.data_type = dtype
    program = outcome(proto.SerializeToString(), folder)
    if program is not None and "w" in program.weights:
        weight = program.weights["w"]
        assert weight.nbytes <= max(p.stat().st_size for p in folder.iterdir())


def test_a_share_in_a_process_of_its_own() -> None:
    code = textwrap.dedent("""
        import faulthandler, random, sys
        from tests.frontends.test_onnx_fuzz import SEEDS, mutate, outcome
        from pathlib import Path
        random.seed(int(sys.argv[1]))
        kinds = ["flip", "set", "insert", "delete", "truncate", "duplicate", "swap"]
        loaded = 0
        for _ in range(int(sys.argv[3])):
            edits = [(random.choice(kinds), random.randrange(1 << 16), random.randrange(256), random.randbytes(5))
                     for _ in range(random.randint(1, 4))]
            faulthandler.dump_traceback_later(20, exit=True)  # a hang says where
            loaded += outcome(mutate(random.choice(SEEDS), edits), Path(sys.argv[2])) is not None
        print(loaded)
    """)
    with tempfile.TemporaryDirectory() as folder:
        external_folder(Path(folder))
        count = 1500
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", code, "7", folder, str(count)], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < int(done.stdout) < count
