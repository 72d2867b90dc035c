"""What a node with a generated kernel costs besides its arithmetic, in microseconds a node.

    python benchmarks/kernels_overhead.py [--nodes 100] [--json results.json]

Chains of products of one row of 16 numbers with matrices of 16 by 16, so that nearly all time is overhead:
planish::Linear with its kernel, against MatMul and Add with ONNX Runtime's kernels, as written (two nodes each) and as
ONNX Runtime fuses them. The time of a call is not in it: a link's time is that of a long chain less that of a chain of
one, by the number of links. One thread, processor time, interleaved; medians with 95% intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from planish.ir.target import Target
from planish.runtime.measure import bootstrap, interleave
from planish.runtime.ort import OrtRunner, compile_ort

SIZE = 16
#: What a node may cost, in microseconds; more than this eats what fusing a small layer gains.
LIMIT = 2.0
KERNEL = "planish::Linear"
VARIANTS = {KERNEL: ("ort-cpu:threads=1,kernels", True), "MatMul, Add": ("ort-cpu:threads=1", False),
            "fused by ONNX Runtime": ("ort-cpu:threads=1", True)}  # fmt: skip


def chain(links: int, kernel: bool) -> ir.Model:
    """`links` products, each with weights of its own."""
    rng = np.random.default_rng(0)
    linear = "[n{0}] {2} = planish.Linear ({1}, w{0}, b{0})"
    parts = "[m{0}] p{0} = MatMul ({1}, w{0}) [a{0}] {2} = Add (p{0}, b{0})"
    values = ["x", *(f"h{i}" for i in range(1, links)), "y"]
    body = " ".join((linear if kernel else parts).format(i, values[i], values[i + 1]) for i in range(links))
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        chain (float[rows, {SIZE}] x) => (float[rows, {SIZE}] y) {{ {body} }}"""
    )
    for i in range(links):
        for name, shape in ((f"w{i}", (SIZE, SIZE)), (f"b{i}", (SIZE,))):
            array = rng.standard_normal(shape).astype(np.float32) / np.float32(SIZE**0.5)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def compiled(name: str, links: int) -> OrtRunner:
    target, optimize = VARIANTS[name]
    return compile_ort(chain(links, name == KERNEL), Target.parse(target), optimize=optimize)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=100, help="links of the long chain (default 100)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for all measurements (default 20)")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    args = parser.parse_args()

    x = np.random.default_rng(1).standard_normal((1, SIZE)).astype(np.float32)
    runners = {(name, links): compiled(name, links) for name in VARIANTS for links in (1, args.nodes)}
    long = {name: runners[name, args.nodes].run({"x": x})["y"] for name in VARIANTS}
    for y in long.values():
        np.testing.assert_allclose(y, long[KERNEL], rtol=1e-3, atol=1e-4)
    times = interleave(
        {f"{name}:{links}": runner.prepared({"x": x}) for (name, links), runner in runners.items()},
        seconds=args.seconds,
        max_runs=400,
        clock="process",
    )
    rows = {}
    print(f"{'':24}{'µs a link':>10}{'95% interval':>18}")
    for name in VARIANTS:
        ends = [np.asarray(times[f"{name}:{links}"]) for links in (args.nodes, 1)]
        links = (ends[0] - ends[1]) / (args.nodes - 1) * 1e6
        low, high = bootstrap(links)
        rows[name] = {"median": float(np.median(links)), "low": low, "high": high, "runs": len(links)}
        print(f"{name:24}{rows[name]['median']:10.2f}{low:10.2f} …{high:6.2f}")
    kept = rows[KERNEL]["high"] < LIMIT
    print(f"a node with a kernel is to stay under {LIMIT} µs, arithmetic included: {'yes' if kept else 'no'}")
    if args.json:
        table = {"unit": "µs", "onnxruntime": ort.__version__, "nodes": args.nodes, "limit": LIMIT, "rows": rows}
        args.json.write_text(json.dumps(table, indent=1))
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
