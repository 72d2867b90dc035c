"""Tokens a second of greedy decoding: planish, transformers on the eager model, and ONNX Runtime with a growing cache.

    python benchmarks/decode.py [--small] [--json FILE] [--rounds N]

A GPT-2 of the usual size with random weights, prompts of 64 tokens, 64 new ones; one thread, processor time,
interleaved. "Plain ONNX Runtime" is what ``torch.onnx.export`` makes of one step with a `DynamicCache`: key and value
of every layer come in, grow by a Concat, and go out. All three must give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import planish
from benchmarks.fusion_models import Decode, past_names

ROOT = Path(__file__).resolve().parents[1]
PROMPT, NEW = 64, 64
Generate = Callable[[np.ndarray, int], np.ndarray]


class Plain:
    """One exported step, run token by token; the prompt is read as one step over an empty cache."""

    def __init__(self, model: Any, folder: Path) -> None:
        import onnxruntime as ort

        config = model.config
        heads = config.num_attention_heads
        self.shape = (getattr(config, "num_key_value_heads", heads), config.hidden_size // heads)
        self.names = past_names(config.num_hidden_layers)
        past = [torch.zeros(2, self.shape[0], 5, self.shape[1]) for _ in self.names]
        example = {
            "input_ids": torch.ones(2, 3, dtype=torch.int64),
            "attention_mask": torch.ones(2, 8, dtype=torch.int64),
            "past": past,
        }
        shapes = {
            "input_ids": {0: "batch", 1: "new"},
            "attention_mask": {0: "batch", 1: "total"},
            "past": [{0: "batch", 2: "held"} for _ in past],
        }
        outputs = ["logits", *(name.replace("past", "present") for name in self.names)]
        with torch.no_grad():
            program = torch.onnx.export(
                Decode(model).eval(),
                kwargs=example,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=["input_ids", "attention_mask", *self.names],
                output_names=outputs,
                verbose=False,
            )
        assert program is not None
        program.save(str(folder / "step.onnx"), external_data=True)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.set_denormal_as_zero", "1")
        self.session = ort.InferenceSession(str(folder / "step.onnx"), settings, providers=["CPUExecutionProvider"])

    def __call__(self, ids: np.ndarray, count: int) -> np.ndarray:
        batch, step = len(ids), ids
        past = [np.zeros((batch, self.shape[0], 0, self.shape[1]), np.float32) for _ in self.names]
        for _ in range(count):
            mask = np.ones((batch, ids.shape[1]), np.int64)
            feeds = {"input_ids": step, "attention_mask": mask, **dict(zip(self.names, past, strict=True))}
            logits, *past = self.session.run(None, feeds)
            step = logits[:, -1].argmax(-1)[:, None].astype(np.int64)
            ids = np.concatenate([ids, step], axis=1)
        return ids


def measure(variants: dict[str, Generate], ids: np.ndarray, rounds: int) -> dict[str, tuple[float, float]]:
    """Median processor time of the prompt with one token, and of each further token, in milliseconds."""
    random = np.random.default_rng(0)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name in random.permutation(list(variants)):
            times = []
            for count in (1, 1 + NEW):
                started = time.process_time()
                variants[name](ids, count)
                times.append(1e3 * (time.process_time() - started))
            found[name].append((times[0], (times[1] - times[0]) / NEW))
    medians = {name: np.median(np.array(t), axis=0) for name, t in found.items()}
    return {name: (float(first), float(step)) for name, (first, step) in medians.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "decode.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="two layers: shows that it runs")
    arguments = parser.parse_args()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**({"n_layer": 2, "n_embd": 192} if arguments.small else {}))).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    exe = planish.optimize(model, "ort-cpu:threads=1", task="causal-lm")

    def eager(ids: np.ndarray, count: int) -> np.ndarray:
        with torch.no_grad():
            found = model.generate(torch.from_numpy(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        result: np.ndarray = found.numpy()
        return result

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plain = Plain(model, Path(folder))
        variants: dict[str, Generate] = {"planish": exe.generate, "plain ONNX Runtime": plain, "transformers": eager}
        print(f"{'batch':>5} {'variant':>20} {'prompt, ms':>11} {'token, ms':>10} {'tokens/s':>9} {'same tokens':>12}")
        for batch in (1, 8):
            ids = np.random.default_rng(batch).integers(0, model.config.vocab_size, (batch, PROMPT))
            expected = eager(ids, 1 + NEW)
            same = {name: bool(np.array_equal(run(ids, 1 + NEW), expected)) for name, run in variants.items()}
            for name, (first, step) in measure(variants, ids, arguments.rounds).items():
                speed = 1e3 * batch / step
                row = {"batch": batch, "variant": name, "prompt_ms": first, "token_ms": step, "tokens_per_s": speed}
                rows.append(row | {"same": same[name]})
                print(f"{batch:>5} {name:>20} {first:11.1f} {step:10.2f} {speed:9.1f} {same[name]!s:>12}", flush=True)
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
