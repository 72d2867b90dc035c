from __future__ import annotations

import numpy as np
import pytest

from planish.ir.infer import infer_shapes
from planish.ir.ops import import_functions
from planish.ir.program import Program
from planish.passes.testing import check_declines, check_numerics, check_rewrite, check_untouched, program_of

KERNELS = "ort-cpu:kernels"
PASS = "lower-normalization"
WEIGHTS = "<float[6] g = {1.0, 0.5, -1.0, 2.0, 0.0, 1.5}, float[6] b = {0.1, -0.2, 0.0, 0.3, 0.4, -1.0}>"


def model(body: str, *, inputs: str = "float[B, S, 6] x, float[B, S, 6] r", outputs: str = "float[B, S, 6] y") -> str:
    return f"""
    <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
    f ({inputs}) => ({outputs}) {WEIGHTS} {{ {body} }}
    """


def with_kernels(body: str, **more: str) -> Program:
    """The program of a body for a target with kernels; the functions of the dialect come along."""
    program = program_of(model(body, **more), KERNELS)
    if "planish." in body:
        import_functions(program.main)
        infer_shapes(program.main)
    else:
        del program.main.graph.opset_imports["planish"]
    return program


def feed(batch: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch * 7 + length)
    return {name: rng.standard_normal((batch, length, 6)).astype(np.float32) for name in "xr"}


LAYER = "LayerNormalization<axis = -1, epsilon = 0.001>(x, g, b)"
RMS = "RMSNormalization<axis = -1, epsilon = 0.001>(x, g)"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"y = {LAYER}", "y = planish.LayerNorm<epsilon = 0.001>(x, g, b)"),
        (f"y = {RMS}", "y = planish.RMSNorm<epsilon = 0.001>(x, g)"),
        ("y = LayerNormalization(x, g, b)", "y = planish.LayerNorm<epsilon = 0.00001>(x, g, b)"),
        ("y = LayerNormalization<axis = 2>(x, g, b)", "y = planish.LayerNorm<epsilon = 0.00001>(x, g, b)"),
        (
            f"t = Add(x, r) y = {LAYER.replace('(x', '(t')}",
            "y, t = planish.AddLayerNormalization<epsilon = 0.001>(x, r, g, b)",
        ),
        (
            f"t = Add(x, r) y = {RMS.replace('(x', '(t')}",
            "y, t = planish.AddRMSNormalization<epsilon = 0.001>(x, r, g)",
        ),
    ],
)
def test_before_and_after(before: str, after: str) -> None:
    check_rewrite(PASS, with_kernels(before), with_kernels(after), edits=1)


def test_the_sum_is_the_residual_of_what_follows() -> None:
    before = f"t = Add(x, r) n = {LAYER.replace('(x', '(t')} y = Add(n, t)"
    after = "n, t = planish.AddLayerNormalization<epsilon = 0.001>(x, r, g, b) y = Add(n, t)"
    check_rewrite(PASS, with_kernels(before), with_kernels(after), edits=1)


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (3, 5)])
@pytest.mark.parametrize("form", [f"y = {LAYER}", f"t = Add(x, r) n = {RMS.replace('(x', '(t')} y = Mul(n, t)"])
def test_numerics(form: str, size: tuple[int, int]) -> None:
    check_numerics(PASS, with_kernels(form), feed(*size))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"y = {LAYER.replace('axis = -1', 'axis = 1')}", "it normalizes from axis 1 of rank 3 on"),
        (f"y, m = {LAYER} z = Mul(m, m)", "its mean or deviation is used"),
    ],
)
def test_declined(body: str, reason: str) -> None:
    outputs = "float[B, S, 6] y" + (", float[B, S, 1] z" if "z =" in body else "")
    check_declines(PASS, with_kernels(body, outputs=outputs), reason)


def test_summands_that_broadcast_stay_outside() -> None:
    before = f"t = Add(x, g) y = {LAYER.replace('(x', '(t')}"
    after = "t = Add(x, g) y = planish.LayerNorm<epsilon = 0.001>(t, g, b)"
    check_rewrite(PASS, with_kernels(before), with_kernels(after), edits=1)


def test_a_target_without_kernels() -> None:
    check_declines(PASS, model(f"y = {LAYER}"), "target 'ort-cpu' has no generated kernels; 'ort-cpu:kernels' has")


def test_without_bias_nothing_matches() -> None:
    check_untouched(PASS, with_kernels("y = LayerNormalization(x, g)"))
