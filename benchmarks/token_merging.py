"""Token merging on vision transformers against the same model optimized without it, on the same target.

    python benchmarks/token_merging.py [--models ViT-B/16 ...] [--targets ort-cpu ort-cpu:kernels] [--batches 1 8]
                                       [--r 13 16] [--seconds N] [--small] [--json FILE]

Models of transformers with random weights, at their usual image size. One thread, processor time, interleaved in one
process; ratios within a round, their median and a bootstrap interval. *merging* is the share of the merged model's time
that merging itself takes (the merges, and the bias that sizes are in attention), from the profiler of ONNX Runtime.
*operations* is the ratio that the products alone would give.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import planish  # noqa: E402
from planish.ir.analyses.cost import cost  # noqa: E402
from planish.passes.defaults import default_pipeline  # noqa: E402
from planish.runtime.measure import bootstrap, interleave  # noqa: E402

FAST = planish.Budget(gates=False)
#: What is wanted: (model, r, batch) → the ratio.
WANTED = {
    ("ViT-B/16", 13, 1): 1.5,
    ("ViT-B/16", 13, 8): 1.7,
    ("ViT-B/16", 16, 1): 1.7,
    ("ViT-B/16", 16, 8): 2.0,
    ("ViT-L/16", 7, 1): 1.5,
}
SHARE = 0.1


def _vit(layers: int, width: int, heads: int) -> Callable[[bool], Any]:
    def build(small: bool) -> Any:
        from transformers import ViTConfig, ViTForImageClassification

        sizes = (2, 64, 4) if small else (layers, width, heads)
        config = ViTConfig(
            num_hidden_layers=sizes[0],
            hidden_size=sizes[1],
            num_attention_heads=sizes[2],
            intermediate_size=4 * sizes[1],
            num_labels=1000,
        )
        return ViTForImageClassification(config)

    return build


MODELS = {"ViT-B/16": _vit(12, 768, 12), "ViT-S/16": _vit(12, 384, 6), "ViT-L/16": _vit(24, 1024, 16)}
DEFAULT_R = {"ViT-L/16": (7,)}


def pipeline(target: str, merge: str) -> str:
    """The exact pipeline with merging between recognition and lowering."""
    cut = ",lower-linear," if "kernels" in target else ",lower-feed-forward,"
    before, after = default_pipeline(target).split(cut)
    return f"{before},{merge}{cut}{after}"


class Made:
    """Artifacts of a model with and without merging, made once in a folder."""

    def __init__(self, name: str, target: str, small: bool, folder: Path) -> None:
        label = f"{name}-{target}{'-small' * small}".replace("/", "-").replace(":", "-").replace(",", "-")
        self.name, self.target, self.small, self.folder = name, target, small, folder / label

    def __call__(self, r: int) -> Path:
        path = self.folder / f"r{r}"
        if not path.exists():
            self._make(r, path)
        return path

    def _make(self, r: int, path: Path) -> None:
        exported = self.folder.parent / f"{self.name.replace('/', '-')}{'-small' * self.small}.onnx"
        if not exported.exists():
            torch.manual_seed(0)
            model, x = MODELS[self.name](self.small).eval(), torch.randn(2, 3, 224, 224)
            exported.parent.mkdir(parents=True, exist_ok=True)
            batch = torch.export.Dim("batch")
            program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
            program.save(str(exported), external_data=True)
        passes = pipeline(self.target, f"merge-tokens{{r={r}}}") if r else None
        exe = planish.optimize(exported, self.target, passes=passes, budget=FAST)
        path.parent.mkdir(parents=True, exist_ok=True)
        exe.export(path)
        (path.with_suffix(".flops")).write_text(str(cost(exe.program).flops))

    def flops(self, r: int) -> int:
        return int(self(r).with_suffix(".flops").read_text())


def share(artifact: Path, x: np.ndarray, runs: int = 3) -> float:
    """The share of a run that merging takes itself."""
    with tempfile.TemporaryDirectory() as folder:
        by_node = profile(artifact, x, runs, Path(folder))
    ours = sum(spent for name, spent in by_node.items() if is_merging(name))
    return ours / sum(by_node.values())


def is_merging(node: str) -> bool:
    """Whether a node of a session is of a merge or of the bias by size: all have names of the pass."""
    return "MergeTokens" in node or any(node.startswith(f"{op}_planish") for op in ("Log", "Unsqueeze", "Expand"))


def profile(artifact: Path, x: np.ndarray, runs: int, folder: Path) -> dict[str, float]:
    """Microseconds by node."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    library = artifact / "kernels" / "kernels.so"
    if library.exists():
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(artifact / "main.onnx"), options, providers=["CPUExecutionProvider"])
    for _ in range(runs + 1):
        session.run(None, {session.get_inputs()[0].name: x})
    found: dict[str, float] = {}
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            name = f"{event['args']['op_name']}:{name}" if "MergeTokens" in event["args"]["op_name"] else name
            found[name] = found.get(name, 0.0) + event["dur"]
    return found


def rows(made: Made, numbers: list[int], batches: list[int], seconds: float) -> Any:
    for path in map(made, [0, *numbers]):
        path.stat()
    loaded = {r: planish.load(made(r), allow_native=True) for r in [0, *numbers]}
    for batch in batches:
        x = np.random.default_rng(batch).standard_normal((batch, 3, 224, 224)).astype(np.float32)
        fns = {str(r): (lambda exe=exe, x=x: exe(x)) for r, exe in loaded.items()}
        times = interleave(fns, seconds=seconds, min_runs=5, clock="process")
        for r in numbers:
            ratios = np.array(times["0"]) / np.array(times[str(r)])
            low, high = bootstrap(ratios)
            yield {
                "model": made.name, "target": made.target, "batch": batch, "r": r, "ratio": float(np.median(ratios)),
                "low": low, "high": high, "merging": share(made(r), x), "operations": made.flops(0) / made.flops(r),
                "wanted": WANTED.get((made.name, r, batch)), "rounds": len(ratios),
                "dense_ms": float(np.median(times["0"]) * 1e3),
            }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B/16", "ViT-L/16"], choices=sorted(MODELS))
    parser.add_argument("--targets", nargs="+", default=["ort-cpu", "ort-cpu:kernels"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--r", nargs="+", type=int)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each model, target and batch")
    parser.add_argument("--small", action="store_true", help="two narrow layers, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where artifacts are kept for the next call; else nowhere")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return run(options, options.folder or Path(folder))


def run(options: argparse.Namespace, folder: Path) -> int:
    print("| model | target | batch | r | times as fast | wanted | merging | operations | rounds |")
    print("|---|---|---|---|---|---|---|---|---|")
    found = []
    for name in options.models:
        for target in options.targets:
            numbers = options.r or list(DEFAULT_R.get(name, (13, 16)))
            full = f"{target}{',' if ':' in target else ':'}threads=1"
            for row in rows(Made(name, full, options.small, folder), numbers, options.batches, options.seconds):
                found.append(row)
                wanted = f"{row['wanted']:g}" if row["wanted"] else ""
                interval = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
                cells = [name, target, row["batch"], row["r"], interval, wanted, f"{row['merging']:.1%}"]
                cells += [f"{row['operations']:.2f}", row["rounds"]]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if not options.small:
        missed = [r for r in found if (r["wanted"] or 0) > r["ratio"] or r["merging"] > SHARE]
        print(f"{len(missed)} rows miss what is wanted" if missed else "every row has what is wanted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
