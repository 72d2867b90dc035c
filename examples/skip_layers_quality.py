"""Perplexity against measured decode speed, for several choices of the layers that are left out.

    python examples/skip_layers_quality.py [--small] [--layer-drop 0.3] [--svg FILE] [--json FILE]

Trains a small Llama (8 layers, hidden 128, one token a byte) for about a minute on the language reference that ships
with Python, then leaves layers out of its `decode` entry: prompts run through all layers, as in Unified Layer Skipping
(arXiv 2404.06954). Perplexity is that of held-out text, byte by byte through `decode`; speed is measured, all variants
interleaved. The paper says that layers spread evenly beat a block of neighbours; whether they do here is printed.

No layer of a model is redundant that was trained with all of them: `--layer-drop 0.3` leaves each inner layer out of
three in ten training steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import planish
from planish.ir.causal_lm import DECODE, IDS, LENGTHS, LOGITS, PREFILL, cache_layer
from planish.passes.base import PassContext
from planish.passes.manager import PassManager
from planish.passes.pipeline import parse_pipeline
from planish.runtime.bench import Bench
from planish.runtime.measure import bootstrap, interleave
from planish.runtime.ort import OrtRunner
from planish.runtime.ort_bound import BoundRun

TARGET = "ort-cpu:threads=1"
CONTIGUOUS = ("contiguous-top", "contiguous-bottom", "contiguous-middle")
METHODS = ("balanced", "released", "importance", *CONTIGUOUS)
COLORS = dict(zip(METHODS, ("#1f77b4", "#17becf", "#2ca02c", "#d62728", "#ff7f0e", "#9467bd"), strict=True))


# --- the model ---------------------------------------------------------------------------------------------


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the language reference: to train on, and every tenth topic to test with."""
    from pydoc_data.topics import topics

    parts: tuple[list[str], list[str]] = ([], [])
    for number, name in enumerate(sorted(topics)):
        parts[number % 10 == 9].append(topics[name])
    train, test = (np.frombuffer("\n".join(part).encode(), np.uint8).astype(np.int64) for part in parts)
    return train, test


def windows(text: np.ndarray, count: int, length: int, seed: int) -> np.ndarray:
    """Stretches of a text, int64[count, length]."""
    starts = np.random.default_rng(seed).integers(0, len(text) - length, count)
    return text[starts[:, None] + np.arange(length)]


