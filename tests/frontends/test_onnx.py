"""Loading ONNX: what is kept, what is refused and with which words."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from planish.frontends import onnx_checks, onnx_wire
from planish.frontends.onnx import load_onnx
from planish.ir.errors import InputError, UnsafeModelError
from planish.ir.external import MappedTensor
from planish.ir.hashing import structural_hash
from planish.ir.program import Program
from planish.ir.serialize import inline, to_proto_without_weights
from tests.frontends.onnx_models import PLAIN, RICH, external, external_folder, plain, rich

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 8)).astype(np.float32)


def run(proto: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feed)


def whole(program: Program) -> onnx.ModelProto:
    proto, weights = to_proto_without_weights(program.main)
    inline(proto, weights)
    return proto


def refused(source: object, match: str, kind: type[InputError] = InputError, **options: object) -> str:
    with pytest.raises(kind, match=match) as caught:
        load_onnx(source, **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700 and caught.value.exit_code == 2
    return text


# What is kept


@pytest.mark.parametrize("text", [PLAIN, RICH])
def test_every_kind_of_source_gives_the_same_program(text: str, tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(text)
    data = proto.SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data)
    model = ir.from_proto(proto)
    before = structural_hash(model)
    programs = [load_onnx(s) for s in (proto, data, tmp_path / "m.onnx", str(tmp_path / "m.onnx"), model)]
    assert len({structural_hash(p) for p in programs}) == 1
    assert proto.SerializeToString() == data and structural_hash(model) == before
    assert programs[0].main is not model
    assert (tmp_path / "m.onnx").read_bytes() == data


def test_functions_and_subgraphs_are_kept_and_run_the_same() -> None:
    program = load_onnx(rich())
    assert [f.name for f in program.main.functions.values()] == ["scale"]
    assert program.provenance["producer"] == "tests" and program.provenance["opset"] == "21"
    assert program.main.opset_imports[""] == 21
    for c in (True, False):
        feed = {"x": X, "c": np.array(c)}
        np.testing.assert_array_equal(run(whole(program), feed)[0], run(rich(), feed)[0])


def test_external_data_is_mapped_not_read(tmp_path: Path) -> None:
    program = load_onnx(external_folder(tmp_path))
    tensor = program.weights["w"]
    assert isinstance(tensor, MappedTensor) and tensor.offset == 64
    np.testing.assert_array_equal(tensor.numpy(), np.arange(64, dtype=np.float32).reshape(8, 8))
    np.testing.assert_array_equal(run(whole(program), {"x": X})[0], X @ tensor.numpy())


def test_external_data_by_base_dir_and_from_an_ir_model(tmp_path: Path) -> None:
    path = external_folder(tmp_path)
    for source in (external(), external().SerializeToString(), ir.from_proto(external())):
        assert isinstance(load_onnx(source, base_dir=tmp_path).weights["w"], MappedTensor)
        refused(source, "give the path of the model, or base_dir")
    loaded = ir.load(path)
    assert isinstance(load_onnx(loaded).weights["w"], MappedTensor)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_without_length_or_offset_and_with_keys_that_are_ignored(tmp_path: Path) -> None:
    path = external_folder(tmp_path, length=None, offset=None, checksum="abc", __class__="x", _proto="y")
    assert load_onnx(path).weights["w"].numpy()[0, 0] == 0


def test_more_files_than_are_kept_open(tmp_path: Path) -> None:
    proto = external(location="w0", offset=0, length=None)
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = "w0"
    for index in range(1, 200):
        tensor = TensorProto(name=f"w{index}", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=f"w{index}")
        proto.graph.initializer.append(tensor)
    for index in range(200):
        (tmp_path / f"w{index}").write_bytes(np.full(64, index, np.float32).tobytes())
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    before = len(os.listdir("/proc/self/fd"))
    program = load_onnx(tmp_path / "m.onnx")
    assert len(os.listdir("/proc/self/fd")) - before < 150
    assert [float(program.weights[f"w{i}"].numpy().flat[0]) for i in range(200)] == list(range(200))


def test_inputs_with_defaults_stay_overridable() -> None:
    proto = plain()
    proto.graph.input.append(helper.make_tensor_value_info("b", 1, [8]))
    program = load_onnx(proto)
    assert [s.name for s in program.inputs()] == ["x"] and len(program.main.graph.inputs) == 2
    feed = {"x": X, "b": np.full(8, -9, np.float32)}
    np.testing.assert_array_equal(run(whole(program), feed)[0], run(proto, feed)[0])
    np.testing.assert_array_equal(run(whole(program), {"x": X})[0], run(proto, {"x": X})[0])


def test_weights_listed_as_inputs_before_ir_version_4_are_constants() -> None:
    proto = plain()
    proto.ir_version = 3
    proto.graph.input.append(helper.make_tensor_value_info("b", 1, [8]))
    program = load_onnx(proto)
    assert [v.name for v in program.main.graph.inputs] == ["x"] and "constants" in program.provenance["notes"]
    np.testing.assert_array_equal(run(whole(program), {"x": X})[0], run(proto, {"x": X})[0])


def test_node_names_become_unique_and_nodes_sorted() -> None:
    proto = plain()
    for node in proto.graph.node:
        node.name = "same"
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    program = load_onnx(proto)
    names = [n.name for n in program.nodes()]
    assert len(set(names)) == 2 and all(names) and "same" in names
    assert "topological" in program.provenance["notes"]
    np.testing.assert_array_equal(run(whole(program), {"x": X})[0], run(plain(), {"x": X})[0])


def test_sparse_tensors_become_dense() -> None:
    values = onnx.numpy_helper.from_array(np.array([5, 7], np.float32), "b")
    sparse = helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(np.array([1, 6]), "i"), [8])
    proto = plain()
    del proto.graph.initializer[:]
    proto.graph.sparse_initializer.append(sparse)
    program = load_onnx(proto)
    np.testing.assert_array_equal(run(whole(program), {"x": X})[0], run(proto, {"x": X})[0])
    constant = helper.make_node("Constant", [], ["b"], sparse_value=sparse)
    del proto.graph.sparse_initializer[:]
    proto.graph.node.insert(0, constant)
    np.testing.assert_array_equal(run(whole(load_onnx(proto)), {"x": X})[0], run(proto, {"x": X})[0])
    values.name = "b"
    proto = plain()
    bad = helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(np.array([1, 60]), "i"), [8])
    proto.graph.sparse_initializer.append(bad)
    refused(proto, "indices outside its shape")
    bad.dims[0] = 1 << 40
    proto.graph.sparse_initializer[0].CopyFrom(bad)
    refused(proto, "bytes when dense")


def test_types_that_the_ir_has_no_class_for_come_back() -> None:
    ints, floats = helper.make_tensor_type_proto(7, []), helper.make_tensor_type_proto(1, [])
    mapped = helper.make_map_type_proto(ints.tensor_type.elem_type, floats)
    info = helper.make_value_info("y", helper.make_sequence_type_proto(mapped))
    node = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", 1, [1, 2])], [info])
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("ai.onnx.ml", 3), helper.make_opsetid("", 17)], ir_version=8
    )
    program = load_onnx(proto)
    assert whole(program).graph.output[0].type == info.type
    feed = {"x": np.ones((1, 2), np.float32)}
    assert run(whole(program), feed) == run(proto, feed)


def test_duplicates_training_info_and_a_missing_import_are_noted() -> None:
    proto = plain()
    proto.graph.initializer.insert(0, helper.make_tensor("b", 1, [8], [9.0] * 8))
    proto.training_info.add()
    node = helper.make_node("Gelu", ["y"], ["z"], domain="com.microsoft")
    proto.graph.node.append(node)
    program = load_onnx(proto)
    for words in ("twice", "Training", "com.microsoft"):
        assert words in program.provenance["notes"]
    assert program.weights["b"].numpy()[0] == 1


# Weights inside the file


def test_large_files_are_split_before_protobuf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = onnx.parser.parse_model(PLAIN.replace("float[8] b = {1, 2, 3, 4, 5, 6, 7, 8}", "float[3] d = {1, 2, 3}"))
    b = RNG.standard_normal(8).astype(np.float32)
    big = RNG.standard_normal((600, 700)).astype(np.float32)
    typed = helper.make_tensor("typed", 1, [300], [0.5] * 300)
    proto.graph.initializer.extend(
        [onnx.numpy_helper.from_array(big, "big"), onnx.numpy_helper.from_array(b, "b"), typed]
    )
    proto.graph.node.append(helper.make_node("ReduceSum", ["big"], ["unused"], name="keep"))
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    split = load_onnx(path)
    monkeypatch.setattr(onnx_wire, "MIN_FILE", 1 << 60)
    plainly = load_onnx(path)
    assert structural_hash(split) == structural_hash(plainly) == structural_hash(load_onnx(proto))
    np.testing.assert_array_equal(split.weights["big"].numpy(), big)
    assert split.weights["big"].numpy().flags.aligned


def test_the_splitter_leaves_odd_layouts_to_protobuf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_wire, "MIN_FILE", 1)
    proto = plain()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1000, np.float32), "w"))
    data = proto.SerializeToString()
    extra = onnx.ModelProto()
    extra.graph.doc_string = "second"
    path = tmp_path / "m.onnx"
    for odd in (data + extra.SerializeToString(), data + b"\x98\x06\x05"):  # a graph in two parts; an unknown field
        path.write_bytes(odd)
        assert structural_hash(load_onnx(path)) == structural_hash(load_onnx(odd))
    path.write_bytes(data[:-5])
    refused(path, "truncated")


def test_a_token_in_a_file_refers_to_nothing(tmp_path: Path) -> None:
    # Detached tensors are found by a random token; a file can not guess it.
    for guess in ("planish#0", "#0", "0"):
        proto = external(location=guess)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((900, 900), np.float32), "big"))
        (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
        refused(tmp_path / "m.onnx", "does not exist")


# What is refused


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert "Did you mean 'model.onnx'" in refused(tmp_path / "modle.onnx", "no such file")
    refused(tmp_path / "no" / "model.onnx", "folder '.*no' does not exist")
    assert "'model.onnx' in it" in refused(tmp_path, "is a folder")
    refused("", "empty")
    refused("a\0b", "NUL")
    (tmp_path / "manifest.json").write_text("{}")
    refused(tmp_path, "planish.load")


@pytest.mark.timeout(10)
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", "x")


FILES: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "empty": (b"", r"empty \(0 bytes\)"),
    "text": (b"hello, this is no model\n" * 9, "text file"),
    "json": (b'{"a": 1}', "JSON"),
    "html": (b"<!DOCTYPE html><html>", "failed download"),
    "zip": (_zip, r"zip archive.*torch\.save"),
    "pickle": (pickle.dumps({"a": 1}, protocol=4), "pickle.*runs code"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(100), "TensorFlow Lite"),
    "ort": (b"\x1c\0\0\0ORTM" + bytes(100), r"\.ort format"),
    "safetensors": ((10).to_bytes(8, "little") + b'{"a":  {}}', "safetensors"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(100), "GGUF"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "git lfs pull"),
    "zeros": (bytes(1000), "truncated or damaged"),
    "noise": (bytes(range(256)) * 10, "truncated or damaged|no graph"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_onnx_say_what_they_look_like(name: str, tmp_path: Path) -> None:
    content, match = FILES[name]
    path = tmp_path / "model.onnx"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    assert str(path) in refused(path, match)
    refused(path.read_bytes(), match)


def test_every_truncation_is_refused() -> None:
    data = rich().SerializeToString()
    for size in range(1, len(data)):
        with pytest.raises(InputError):
            load_onnx(data[:size])


def test_other_types_are_refused() -> None:
    for source in (5, None, ["m.onnx"], np.zeros(3)):
        refused(source, "must be a path, bytes")


def edited(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    proto = plain()
    change(proto)
    return proto


def _set(message: object, **fields: object) -> None:
    for name, value in fields.items():
        setattr(message, name, value)


def _big_dims(proto: onnx.ModelProto, *dims: int) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    del tensor.dims[:]
    tensor.dims.extend(dims)


def _nest(proto: onnx.ModelProto, depth: int) -> None:
    graph = proto.graph
    for level in range(depth):
        node = graph.node.add(op_type="If", input=["c"], output=[f"o{level}"])
        attribute = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
        graph = attribute.g


DAMAGED: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "no graph": (lambda p: p.ClearField("graph"), "no graph"),
    "no opset": (lambda p: p.ClearField("opset_import"), "imports no opset"),
    "newer opset": (lambda p: _set(p.opset_import[0], version=99), r"opset 99 is not supported; 1 to \d+ are"),
    "opset 0": (lambda p: _set(p.opset_import[0], version=0), "opset 0 is not supported"),
    "newer ir": (lambda p: _set(p, ir_version=99), r"ir_version 99 is newer than \d+"),
    "no ir": (lambda p: p.ClearField("ir_version"), "no ir_version"),
    "two opsets": (lambda p: p.opset_import.add(domain="ai.onnx", version=3), "two versions"),
    "unknown op": (lambda p: _set(p.graph.node[1], op_type="Rellu", name="r"), "node 'r'.*'Rellu'.*mean 'Relu'"),
    "future op": (lambda p: _set(p.graph.node[1], op_type="Gelu"), "Gelu needs opset 20; the model imports 17"),
    "custom op": (lambda p: _set(p.graph.node[1], domain="acme", op_type="Magic"), r"acme: Magic"),
    "dangling": (lambda p: _set(p.graph.node[1], input=["hh"]) if 0 else p.graph.node[1].input.__setitem__(0, "hh"),
                 "node 'Relu' reads 'hh', which nothing defines"),
    "no output": (lambda p: _set(p.graph.output[0], name="z"), "output 'z' is produced by no node"),
    "not SSA": (lambda p: p.graph.node[1].output.__setitem__(0, "h"), "'h' is defined again by node 'Relu'"),
    "twice an input": (lambda p: p.graph.input.append(p.graph.input[0]), "'x' is defined twice"),
    "arity": (lambda p: p.graph.node[0].input.append("b"), "not a valid ONNX model"),
    "negative dim": (lambda p: _big_dims(p, -8), "at least 0"),
    "huge dims": (lambda p: _big_dims(p, 1 << 40, 1 << 40), "more than"),
    "hidden huge": (lambda p: _big_dims(p, 1 << 62, 0), "more than"),
    "declared, absent": (lambda p: _big_dims(p, 1 << 33), "needs 8589934592 .* has 0"),
    "dtype": (lambda p: _set(p.graph.initializer[0], data_type=77), "unknown dtype number 77"),
    "value dtype": (lambda p: _set(p.graph.input[0].type.tensor_type, elem_type=77), "77"),
    "deep": (lambda p: _nest(p, 40), "nested more than 32 deep; limit 32"),
    "long name": (lambda p: _set(p.graph.node[0], name="n" * 70000), "70000 characters; limit 65536"),
    "segment": (lambda p: p.graph.initializer[0].segment.SetInParent(), "segments"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_models(name: str) -> None:
    change, match = DAMAGED[name]
    proto = edited(change)
    refused(proto, match)
    refused(proto.SerializeToString(), match)


def test_a_cycle_is_refused() -> None:
    proto = plain()
    proto.graph.node[0].input[1] = "y"
    refused(proto, "cycle")


def test_recursive_and_exploding_functions_are_refused() -> None:
    recursive = RICH.replace("r = Mul (a, f)", "g = Mul (a, f) r = local.scale <alpha = 1.0> (g)")
    refused(onnx.parser.parse_model(recursive), "calls itself")
    proto = rich()
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    for level in range(30):
        inner = f"f{level - 1}" if level else "scale"
        nodes = [helper.make_node(inner, [a], [b], domain="local") for a, b in (("a", "m"), ("m", "r"))]
        proto.functions.append(helper.make_function("local", f"f{level}", ["a"], ["r"], nodes, imports))
    refused(proto, "10000000 nodes once functions are inlined")


def test_limits_on_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_checks, "MAX_NODES", 1)
    refused(plain(), "more than 1 nodes")


UNSAFE: dict[str, tuple[dict[str, str | int | None], str]] = {
    "absolute": ({"location": "/etc/passwd"}, "absolute"),
    "parent": ({"location": "../w.bin"}, r"'\.\.'"),
    "hidden parent": ({"location": "a/../../w.bin"}, r"'\.\.'"),
    "windows": ({"location": "..\\w.bin"}, "Windows"),
    "empty": ({"location": ""}, "empty location"),
    "negative offset": ({"offset": -1}, "offset '-1'"),
    "hex offset": ({"offset": "0x10"}, "offset '0x10'"),
    "float length": ({"length": "1e3"}, "length '1e3'"),
    "huge offset": ({"offset": "9" * 25}, "offset"),
    "unicode digits": ({"offset": "٣"}, "offset"),
    "no location": ({"location": None}, "names no file"),
    "missing": ({"location": "x.bin"}, "does not exist"),
    "length": ({"length": 255}, "external length 255 bytes, but FLOAT of shape .* is 256"),
    "long": ({"length": 1 << 40}, "is 256"),
    "past the end": ({"offset": 65}, "has 320 bytes; bytes 65 to 321 are needed"),
    "far past the end": ({"offset": 1 << 60}, "has 320 bytes"),
    "folder": ({"location": "dir"}, "folder"),
    "symlink": ({"location": "link"}, "link"),
    "hard link": ({"location": "hard"}, "hard links"),
    "pipe": ({"location": "pipe"}, "pipe"),
    "through a link": ({"location": "up/m/w.bin"}, "link"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_external_data(name: str, tmp_path: Path) -> None:
    changes, match = UNSAFE[name]
    folder = tmp_path / "m"
    (folder / "dir").mkdir(parents=True)
    path = external_folder(folder, **changes)
    (folder / "link").symlink_to("w.bin")
    (tmp_path / "secret").write_bytes(bytes(320))
    os.link(tmp_path / "secret", folder / "hard")
    (folder / "up").symlink_to("..")
    os.mkfifo(folder / "pipe")
    refused(path, match)
    refused(ir.load(path), match) if changes.get("location") else None
    refused(external(**changes), match, base_dir=folder)


def test_truncated_external_data_states_both_sizes(tmp_path: Path) -> None:
    path = external_folder(tmp_path)
    os.truncate(tmp_path / "w.bin", 100)
    refused(path, "tensor 'w'.*has 100 bytes; bytes 64 to 320 are needed")
    (tmp_path / "w.bin").unlink()
    refused(path, "tensor 'w'.*does not exist")


def test_external_data_in_attributes_and_subgraphs_is_confined_too(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    for location, ok in (("w.bin", True), ("../w.bin", False)):
        tensor = TensorProto(name="k", data_type=1, dims=[8], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
        constant, initializer, function = rich(), rich(), rich()
        constant.graph.node[0].attribute[0].t.CopyFrom(tensor)
        branches = [a.g for a in initializer.graph.node[2].attribute if a.name == "then_branch"]
        branches[0].initializer.append(tensor)
        function.functions[0].node.append(helper.make_node("Constant", [], ["q"], value=tensor))
        for proto in (constant, initializer, function):
            if ok:
                whole(load_onnx(proto, base_dir=tmp_path))
            else:
                refused(proto, r"\.\.", UnsafeModelError, base_dir=tmp_path)


def test_warnings_of_the_ir_library_do_not_reach_the_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnx_ir", "onnx_ir.serde"):  # whatever another test of this process did to them
        monkeypatch.setattr(logging.getLogger(name), "disabled", False)
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        caplog.set_level(logging.WARNING, logger=name)
    proto = plain()
    proto.graph.node.append(helper.make_node("Gelu", ["h"], ["g"], name="g", domain="com.microsoft", mode=b"\xff\xfe"))
    ir.from_proto(proto)
    assert "invalid UTF-8" in caplog.text
    caplog.clear()
    try:
        load_onnx(proto)
    except InputError as error:
        assert "\n" not in str(error)
    assert not caplog.text
    ir.from_proto(proto)
    assert "invalid UTF-8" in caplog.text
