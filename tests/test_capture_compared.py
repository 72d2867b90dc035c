"""On which machine a captured program is compared with its module."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from planish.driver import _compare
from planish.ir.errors import InputError
from planish.ir.target import Target


@pytest.mark.parametrize("target, ran", [("ort-cuda", True), ("ort-cpu", False)])
def test_what_a_gpu_can_not_run_is_compared_on_the_cpu(target, ran):
    seen = []

    def compare(bench):
        seen.append(bench.target.device)
        if len(seen) == 1:
            raise InputError("it fails") from RuntimeError("no kernel")

    bench = SimpleNamespace(target=Target.parse(target), calibration=None)
    if ran:
        _compare(compare, bench)
        assert seen == ["cuda", "cpu"]
    else:
        with pytest.raises(InputError, match="it fails"):
            _compare(compare, bench)
        assert seen == ["cpu"]


def test_what_differs_is_not_compared_again():
    seen = []

    def compare(bench):
        seen.append(bench)
        raise InputError("it differs")

    with pytest.raises(InputError, match="it differs"):
        _compare(compare, SimpleNamespace(target=Target.parse("ort-cuda"), calibration=None))
    assert len(seen) == 1
