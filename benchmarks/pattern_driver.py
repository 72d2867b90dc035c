"""How the cost of the pattern driver grows: 1k to 64k nodes, with rules that fire and rules that do not.

    python benchmarks/pattern_driver.py [--json FILE] [--sizes 1000,4000,16000,64000]

Graphs are transformer layers as an exporter decomposes them (LayerNorm, attention, Gelu, bias additions). A time
is the smallest of some runs, each on a fresh copy; a ratio near 4 from row to row is linear growth.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from pattern_rules import MATCHING, OTHER, rules

from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.driver import apply_rules
from planish.passes.rewrite import Rule

WIDTH = 8


class _Graph:
    """Builds layers into one graph; weights are shared, since only the number of nodes matters here."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", 2, "s", WIDTH]))
        self.constants = {
            "w": np.ones((WIDTH, WIDTH), np.float32),
            "b": np.ones(WIDTH, np.float32),
            "eps": np.float32(1e-5),
            "axes": np.array([-1]),
            "root": np.float32(1.4142135),
            "one": np.float32(1),
            "half": np.float32(0.5),
            "scale": np.float32(2.828427),
            "mask": np.zeros((1, 1, 1, 1), np.float32),
        }
        self.values = {
            name: ir.Value(name=name, const_value=ir.tensor(np.asarray(a)), shape=ir.Shape(np.shape(a)),
                           type=ir.TensorType(ir.tensor(np.asarray(a)).dtype))
            for name, a in self.constants.items()
        }  # fmt: skip

    def op(self, kind: str, *inputs: ir.Value | str, **attributes: object) -> ir.Value:
        operands = [self.values[i] if isinstance(i, str) else i for i in inputs]
        node = ir.node(kind, operands, attributes=attributes)  # type: ignore[arg-type]
        node.name, node.outputs[0].name = f"n{len(self.nodes)}", f"v{len(self.nodes)}"
        node.outputs[0].type, node.outputs[0].shape = self.x.type, ir.Shape(["b", 2, "s", WIDTH])
        self.nodes.append(node)
        return node.outputs[0]

    def dense(self, x: ir.Value) -> ir.Value:
        return self.op("Add", self.op("MatMul", x, "w"), "b")

    def norm(self, x: ir.Value) -> ir.Value:
        centred = self.op("Sub", x, self.op("ReduceMean", x, "axes"))
        variance = self.op("ReduceMean", self.op("Mul", centred, centred), "axes")
        normal = self.op("Div", centred, self.op("Sqrt", self.op("Add", variance, "eps")))
        return self.op("Add", self.op("Mul", normal, "b"), "b")

    def layer(self, x: ir.Value) -> ir.Value:
        q, k, v = (self.dense(x) for _ in range(3))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        weights = self.op("Softmax", self.op("Add", self.op("Div", scores, "scale"), "mask"), axis=-1)
        x = self.norm(self.op("Add", x, self.dense(self.op("MatMul", weights, v))))
        hidden = self.dense(x)
        wide = self.op("Add", self.op("Erf", self.op("Div", hidden, "root")), "one")
        gelu = self.op("Mul", self.op("Mul", hidden, wide), "half")
        return self.norm(self.op("Add", x, self.dense(gelu)))


def build(nodes: int) -> ir.Model:
    """A model of about `nodes` nodes."""
    graph = _Graph()
    x: ir.Value = graph.x
    while len(graph.nodes) < nodes:
        x = graph.layer(x)
    made = ir.Graph(
        [graph.x], [x], nodes=graph.nodes, initializers=list(graph.values.values()), name="g",
        opset_imports={"": 23},
    )  # fmt: skip
    return ir.Model(made, ir_version=10)


def measure(model: ir.Model, group: Sequence[Rule], runs: int = 3) -> tuple[float, int]:
    """Smallest time of applying `group` in seconds, and the number of firings."""
    best, fired = float("inf"), 0
    for _ in range(runs):
        program = Program.single(model.clone())
        gc.collect()
        gc.disable()
        started = time.process_time()
        fired = apply_rules("benchmark", group, program, PassContext()).fired
        best = min(best, time.process_time() - started)
        gc.enable()
    return best, fired


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1000,4000,16000,64000")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    matching, other = rules(MATCHING), rules(OTHER)
    sizes = [int(s) for s in options.sizes.split(",")]
    rows, previous = [], None
    print(f"{len(matching)} rules that fire, {len(other)} that do not; seconds of processor time\n")
    print(f"{'nodes':>7} {'no rule fires':>14} {'ratio':>6} {'rules fire':>11} {'ratio':>6} {'firings':>8}")
    for size in sizes:
        model = build(size)
        idle, none = measure(model, other)
        busy, fired = measure(model, [*matching, *other])
        assert none == 0, f"{none} firings of rules that should not fire"
        row = {
            "nodes": len(model.graph),
            "idle_s": idle,
            "busy_s": busy,
            "firings": fired,
            "idle_us_per_node": idle / len(model.graph) * 1e6,
            "busy_us_per_node": busy / len(model.graph) * 1e6,
        }
        ratios = (f"{idle / previous['idle_s']:.2f}", f"{busy / previous['busy_s']:.2f}") if previous else ("", "")
        print(f"{row['nodes']:>7} {idle:>14.4f} {ratios[0]:>6} {busy:>11.4f} {ratios[1]:>6} {fired:>8}")
        rows.append(row)
        previous = row
    ten = build(10_000)
    idle, busy = measure(ten, other)[0], measure(ten, [*matching, *other])[0]
    count = len(matching) + len(other)
    print(f"\n10k nodes: {len(other)} rules that do not fire {idle:.3f} s; all {count} rules {busy:.3f} s (limit 1 s)")
    result = {
        "python": platform.python_version(),
        "rules": count,
        "rows": rows,
        "ten_thousand": {"nodes": len(ten.graph), "idle_s": idle, "busy_s": busy},
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if busy < 1.0 else 1


if __name__ == "__main__":
    sys.exit(main())
