"""Random graphs under random rules: valid, equal in numbers, and never without an end."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planish.ir.compare import compare_outputs
from planish.ir.program import Program
from planish.passes.rewrite import RewritePass, Rule
from planish.passes.testing import apply_pass, run_reference

UNARY = ("Neg", "Abs", "Relu", "Identity")
BINARY = ("Add", "Mul", "Max", "Sub")

RULES = {
    "neg-neg": Rule("neg-neg", lambda op, x: op.Neg(op.Neg(x)), lambda op, x: x),
    "identity": Rule("identity", lambda op, x: op.Identity(x), lambda op, x: x),
    "abs-neg": Rule("abs-neg", lambda op, x: op.Abs(op.Neg(x)), lambda op, x: op.Abs(x)),
    "relu-relu": Rule("relu-relu", lambda op, x: op.Relu(op.Relu(x)), lambda op, x: op.Relu(x)),
    "sub": Rule("sub", lambda op, x, y: op.Sub(x, y), lambda op, x, y: op.Add(x, op.Neg(y))),
    "add-neg": Rule("add-neg", lambda op, x, y: op.Add(op.Neg(x), op.Neg(y)), lambda op, x, y: op.Neg(op.Add(x, y))),
    "keep": Rule(
        "keep", lambda op, x: op.Relu(op.Abs(x)), lambda op, x: op.Abs(x), remove_nodes=False
    ),
    "factor": Rule(
        "factor", lambda op, a, b, c: op.Add(op.Mul(a, b), op.Mul(a, c)), lambda op, a, b, c: op.Mul(a, op.Add(b, c))
    ),
    "two": Rule(
        "two",
        lambda op, a, b: (op.Max(a, b), op.Sub(a, b)),
        lambda op, a, b: (op.Max(b, a), op.Add(a, op.Neg(b))),
    ),
    "constant": Rule("constant", lambda op, x: op.Mul(x, x), lambda op, x: op.Pow(x, np.float32(2))),
}  # fmt: skip


@st.composite
def graphs(draw: st.DrawFn) -> ir.Model:
    kind = ir.TensorType(ir.DataType.FLOAT)
    inputs = [ir.Value(name=n, type=kind, shape=ir.Shape([2, 2])) for n in ("x", "y")]
    values: list[ir.Value] = list(inputs)
    nodes: list[ir.Node] = []
    for number in range(draw(st.integers(1, 14))):
        pick = st.integers(max(0, len(values) - 5), len(values) - 1)
        op = draw(st.sampled_from(UNARY + BINARY))
        node = ir.node(op, [values[draw(pick)] for _ in range(1 if op in UNARY else 2)], name=f"n{number}")
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"v{number}", kind, ir.Shape([2, 2])
        nodes.append(node)
        values.append(node.outputs[0])
    computed = values[2:]
    chosen = draw(st.lists(st.integers(0, len(computed) - 1), max_size=2, unique=True))
    outputs = [computed[-1], *(computed[i] for i in chosen if i != len(computed) - 1)]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs(), st.lists(st.sampled_from(sorted(RULES)), min_size=1, max_size=5, unique=True))
def test_random_rules_on_random_graphs(model: ir.Model, chosen: list[str]) -> None:
    class Some(RewritePass):
        name = "test-some"

        def rules(self) -> list[Rule]:
            return [RULES[name] for name in chosen]

    program = Program.single(model)
    before = program.clone()
    names = [v.name for v in program.main.graph.outputs]
    apply_pass(Some(), program)  # verified in full, and its hash compared
    assert [v.name for v in program.main.graph.outputs] == names
    feeds: dict[str, Any] = {
        "x": np.float32([[1.5, -2.0], [0.25, 3.0]]),
        "y": np.float32([[-0.5, 1.0], [2.0, -4.0]]),
    }
    error = compare_outputs(run_reference(before, feeds), run_reference(program, feeds))
    assert error.relative_l2 < 1e-5
    assert not apply_pass(Some(), program).modified, "a fixpoint is one"
