"""What `planish.load` costs over making the ONNX Runtime session, each in fresh processes, in seconds.

    python benchmarks/startup.py [ARTIFACT] [--runs 5] [--json results.json]

Without an artifact, one of the size of BERT-base (12 layers, 435 MB of weights) is made in a temporary folder.
Columns: importing onnxruntime (and planish), the call, and the processor time of the call, which is what to look at
on a machine with other work. The load hashes every file before it uses any; the session alone does not.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SESSION = """
import time, sys
start = time.perf_counter()
import onnxruntime as ort
imported, used = time.perf_counter(), time.process_time()
options = ort.SessionOptions()
options.intra_op_num_threads = 1
ort.InferenceSession(sys.argv[1] + "/main.onnx", options, providers=["CPUExecutionProvider"])
print(imported - start, time.perf_counter() - imported, time.process_time() - used)
"""
LOAD = """
import time, sys
start = time.perf_counter()
import onnxruntime, planish
imported, used = time.perf_counter(), time.process_time()
planish.load(sys.argv[1], threads=1)
print(imported - start, time.perf_counter() - imported, time.process_time() - used)
"""


def like_bert(folder: Path, layers: int = 12, width: int = 768, inner: int = 3072, words: int = 30522) -> Path:
    """An artifact with the weights of BERT-base: per layer four square and two wide MatMuls, and a table of words."""
    import numpy as np
    import onnx
    import onnx_ir as ir

    from planish.ir.program import Program
    from planish.runtime.executable import Executable
    from planish.runtime.ort import compile_ort

    rng = np.random.default_rng(0)
    nodes = [onnx.helper.make_node("Gather", ["words", "ids"], ["h"])]
    weights = {"words": rng.standard_normal((words, width), dtype=np.float32)}
    last = "h"
    for layer in range(layers):
        shapes = [(width, width)] * 4 + [(width, inner), (inner, width)]
        for number, shape in enumerate(shapes):
            name = f"layer.{layer}.{number}"
            weights[name] = rng.standard_normal(shape, dtype=np.float32) / 30
            nodes.append(onnx.helper.make_node("MatMul", [last, name], [f"{name}.out"]))
            nodes.append(onnx.helper.make_node("Tanh", [f"{name}.out"], [last := f"{name}.act"]))
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["b", "s"])
    output = onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, ["b", "s", width])
    graph = onnx.helper.make_graph(nodes, "like_bert", [ids], [output])
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    opset = onnx.helper.make_opsetid("", 20)
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10))
    program = Program.single(model, "ort-cpu:threads=1")
    return Executable(program, {"main": compile_ort(model, program.target)}).export(folder / "like-bert")


def measure(artifact: Path, runs: int) -> dict[str, list[tuple[float, ...]]]:
    """(import, call, processor) seconds of fresh processes, shuffled; the first of each only warms the page cache."""
    times: dict[str, list[tuple[float, ...]]] = {"ONNX Runtime session": [], "planish.load": []}
    shuffle = random.Random(0)
    for _ in range(runs + 1):
        variants = list(zip(times, (SESSION, LOAD), strict=True))
        shuffle.shuffle(variants)
        for name, code in variants:
            command = [sys.executable, "-c", code, str(artifact)]
            run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
            times[name].append(tuple(map(float, run.stdout.split())))
    return {name: samples[1:] for name, samples in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = measure(args.artifact.resolve() if args.artifact else like_bert(Path(folder)), args.runs)
    rows = {}
    print(f"{'':24}{'import s':>10}{'call s':>10}{'CPU s':>10}")
    for name, samples in times.items():
        medians = [statistics.median(values) for values in zip(*samples, strict=True)]
        rows[name] = dict(zip(("import", "call", "cpu"), medians, strict=True))
        print(f"{name:24}{medians[0]:10.3f}{medians[1]:10.3f}{medians[2]:10.3f}")
    over, cpu = (rows["planish.load"][key] - rows["ONNX Runtime session"][key] for key in ("call", "cpu"))
    print(f"planish.load costs {over:.3f} s beyond the session ({cpu:.3f} s of processor time).")
    if args.json:
        args.json.write_text(
            json.dumps({"unit": "s", "over_session": over, "cpu_over_session": cpu, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
