from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import apply_pass, check_declines, check_numerics, check_untouched, program_of


def model(body: str, *, up: str = "[B, S, 6]", extra: str = "", imports: str = "") -> str:
    return f"""
    <ir_version: 10, opset_import: ["" : 23{imports}]>
    f (float[B, S, 6] gate, float{up} up) => (float[B, S, 6] y{extra})
    {{ {body} }}
    """


ORDERS = [
    "s = Sigmoid(gate)\n a = Mul(gate, s)\n y = Mul(a, up)",
    "s = Sigmoid(gate)\n a = Mul(s, gate)\n y = Mul(up, a)",
]


@pytest.mark.parametrize("size", [(1, 1, 6), (3, 5, 6)])
@pytest.mark.parametrize("order", ORDERS)
def test_gate_becomes_one_operator(order: str, size: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    inputs = {k: (4 * rng.standard_normal(size)).astype(np.float32) for k in ("gate", "up")}
    program = check_numerics("fuse-swiglu", model(order), inputs)
    nodes = list(program.main.graph)
    assert [(n.domain, n.op_type) for n in nodes] == [("planish", "SwiGLU")]
    assert [v.name for v in nodes[0].inputs] == ["gate", "up"]
    assert [f.name for f in program.main.functions.values()] == ["SwiGLU"]
    assert not apply_pass("fuse-swiglu", program).modified


def test_body_keeps_the_fusion_of_the_runtime() -> None:
    import onnx_ir as ir
    import onnxruntime

    program = program_of(model(ORDERS[0]))
    apply_pass("fuse-swiglu", program)
    proto = ir.to_proto(program.main).SerializeToString()
    events = _operators_run(onnxruntime, proto)
    assert "QuickGelu" in events and "Sigmoid" not in events


def _operators_run(onnxruntime: object, proto: bytes) -> set[str]:
    import json
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()  # type: ignore[attr-defined]
        options.enable_profiling, options.profile_file_prefix = True, os.path.join(folder, "profile")
        session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])  # type: ignore[attr-defined]
        x = np.ones((2, 3, 6), np.float32)
        session.run(None, {"gate": x, "up": x})
        with open(session.end_profiling()) as file:
            events = json.load(file)
    return {e["args"]["op_name"] for e in events if "op_name" in e.get("args", {})}


DECLINES = {
    "does not broadcast": model(ORDERS[0], up="[B, S, 1]"),
    "not proved to have one shape": model(ORDERS[0], up="[N, S, 6]"),
    "'a'": model(ORDERS[0], extra=", float[B, S, 6] a"),
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    check_declines("fuse-swiglu", DECLINES[reason], reason.strip("'"))


def test_another_sigmoid_is_none() -> None:
    check_untouched("fuse-swiglu", model("s = Sigmoid(up)\n a = Mul(gate, s)\n y = Mul(a, gate)"))
