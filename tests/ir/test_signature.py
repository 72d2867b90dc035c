from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.errors import InputError
from planish.ir.program import TensorSpec
from planish.ir.signature import as_batches, check_inputs

SPECS = [
    TensorSpec("ids", ir.DataType.INT64, ("batch", "seq")),
    TensorSpec("mask", ir.DataType.FLOAT, ("batch", "seq")),
    TensorSpec("table", ir.DataType.FLOAT, (3, None)),
]


def inputs(**changed: Any) -> dict[str, Any]:
    good = {"ids": np.zeros((2, 5), np.int64), "mask": np.zeros((2, 5), np.float32), "table": np.zeros((3, 7), "f")}
    return {name: value for name, value in (good | changed).items() if value is not None}


def test_good_inputs_pass() -> None:
    check_inputs(SPECS, inputs())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"idz": np.zeros(1)}, "no input is named 'idz'. Did you mean 'ids'?"),
        ({"mask": None}, "input 'mask' is missing. Inputs: ids: int64[batch, seq]"),
        ({"ids": np.zeros((2, 5), np.int32)}, "input 'ids' is int32, expected ids: int64[batch, seq]; convert it"),
        ({"ids": np.zeros(5, np.int64)}, "input 'ids' has 1 dimensions [5], expected ids: int64[batch, seq]"),
        ({"table": np.zeros((4, 7), "f")}, "input 'table' has size 4 in dimension 0, expected 3"),
        ({"mask": np.zeros((2, 6), "f")}, "input 'mask' has seq=6 in dimension 1, but 'ids' has seq=5"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_inputs(SPECS, inputs(**changed))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


RANGED = [
    TensorSpec("ids", ir.DataType.INT64, ("batch", "seq"), (None, (1, 512))),
    TensorSpec("image", ir.DataType.FLOAT, ("batch", None), (None, (32, None))),
]


@pytest.mark.parametrize("seq", [1, 512])
def test_the_ends_of_a_range_are_taken(seq: int) -> None:
    check_inputs(RANGED, {"ids": np.zeros((0, seq), np.int64), "image": np.zeros((0, 32), "f")})


@pytest.mark.parametrize(
    ("ids", "image", "message"),
    [
        ((2, 600), (2, 32), "input 'ids' has seq=600 in dimension 1; the captured model takes 1 to 512 there: give"),
        ((2, 0), (2, 32), "input 'ids' has seq=0 in dimension 1; the captured model takes 1 to 512 there: give"),
        ((2, 5), (2, 31), "input 'image' has size 31 in dimension 1; the captured model takes 32 or more there: give"),
    ],
)
def test_a_size_outside_its_range_is_named(ids: tuple[int, ...], image: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_inputs(RANGED, {"ids": np.zeros(ids, np.int64), "image": np.zeros(image, "f")})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="calibration batch 0: input"):
        as_batches({"ids": np.zeros(ids, np.int64), "image": np.zeros(image, "f")}, RANGED)


def test_batches_of_every_form() -> None:
    one = inputs()
    for data in (one, [one], tuple(one.values()), [tuple(one.values())], list(one.values())):
        batches = as_batches(data, SPECS)
        assert len(batches) == 1
        assert list(batches[0]) == ["ids", "mask", "table"]
    assert len(as_batches([one, one], SPECS)) == 2
    assert len(as_batches(np.zeros((2, 5), np.int64), SPECS[:1])) == 1
    assert len(as_batches([np.zeros((2, 5), np.int64)] * 3, SPECS[:1])) == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no batch"),
        ((np.zeros(1),), "a batch has 1 inputs, expected 3"),
        ([inputs(), inputs(mask=None)], "calibration batch 1: input 'mask' is missing"),
        (inputs(ids=object()), "object does not convert to a numpy array"),
    ],
)
def test_bad_calibration_is_one_clear_line(data: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        as_batches(data, SPECS)
    assert message in str(caught.value)
