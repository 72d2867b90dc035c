from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import planish
from planish.driver import resolve_pipeline
from planish.ir.errors import InputError
from planish.ir.target import IMPLEMENTED, Target
from planish.passes import registry
from planish.passes.base import ApproximatePass
from planish.passes.defaults import default_pipeline, with_approximate
from planish.passes.pipeline import parse_pipeline


@pytest.mark.parametrize("target", [*IMPLEMENTED, "ort-cpu:kernels"])
def test_without_approximate_passes_it_is_the_default(target):
    assert ",".join(map(str, with_approximate(target, []))) == default_pipeline(target)


def test_they_go_where_they_declare():
    given = "bf16,quantize-weights{bits=4},skip-layers{speedup=2.0}"
    names = [p.name for p in resolve_pipeline(None, Target.parse("ort-cpu:kernels"), given)]
    assert names.index("skip-layers") + 1 == names.index("quantize-weights")
    assert names.index("quantize-weights") + 1 == names.index("lower-linear")
    assert names[-1] == "bf16"
    assert [n for n in names if n not in ("bf16", "quantize-weights", "skip-layers")] == default_pipeline(
        "ort-cpu:kernels"
    ).split(",")


def test_every_approximate_pass_has_a_place():
    for name, cls in registry.known().items():
        if issubclass(cls, ApproximatePass) and cls.__module__.startswith("planish."):
            assert 0 < cls.order < 100, name


def test_exact_passes_and_both_are_refused():
    with pytest.raises(InputError, match="'fold-constants' is an exact pass"):
        resolve_pipeline(None, Target(), "fold-constants")
    with pytest.raises(InputError, match="approximate= goes with the target's exact passes"):
        resolve_pipeline("fold-constants", Target(), parse_pipeline("skip-layers{speedup=2.0}"))


def test_optimize_runs_them():
    weight = ir.tensor(np.random.default_rng(0).standard_normal((128, 64)).astype("f4"), name="w")
    text = """<ir_version: 10, opset_import: ["" : 23]> g (float[b, 128] x) => (float[b, 64] y) { y = MatMul(x, w) }"""
    model = ir.from_onnx_text(text, initializers=[weight])
    exe = planish.optimize(model, approximate="quantize-weights", budget=planish.Budget(gates=False))
    assert exe.report.after.ops == {"com.microsoft::MatMulNBits": 1}
    assert "quantize-weights" in exe.pipeline
