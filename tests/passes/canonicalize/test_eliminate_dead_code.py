"""Dead nodes, weights, functions and optional outputs go; what something reads stays."""

from __future__ import annotations

import sys

import numpy as np
import onnx_ir as ir

from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.canonicalize.eliminate_dead_code import EliminateDeadCode
from tests.passes.canonicalize.canonical_support import assert_same, interface, model_of, ops, run_pass

DCE = EliminateDeadCode()


def test_dead_chains_and_weights_go():
    model = model_of("""agraph (float[2] x, float[2] unused) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}>
    { s = Add(x, a)  t = Add(s, b)  u = Neg(t)  y = Relu(x) }""")
    assert run_pass(DCE, model).fired == 5
    assert (ops(model), interface(model)) == (["Relu"], (["x", "unused"], ["y"]))
    assert not model.graph.initializers


def test_optional_outputs():
    model = model_of("""agraph (float[2,4] x) => (float[2,4] y, float[2,1] keep) <float[4] s = {1, 1, 1, 1}>
    { a, mean, inv = LayerNormalization(x, s)  y, m2, keep = LayerNormalization(a, s)
      d, mask = Dropout(a) e = Neg(d) }""")
    assert run_pass(DCE, model).fired == 5
    assert [[v.name for v in n.outputs] for n in model.graph] == [["a"], ["y", "", "keep"]]


def test_required_outputs_stay():
    model = model_of(
        """agraph (float[4] x) => (float[2] a) <int64[2] n = {2, 2}>
    { a, b = Split(x, n)  v, i = TopK(x, k)  w = Neg(v) }""".replace("TopK(x, k)", "TopK(x, two)").replace(
            "{2, 2}>", "{2, 2}, int64[1] two = {2}>"
        )
    )
    assert run_pass(DCE, model).fired == 3
    assert [len(n.outputs) for n in model.graph] == [2]


def test_what_only_a_subgraph_reads_is_alive():
    model = model_of("""agraph (bool c, float[1] x) => (float[1] y) <float[1] w = {2}, float[1] v = {3}>
    { h = Neg(x)  dead = Abs(x)
      y = If(c) <then_branch = g1 () => (float[1] o) { d = Mul(dead, v)  o = Mul(h, w) },
                 else_branch = g2 () => (float[1] o) { o = Identity(x) }> }""")
    before = model.clone()
    assert run_pass(DCE, model).fired == 3  # d inside, then its operands outside
    assert ops(model) == ["Neg", "If"] and list(model.graph.initializers) == ["w"]
    x = np.ones(1, np.float32)
    assert_same(before, model, {"c": np.array(True), "x": x}, {"c": np.array(False), "x": x})


def test_a_dead_control_flow_node_releases_what_it_captured():
    model = model_of("""agraph (bool c, float[1] x) => (float[1] y)
    { h = Neg(x)
      z = If(c) <then_branch = g1 () => (float[1] o) { o = Neg(h) },
                 else_branch = g2 () => (float[1] o) { o = Abs(h) }>
      y = Relu(x) }""")
    assert run_pass(DCE, model).fired == 2
    assert ops(model) == ["Relu"]


def test_functions_that_nothing_calls():
    model = model_of(
        """<ir_version: 10, opset_import: ["" : 23, "f" : 1]>
    agraph (float[1] x) => (float[1] y) { y = f.outer(x) }
    <domain: "f", opset_import: ["" : 23, "f" : 1]> outer (a) => (b) { b = f.inner(a) }
    <domain: "f", opset_import: ["" : 23]> inner (a) => (b) { b = Neg(a) }
    <domain: "f", opset_import: ["" : 23]> unused (a) => (b) { b = Abs(a) }""",
        header="",
    )
    assert run_pass(DCE, model).fired == 1
    assert sorted(f.name for f in model.functions.values()) == ["inner", "outer"]


def test_linear_in_the_size_of_the_graph():
    """Calls of functions are counted, not seconds, so that other work on the machine does not matter."""

    def calls_per_node(count: int) -> float:
        x = ir.val("x", ir.DataType.FLOAT, [1])
        nodes = [ir.node("Neg", [x], name="n0")]
        for i in range(1, count):
            nodes.append(ir.node("Neg", [nodes[-1].outputs[0]], name=f"n{i}"))
        last = ir.node("Relu", [x], name="last")
        for i, node in enumerate([*nodes, last]):
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"v{i}", x.type, x.shape
        graph = ir.Graph([x], last.outputs, nodes=[*nodes, last], opset_imports={"": 23}, name="g")
        model = ir.Model(graph, ir_version=10)
        calls = 0

        def counted(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        program = Program.single(model)
        sys.setprofile(counted)
        try:
            result = DCE.apply(program, PassContext())
        finally:
            sys.setprofile(None)
        assert result.fired == count
        return calls / count

    assert calls_per_node(4000) < 1.1 * calls_per_node(500)
