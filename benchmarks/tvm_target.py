"""Whole models on target tvm-cpu against plain ONNX Runtime.

    python benchmarks/tvm_target.py [--small] [--rows NAME ...] [--seconds 20] [--json FILE]

Each model is one file of ``torch.onnx.export`` with dynamic batch and sequence. planish compiles it with its exact
pipeline for tvm-cpu; ONNX Runtime gets the same file with all of its own optimizations. Both run in this process,
interleaved, on one thread, timed by processor time. Errors are relative L2 to the eager module, the largest over all
outputs and over other batches and lengths than the timed ones, on the same compiled code. Ends with 1 if a line that
must hold does not.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnxruntime
import torch

import planish
from benchmarks.fusion_models import Feeds, arguments, export, feeds, outputs
from benchmarks.fusion_rows import ROWS, Row, slug
from planish.frontends.onnx import load_onnx
from planish.runtime.fingerprint import fingerprint
from planish.runtime.measure import interleave, ratio
from planish.runtime.ort import compile_ort

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("BERT s128", "BERT s512", "ViT-B/16", "MiniLM b1 s32", "ResNet-50")
#: What must hold: time of plain ONNX Runtime over ours, and the error.
LEAST = {"BERT s128": 0.8, "ViT-B/16": 0.8}
MOST_ERROR = 1e-5


def eager(module: Any, given: Feeds) -> list[np.ndarray]:
    with torch.no_grad():
        return [tensor.numpy() for tensor in outputs(module(**arguments(given)))]


def error(want: list[np.ndarray], got: dict[str, Any]) -> float:
    """The largest relative L2 over the outputs."""
    worst = 0.0
    for expected, found in zip(want, got.values(), strict=True):
        wide = expected.astype(np.float64)
        worst = max(worst, float(np.linalg.norm(found - wide) / np.linalg.norm(wide)))
    return worst


def measure(row: Row, folder: Path, *, small: bool, seconds: float) -> dict[str, Any]:
    """One row: both programs on the timed inputs, and ours on other sizes."""
    path = folder / f"{slug(row.name)}.onnx"
    module = export(row, path, small=small)
    timed = feeds(row, module, row.batch, row.small if small else row.length, padded=False)
    started = time.perf_counter()
    exe = planish.optimize(path, "tvm-cpu:threads=1", calibration=dict(timed), budget=planish.Budget(gates=False))
    compiled = time.perf_counter() - started
    plain = compile_ort(load_onnx(path, "ort-cpu:threads=1").main, planish.Target.parse("ort-cpu:threads=1"))
    pairs = row.pairs(small)[:: 3 if row.kind == "text" else 2]
    errors = {f"{row.batch} x {row.length}": error(eager(module, timed), exe.run(timed))}
    for batch, length in pairs:
        other = feeds(row, module, batch, length, padded=True)
        errors[f"{batch} x {length}"] = error(eager(module, other), exe.run(other))
    runs = {"plain": plain.prepared(timed), "planish": exe.runners["main"].prepared(timed)}  # type: ignore[attr-defined]
    times = interleave(runs, seconds=seconds, clock="process")
    found = ratio(times["plain"], times["planish"])
    return {
        "row": row.name,
        **found.to_dict(),
        "error": max(errors.values()),
        "errors": errors,
        "compile_seconds": compiled,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="small models: a test of the benchmark, not a measurement")
    parser.add_argument("--rows", nargs="*", default=list(NAMES), choices=sorted(ROWS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "tvm_target.json")
    options = parser.parse_args()
    import tvm

    torch.set_num_threads(1)
    print(f"TVM {tvm.__version__}, ONNX Runtime {onnxruntime.__version__}, one thread, processor time")
    print(f"{'model':16} {'plain ORT, ms':>14} {'tvm-cpu, ms':>12} {'speed to plain ORT':>24} {'error':>9}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.rows:
            found = measure(ROWS[name], Path(folder), small=options.small, seconds=options.seconds)
            rows.append(found)
            speed = f"{found['median']:.3f} [{found['low']:.2f}, {found['high']:.2f}]"
            times = f"{found['baseline_ms']:14.1f} {found['candidate_ms']:12.1f}"
            print(f"{name:16} {times} {speed:>24} {found['error']:9.1e}", flush=True)
            gc.collect()
    failed = [f"{r['row']}: error {r['error']:.1e} is above {MOST_ERROR:.0e}" for r in rows if r["error"] > MOST_ERROR]
    if not options.small:
        slow = [r for r in rows if r["median"] < LEAST.get(r["row"], 0.0)]
        failed += [f"{r['row']}: {r['median']:.2f} is below {LEAST[r['row']]}" for r in slow]
    result = {"machine": fingerprint(), "tvm": tvm.__version__, "small": options.small, "rows": rows, "failed": failed}
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for line in failed:
        print(line)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
