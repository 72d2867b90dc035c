"""One step of decoding over a cache in 8 bits or float16, against the same over a cache in float32.

    python benchmarks/cache_formats.py [--rows GPT-2 Llama] [--past 512 2048 8192] [--seconds 6] [--small] [--json FILE]

A GPT-2 (hidden 768, 12 heads of 64) and a Llama shape (hidden 1024, 16 heads of 64 on 4 of keys), four layers each,
with random weights and a vocabulary that has the share of the whole model's time that a GPT-2's has in twelve layers.
Every form is an executable of planish's, its decode entry bound to its caches as `generate` binds it; one thread,
processor time, interleaved, 95 % bootstrap intervals.

The caches hold what `prefill` makes of a random prompt, rounded. The error is relative L2 of the logits against those
of the float32 cache, the worst of some next tokens. Bytes are those of a token in all caches.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import planish
from planish.ir.causal_lm import DECODE, IDS, LENGTHS, LOGITS, PREFILL, cache_layer
from planish.runtime.caches import fitting
from planish.runtime.executable import Executable
from planish.runtime.measure import interleave, ratio
from planish.runtime.ort_bound import BoundRun

#: Name → target, approximate pass. The first is what the others are measured against.
FORMS = {
    "float32": ("ort-cpu:kernels,threads=1", None),
    "int8, kernel": ("ort-cpu:kernels,threads=1", "quantize-cache"),
    "int8, ONNX Runtime": ("ort-cpu:threads=1", "quantize-cache"),
    "float16, kernel": ("ort-cpu:kernels,threads=1", "quantize-cache{format='float16'}"),
    "float16, ONNX Runtime": ("ort-cpu:threads=1", "quantize-cache{format='float16'}"),
}
ROOM, CALIBRATION, STEPS = 8, 64, 4


def model_of(name: str, positions: int, small: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    layers = 1 if small else 4
    vocabulary = 500 if small else 50257 * layers // 12
    if name == "GPT-2":
        wide = {"n_embd": 128, "n_head": 2} if small else {}
        config = GPT2Config(n_layer=layers, vocab_size=vocabulary, n_positions=positions, **wide)
        return GPT2LMHeadModel(config).eval()
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    if small:
        sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=positions)
    ).eval()


class Form:
    """An executable, and its decode entry over caches of its own."""

    def __init__(self, name: str, model: Any) -> None:
        target, approximate = FORMS[name]
        random = np.random.default_rng(1)
        prompts = random.integers(1, model.config.vocab_size, (2, CALIBRATION))
        self.exe: Executable = planish.optimize(
            model,
            target,
            task="causal-lm",
            calibration=prompts,
            approximate=approximate,
            budget=planish.Budget(gates=False),
        )
        if approximate:
            entry = self.exe.report.ledger[approximate]
            assert entry.fired == model.config.num_hidden_layers, entry.declined

    def bind(self, caches: dict[str, np.ndarray], tokens: int) -> None:
        """Over float32 caches (as `prefill` gives them) of so many tokens."""
        runner = self.exe.runners[DECODE]
        names = {spec.name for spec in runner.inputs}
        graph = self.exe.program.entry(DECODE).graph
        self.ids, self.lengths = np.ones((1, 1), np.int64), np.array([tokens])
        feeds = fitting(graph, names, {IDS: self.ids, LENGTHS: self.lengths, **caches})
        self.caches = {name: _placed(value) for name, value in feeds.items() if cache_layer(name) is not None}
        self.logits = next(np.zeros((1, s.shape[1]), np.float32) for s in runner.outputs if s.name == LOGITS)
        outputs = {name.replace("past_", "present_", 1): value for name, value in self.caches.items()}
        inputs = {IDS: self.ids, LENGTHS: self.lengths, **self.caches}
        self.step = BoundRun(runner, inputs, {LOGITS: self.logits, **outputs})

    def bytes_per_token(self) -> int:
        return sum(value.nbytes // value.shape[2] for value in self.caches.values())


def _placed(array: np.ndarray) -> np.ndarray:
    """A copy with room for new tokens."""
    shape = list(array.shape)
    shape[2] += ROOM
    made = np.zeros(shape, array.dtype)
    made[:, :, : array.shape[2]] = array
    return made


def measure(name: str, past: list[int], seconds: float, small: bool) -> list[dict[str, Any]]:
    model = model_of(name, max(*past, CALIBRATION) + ROOM, small)
    forms = {form: Form(form, model) for form in FORMS}
    rows = []
    for tokens in past:
        prompt = np.random.default_rng(tokens).integers(1, model.config.vocab_size, (1, tokens))
        first = forms["float32"].exe.run({IDS: prompt, LENGTHS: np.array([tokens])}, PREFILL)
        caches = {k.replace("present_", "past_", 1): v for k, v in first.items() if cache_layer(k) is not None}
        logits: dict[str, list[np.ndarray]] = {}
        for form, made in forms.items():
            made.bind(caches, tokens)
            logits[form] = []
            for step in range(STEPS):
                made.ids[:], made.lengths[:] = 17 + step, tokens + step
                made.step()
                logits[form].append(made.logits.copy())
        times = interleave({form: made.step for form, made in forms.items()}, seconds=seconds, clock="process")
        for form, made in forms.items():
            found = ratio(times["float32"], times[form])
            error = max(
                float(np.linalg.norm(a - b) / np.linalg.norm(b))
                for a, b in zip(logits[form], logits["float32"], strict=True)
            )
            rows.append(
                {
                    "model": name,
                    "past": tokens,
                    "form": form,
                    "speed": found.median,
                    "low": found.low,
                    "high": found.high,
                    "ms": found.candidate_ms,
                    "error": error,
                    "bytes": made.bytes_per_token(),
                    "share": made.bytes_per_token() / forms["float32"].bytes_per_token(),
                }
            )
            print(
                "{model:>6} {past:>6} {form:>22} {speed:7.2f} [{low:.2f}, {high:.2f}] {ms:9.2f} {error:9.1e} "
                "{bytes:>7} {share:6.3f}".format(**rows[-1]),
                flush=True,
            )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", nargs="+", default=["GPT-2", "Llama"], choices=["GPT-2", "Llama"])
    parser.add_argument("--past", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--small", action="store_true", help="one layer: shows that it runs")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    head = ("model", "past", "cache", "times as fast", "ms", "error", "bytes", "share")
    print("{:>6} {:>6} {:>22} {:>20} {:>9} {:>9} {:>7} {:>6}".format(*head))
    rows = [row for name in given.rows for row in measure(name, given.past, given.seconds, given.small)]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
