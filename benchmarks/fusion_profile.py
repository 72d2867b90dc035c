"""Where the time of a row of ``benchmarks/fusion.py`` goes, for plain ORT, planish and OpenVINO.

    python benchmarks/fusion_profile.py ["BERT s128" ...] [--runs 20] [--json FILE]

Milliseconds from the profilers of ONNX Runtime and OpenVINO, one thread; by operator in the JSON, by kind in the table.
Products (MatMul, Gemm, Conv and what is fused into them) are one kind, since each runtime fuses other things into them;
OpenVINO's decomposed attention has its own products there too. Profilers cost time themselves, so these say where a
lead comes from, not how large it is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks import fusion_models  # noqa: E402
from benchmarks.fusion_rows import ROWS  # noqa: E402

_KINDS = {
    "products": "MatMul FusedMatMul Gemm FusedGemm Conv FusedConv FullyConnected Convolution GroupConvolution",
    "attention": "Attention MultiHeadAttention ScaledDotProductAttention ScaledAttn Softmax If Where IsNaN MHA "
    "ScaledDotProductAttentionWithKVCache",
    "normalization": "LayerNormalization RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization MVN RMS "
    "SkipSimplifiedLayerNormalization RMSNorm",
    "activation": "Gelu BiasGelu FastGelu QuickGelu Swish SiLU Sigmoid Tanh Erf Relu Eltwise",
    "elementwise": "Add Sum Mul Sub Div Pow Sqrt Neg Subgraph ReduceMean Reciprocal Cos Sin RotaryEmbedding RoPE",
    "layout": "Transpose Reshape Reorder ReorderInput ReorderOutput Concat Split Slice Expand Unsqueeze Squeeze Tile "
    "VariadicSplit StridedSlice Broadcast Identity",
}
_KIND = {op: kind for kind, ops in _KINDS.items() for op in ops.split()}


def ort(model: Any, feeds: dict[str, np.ndarray], runs: int, folder: Path) -> dict[str, float]:
    """Milliseconds by operator of a session over `model`, a path or an onnx_ir model's path."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    for _ in range(runs + 2):
        session.run(None, feeds)
    by_op: dict[str, float] = defaultdict(float)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        # What runs inside of a branch is counted as such; the If around it would count it twice.
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["args"]["op_name"] != "If":
            by_op[event["args"]["op_name"]] += event["dur"] / 1e3 / (runs + 2)
    return dict(by_op)


def openvino(model: Path, feeds: dict[str, np.ndarray], runs: int, _: Path) -> dict[str, float]:
    """Milliseconds by node type of OpenVINO's own performance counters."""
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1", "NUM_STREAMS": "1"}
    settings |= {"PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": "YES"}
    core = ov.Core()
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    samples: dict[str, list[float]] = defaultdict(list)
    for number in range(runs + 2):
        request.infer(feeds, share_inputs=True)
        if number < 2:
            continue
        by_op: dict[str, float] = defaultdict(float)
        for item in request.profiling_info:
            by_op[item.node_type] += item.real_time.total_seconds() * 1e3
        for op, spent in by_op.items():
            samples[op].append(spent)
    return {op: float(np.median(spent)) for op, spent in samples.items() if max(spent) > 0}


def planish(model: Path, feeds: dict[str, np.ndarray], runs: int, folder: Path) -> dict[str, float]:
    import planish as package

    made = package.optimize(model, "ort-cpu:threads=1", budget=package.Budget(gates=False))
    made.export(folder / "artifact", overwrite=True)
    return ort(folder / "artifact" / "main.onnx", feeds, runs, folder)


PEERS: dict[str, Callable[..., dict[str, float]]] = {"ort": ort, "planish": planish, "openvino": openvino}


def kinds(by_op: dict[str, float]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for op, spent in by_op.items():
        total[_KIND.get(op, "other")] += spent
    return dict(total)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("rows", nargs="*", help="beginnings of names of rows")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "fusion_profile.json")
    arguments = parser.parse_args()
    chosen = [
        r for n, r in ROWS.items() if (r.fusion and not arguments.rows) or any(n.startswith(a) for a in arguments.rows)
    ]
    found: dict[str, dict[str, dict[str, float]]] = {}
    columns = [*_KINDS, "other", "total"]
    print(f"{'ms':>28} " + " ".join(f"{c:>13}" for c in columns))
    for row in chosen:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            module = fusion_models.export(row, folder / "model.onnx", small=False)
            feeds = fusion_models.feeds(row, module, row.batch, row.length, padded=False)
            arrays = {name: np.asarray(value) for name, value in feeds.items()}
            found[row.name] = {}
            for peer, profile in PEERS.items():
                by_op = profile(folder / "model.onnx", arrays, arguments.runs, folder)
                found[row.name][peer] = by_op
                totals = kinds(by_op)
                totals["total"] = sum(totals.values())
                shown = " ".join(f"{totals.get(c, 0.0):13.2f}" for c in columns)
                print(f"{row.name:>19} {peer:>8} {shown}", flush=True)
    arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
