"""What a call through planish costs over a bare `session.run`, in microseconds per call.

    python benchmarks/overhead.py [--json results.json]

The model is one Add of 16 numbers, so that nearly all time is overhead. One thread, processor time, interleaved.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from planish.ir.program import Program
from planish.ir.serialize import to_proto_without_weights
from planish.ir.target import Target
from planish.runtime.executable import Executable
from planish.runtime.measure import Timing, interleave
from planish.runtime.ort import compile_ort

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
add (float[b, 16] x, float[b, 16] z) => (float[b, 16] y) { y = Add(x, z) }"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    args = parser.parse_args()

    model = ir.from_onnx_text(TEXT)
    program = Program.single(model, Target.parse("ort-cpu:threads=1"))
    runner = compile_ort(model, program.target)
    exe = Executable(program, {"main": runner})
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    raw = to_proto_without_weights(model)[0].SerializeToString()
    session = ort.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    x = np.ones((1, 16), np.float32)
    feeds = {"x": x, "z": x}
    variants = {
        "session.run": lambda: session.run(["y"], feeds),
        "runner.run": lambda: runner.run(feeds),
        "exe(x, z)": lambda: exe(x, x),
    }
    times = interleave(variants, seconds=20, max_runs=300, clock="process")
    rows = {name: Timing.of(samples) for name, samples in times.items()}
    base = rows["session.run"].median
    print(f"{'':14}{'median µs':>10}{'p90 µs':>10}{'over session.run':>18}")
    for name, row in rows.items():
        print(f"{name:14}{row.median * 1e3:10.2f}{row.p90 * 1e3:10.2f}{(row.median - base) * 1e3:+17.2f}")
    if args.json:
        table = {name: row.to_dict() for name, row in rows.items()}
        args.json.write_text(json.dumps({"unit": "ms", "onnxruntime": ort.__version__, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
