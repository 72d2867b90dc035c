"""What the benchmarks on a GPU gave, against what is asked of them: one line for each promise.

    python benchmarks/cuda_summary.py [FOLDER] [--run]

FOLDER (benchmarks/results) has the JSON of the benchmarks; `--run` makes it, one after another on the card at hand. A
line says what was measured, what is asked, and whether it holds; what was not run is said to be so. The exit code is 1
if a line that was measured does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
#: Name of the JSON → the script and its arguments.
BENCHMARKS = {
    "ort_cuda": ("ort_cuda.py", "--targets", "ort-cuda:dtype=float16", "ort-cuda:dtype=float16,kernels", "--json"),
    "cuda_attention": ("cuda_attention.py", "--json"),
    "cuda_relational": ("cuda_relational.py", "--sizes", "bgs,am", "--json"),
    "cuda_relational_hub": ("cuda_relational.py", "--sizes", "am-1.2,am-hub", "--json"),
    "cuda_tokens": ("cuda_tokens.py", "--json"),
    "cuda_merge_pipeline": ("cuda_merge_pipeline.py", "--json"),
    "cuda_gemv": ("cuda_gemv.py", "--json"),
    "cuda_weights": ("cuda_weights.py", "--json"),
    "cuda_memory": ("cuda_memory.py", "--out"),
    "cuda_decode": ("cuda_decode.py", "--json"),
    "cuda_buckets": ("cuda_buckets.py", "--json"),
}
#: What is measured, the figure, the limit, and whether the figure may not be above it (else not below).
Line = tuple[str, float, float, bool]


def models(data: Any) -> Iterator[Line]:
    """Whole models on ort-cuda against the fastest peer of each kind."""
    for name, row in data["rows"].items():
        ms = {who: item["ms"] for who, item in row.items() if "ms" in item}
        ours = min(time for who, time in ms.items() if who.startswith("ort-cuda"))
        if "ort_fusions, graph" in ms:
            yield f"{name}: against ort_fusions in a graph", ms["ort_fusions, graph"] / ours, 1.0, False
        if name == "bert":
            yield f"{name}: against torch.compile in a graph", ms["HF torch.compile, graph"] / ours, 2.0, False
        best = min(time for who, time in ms.items() if not who.startswith("ort-cuda"))
        yield f"{name}: against the best peer", best / ours, 1.0, False


def attention(data: Any, other: Any) -> Iterator[Line]:
    """S2's pattern, prompts and decoding; how fast a copy is may be of another benchmark on the same card."""
    same = data.get("gpu") == other.get("gpu")
    copy = data.get("copy_bytes_s", other.get("copy_bytes_s") if same else None)
    for row in data["rows"]:
        if row["length"] < 32768:
            continue
        at = f"S2, block {row['block']}, {row['length'] >> 10}K"
        if row["kind"] == "prefill":
            if "flex" in row:
                yield f"{at}: prompt against FlexAttention", row["flex"] / row["s2"], 0.9, False
            if row["length"] == 65536:
                yield f"{at}: prompt against torch's flash", row["flash"] / row["s2"], 6.0, False
            continue
        yield f"{at}: step against the best dense", min(row["flash"], row["cudnn"]) / row["s2"], 4.0, False
        if copy is not None:
            yield f"{at}: step over the bandwidth floor", copy / 1e9 / row["gb_s"], 1.5, True


def relational(data: Any) -> Iterator[Line]:
    """Layers at am's size; where PyG does not fit, at the next smaller one."""
    rows = {(row["layer"], row["size"], row["who"]): row for row in data["rows"]}

    def ratio(layer: str, size: str, who: str, key: str) -> float | None:
        ours, theirs = rows.get((layer, size, "planish"), {}), rows.get((layer, size, who), {})
        return theirs[key] / ours[key] if key in ours and key in theirs else None

    for layer, who, key, limit in (
        ("rgcn", "by hand", "forward_ms", 6.0),
        ("rgcn", "RGCNConv", "forward_ms", 50.0),
        ("rgcn", "by hand", "both_ms", 4.0),
        ("rgat", "RGATConv", "forward_ms", 10.0),
        ("hgt", "HGTConv", "forward_ms", 10.0),
    ):
        for size in ("am", "bgs"):
            found = ratio(layer, size, who, key)
            if found is not None:
                what = "forward" if key == "forward_ms" else "forward and backward"
                yield f"{layer} at {size}'s size, {what}: against {who}", found, limit, False
                break