def train(text: np.ndarray, options: argparse.Namespace) -> Any:
    """A small causal language model; prints its loss on the way."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    config = LlamaConfig(
        hidden_size=64 if options.small else 128,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=176 if options.small else 352,
        vocab_size=256,
        max_position_embeddings=256,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(text) / 1e3:.0f} kB of text, {options.steps} steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    warm = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: min((at + 1) / warm, 0.03 + 0.97 * (1 + math.cos(math.pi * at / options.steps)) / 2)
    )
    if options.layer_drop:
        drop_layers(model, options.layer_drop)
    started = time.monotonic()
    for step in range(options.steps):
        ids = torch.from_numpy(windows(text, 16, 96, seed=step))
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, options.steps // 8) == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    for layer in model.model.layers:
        layer.__dict__.pop("forward", None)
    torch.set_num_threads(1)
    return model.eval()


def drop_layers(model: Any, share: float) -> None:
    """Leaves each layer but the first and the last out of that share of the training steps."""
    coin = random.Random(0)

    def dropping(forward: Any) -> Any:
        return lambda hidden, *args, **kwargs: hidden if coin.random() < share else forward(hidden, *args, **kwargs)

    for layer in model.model.layers[1:-1]:
        layer.forward = dropping(layer.forward)


# --- variants and what they cost ---------------------------------------------------------------------------


def passes(method: str, total: int, kept: int) -> str:
    """The pipeline that leaves `kept` of `total` layers by a method."""
    gone = total - kept
    if method in CONTIGUOUS:
        # "middle" keeps the first and the last layer, as the unified rules do.
        first = {"contiguous-top": kept, "contiguous-bottom": 0, "contiguous-middle": (total - gone + 1) // 2}[method]
        return f"skip-layers{{layers=[{', '.join(map(str, range(first, first + gone)))}]}}"
    how = "by='importance'" if method == "importance" else f"rule='{method}'"
    return f"skip-layers{{speedup={total / kept!r},{how}}}"


def without_layers(exe: planish.Executable, pipeline: str) -> tuple[OrtRunner, str]:
    """`decode` after a pipeline, and which layers are gone; what was captured once is used for all variants."""
    assert exe.program is not None
    program = exe.program.clone()
    bench = Bench(program.target, program.calibration)
    result = PassManager(parse_pipeline(pipeline)).apply(program, PassContext(program.target, run=bench.run_entry))
    assert result.fired, result.declined
    note = result.notes[0]
    return bench.runner(program, DECODE), note[note.index("(") + 1 : note.index(")")]


class Decoder:
    """`decode` bound to caches of its own, filled from the prompts by `prefill` with all layers.

    Args:
        decode: the entry of a variant.
        exe: with all layers.
        ids: prompts of one length, int64[batch, tokens].
        room: positions after the prompt.
    """

    def __init__(self, decode: OrtRunner, exe: planish.Executable, ids: np.ndarray, room: int) -> None:
        batch, tokens = ids.shape
        self.start = tokens
        self.ids, self.lengths = np.zeros((batch, 1), np.int64), np.full(batch, tokens, np.int64)
        first = exe.run({IDS: ids, LENGTHS: self.lengths}, entry=PREFILL)
        self.logits = np.ascontiguousarray(first[LOGITS])
        caches: dict[str, np.ndarray] = {}
        for spec in decode.inputs:
            if cache_layer(spec.name) is not None:
                present = first[spec.name.replace("past", "present")]
                caches[spec.name] = np.zeros((*present.shape[:2], tokens + room, present.shape[3]), np.float32)
                caches[spec.name][:, :, :tokens] = present
        outputs = {name.replace("past", "present"): cache for name, cache in caches.items()}
        inputs = {IDS: self.ids, LENGTHS: self.lengths, **caches}
        self.run = BoundRun(decode, inputs, {LOGITS: self.logits, **outputs})

    def perplexity(self, text: np.ndarray) -> float:
        """Of the bytes that follow the prompts and a first byte after them, int64[batch, 1 + count]."""
        losses = []
        for at in range(text.shape[1] - 1):
            self.ids[:, 0], self.lengths[:] = text[:, at], self.start + at
            self.run()
            losses.append(cross_entropy(self.logits, text[:, at + 1]))
        return float(np.exp(np.mean(losses)))


def cross_entropy(logits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of the wanted tokens, in nats."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(wanted)), wanted]
    return result


def study(exe: planish.Executable, test: np.ndarray, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Perplexity and speed of every variant; the first row has all layers."""
    prompt, more = 32, 8 if options.small else 64
    text = windows(test, 16 if options.small else 64, prompt + 1 + more, seed=1)
    decode = exe.runners[DECODE]
    assert isinstance(decode, OrtRunner)
    runners: dict[tuple[str, int], tuple[OrtRunner, str]] = {("all", options.layers): (decode, "")}
    for kept in options.kept:
        for method in METHODS:
            runners[method, kept] = without_layers(exe, passes(method, options.layers, kept))
    rows = []
    steps = {}
    for (method, kept), (runner, removed) in runners.items():
        perplexity = Decoder(runner, exe, text[:, :prompt], more + 1).perplexity(text[:, prompt:])
        rows.append({"method": method, "kept": kept, "removed": removed, "perplexity": perplexity})
        steps[f"{method} {kept}"] = Decoder(runner, exe, text[:1, :prompt], more + 1).run
    times = interleave(steps, seconds=options.seconds, clock="process")
    whole = np.array(next(iter(times.values())))
    for row, samples in zip(rows, times.values(), strict=True):
        ratios = whole / np.array(samples)
        row |= {"ms": 1e3 * float(np.median(samples)), "speedup": float(np.median(ratios))}
        row["interval"] = bootstrap(ratios)
    return rows


def gate(model: Any, test: np.ndarray, options: argparse.Namespace) -> None:
    """The error gate with perplexity as the metric: how much skipping a limit allows."""
    # The gates run `decode` on the likeliest byte after each prompt: prompts are those where the text has it too.
    text = windows(test, 64 if options.small else 256, 34, seed=2)
    with torch.no_grad():
        likeliest = model(input_ids=torch.from_numpy(text[:, :32].copy())).logits[:, -1].argmax(-1).numpy()
    text = text[likeliest == text[:, 32]][:64]

    def rise(expected: list[Any], got: list[Any]) -> float:
        """By how much, as a share, the perplexity of the next byte has risen: after `prefill` and after `decode`."""
        costs = [
            [np.exp(cross_entropy(out[LOGITS], text[:, 32 + at]).mean()) for at, out in enumerate(outputs)]
            for outputs in (expected, got)
        ]
        return max(0.0, *(float(b / a - 1) for a, b in zip(*costs, strict=True)))

    for limit, speedup in ((0.1, 1.5),) if options.small else ((0.1, 1.5), (1.0, 1.5)):
        exe = planish.optimize(
            model,
            TARGET,
            task="causal-lm",
            passes=f"skip-layers{{speedup={speedup}}}",
            calibration=text[:, :32].copy(),
            budget=planish.Budget(error=limit, metric=rise, seconds=2 if options.small else 10),
        )
        assert exe.report is not None
        entry = next(e for e in exe.report.ledger.entries if e.kind == "approximate")
        print(f"  perplexity may rise by {limit:.0%}: {entry.name}: {entry.verdict}")


