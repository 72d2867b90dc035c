from __future__ import annotations

import json
from typing import Any

import onnx_ir as ir
import pytest

from planish.ir.inputs import synthesize
from planish.ir.program import Program
from planish.ir.spec import ElementType, TensorSpec

SPECS = [
    TensorSpec("ids", ElementType.INT64, ("b", "s", None, 3), (None, (1, 512), (8, None), None)),
    TensorSpec("x", ElementType.FLOAT, ("b",)),
    TensorSpec("sequence", None, None),
]


def value(**metadata: str) -> ir.Value:
    dims = ir.Shape(["b", "s", 4])
    named = ir.Value(name="x", shape=dims, type=ir.TensorType(ir.DataType.FLOAT))
    named.metadata_props.update({f"planish.range.{key[1:]}": text for key, text in metadata.items()})
    return named


@pytest.mark.parametrize("spec", SPECS)
def test_round_trip(spec: TensorSpec) -> None:
    data = json.loads(json.dumps(spec.to_dict()))
    assert TensorSpec.from_dict(data) == spec
    assert ("ranges" in data) == (spec.ranges is not None)  # what has none is written as before there were any


@pytest.mark.parametrize(
    "ranges",
    [5, "ab", [], [None], [[1, 2], None], [[2, 1]] * 4, [[-1, 2]] * 4, [[1]] * 4, [[1.0, 2]] * 4, [[True, 2]] * 4],
)
def test_ranges_that_are_none(ranges: Any) -> None:
    with pytest.raises(ValueError, match="ranges of 'ids'"):
        TensorSpec.from_dict(SPECS[0].to_dict() | {"ranges": ranges})


@pytest.mark.parametrize(
    ("metadata", "ranges"),
    [
        ({}, None),
        ({"_1": "1..512"}, (None, (1, 512), None)),
        ({"_0": "32.."}, ((32, None), None, None)),
        ({"_0": "3..3", "_1": "0..1"}, ((3, 3), (0, 1), None)),
        ({"_2": "1..2"}, None),  # the size is fixed
        ({"_7": "1..2"}, None),
        *(({"_1": text}, None) for text in ("5..1", "..5", "1...5", "-1..5", "1..x", "", "9" * 5000 + "..", "٣..٥")),
    ],
)
def test_ranges_are_read_off_metadata(metadata: dict[str, str], ranges: Any) -> None:
    assert TensorSpec.of(value(**metadata)).ranges == ranges


@pytest.mark.parametrize(("spans", "sizes"), [({"0": "3..4", "1": "20..30"}, (3, 20)), ({"1": "1..5"}, (2, 5))])
def test_made_up_inputs_keep_to_the_ranges(spans: dict[str, str], sizes: tuple[int, int]) -> None:
    x, other = (
        ir.Value(name=name, shape=ir.Shape(["batch", "seq"]), type=ir.TensorType(ir.DataType.FLOAT))
        for name in ("x", "other")
    )
    other.metadata_props.update({f"planish.range.{axis}": text for axis, text in spans.items()})
    node = ir.node("Add", [x, other])
    graph = ir.Graph([x, other], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    batch = synthesize(Program.single(ir.Model(graph, ir_version=10)))
    assert batch["x"].shape == batch["other"].shape == sizes
