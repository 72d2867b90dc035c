"""Generated matrix products against ONNX Runtime's: packed constant weights, bias and activation.

    python benchmarks/kernels_gemm.py [--seconds S] [--only TEXT] [--json FILE]

Float32 (and bfloat16 on AMX, against the same float32 baseline), one thread, processor time, both sides interleaved
in one process. ONNX Runtime gets MatMul, Add and Gelu (or what the row says) with constant weights and all of its own
optimizations. A ratio above 1 means that the generated kernel is faster; its interval is a 95 % bootstrap of the
median.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from planish.runtime.kernels import amx_gemm, gemm
from planish.runtime.kernels.cpu import detect, permit_tiles
from planish.runtime.kernels.template import aligned, function
from planish.runtime.measure import interleave, ratio

SHAPES = (
    (1, 768, 3072),
    (32, 384, 1536),
    (128, 768, 768),
    (128, 768, 3072),
    (128, 3072, 768),
    (197, 768, 3072),
    (256, 2048, 5632),
    (512, 768, 768),
    (512, 768, 3072),
)
#: Bodies in ONNX text and activations of ours.
FORMS = {
    "matmul": ("y = MatMul(x, w)", None),
    "bias": ("m = MatMul(x, w) y = Add(m, b)", None),
    "gelu": ("m = MatMul(x, w) s = Add(m, b) y = Gelu(s)", "gelu"),
    "swiglu": ("g = MatMul(x, w) u = MatMul(x, v) s = Sigmoid(g) a = Mul(g, s) y = Mul(a, u)", "silu"),
}


def baseline(form: str, arrays: dict[str, np.ndarray]) -> Callable[[], object]:
    """An ONNX Runtime session as a function without arguments."""
    body = FORMS[form][0]
    m, n = len(arrays["x"]), len(arrays["b"])
    used = [name for name in ("w", "v", "b") if f" {name})" in body or f", {name}" in body]
    text = f"""<ir_version: 10, opset_import: ["" : 20]> g (float[{m},{arrays["x"].shape[1]}] x) => (float[{m},{n}] y)
        <{", ".join(f"float{list(arrays[name].shape)} {name}" for name in used)}> {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(arrays[name], name) for name in used)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": arrays["x"]})[0]


def generated(form: str, module: Any, arrays: dict[str, np.ndarray]) -> Callable[[], np.ndarray]:
    """The kernel of a module of templates as a function without arguments."""
    activation = FORMS[form][1]
    template = module.GatedGemm(activation) if form == "swiglu" else module.Gemm(activation)
    cpu = template.cpu()

    def packed(name: str) -> np.ndarray:
        width = module.panel_width(cpu)
        return aligned(amx_gemm.pack(arrays[name]) if module is amx_gemm else gemm.pack(arrays[name], width))

    y = aligned(np.zeros((len(arrays["x"]), len(arrays["b"])), np.float32))
    second = packed("v") if form == "swiglu" else aligned(arrays["b"] if form != "matmul" else 0 * arrays["b"])
    call, arguments = function(template, cpu), (arrays["x"], packed("w"), second, y)

    def run() -> np.ndarray:
        call(*arguments)
        return y

    return run


def row(form: str, shape: tuple[int, int, int], seconds: float) -> list[dict[str, Any]]:
    m, k, n = shape
    rng = np.random.default_rng(0)
    arrays = {
        "x": aligned(rng.standard_normal((m, k), np.float32)),
        "w": rng.standard_normal((k, n), np.float32) / np.float32(k**0.5),
        "v": rng.standard_normal((k, n), np.float32) / np.float32(k**0.5),
        "b": rng.standard_normal(n, np.float32),
    }
    theirs = baseline(form, arrays)
    variants = {"float32": generated(form, gemm, arrays)}
    if detect("amx") and permit_tiles():
        variants["bfloat16"] = generated(form, amx_gemm, arrays)
    expected = theirs()
    rows = []
    times = interleave({"onnxruntime": theirs, **variants}, seconds=seconds, clock="process", min_runs=9)
    flops = 2 * m * k * n * (2 if form == "swiglu" else 1)
    for name, run in variants.items():
        faster = ratio(times["onnxruntime"], times[name])
        error = float(np.linalg.norm(run() - expected) / np.linalg.norm(expected))
        rows.append(
            {
                "form": form,
                "shape": f"{m}x{k}x{n}",
                "type": name,
                "ratio": faster.median,
                "low": faster.low,
                "high": faster.high,
                "rounds": faster.runs,
                "gflops": flops / np.median(times[name]) / 1e9,
                "gflops_onnxruntime": flops / np.median(times["onnxruntime"]) / 1e9,
                "difference": error,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--only", default="", help="rows whose name contains this, 'gelu 512x768'")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print(f"{'':8}{'shape':>14}  {'type':9} {'ratio':>6}  {'95 %':13} {'GF/s':>6} {'theirs':>6}  difference")
    for form in FORMS:
        for shape in SHAPES:
            if arguments.only not in f"{form} {'x'.join(map(str, shape))}":
                continue
            for found in row(form, shape, arguments.seconds):
                rows.append(found)
                print(
                    f"{form:8}{found['shape']:>14}  {found['type']:9} {found['ratio']:6.2f}  "
                    f"{found['low']:5.2f}..{found['high']:5.2f}  {found['gflops']:6.0f} "
                    f"{found['gflops_onnxruntime']:6.0f}  {found['difference']:.1e}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
