"""What the tests of the command line share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

GELU = """<ir_version: 10, opset_import: ["" : 23]>
g (float[batch, 8] x) => (float[batch, 8] y)
<float[8] scale = {1, 2, 3, 4, 5, 6, 7, 8}, float root = {1.4142135}, float one = {1}, float half = {0.5}>
{
  a = Mul(x, scale)
  i = Identity(a)
  d = Div(i, root)
  e = Erf(d)
  s = Add(e, one)
  m = Mul(i, s)
  y = Mul(m, half)
}"""


def save(path: Path, text: str = GELU) -> Path:
    path.write_bytes(ir.to_proto(ir.from_onnx_text(text)).SerializeToString())
    return path


def as_json(out: str) -> dict[str, Any]:
    """Stdout must be one strict JSON object and nothing else."""
    found: dict[str, Any] = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert found["schema"] == 1
    return found


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}
