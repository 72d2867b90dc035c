"""A residual and a layer normalization on ONNX Runtime's CPU provider: fused by it, and written so that it is not.

    python benchmarks/residual_norm.py [--json FILE]

The figures behind `lower-residual-add`: SkipLayerNormalization (what ONNX Runtime makes of Add) against Sum and
LayerNormalization, one thread, processor time, interleaved.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir

from planish.ir.target import Target
from planish.runtime.measure import interleave, ratio
from planish.runtime.ort import compile_ort

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((32, 384), (128, 384), (128, 768), (512, 768), (128, 1024))


def model(op: str, width: int) -> ir.Model:
    parsed = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float[1, n, {width}] x, float[1, n, {width}] r, float[{width}] w, float[{width}] b)
          => (float[1, n, {width}] y) {{ s = {op}(x, r) y = LayerNormalization(s, w, b) }}"""
    )
    parsed.graph.name = op
    return parsed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "residual_norm.json")
    arguments = parser.parse_args()
    rows, target, rng = [], Target.parse("ort-cpu:threads=1"), np.random.default_rng(0)
    print(f"{'rows x width':>14} {'fused, us':>10} {'apart, us':>10} {'apart is faster by':>28}")
    for length, width in SHAPES:
        x, r = rng.standard_normal((2, 1, length, width)).astype(np.float32)
        feed = {"x": x, "r": r, "w": np.ones(width, np.float32), "b": np.zeros(width, np.float32)}
        runners = {op: compile_ort(model(op, width), target) for op in ("Add", "Sum")}
        np.testing.assert_allclose(runners["Add"].run(feed)["y"], runners["Sum"].run(feed)["y"], rtol=1e-4, atol=1e-5)
        times = interleave({op: runner.prepared(feed) for op, runner in runners.items()}, seconds=3, clock="process")
        found = ratio(times["Add"], times["Sum"])
        rows.append({"rows": length, "width": width, **found.to_dict()})
        fused, apart = 1e3 * (found.baseline_ms or 0), 1e3 * (found.candidate_ms or 0)
        print(f"{f'{length} x {width}':>14} {fused:10.1f} {apart:10.1f} {found!s:>28}")
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
