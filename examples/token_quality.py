"""Accuracy against measured throughput of a vision transformer with fewer tokens: merging, random pruning, FEATHER.

    python examples/token_quality.py [--small] [--svg FILE] [--json FILE]

Trains a small ViT (6 layers, 100 patches) for a few minutes on images that it makes: a shape with a texture on a noisy
ground, and something to distract. The model says which of 16 combinations it sees, and where its middle is. Then tokens
are merged (`merge-tokens`, Token Merging) or dropped (`prune-tokens`: by chance, or in FEATHER's two stages), from mild
to strong, and both answers are measured on new images beside the throughput, all variants interleaved. A classifier may
still be right when the image is no longer there to point at: that is what the second answer is for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import nn

import planish
from planish.passes.base import PassContext
from planish.passes.defaults import default_pipeline
from planish.passes.manager import PassManager
from planish.passes.pipeline import parse_pipeline
from planish.runtime.bench import Bench
from planish.runtime.measure import bootstrap, interleave

TARGET = "ort-cpu:threads=1"
#: Tokens go where attention is one operator, before it is lowered.
BEFORE, AFTER = default_pipeline(TARGET).split(",lower-feed-forward,")
AFTER = f"lower-feed-forward,{AFTER}"
SIZE, PATCH = 40, 4
SHAPES = ("disc", "ring", "wide bar", "tall bar")
TEXTURES = ("rows", "columns", "checks", "plain")
#: How far, in pixels, the middle may be off to count as found.
NEAR = 2.0
#: Method → pass, what changes from mild to strong, and the colour of its line.
METHODS: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "merging": ("merge-tokens{{r={}}}", (8, 16, 24, 40), "#1f77b4"),
    "merging by energy": ("merge-tokens{{r={},match='energy'}}", (8, 16, 24, 40), "#17becf"),
    "FEATHER": ("{},stride=3}}", ((0.5, 0.5), (0.2, 0.3), (0.1, 0.15), (0.02, 0.1)), "#2ca02c"),
    "attention alone": ("{},stride=0}}", ((0.6, 0.5), (0.3, 0.3), (0.2, 0.15), (0.1, 0.1)), "#ff7f0e"),
    "random": ("prune-tokens{{method='random',layers=[1],keep=[{}],span=(1, 100)}}", (0.6, 0.4, 0.2, 0.1), "#d62728"),
}
#: FEATHER's two stages, on the attention of the class token: before the second layer and in the middle.
STAGES = "prune-tokens{{layers=[1, {}],keep={},span=(1, 100),query=0"


# --- images and the model ----------------------------------------------------------------------------------


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (count, 1, SIZE, SIZE), classes (count) and middles in pixels (count, 2)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIZE, 0:SIZE][:, None].astype(np.float32)
    pictures = rng.normal(0, 0.2, (count, SIZE, SIZE)).astype(np.float32)
    ramp = rng.normal(0, 0.02, (count, 2, 1, 1)).astype(np.float32)
    pictures += ramp[:, 0] * (x - SIZE / 2) + ramp[:, 1] * (y - SIZE / 2)
    for _ in range(2):  # discs of one tone, which are no answer
        middle, radius = rng.uniform(0, SIZE, (2, count, 1, 1)), rng.uniform(1.5, 3, (count, 1, 1))
        blot = (x - middle[0]) ** 2 + (y - middle[1]) ** 2 < radius**2
        pictures += blot * rng.choice([-1.0, 1.0], (count, 1, 1)).astype(np.float32)
    size = rng.uniform(5.5, 7.5, (count, 1, 1)).astype(np.float32)
    middle = rng.uniform(8, SIZE - 8, (2, count, 1, 1)).astype(np.float32)
    shape, texture = rng.integers(0, 4, (2, count))
    dx, dy = x - middle[0], y - middle[1]
    away = np.sqrt(dx**2 + dy**2)
    inside = np.stack([
        away < size,
        (away < size) & (away > 0.6 * size),
        np.maximum(abs(dx) / 2.2, abs(dy)) < 0.5 * size,
        np.maximum(abs(dx), abs(dy) / 2.2) < 0.5 * size,
    ])  # fmt: skip
    rows, columns = (v // 2 % 2 * 2 - 1 + 0 * dx for v in (y, x))
    tones = np.stack([rows, columns, rows * columns, np.ones_like(dx)])
    here = np.arange(count)
    pictures = np.where(inside[shape, here], 0.3 * pictures + 1.2 * tones[texture, here], pictures)
    where = np.stack([middle[0].ravel(), middle[1].ravel()], 1)
    labels = torch.from_numpy(shape * len(TEXTURES) + texture)
    return torch.from_numpy(pictures[:, None].astype(np.float32)), labels, torch.from_numpy(where)


class Layer(nn.Module):
    """Attention and a feed-forward network, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Finder(nn.Module):
    """A ViT whose class token says what there is and where: logits (batch, 16), middles in pixels (batch, 2)."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        tokens = (SIZE // PATCH) ** 2
        self.patches = nn.Conv2d(1, width, PATCH, PATCH)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, tokens + 1, width) * 0.1)
        self.layers = nn.ModuleList([Layer(width, heads) for _ in range(layers)])
        self.norm, self.what, self.where = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(width, 2)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        y = self.norm(x[:, 0])
        return self.what(y), self.where(y) * (SIZE / 4) + SIZE / 2


def train(options: argparse.Namespace) -> Finder:
    """Trains on new images in every step; prints on the way."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = Finder(options.layers, options.width, options.heads)
    steps, batch = options.steps, 48
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(steps):
        picture, label, middle = images(batch, seed=step + 1)
        what, where = model(picture)
        loss = nn.functional.cross_entropy(what, label) + nn.functional.smooth_l1_loss(where / PATCH, middle / PATCH)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 8) == 0:
            right = (what.argmax(1) == label).float().mean()
            near = ((where - middle).norm(dim=1) < NEAR).float().mean()
            seconds = time.monotonic() - started
            print(
                f"step {step + 1}: loss {loss.item():.3f}, right {right:.2f}, near {near:.2f}, {seconds:.0f} s",
                flush=True,
            )
    torch.set_num_threads(1)
    return model.eval()


