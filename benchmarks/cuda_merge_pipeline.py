"""Token merging through the whole of target ort-cuda: vision transformers optimized with it and without.

    python benchmarks/cuda_merge_pipeline.py [--models B,L] [--batch 64] [--gates] [--profile] [--json FILE]

Models are those of transformers. Both programs are planish's, in float16 with kernels, and run as CUDA graphs with
inputs and outputs on the GPU; times are of a call until its result is there, medians of interleaved rounds. Without
`--gates` nothing is measured while they are made; with it the report of merging is printed. Errors are relative L2 of
the logits: of the exact program to the float32 module, of the merged one to the same merging in float32 on the GPU, and
to the float32 module, which is what merging costs. Weights are random, biases and scales not trivial.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

import torch

TARGET = "ort-cuda:dtype=float16,kernels"
#: Name → settings of transformers' ViTConfig, and how many tokens each layer merges.
MODELS: dict[str, tuple[dict[str, int], int]] = {
    "B": ({}, 16),
    "L": ({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}, 8),
    "tiny": ({"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 256}, 16),
}
VARIANTS = ("exact", "merged", "float32")


class Logits(torch.nn.Module):
    """A classifier of transformers, of one input and one output."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.module(x).logits
        return logits


def build(name: str, batch: int) -> tuple[Logits, torch.Tensor]:
    """The float32 module and its input; the same each time."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = Logits(ViTForImageClassification(ViTConfig(**MODELS[name][0], num_labels=1000)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval(), torch.randn(batch, 3, 224, 224)


def prepare(name: str, batch: int, variant: str, folder: Path, gates: bool, target: str) -> None:
    """Writes one artifact, and what the float32 module gives."""
    import planish

    model, x = build(name, batch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if variant == "exact":
        with torch.no_grad():
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            torch.save(model.to(device)(x.to(device)).cpu(), folder / f"{name}.reference.pt")
            model.cpu()
    started = time.perf_counter()
    merging = None if variant == "exact" else f"merge-tokens{{r={MODELS[name][1]}}}"
    gates = gates and variant != "float32"
    exe = planish.optimize(
        model,
        "ort-cuda" if variant == "float32" else target,
        example_inputs=(x,),
        approximate=merging,
        budget=planish.Budget(error=0.5, gates=gates),
    )
    exe.export(folder / f"{name}.{variant}", overwrite=True)
    print(f"{name} {variant}: {time.perf_counter() - started:.1f} s", flush=True)
    if gates:
        exe.report.print()


def calls_of(name: str, batch: int, folder: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """Variant → buffers of its program, filled with the input."""
    import planish

    x = build(name, batch)[1].cuda()
    made = {}
    for variant in VARIANTS:
        try:
            runner: Any = planish.load(folder / f"{name}.{variant}", allow_native=True).runners["main"]
            print(name, variant, runner.notes, flush=True)
            made[variant] = runner, runner.buffers({runner.inputs[0].name: x})
        except Exception:
            traceback.print_exc()
    return made, x


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def measure(name: str, batch: int, folder: Path, rounds: int, profile: bool) -> dict[str, Any]:
    """Milliseconds and errors of one model."""
    made, _ = calls_of(name, batch, folder)
    results = {}
    for variant, (runner, buffers) in made.items():
        for _ in range(3):
            buffers.run()
        torch.cuda.synchronize()
        results[variant] = buffers.view(runner.outputs[0].name).clone()
    reference = torch.load(folder / f"{name}.reference.pt").cuda()
    row: dict[str, Any] = {"model": f"ViT-{name}/16", "batch": batch, "r": MODELS[name][1]}
    timed = {variant: made[variant][1].run for variant in ("exact", "merged") if variant in made}
    spent: dict[str, list[float]] = {variant: [] for variant in timed}
    for _ in range(rounds):
        for variant, call in timed.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            spent[variant].append((time.perf_counter() - started) * 1e3)
    row["ms"] = {variant: median(values) for variant, values in spent.items()}
    row["quartiles"] = {v: [sorted(t)[len(t) // 4], sorted(t)[3 * len(t) // 4]] for v, t in spent.items()}
    row["ratio"] = row["ms"]["exact"] / row["ms"]["merged"]
    row["error_exact"] = relative(results["exact"], reference)
    row["error_merged"] = relative(results["merged"], results["float32"]) if "float32" in results else None
    row["cost"] = relative(results["merged"], reference)
    if profile:
        for variant, call in timed.items():
            print(f"{name} {variant}\n{kernels(call)}", flush=True)
    return row


def kernels(call: Any, runs: int = 5) -> str:
    """What a call spends in each kernel, in µs, by CUPTI."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(runs):
            call()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    lines = [
        f"  {event.self_device_time_total / runs:8.1f} {event.count / runs:5.0f}  {event.key[:110]}"
        for event in rows[:22]
    ]
    total = sum(event.self_device_time_total for event in rows) / runs
    return "\n".join([*lines, f"  {total:8.1f} in all"])


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | r | exact, ms (error) | merged, ms (error) | times as fast | merging costs |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        merged = f" ({row['error_merged']:.1e})" if row["error_merged"] is not None else ""
        exact = f"{row['ms']['exact']:.3f} ({row['error_exact']:.1e})"
        lines.append(
            f"| {row['model']}, {row['batch']} images | {row['r']} | {exact} | {row['ms']['merged']:.3f}{merged} "
            f"| {row['ratio']:.2f} | {row['cost']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="B,L")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--gates", action="store_true", help="measure while the programs are made")
    parser.add_argument("--profile", action="store_true", help="what is spent in each kernel")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prepare", help="only write one artifact, as model.variant")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="cuda-merge-"))
    folder.mkdir(parents=True, exist_ok=True)
    if given.prepare:
        name, variant = given.prepare.split(".")
        prepare(name, given.batch, variant, folder, given.gates, given.target)
        return
    names = given.models.split(",")
    own = ["--folder", str(folder), "--batch", str(given.batch), "--target", given.target]
    own += ["--gates"] if given.gates else []
    variants = given.variants.split(",")
    started = {
        name: [
            subprocess.Popen([sys.executable, __file__, "--prepare", f"{name}.{variant}", *own]) for variant in variants
        ]
        for name in names
    }
    for process in (process for name in names for process in started[name]):
        process.wait()
    rows = []
    for name in names:
        try:
            rows.append(measure(name, given.batch, folder, given.rounds, given.profile))
        except Exception:
            traceback.print_exc()
    import onnxruntime

    print(torch.cuda.get_device_name(), "torch", torch.__version__, "onnxruntime", onnxruntime.__version__)
    print(table(rows))
    if given.json is not None:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "ort": onnxruntime.__version__}
        given.json.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
