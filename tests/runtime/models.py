"""Small models for the tests of the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from planish.ir.program import Calibration, Program
from planish.runtime import artifact_writer
from planish.runtime.artifact import read_manifest
from planish.runtime.executable import Executable
from planish.runtime.manifest import NAME
from planish.runtime.ort import OrtRunner, compile_ort

ONE_THREAD = "ort-cpu:threads=1"


def model(text: str, weights: dict[str, np.ndarray] | None = None) -> ir.Model:
    """A model from ONNX text; `weights` become initializers."""
    proto = onnx.parser.parse_model(text)
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def two_layers(seed: int = 0) -> Program:
    """y = relu(x w1) w2 and e = table[ids]; batch `b`, length `s`; one calibration batch."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((16, 64)).astype(np.float32),
        "w2": rng.standard_normal((64, 8)).astype(np.float32),
        "table": rng.standard_normal((100, 8)).astype(np.float32),
    }
    text = """<ir_version: 10, opset_import: ["" : 20]>
    two_layers (float[b, 16] x, int64[b, s] ids) => (float[b, 8] y, float[b, s, 8] e) {
      h = MatMul(x, w1)
      r = Relu(h)
      y = MatMul(r, w2)
      e = Gather(table, ids)
    }"""
    program = Program.single(model(text, weights), ONE_THREAD, source="test")
    inputs = {"x": rng.standard_normal((3, 16)).astype(np.float32), "ids": rng.integers(0, 100, (3, 5))}
    program.calibration = Calibration([inputs])
    return program


def limited() -> Program:
    """y = 2 x for x of shape [batch, seq], with 1 to 16 in dimension 1."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    limited (float[batch, seq] x) => (float[batch, seq] y) { y = Add(x, x) }"""
    program = Program.single(model(text), ONE_THREAD)
    program.main.graph.inputs[0].metadata_props["planish.range.1"] = "1..16"
    return program


def executable(program: Program | None = None) -> Executable:
    program = program or two_layers()
    runners = {name: compile_ort(item, program.target) for name, item in program.entries.items()}
    return Executable(program, runners, pipeline="fuse-gelu")


def identity(kind: str, shape: str = "[n]", op: str = "Identity", opset: int = 23) -> OrtRunner:
    """A runner of y = op(x)."""
    text = f'<ir_version: 11, opset_import: ["" : {opset}]> g ({kind}{shape} x) => ({kind}{shape} y) {{ y = {op}(x) }}'
    return compile_ort(model(text), Program.single(model(text), ONE_THREAD).target)


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def reseal(path: Path, **changed: Any) -> None:
    """Makes the manifest fit the files again: what an author of a hostile artifact would do."""
    manifest = read_manifest(path)
    for name in list(manifest.files):
        digest = artifact_writer._Files(path)
        if (path / name).is_file():
            digest.add(name)
            manifest.files[name] = digest.written[name]
    for key, value in changed.items():
        setattr(manifest, key, value)
    (path / NAME).write_bytes(manifest.to_bytes())