# --- variants and what they cost ---------------------------------------------------------------------------


def passes(method: str, strength: Any, layers: int) -> str:
    """The pass of a method at a strength."""
    form = METHODS[method][0]
    if isinstance(strength, tuple):
        return form.format(STAGES.format(layers // 2, list(strength)))
    return form.format(strength)


def build(model: Finder, options: argparse.Namespace) -> dict[tuple[str, str], Any]:
    """(method, pass) → a compiled variant; the first has all tokens."""
    exe = planish.optimize(
        model,
        TARGET,
        example_inputs=(images(2, seed=0)[0],),
        dynamic_shapes={"image": {0: "batch"}},
        passes=BEFORE,
        budget=planish.Budget(gates=False),
    )
    assert exe.program is not None
    found: dict[tuple[str, str], Any] = {}
    for method, strength in [("all", None), *((m, s) for m in METHODS for s in METHODS[m][1][: options.strengths])]:
        text = "" if strength is None else passes(method, strength, options.layers)
        program = exe.program.clone()
        if text:
            result = PassManager(parse_pipeline(text)).apply(program, PassContext(program.target))
            assert result.fired, result.declined
        PassManager(parse_pipeline(AFTER)).apply(program, PassContext(program.target))
        found[method, text] = Bench(program.target, None).runner(program, "main")
    return found


def study(model: Finder, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both answers and the throughput of every variant."""
    picture, label, middle = images(options.images, seed=10**6)
    rows, steps = [], {}
    for (method, text), runner in build(model, options).items():
        right, off = [], []
        for start in range(0, len(picture), 50):
            part = slice(start, start + 50)
            what, where = runner.run({"image": picture[part].numpy()}).values()
            right += list(what.argmax(1) == label[part].numpy())
            off += list(np.linalg.norm(where - middle[part].numpy(), axis=1))
        near = float(np.mean(np.array(off) < NEAR))
        rows.append({"method": method, "pass": text, "right": float(np.mean(right)), "near": near})
        rows[-1]["pixels"] = float(np.median(off))
        steps[f"{method} {text}"] = runner.prepared({"image": picture[: options.batch].numpy()})
    times = interleave(steps, seconds=options.seconds, clock="process")
    whole = np.array(next(iter(times.values())))
    for row, samples in zip(rows, times.values(), strict=True):
        ratios = whole / np.array(samples)
        row |= {"speedup": float(np.median(ratios)), "interval": bootstrap(ratios)}
    return rows


# --- what is shown -----------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | pass | throughput | right class | middle found | off by, median |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['method']} | `{row['pass'] or '-'}` | {row['speedup']:.2f} [{low:.2f}, {high:.2f}] | "
            f"{row['right']:.1%} | {row['near']:.1%} | {row['pixels']:.2f} px |"
        )
    return "\n".join(lines)


def at_throughput(rows: list[dict[str, Any]], method: str, key: str, speedup: float) -> float:
    """An answer's share at a throughput, between the measured ones; nan beyond the fastest."""
    found = sorted((r["speedup"], r[key]) for r in rows if r["method"] in ("all", method))
    x, y = zip(*found, strict=True)
    return float(np.interp(speedup, x, y, right=np.nan))


def finding(rows: list[dict[str, Any]]) -> str:
    """The methods at one throughput each, between the measured points."""
    lines = ["Right classes and middles found, between the measured points:"]
    for speedup in (1.25, 1.5, 2.0, 3.0):
        cells = []
        for method in METHODS:
            right, near = (at_throughput(rows, method, key, speedup) for key in ("right", "near"))
            cells += [f"{method} {right:.1%} and {near:.1%}"] if not np.isnan(right) else []
        if cells:
            lines.append(f"at {speedup:g} times the throughput: {', '.join(cells)}")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> str:
    """An SVG of two plots: throughput to the right, the share of right answers up."""
    most = max(r["speedup"] for r in rows) * 1.03
    least = min(r["speedup"] for r in rows) // 0.25 * 0.25
    low = min(min(r["right"], r["near"]) for r in rows) // 0.1 * 0.1
    high = min(1.0, max(max(r["right"], r["near"]) for r in rows) // 0.1 * 0.1 + 0.1)
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 400" font-family="sans-serif" font-size="12">',
        '<rect width="960" height="400" fill="white"/>',
    ]
    for left, key, title in (
        (60, "right", "What is it? (16 classes)"),
        (450, "near", "Where is it? (within 2 pixels)"),
    ):
        parts += _axes(left, title, (least, most), (low, high))
        for method, (_, _, color) in METHODS.items():
            found = sorted((r["speedup"], r[key]) for r in rows if r["method"] in ("all", method))
            places = [
                (left + 330 * (x - least) / (most - least), 340 - 290 * (y - low) / (high - low)) for x, y in found
            ]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{color}"/>' for x, y in places]
    for number, (method, (_, _, color)) in enumerate(METHODS.items()):
        y = 70 + 22 * number
        parts.append(f'<path d="M800 {y}h22" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="828" y="{y + 4}">{method}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _axes(left: int, title: str, across: tuple[float, float], up: tuple[float, float]) -> list[str]:
    (least, most), (low, high) = across, up
    parts = [f'<text x="{left}" y="28" font-size="14">{title}</text>']
    for number in range(round((high - low) / 0.1) + 1):
        share = low + 0.1 * number
        y = 340 - 290 * (share - low) / (high - low)
        parts.append(f'<path d="M{left} {y:.1f}h330" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    step = 0.25 if most - least < 1.6 else 0.5
    for number in range(round(least / step + 0.49), int(most / step) + 1):
        x = left + 330 * (number * step - least) / (most - least)
        parts.append(f'<path d="M{x:.1f} 340v5" stroke="black"/>')
        parts.append(f'<text x="{x:.1f}" y="359" text-anchor="middle">{number * step:g}</text>')
    parts.append(f'<path d="M{left} 50V340h330" stroke="black" fill="none"/>')
    parts.append(f'<text x="{left + 165}" y="384" text-anchor="middle">measured throughput, all tokens = 1</text>')
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a smaller model, hardly trained: shows that it runs")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=800, help="of training, on 48 images each")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="for training")
    parser.add_argument("--images", type=int, default=2000, help="new ones, to measure answers on")
    parser.add_argument("--batch", type=int, default=8, help="for measuring throughput")
    parser.add_argument("--seconds", type=float, default=20.0, help="for measuring throughput")
    parser.add_argument("--strengths", type=int, default=4, help="how many of each method")
    parser.add_argument("--svg", type=Path, help="where to write the plot")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    if options.small:
        options.layers, options.width, options.steps, options.images, options.seconds = 4, 32, 12, 50, 1.0
        options.strengths = 2
    rows = study(train(options), options)
    print(f"\n{table(rows)}\n\n{finding(rows)}")
    if options.svg:
        options.svg.write_text(draw(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
