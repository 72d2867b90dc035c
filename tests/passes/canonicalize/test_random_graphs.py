"""Random graphs of elementwise, shape and layout operators: every canonicalizing pass keeps every bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planish.ir.infer import infer_shapes
from planish.ir.names import ensure_names
from planish.passes import registry
from planish.passes.defaults import CLEAN
from tests.passes.canonicalize.canonical_support import assert_same, run_pass

PASSES = ("infer-shapes", *CLEAN)
UNARY = ("Neg", "Abs", "Relu", "Identity", "Floor")
BINARY = ("Add", "Sub", "Mul", "Max")


class Builder:
    """Grows a graph over values of rank 3, batch and length symbolic, next to its shape in numpy."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.x = ir.val("x", ir.DataType.FLOAT, ["B", "S", 4])
        # Value and the order of (batch, length, width) in its axes.
        self.values: list[tuple[ir.Value, tuple[int, ...]]] = [(self.x, (0, 1, 2))]

    def op(self, name: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        node = ir.node(name, list(inputs), attributes=attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def weight(self, items: object, dtype: type = np.int64) -> ir.Value:
        tensor = ir.tensor(np.array(items, dtype))
        if self.draw(st.booleans()):
            return self.op("Constant", value=tensor)
        value = ir.Value(name=f"w{len(self.weights)}", const_value=tensor, type=ir.TensorType(tensor.dtype))
        value.shape = ir.Shape(tensor.shape.numpy())
        self.weights.append(value)
        return value

    def step(self) -> None:
        value, order = self.draw(st.sampled_from(self.values))
        kind = self.draw(
            st.sampled_from(
                ["unary", "binary", "neutral", "transpose", "view", "heads", "slice", "cast", "concat", "constant"]
            )
        )
        result, order = getattr(self, kind)(value, order)
        self.values.append((result, order))

    def unary(self, v, order):
        return self.op(self.draw(st.sampled_from(UNARY)), v), order

    def binary(self, v, order):
        same = [w for w, o in self.values if o == order]
        return self.op(self.draw(st.sampled_from(BINARY)), v, self.draw(st.sampled_from(same))), order

    def neutral(self, v, order):
        name, element = self.draw(
            st.sampled_from([("Add", 0.0), ("Mul", 1.0), ("Div", 1.0), ("Sub", 0.0), ("Mul", 2.0)])
        )
        return self.op(
            name, v, self.weight(self.draw(st.sampled_from([element, [element], [[[element]]]])), np.float32)
        ), order

    def transpose(self, v, order):
        perm = self.draw(st.permutations([0, 1, 2]))
        return self.op("Transpose", v, perm=perm), tuple(order[i] for i in perm)

    def sizes(self, v, order):
        """The shape of `v` in one of the ways that exporters write it."""
        source = self.draw(st.sampled_from([v, *(w for w, o in self.values if o == order)]))
        parts = []
        for axis in range(3):
            way = self.draw(st.integers(0, 3))
            if way == 0:
                parts.append(self.op("Shape", source, start=axis, end=axis + 1))
            elif way == 1:
                scalar = self.op("Gather", self.op("Shape", source), self.weight(axis))
                parts.append(self.op("Unsqueeze", scalar, self.weight([0])))
            elif way == 2:
                shape = self.op("Shape", source)
                parts.append(self.op("Slice", shape, self.weight([axis]), self.weight([axis + 1])))
            else:
                scalar = self.op("Squeeze", self.op("Shape", source, start=axis, end=axis + 1), self.weight([0]))
                one = self.op("Mul", scalar, self.weight(1))
                parts.append(self.op("Reshape", one, self.weight([1])))
        return parts

    def view(self, v, order):
        target = self.op("Concat", *self.sizes(v, order), axis=0)
        if self.draw(st.booleans()):
            return self.op("Reshape", v, target, allowzero=1), order
        return self.op("Expand", v, target), order

    def heads(self, v, order):
        if order[2] != 2:
            return self.op("Identity", v), order
        a, b, c = self.sizes(v, order)
        split = self.op("Concat", a, b, self.weight([2]), self.weight([2]), axis=0)
        wide = self.op("Relu", self.op("Reshape", v, split, allowzero=1))
        return self.op("Reshape", wide, self.op("Concat", a, b, c, axis=0), allowzero=1), order

    def slice(self, v, order):
        big = np.iinfo(np.int64).max
        return self.op(
            "Slice", v, self.weight([0]), self.weight([big]), self.weight([self.draw(st.integers(0, 2))])
        ), order

    def cast(self, v, order):
        through = self.draw(st.sampled_from([1, 11]))
        return self.op("Cast", self.op("Cast", v, to=through), to=1), order

    def concat(self, v, order):
        return self.op("Concat", v, axis=self.draw(st.integers(0, 2))), order

    def constant(self, v, order):
        a = self.op("Cast", self.op("Div", self.weight([7, -7, 9]), self.weight([2])), to=1)
        total = self.op(
            "ReduceMax", self.op("Transpose", self.op("Reshape", a, self.weight([1, 3])), perm=[1, 0]), keepdims=0
        )
        return self.op("Add", v, total), order


@st.composite
def models(draw: st.DrawFn) -> ir.Model:
    builder = Builder(draw)
    for _ in range(draw(st.integers(1, 7))):
        builder.step()
    outputs = []
    count = draw(st.integers(1, 2))
    for index, (value, order) in enumerate(builder.values[-count:]):
        if value is builder.x or draw(st.booleans()):
            value = builder.op("Identity", value)
        if value in outputs:
            continue
        value.name, value.type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape([["B", "S", 4][i] for i in order])
        outputs.append(value)
    graph = ir.Graph(
        [builder.x], outputs, nodes=builder.nodes, initializers=builder.weights, opset_imports={"": 23}, name="random"
    )
    model = ir.Model(graph, ir_version=10)
    ensure_names(model)
    infer_shapes(model)
    return model


@given(models(), st.permutations(PASSES), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_pass_keeps_every_bit(model, order, seed):
    rng = np.random.default_rng(seed)
    feeds = [{"x": rng.normal(size=(b, s, 4)).astype(np.float32)} for b, s in ((2, 3), (0, 2), (1, 1), (3, 0))]
    before = model.clone()
    for name in order:
        run_pass(registry.get(name)(), model)
        assert [v.name for v in model.graph.outputs] == [v.name for v in before.graph.outputs]
    assert_same(before, model, *feeds)
