"""Feed-forward blocks on ONNX Runtime's CPU provider: as products of matrices, and as 1×1 convolutions.

    python benchmarks/feed_forward.py [--seconds N] [--json FILE]

The figures behind `lower-feed-forward`: four blocks in a row (LayerNormalization, product, activation, product,
residual) before and after the pass, one thread, processor time, interleaved.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.infer import infer_shapes
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.base import PassContext
from planish.passes.lowering.lower_feed_forward import LowerFeedForward
from planish.passes.lowering.lower_residual_add import LowerResidualAdd
from planish.runtime.measure import interleave, ratio
from planish.runtime.ort import compile_ort

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = 4
#: (batch, tokens, channels, inner channels, activation)
SHAPES = (
    (1, 1, 768, 3072, "Gelu"),
    (1, 8, 768, 3072, "Gelu"),
    (1, 128, 768, 3072, "Gelu"),
    (1, 197, 768, 3072, "Gelu"),
    (1, 512, 768, 3072, "Gelu"),
    (1, 32, 384, 1536, "Gelu"),
    (8, 128, 384, 1536, "Gelu"),
    (1, 128, 768, 3072, "Relu"),
    (1, 256, 768, 2048, "SiLU gate"),
    (1, 1, 1024, 2816, "SiLU gate"),
    (1, 16, 64, 256, "Gelu"),
)


def model(channels: int, inner: int, activation: str) -> ir.Model:
    """Four blocks with random weights."""
    lines, value = [], "x"
    weights: dict[str, tuple[int, ...]] = {}
    for k in range(BLOCKS):
        weights |= {f"s{k}": (channels,), f"w{k}": (channels, inner), f"b{k}": (inner,), f"u{k}": (channels, inner)}
        weights |= {f"v{k}": (inner, channels), f"c{k}": (channels,)}
        lines += [f"n{k} = LayerNormalization({value}, s{k}, c{k})", f"p{k} = MatMul(n{k}, w{k})"]
        if activation == "SiLU gate":
            lines += [f"a{k} = Sigmoid(p{k})", f"g{k} = Mul(p{k}, a{k})", f"q{k} = MatMul(n{k}, u{k})"]
            lines += [f"h{k} = Mul(g{k}, q{k})", f"y{k} = MatMul(h{k}, v{k})"]
        else:
            lines += [f"q{k} = Add(p{k}, b{k})", f"h{k} = {activation}(q{k})", f"o{k} = MatMul(h{k}, v{k})"]
            lines += [f"y{k} = Add(o{k}, c{k})"]
        lines += [f"x{k} = Add(y{k}, {value})"]
        value = f"x{k}"
    rng = np.random.default_rng(0)
    declared = [f"float[b, n, {channels}] x"]
    declared += [f"float[{','.join(map(str, dims))}] {name}" for name, dims in weights.items()]
    parsed = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g ({", ".join(declared)}) => (float[b, n, {channels}] {value}) {{ {" ".join(lines)} }}"""
    )
    for item in parsed.graph.inputs[1:]:
        dims = weights[item.name or ""]
        item.const_value = ir.tensor((rng.standard_normal(dims) / np.sqrt(dims[0])).astype(np.float32), name=item.name)
    constants = list(parsed.graph.inputs[1:])
    del parsed.graph.inputs[1:]
    for item in constants:
        parsed.graph.register_initializer(item)
    infer_shapes(parsed)
    return parsed


def measured(shape: tuple[int, int, int, int, str], seconds: float) -> Any:
    batch, tokens, channels, inner, activation = shape
    target = Target.parse("ort-cpu:threads=1")
    programs = {"products": Program.single(model(channels, inner, activation), target)}
    programs["convolutions"] = programs["products"].clone()
    for p in (LowerFeedForward(), LowerResidualAdd()):
        fired = p.apply(programs["convolutions"], PassContext(target)).fired
        assert fired == BLOCKS or not isinstance(p, LowerFeedForward), f"{p} fired {fired} times"
    feed = {"x": np.random.default_rng(1).standard_normal((batch, tokens, channels)).astype(np.float32)}
    runners = {name: compile_ort(program.main, target) for name, program in programs.items()}
    before, after = (next(iter(runner.run(feed).values())) for runner in runners.values())
    np.testing.assert_allclose(before, after, rtol=1e-3, atol=1e-3)
    times = interleave(
        {name: runner.prepared(feed) for name, runner in runners.items()}, seconds=seconds, clock="process"
    )
    return ratio(times["products"], times["convolutions"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "feed_forward.json")
    arguments = parser.parse_args()
    rows = []
    print(f"{'batch x tokens x channels x inner':>34} {'products, ms':>13} {'convolutions, ms':>17} faster by")
    for shape in SHAPES:
        found = measured(shape, arguments.seconds)
        rows.append({"shape": shape, **found.to_dict()})
        name = " x ".join(map(str, shape[:4])) + f", {shape[4]}"
        print(f"{name:>34} {found.baseline_ms:13.3f} {found.candidate_ms:17.3f} {found}", flush=True)
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
