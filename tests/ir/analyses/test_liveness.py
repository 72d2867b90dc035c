"""Liveness: intervals and the peak, by hand and against a simulation that frees after the last use."""

from __future__ import annotations

import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.analyses.liveness import Interval, liveness
from planish.ir.printer import parse_model
from planish.ir.program import Program

HEAD = '<ir_version: 10, opset_import: ["" : 23]>'


def test_intervals_and_peak() -> None:
    m = parse_model(
        f"""{HEAD}
        g (float[N, 10] x) => (float[N, 10] y) {{
          c = Constant <value_float = 1.0> ()
          [a] a = Neg (x)
          [wide] b = Concat <axis = 1> (a, a, x)
          [sum] s = ReduceSum <keepdims = 0> (b)
          [last] y = Add (a, s)
        }}
        """
    )
    live = liveness(Program.single(m), dims={"N": 1})
    assert live.intervals == {
        "x": Interval(0, 4, 40),
        "a": Interval(1, 4, 40),
        "b": Interval(2, 3, 120),
        "s": Interval(3, 3 + 1, 4),
        "y": Interval(4, 4, 40),
    }
    assert live.curve == [40, 80, 200, 204, 124]
    assert (live.peak_bytes, live.peak_node, live.unresolved) == (204, "sum", [])
    assert liveness(m, dims={"N": 10}).peak_bytes == 2004


def test_branches_add_their_own_peak_and_keep_what_they_read() -> None:
    m = parse_model(
        f"""{HEAD}
        g (bool flag, float[100] x) => (float[100] z) {{
          [a] a = Neg (x)
          [choose] y = If (flag) <
            then_branch = yes () => (float[100] p) {{ t = Exp (a)  p = Abs (t) }},
            else_branch = no () => (float[100] q) {{ q = Abs (x) }}
          >
          [z] z = Neg (y)
        }}
        """
    )
    live = liveness(m)
    assert live.intervals["a"] == Interval(0, 1, 400)
    # flag, x, a, y, and inside of the branch t and p
    assert live.curve == [1 + 800, 1 + 1200 + 800, 1 + 1200]
    assert live.peak_node == "choose"


def test_elementwise_nodes_write_over_what_nothing_reads_again() -> None:
    m = parse_model(
        f"""{HEAD}
        g (float[100] x) => (float[100] y) {{
          [a] a = Neg (x)
          [b] b = Exp (a)
          [c] c = Tanh (b)
          [d] d = Add (b, c)
          [y] y = Mul (d, x)
        }}
        """
    )
    live = liveness(m)
    # x is the caller's, b is read again by d, and y is an output; b takes the memory of a, and d that of b.
    assert live.shared == {"b": "a", "d": "b"}
    assert live.curve == [800, 800, 1200, 1200, 1200]
    assert live.intervals["a"] == Interval(0, 1, 400)


def test_views_take_no_memory_and_keep_that_of_their_operand() -> None:
    m = parse_model(
        f"""{HEAD}
        g (float[10, 10] x) => (float[10, 10] y) <int64[1] s = {{100}}, int64[2] t = {{10, 10}}> {{
          [a] a = Transpose (x)
          [v] v = Reshape (a, s)
          [b] b = Exp (x)
          [w] w = Reshape (v, t)
          [y] y = Sub (w, b)
        }}
        """
    )
    live = liveness(m)
    assert live.shared == {"v": "a", "w": "v"}
    assert live.curve == [800, 800, 1200, 1200, 1600]


def test_what_broadcasts_or_changes_its_size_is_not_written_over() -> None:
    m = parse_model(
        f"""{HEAD}
        g (float[10, 10] x, float[10] r) => (float[10, 10] y) {{
          [a] a = Neg (r)
          [b] b = Add (x, a)
          [c] c = Cast <to = 11> (b)
          [d] d = Cast <to = 1> (c)
          [y] y = Neg (d)
        }}
        """
    )
    assert liveness(m).shared == {}


def test_sizes_of_symbols_change_the_peak() -> None:
    m = parse_model(f"{HEAD}\ng (float[B, S] x) => (float[B, S] y) {{ a = Neg (x)  b = Exp (a)  y = Neg (b) }}")
    assert liveness(m, dims={"B": 2, "S": 8}).peak_bytes == 3 * 64
    assert liveness(m, dims={"B": 1, "S": 1}).peak_bytes == 3 * 4


def test_graph_without_nodes() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    m = ir.Model(ir.Graph([x], [x], nodes=[], opset_imports={"": 23}, name="g"), ir_version=10)
    assert (liveness(m).peak_bytes, liveness(m).curve) == (16, [])


def test_unresolved_values_count_as_nothing() -> None:
    m = parse_model(f"{HEAD}\ng (float[4] x) => (int64[1, n] y) {{ a = NonZero (x) y = Neg (a) }}")
    live = liveness(m)
    assert live.unresolved == ["a"]
    assert live.peak_bytes == 16


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_peak_equals_a_simulation(data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 9), label="x")]
    values = [ir.Value(name="v0", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([sizes[0]]))]
    nodes: list[ir.Node] = []
    reads: list[list[int]] = []
    for index in range(1, data.draw(st.integers(1, 8), label="nodes") + 1):
        operands = data.draw(st.lists(st.integers(0, index - 1), min_size=1, max_size=3), label="operands")
        output = ir.Value(name=f"v{index}")
        nodes.append(ir.node("Concat", [values[i] for i in operands], {"axis": 0}, name=f"n{index}", outputs=[output]))
        values.append(output)
        reads.append(operands)
        sizes.append(sum(sizes[i] for i in operands))
    kept = data.draw(st.sets(st.integers(1, len(nodes)), min_size=1), label="outputs")
    for i in kept:
        values[i].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([values[0]], [values[i] for i in sorted(kept)], nodes=nodes, opset_imports={"": 23}, name="g")
    live = liveness(ir.Model(graph, ir_version=10))

    held, curve = {0}, []
    for position in range(len(nodes)):
        held.add(position + 1)
        curve.append(4 * sum(sizes[i] for i in held))
        later = {i for operands in reads[position + 1 :] for i in operands}
        held = {i for i in held if i == 0 or i in kept or i in later}
    assert live.curve == curve
    assert live.peak_bytes == max(curve)