def tokens(data: Any) -> Iterator[Line]:
    """Vision transformers that merge tokens against the plain net, and against it with sums and norms in one kernel."""
    for model in dict.fromkeys(row["model"] for row in data["rows"]):
        best = max((row for row in data["rows"] if row["model"] == model), key=lambda row: row["ratio"])
        yield f"{model}: merging against the plain net", best["ratio"], 1.5, False
        yield f"{model}: merging against the plain net with sums in norms", best["ratio_fused"], 1.5, False


def merging(data: Any) -> Iterator[Line]:
    """The same through target ort-cuda, against planish's exact program in a graph."""
    for row in data["rows"]:
        yield f"{row['model']} on ort-cuda: merging against the exact program", row["ratio"], 1.5, False


def memory(data: Any) -> Iterator[Line]:
    """Decoding under budgets: the peak's share of the budget, whether tokens are the same, speed against accelerate."""
    rows = {name: row for name, row in data["rows"].items() if "error" not in row}
    for name, row in rows.items():
        if "limit" in row and name.startswith("planish"):
            yield f"{name}: peak over the budget", row["peak"] / row["limit"], 1.0, True
        if "same_tokens" in row:
            yield f"{name}: tokens as without a budget (1: all)", float(row["same_tokens"]), 1.0, False
    for ours, peers in (
        ("planish, a quarter of the weights", ("accelerate, max_memory a quarter", "accelerate, cpu_offload")),
        ("planish, 4 times the context, by the rule", ("accelerate and offloaded cache, 4 times the context",)),
    ):
        speeds = [rows[peer]["tokens_per_second"] for peer in peers if peer in rows]
        if ours in rows and speeds:
            yield f"{ours}: tokens/s against accelerate", rows[ours]["tokens_per_second"] / max(speeds), 1.0, False


def cards(folder: Path) -> dict[str, list[str]]:
    """Card → the benchmarks that were run on it."""
    found: dict[str, list[str]] = {}
    for name in BENCHMARKS:
        if (path := folder / f"{name}.json").exists():
            data = json.loads(path.read_text())
            found.setdefault(data.get("gpu", data.get("card", "an unknown card")), []).append(name)
    return found


def lines(folder: Path) -> Iterator[tuple[str, list[Line] | None]]:
    """By benchmark; None for those without results."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    readers = {
        "ort_cuda": models,
        "cuda_attention": lambda data: attention(data, found.get("cuda_gemv", {})),
        "cuda_relational": relational,
        "cuda_tokens": tokens,
        "cuda_merge_pipeline": merging,
        "cuda_memory": memory,
    }
    for name, reader in readers.items():
        yield name, list(reader(found[name])) if name in found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=HERE / "results")
    parser.add_argument("--run", action="store_true", help="run the benchmarks first")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="names of benchmarks to run")
    given = parser.parse_args()
    if given.run:
        given.folder.mkdir(parents=True, exist_ok=True)
        for name in given.only.split(","):
            script, *arguments = BENCHMARKS[name]
            command = [sys.executable, str(HERE / script), *arguments, str(given.folder / f"{name}.json")]
            done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(HERE.parent)}, check=False)
            if done.returncode:
                print(f"{name}: ended with {done.returncode}", file=sys.stderr)
    held = True
    print("| | measured | asked | |\n|---|---|---|---|")
    for name, found in lines(given.folder):
        if found is None:
            print(f"| {name} | not run | | |")
            continue
        for what, figure, limit, at_most in found:
            holds = figure <= limit if at_most else figure >= limit
            held &= holds
            print(f"| {what} | {figure:.2f} | {'≤' if at_most else '≥'} {limit:g} | {'holds' if holds else 'FAILS'} |")
    for card, names in cards(given.folder).items():
        print(f"\n{card}: {', '.join(names)}.")
    sys.exit(not held)


if __name__ == "__main__":
    main()