# --- what is shown -----------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Perplexity by layers kept and method, and the measured speed-up of each number of layers."""
    lines = ["| layers | speed-up of decode | " + " | ".join(METHODS) + " |", "|" + "---|" * (2 + len(METHODS))]
    for kept in dict.fromkeys(row["kept"] for row in rows):
        same = {row["method"]: row for row in rows if row["kept"] == kept}
        speed = float(np.median([row["speedup"] for row in same.values()]))
        best = min(row["perplexity"] for row in same.values())
        cells = []
        for method in METHODS:
            value = same.get(method, same.get("all", {}))["perplexity"]
            cells.append(f"**{value:.2f}**" if value == best and "all" not in same else f"{value:.2f}")
        lines.append(f"| {kept} | {speed:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def finding(rows: list[dict[str, Any]]) -> list[str]:
    """The paper's claim, number of layers by number of layers."""
    found = {(row["method"], row["kept"]): row for row in rows}
    sizes = sorted({kept for method, kept in found if method != "all"}, reverse=True)
    lines, holds = [], True
    for other in METHODS[1:]:
        # Two methods may well choose the same layers: that is no comparison.
        apart = [kept for kept in sizes if found["balanced", kept]["removed"] != found[other, kept]["removed"]]
        better = [k for k in apart if found["balanced", k]["perplexity"] < found[other, k]["perplexity"]]
        which = f" ({', '.join(map(str, better))} layers)" if 0 < len(better) < len(apart) else ""
        lines.append(f"balanced against {other}: better {len(better)} of {len(apart)} times that the two differ{which}")
        holds &= other not in CONTIGUOUS or better == apart
    answer = "holds" if holds else "does not hold everywhere"
    return [*lines, f"The claim that balanced beats contiguous {answer} here."]


def draw(rows: list[dict[str, Any]], title: str) -> str:
    """An SVG: measured speed-up to the right, perplexity (logarithmic) up."""
    points = [(row["speedup"], row["perplexity"]) for row in rows]
    x_most, low, high = max(x for x, _ in points) * 1.03, min(y for _, y in points), max(y for _, y in points)
    low, high = low / 1.15, high * 1.15

    def place(x: float, y: float) -> tuple[float, float]:
        return 60 + 470 * (x - 1) / (x_most - 1), 330 - 290 * math.log(y / low) / math.log(high / low)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 380" font-family="sans-serif" font-size="12">',
        '<rect width="700" height="380" fill="white"/>',
        f'<text x="60" y="24" font-size="14">{title}</text>',
        '<text x="295" y="372" text-anchor="middle">measured speed-up of decode, batch 1</text>',
        '<text x="16" y="185" text-anchor="middle" transform="rotate(-90 16 185)">perplexity per byte</text>',
    ]
    ticks = [y for y in (m * 10**e for e in range(5) for m in (1, 1.5, 2, 3, 5, 7)) if low <= y <= high]
    for y in ticks:
        at = place(1, y)[1]
        parts.append(f'<path d="M60 {at:.1f}H530" stroke="#ddd"/>')
        parts.append(f'<text x="54" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    step = 0.25 if x_most < 2.6 else 0.5
    for number in range(int((x_most - 1) / step) + 1):
        at = place(1 + number * step, low)[0]
        parts.append(f'<path d="M{at:.1f} 330v5" stroke="black"/>')
        parts.append(f'<text x="{at:.1f}" y="349" text-anchor="middle">{1 + number * step:g}</text>')
    parts.append('<path d="M60 40V330H530" stroke="black" fill="none"/>')
    for number, method in enumerate(METHODS):
        found = [place(r["speedup"], r["perplexity"]) for r in rows if r["method"] in ("all", method)]
        color, width = COLORS[method], 3 if method == "balanced" else 1.6
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in found)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="{width}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width + 1.2:g}" fill="{color}"/>' for x, y in found]
        y = 60 + 22 * number
        parts.append(f'<path d="M545 {y}h22" stroke="{color}" stroke-width="{width}"/>')
        parts.append(f'<text x="573" y="{y + 4}">{method}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a smaller model, hardly trained: shows that it runs")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="for training")
    parser.add_argument("--layer-drop", type=float, default=0.0, help="share of training steps without an inner layer")
    parser.add_argument("--seconds", type=float, default=20.0, help="for measuring speed")
    parser.add_argument("--svg", type=Path, help="where to write the plot")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    options.kept = [7, 6, 5, 4, 3, 2]
    if options.small:
        options.layers, options.steps, options.seconds, options.kept = 4, 20, 1.0, [3, 2]
    options.kept = [kept for kept in options.kept if kept < options.layers]
    text, test = corpus()
    model = train(text, options)
    prompts = windows(test, 8, 32, seed=3)
    exe = planish.optimize(model, TARGET, task="causal-lm", calibration=prompts, budget=planish.Budget(gates=False))
    rows = study(exe, test, options)
    print(
        f"\nPerplexity of held-out text, {options.layers} layers, layer drop {options.layer_drop:g}\n\n{table(rows)}\n"
    )
    print("\n".join(finding(rows)))
    if options.svg:
        how = f"trained with layer drop {options.layer_drop:g}" if options.layer_drop else "trained with all layers"
        options.svg.write_text(draw(rows, f"Layers left out of a Llama of {options.layers} layers, {how}"))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\nThe error gate with perplexity as its metric:")
    gate(model, test, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
