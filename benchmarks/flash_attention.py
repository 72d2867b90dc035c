"""Attention without a mask on ONNX Runtime's CPU provider: the standard operator, and the one with a flash kernel.

    python benchmarks/flash_attention.py [--json FILE]

The figures behind `lower-flash-attention`: opset 23's Attention against com.microsoft's MultiHeadAttention (and the
same Attention with a mask that hides nothing), one thread, processor time, interleaved.
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
HEADS = ((12, 64), (12, 32), (16, 80), (8, 128))
LENGTHS = (384, 512, 577, 768, 1024, 1500, 2048)
CALLS = {
    "attention": "Attention<q_num_heads = {n}, kv_num_heads = {n}>(q, k, v)",
    "flash": "com.microsoft.MultiHeadAttention<num_heads = {n}>(q, k, v)",
    "masked": "Attention<q_num_heads = {n}, kv_num_heads = {n}>(q, k, v, m)",
}


def model(call: str, heads: int, depth: int) -> ir.Model:
    width = heads * depth
    return ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        g (float[1, n, {width}] q, float[1, n, {width}] k, float[1, n, {width}] v, bool[n, n] m)
          => (float[1, n, {width}] y) {{ y = {call.format(n=heads)} }}"""
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "flash_attention.json")
    arguments = parser.parse_args()
    rows, target, rng = [], Target.parse("ort-cpu:threads=1"), np.random.default_rng(0)
    heading = ("heads x depth", "keys", "attention, ms", "flash, ms", "flash gains", "masked, ms")
    print("{:>14} {:>5} {:>14} {:>10} {:>28} {:>11}".format(*heading))
    for heads, depth in HEADS:
        for length in LENGTHS:
            feed = dict(zip("qkv", rng.standard_normal((3, 1, length, heads * depth)).astype(np.float32), strict=True))
            feed["m"] = np.ones((length, length), bool)
            runners = {name: compile_ort(model(call, heads, depth), target) for name, call in CALLS.items()}
            results = {name: runner.run(feed)["y"] for name, runner in runners.items()}
            for name in ("flash", "masked"):
                np.testing.assert_allclose(results[name], results["attention"], rtol=1e-4, atol=1e-5)
            times = interleave({n: r.prepared(feed) for n, r in runners.items()}, seconds=3, clock="process")
            found = ratio(times["attention"], times["flash"])
            masked = ratio(times["masked"], times["flash"])
            rows.append(
                {"heads": heads, "depth": depth, "keys": length, **found.to_dict(), "masked_ms": masked.baseline_ms}
            )
            plain, flash, hidden = (ms or 0 for ms in (found.baseline_ms, found.candidate_ms, masked.baseline_ms))
            print(f"{f'{heads} x {depth}':>14} {length:>5} {plain:14.2f} {flash:10.2f} {found!s:>28} {hidden:11.2f}")
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
