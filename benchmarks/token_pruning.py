"""What prune-tokens gains on the prompt of a language model that reads an image: every method against all tokens.

    python benchmarks/token_pruning.py [--image 576] [--text 64] [--seconds 25]

A Llama of random weights (8 layers, hidden 384), pruned before layers 2 and 4, as one of 32 layers is before 8 and 16.
One thread, processor time, all variants interleaved; the baseline is the same optimized model with all tokens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from planish.frontends.causal_lm import capture_causal_lm
from planish.ir.causal_lm import IDS, LENGTHS, PREFILL
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.defaults import default_pipeline
from planish.passes.manager import PassManager
from planish.passes.pipeline import parse_pipeline
from planish.runtime.bench import Bench
from planish.runtime.measure import bootstrap, interleave

TARGET = "ort-cpu:threads=1"
START = 20
VARIANTS = {
    "all tokens": "",
    "feather": "prune-tokens{{layers=[2,4],span=({},{})}}",
    "fastv": "prune-tokens{{method='fastv',layers=[2],span=({},{})}}",
    "efficientvla": "prune-tokens{{method='efficientvla',layers=[2],span=({},{})}}",
}


def apply(program: Program, passes: str) -> list[str]:
    return PassManager(parse_pipeline(passes)).apply(program, PassContext(program.target)).notes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, default=576, help="image tokens, a square number")
    parser.add_argument("--text", type=int, default=64, help="tokens of text, at least 21")
    parser.add_argument("--seconds", type=float, default=25.0)
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000, max_position_embeddings=4096)).eval()
    whole = capture_causal_lm(model, target=TARGET).program
    before, after = default_pipeline(TARGET).split(",lower-feed-forward,")
    apply(whole, before)
    tokens = options.image + options.text
    ids = np.random.default_rng(0).integers(0, 1000, (1, tokens))
    steps = {}
    for name, form in VARIANTS.items():
        program = whole.clone()
        if form:
            print(*apply(program, form.format(START, options.image)), sep="\n")
        apply(program, f"lower-feed-forward,{after}")
        runner = Bench(program.target, None).runner(program, PREFILL)
        steps[name] = runner.prepared({IDS: ids, LENGTHS: np.array([tokens])})
    times = interleave(steps, seconds=options.seconds, clock="process")
    base = np.array(times["all tokens"])
    print(f"\n| {tokens} tokens, {options.image} of an image | ms | speed-up of prefill |\n|---|---|---|")
    for name, samples in times.items():
        ratios = base / np.array(samples)
        low, high = bootstrap(ratios)
        print(f"| {name} | {1e3 * np.median(samples):.1f} | {np.median(ratios):.2f} [{low:.2f}, {high:.2f}] |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
