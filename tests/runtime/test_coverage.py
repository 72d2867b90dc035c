"""Coverage: which operators the target has kernels for."""

from __future__ import annotations

import onnx_ir as ir

from planish.ir.program import Program
from planish.runtime.coverage import ort_cpu_coverage


def program(body: str, extra: str = "") -> Program:
    text = f"""<ir_version: 10, opset_import: ["" : 23, "acme" : 1]>
g (float[2, 4] x) => (float[2, 4] y) {{ {body} }}{extra}"""
    return Program.single(ir.from_onnx_text(text))


def test_kernels_functions_and_what_is_missing() -> None:
    function = """
<domain: "acme", opset_import: ["" : 23]> Twice (a) => (b) { b = Add(a, a) }"""
    coverage = ort_cpu_coverage(program("a = Relu(x) b = acme.Twice(a) y = acme.Magic(b)", function))
    assert coverage is not None
    assert coverage.kernels == {"Relu": 1}
    assert coverage.functions == {"acme::Twice": 1}
    assert coverage.missing == {"acme::Magic": 1}
    assert abs(coverage.share - 1 / 3) < 1e-9
    assert coverage.to_dict()["missing"] == {"acme::Magic": 1}


def test_an_operator_with_a_body_in_the_standard_needs_no_kernel() -> None:
    coverage = ort_cpu_coverage(program("y = PRelu(x, x)"))
    assert coverage is not None and not coverage.missing
