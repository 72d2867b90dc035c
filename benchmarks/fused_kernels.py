"""Operators that ONNX Runtime's CPU provider has for several at once, against the same written with plain ones.

    python benchmarks/fused_kernels.py [--seconds S] [--only NAME] [--json FILE]

The figures behind the choices of fusion and lowering passes: for each fused form and each number of tokens, how many
times as fast it is as its parts. One thread, processor time, interleaved, ONNX Runtime's own rewriting off, so that
what is written is what runs. Products of matrices have constant weights, so that they are packed beforehand.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.target import Target
from planish.runtime.measure import interleave, ratio
from planish.runtime.ort import compile_ort

ROOT = Path(__file__).resolve().parents[1]
TOKENS = (1, 32, 128, 512, 1024)
WIDTH, HEADS, KV_HEADS, DEPTH = 768, 12, 4, 64
KV_WIDTH = KV_HEADS * DEPTH
WIDE = 4 * WIDTH


@dataclass(frozen=True)
class Case:
    """One comparison: bodies of graphs over the values that `inputs` names; `y` (and `z`) are the outputs.

    `inputs` and `outputs` are declarations in ONNX text; `weights` gives shapes of constants.
    """

    name: str
    fused: str
    plain: str
    inputs: str
    outputs: str
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: tuple[int, ...] = TOKENS


def _act(name: str, fused: str, plain: str, weights: dict[str, tuple[int, ...]] | None = None, more: str = "") -> Case:
    return Case(name, fused, plain, f"float[1,n,{WIDE}] x{more}", f"float[1,n,{WIDE}] y", weights or {})


def _norm(name: str, fused: str, plain: str, outputs: str, *names: str) -> Case:
    inputs = f"float[1,n,{WIDTH}] x, float[1,n,{WIDTH}] r"
    return Case(name, fused, plain, inputs, outputs, dict.fromkeys(names, (WIDTH,)))


_Y, _YZ = f"float[1,n,{WIDTH}] y", f"float[1,n,{WIDTH}] y, float[1,n,{WIDTH}] z"
_UP = f", float[1,n,{WIDE}] up"
_MS = "com.microsoft."


def _rotated(x: str, heads: str) -> str:
    """Halves of the heads turned, as exporters write it."""
    return f"""{x}r = Reshape({x}, {heads})
        {x}t = Transpose<perm = [0, 2, 1, 3]>({x}r)
        {x}c = Mul({x}t, cos2)
        {x}a = Slice({x}t, zero, half, three)
        {x}b = Slice({x}t, half, full, three)
        {x}n = Neg({x}b)
        {x}h = Concat<axis = -1>({x}n, {x}a)
        {x}s = Mul({x}h, sin2)
        {x}o = Add({x}c, {x}s)"""


_SHAPES = f"""split = Constant<value_ints = [0, 0, {HEADS}, {DEPTH}]>()
    splitkv = Constant<value_ints = [0, 0, {KV_HEADS}, {DEPTH}]>()
    zero = Constant<value_ints = [0]>()
    half = Constant<value_ints = [{DEPTH // 2}]>()
    full = Constant<value_ints = [{DEPTH}]>()
    three = Constant<value_ints = [3]>()
    one = Constant<value_ints = [1]>()
    joined = Constant<value_ints = [0, 0, {WIDTH}]>()"""
_KV_ATTENTION = f"Attention<q_num_heads = {HEADS}, kv_num_heads = {KV_HEADS}>"
_ATTENTION = f"Attention<q_num_heads = {HEADS}, kv_num_heads = {HEADS}>"
_PARTS = {"wq": (WIDTH, WIDTH), "wk": (WIDTH, WIDTH), "wv": (WIDTH, WIDTH)}
_PART_BIASES = {"bq": (WIDTH,), "bk": (WIDTH,), "bv": (WIDTH,)}
_THREE = "q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)"
_BIASES = "q = Add(q0, bq) k = Add(k0, bk) v = Add(v0, bv)"

CASES = (
    _act("BiasGelu", f"y = {_MS}BiasGelu(x, b)", "s = Add(x, b) y = Gelu(s)", {"b": (WIDE,)}),
    _act("FastGelu", f"y = {_MS}FastGelu(x)", 'y = Gelu<approximate = "tanh">(x)'),
    _act(
        "FastGelu, bias",
        f"y = {_MS}FastGelu(x, b)",
        's = Add(x, b) y = Gelu<approximate = "tanh">(s)',
        {"b": (WIDE,)},
    ),
    _act("QuickGelu", f"y = {_MS}QuickGelu<alpha = 1.0>(x)", "s = Sigmoid(x) y = Mul(x, s)"),
    _act(
        "QuickGelu, gate",
        f"g = {_MS}QuickGelu<alpha = 1.0>(x) y = Mul(g, up)",
        "s = Sigmoid(x) g = Mul(x, s) y = Mul(g, up)",
        more=_UP,
    ),
    _norm(
        "SkipLayerNormalization",
        f"y = {_MS}SkipLayerNormalization(x, r, w, b)",
        "s = Sum(x, r) y = LayerNormalization(s, w, b)",
        _Y,
        "w",
        "b",
    ),
    _norm(
        "SkipLayerNormalization, sum read twice",
        f"y, m, i, z = {_MS}SkipLayerNormalization(x, r, w, b)",
        "z = Add(x, r) y = LayerNormalization(z, w, b)",
        _YZ,
        "w",
        "b",
    ),
    _norm(
        "SkipSimplifiedLayerNormalization, sum read twice",
        f"y, m, i, z = {_MS}SkipSimplifiedLayerNormalization(x, r, w)",
        "z = Add(x, r) y = RMSNormalization(z, w)",
        _YZ,
        "w",
    ),
    _norm("Sum of three", "y = Sum(x, b, r)", "s = Add(x, b) y = Add(s, r)", _Y, "b"),
    _norm(
        "SimplifiedLayerNormalization", "y = SimplifiedLayerNormalization(x, w)", "y = RMSNormalization(x, w)", _Y, "w"
    ),
    Case(
        "EmbedLayerNormalization",
        f"y, m = {_MS}EmbedLayerNormalization<epsilon = 1e-5>(ids, segments, words, positions, types, w, b)",
        """p = Shape<start = 1>(ids) n = Squeeze(p) start = Constant<value_int = 0>() step = Constant<value_int = 1>()
           r = Range(start, n, step) a = Gather(words, ids) c = Gather(positions, r) d = Gather(types, segments)
           e = Add(a, d) s = Add(e, c) y = LayerNormalization(s, w, b)""",
        "int32[1,n] ids, int32[1,n] segments",
        _Y,
        {"words": (1000, WIDTH), "positions": (1024, WIDTH), "types": (2, WIDTH), "w": (WIDTH,), "b": (WIDTH,)},
    ),
    Case(
        "RotaryEmbedding and Attention",
        f"a = RotaryEmbedding<num_heads = {HEADS}>(q, cos, sin) "
        f"c = RotaryEmbedding<num_heads = {KV_HEADS}>(k, cos, sin) "
        f"y = {_KV_ATTENTION}(a, c, v)",
        f"""{_SHAPES} co = Concat<axis = -1>(cos, cos) si = Concat<axis = -1>(sin, sin)
            cos2 = Unsqueeze(co, one) sin2 = Unsqueeze(si, one)
            {_rotated("q", "split")} {_rotated("k", "splitkv")}
            vr = Reshape(v, splitkv) vt = Transpose<perm = [0, 2, 1, 3]>(vr)
            o = Attention(qo, ko, vt) t = Transpose<perm = [0, 2, 1, 3]>(o) y = Reshape(t, joined)""",
        f"float[1,n,{WIDTH}] q, float[1,n,{KV_WIDTH}] k, float[1,n,{KV_WIDTH}] v, "
        f"float[1,n,{DEPTH // 2}] cos, float[1,n,{DEPTH // 2}] sin",
        _Y,
    ),
    Case(
        "MatMul and Add for Gemm",
        "m = MatMul(x, w) y = Add(m, b)",
        f"""flat = Constant<value_ints = [-1, {WIDTH}]>() a = Reshape(x, flat) g = Gemm(a, w, b)
            lead = Shape<start = 0, end = 2>(x) last = Constant<value_ints = [{WIDE}]>()
            back = Concat<axis = 0>(lead, last) y = Reshape(g, back)""",
        f"float[1,n,{WIDTH}] x",
        f"float[1,n,{WIDE}] y",
        {"w": (WIDTH, WIDE), "b": (WIDE,)},
        TOKENS[:4],
    ),
    Case(
        "three products for one and Split",
        f"{_THREE} {_BIASES} y = {_ATTENTION}(q, k, v)",
        f"""m = MatMul(x, w) s = Add(m, b) thirds = Constant<value_ints = [{WIDTH}, {WIDTH}, {WIDTH}]>()
            q, k, v = Split<axis = -1>(s, thirds) y = {_ATTENTION}(q, k, v)""",
        f"float[1,n,{WIDTH}] x",
        _Y,
        {**_PARTS, **_PART_BIASES, "w": (WIDTH, 3 * WIDTH), "b": (3 * WIDTH,)},
        TOKENS[:4],
    ),
    Case(
        "MultiHeadAttention with biases",
        f"{_THREE} y = {_MS}MultiHeadAttention<num_heads = {HEADS}>(q0, k0, v0, b)",
        f"{_THREE} {_BIASES} y = {_ATTENTION}(q, k, v)",
        f"float[1,n,{WIDTH}] x",
        _Y,
        {**_PARTS, **_PART_BIASES, "b": (3 * WIDTH,)},
    ),
)


def model(case: Case, body: str, weights: dict[str, np.ndarray]) -> ir.Model:
    parsed = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        g ({case.inputs}{"".join(f", float{list(a.shape)} {n}" for n, a in weights.items())}) => ({case.outputs})
        {{ {body} }}"""
    )
    graph = parsed.graph
    for value in [v for v in graph.inputs if v.name in weights]:
        graph.inputs.remove(value)
        if value.uses():
            value.const_value = ir.tensor(weights[str(value.name)], name=value.name)
            graph.register_initializer(value)
    graph.name = "g"
    return parsed


def feed(found: ir.Model, tokens: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for value in found.graph.inputs:
        assert value.shape is not None
        shape = [d if isinstance(d, int) else tokens for d in value.shape]
        whole = value.dtype == ir.DataType.INT32
        made[str(value.name)] = (
            rng.integers(0, 2, shape).astype(np.int32) if whole else rng.standard_normal(shape).astype(np.float32)
        )
    return made


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    rng, target = np.random.default_rng(0), Target.parse("ort-cpu:threads=1")
    weights = {n: (0.03 * rng.standard_normal(s)).astype(np.float32) for n, s in case.weights.items()}
    for whole in ("w", "b"):
        if f"{whole}q" in weights:
            weights[whole] = np.concatenate([weights[f"{whole}{part}"] for part in "qkv"], axis=-1)
    models = {"fused": model(case, case.fused, weights), "plain": model(case, case.plain, weights)}
    runners = {name: compile_ort(m, target, optimize=False) for name, m in models.items()}
    rows = []
    for tokens in case.tokens:
        arrays = feed(models["fused"], tokens, rng)
        got, wanted = (runners[name].run(arrays) for name in ("fused", "plain"))
        for name, value in wanted.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-4, err_msg=case.name)
        calls = {name: runner.prepared(arrays) for name, runner in runners.items()}
        times = interleave(calls, seconds=seconds, clock="process")
        rows.append({"case": case.name, "tokens": tokens, **ratio(times["plain"], times["fused"]).to_dict()})
        found = ratio(times["plain"], times["fused"])
        plain, fused = 1e3 * (found.baseline_ms or 0), 1e3 * (found.candidate_ms or 0)
        print(f"{case.name:<50} {tokens:6} {plain:10.1f} {fused:10.1f} {found!s:>28}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    print(f"{'':<50} {'tokens':>6} {'plain, us':>10} {'fused, us':>10} {'fused is faster by':>28}")
    rows = [row for case in CASES if arguments.only in case.name for row in measure(case, arguments.seconds)]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
