"""Does a needle stay findable when each head sees only its shard of the context? S2-Attention, trained and imposed.

    python examples/needle_s2.py [--small] [--steps 300] [--svg FILE] [--json FILE]

Pairs of a key and a value (one token a pair) lie among noise; at the end stands a key, and the model has to say its
value. A small Llama is trained twice, for about a minute each: with the S2 pattern (arXiv 2407.17678) as its mask from
the start, and with dense attention. Then planish puts the pattern on both by `shard-attention`, with a cache that keeps
only what some later token sees, exports them, loads them, and looks for the needle at every depth: in the prompt, and
with the key read by `decode` over the evicted cache. A window without shards is the control: it can not see far. "By
head" puts the pattern only on those heads of the dense model that lose little of their attention by it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import planish
from planish.ir.block_sparsity import S2, Heads, Layout, slots_of
from planish.ir.causal_lm import IDS, LENGTHS, LOGITS, cache_layer
from planish.ir.ops.block_sparse_attention import layout_mask

TARGET = "ort-cpu:threads=1"
KEYS, VALUES, NOISE = 4, 8, 16
PAIR, ASK = NOISE, NOISE + KEYS * VALUES  # ids of the first pair, of the first key that is asked for
VOCABULARY = ASK + KEYS
HEADS = Heads(4, 4)
BLOCK, LOCAL, STRIDE = 16, 2, 4
ASKED = KEYS  # keys at the end of a training row


@dataclass
class Row:
    """Contexts: ids (batch, length); value (batch, keys asked): what the keys at the end ask for."""

    ids: np.ndarray
    value: np.ndarray


def rows(count: int, length: int, random: np.random.Generator, asked: int = 1, depth: int | None = None) -> Row:
    """Contexts of noise with all keys at random places, each with a value; the last `asked` tokens ask for some.

    Args:
        depth: where the pair of the (only) key that is asked for lies; None: anywhere.
    """
    ids = random.integers(0, NOISE, (count, length))
    value = np.zeros((count, asked), np.int64)
    room = length - asked
    for row in range(count):
        places = random.choice(room, KEYS, replace=False)
        keys, values = random.permutation(KEYS), random.integers(0, VALUES, KEYS)
        if depth is not None:
            places[places == depth] = places[0]
            places[0] = depth
        ids[row, places] = PAIR + keys * VALUES + values
        ids[row, room:] = ASK + keys[:asked]
        value[row] = values[:asked]
    return Row(ids, value)


def s2_mask(length: int) -> torch.Tensor:
    """The pattern as an additive mask, (1, heads, length, length)."""
    layout: Layout = S2(block=BLOCK, local=LOCAL, stride=STRIDE).layout(length, HEADS)
    seen = layout_mask(layout.indptr, layout.indices, layout.block, length, length)[layout.head_layout]
    seen &= np.tril(np.ones((length, length), bool))
    return torch.where(torch.from_numpy(seen)[None], 0.0, torch.finfo(torch.float32).min)


def train(name: str, sparse: bool, options: argparse.Namespace) -> Any:
    """A model that was trained to answer; prints how often it does on the way."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS.query,
        num_key_value_heads=HEADS.kv,
        intermediate_size=128,
        vocab_size=VOCABULARY,
        max_position_embeddings=options.length + 64,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.steps)
    started = time.process_time()
    # Short contexts first: in those it is soon learned what to look for. The second half of the steps is all long.
    lengths = [options.length * part // 8 for part in (1, 2, 4, 8)]
    for step in range(options.steps):
        length = lengths[min(len(lengths) - 1, 2 * len(lengths) * step // options.steps)]
        mask = s2_mask(length) if sparse else None
        batch = rows(options.batch * options.length // length, length, random, ASKED)
        ids = torch.from_numpy(batch.ids)
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, -ASKED:])[..., :VALUES]
        target = torch.from_numpy(batch.value)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VALUES), target.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step + 1 == options.steps:
            right = (logits.argmax(-1) == target).float().mean().item()
            spent = time.process_time() - started
            print(f"{name}: step {step + 1}, loss {loss.item():.3f}, right {right:.3f}, {spent:.0f} s", flush=True)
    return model.eval()


def exported(model: Any, shard: str, examples: np.ndarray, folder: Path) -> Any:
    """The model optimized, exported and loaded again, with a pass for its attention ("" for none)."""
    exe = planish.optimize(
        model,
        TARGET,
        task="causal-lm",
        example_inputs=examples,
        approximate=shard or None,
        budget=planish.Budget(gates=False),
    )
    for remark in exe.report.remarks() if exe.report is not None else ():
        if remark.startswith("shard-attention"):
            print(remark)
    exe.export(folder)
    return planish.load(folder)


def found(exe: Any, depths: list[int], length: int, count: int) -> tuple[list[float], float]:
    """How often the needle is found at each depth, and over all depths by `decode` with the prompt before it."""
    random = np.random.default_rng(1)
    shares, stepped = [], []
    for depth in depths:
        batch = rows(count, length, random, depth=depth)
        lengths = np.full(count, length)
        logits = exe.run({IDS: batch.ids, LENGTHS: lengths}, entry="prefill")[LOGITS][:, :VALUES]
        shares.append(float((logits.argmax(-1) == batch.value[:, 0]).mean()))
        stepped.append(decoded(exe, batch) == batch.value[:, 0])
    return shares, float(np.mean(stepped))


def decoded(exe: Any, batch: Row) -> np.ndarray:
    """The answers when the key is read by `decode`: the prompt before it was read by `prefill`."""
    prompt, lengths = batch.ids[:, :-1], np.full(len(batch.ids), batch.ids.shape[1] - 1)
    feeds = {IDS: batch.ids[:, -1:], LENGTHS: lengths}
    plans = slots_of(exe.provenance)
    for name, cache in exe.run({IDS: prompt, LENGTHS: lengths}, entry="prefill").items():
        layer = cache_layer(name)
        if layer is not None:
            room = plans[layer].capacity(batch.ids.shape[1]) if layer in plans else batch.ids.shape[1]
            more = ((0, 0), (0, 0), (0, room - cache.shape[2]), (0, 0))
            feeds[name.replace("present_", "past_")] = np.pad(cache, more)
    answers: np.ndarray = exe.run(feeds, entry="decode")[LOGITS][:, :VALUES].argmax(-1)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a short context and little training, to see that it runs")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--count", type=int, help="contexts at each depth")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--svg", type=Path, help="writes the plot")
    parser.add_argument("--json", type=Path, help="writes the figures")
    options = parser.parse_args()
    options.steps = options.steps or (20 if options.small else 300)
    options.length = options.length or (96 if options.small else 256)
    options.count = options.count or (4 if options.small else 64)
    torch.set_num_threads(options.threads)
    layout = S2(block=BLOCK, local=LOCAL, stride=STRIDE).layout(options.length, HEADS)
    print(f"{options.length} tokens: {layout.summary()}")
    print(layout.picture().split("\n\n")[1])

    s2 = f"shard-attention{{block={BLOCK},local={LOCAL},stride={STRIDE},evict=True}}"
    window = f"shard-attention{{pattern='sliding-window',block={BLOCK},local={LOCAL},evict=True}}"
    by_head = f"shard-attention{{block={BLOCK},local={LOCAL},stride={STRIDE},keep_mass=0.9}}"
    sparse, dense = (train(name, name == "trained with S2", options) for name in ("trained with S2", "trained dense"))
    cases = {
        "trained with S2, runs with S2": (sparse, s2),
        "trained dense, runs dense": (dense, ""),
        "trained dense, S2 imposed": (dense, s2),
        "trained with S2, window only": (sparse, window),
        "trained dense, S2 by head": (dense, by_head),
    }
    if options.small:
        cases = dict(list(cases.items())[::3])
    examples = rows(8, options.length, np.random.default_rng(2)).ids
    depths = list(range(BLOCK // 2, options.length - 1, BLOCK))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (model, shard)) in enumerate(cases.items()):
            exe = exported(model, shard, examples, Path(folder) / str(number))
            shares, stepped = found(exe, depths, options.length, options.count)
            figures[name] = {"by depth": dict(zip(depths, shares, strict=True)), "by decode": stepped}
    print(table(figures, depths))
    if options.svg:
        shown = {name: case for name, case in figures.items() if "by head" not in name}  # like the dense one
        options.svg.write_text(plot(shown, depths))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    first = figures["trained with S2, runs with S2"]["by depth"].values()
    print(f"The worst depth of the model trained with S2: found {min(first):.2f} (chance {1 / VALUES:.2f}).")


def table(figures: dict[str, Any], depths: list[int]) -> str:
    """Share found, by depth of the needle."""
    lines = ["| needle at | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for depth in depths:
        lines.append(f"| {depth} | " + " | ".join(f"{f['by depth'][depth]:.2f}" for f in figures.values()) + " |")
    lines.append("| all, by decode | " + " | ".join(f"{f['by decode']:.2f}" for f in figures.values()) + " |")
    return "\n".join(lines)


COLORS = ("#2ca02c", "#1f77b4", "#ff7f0e", "#d62728", "#9467bd")


def plot(figures: dict[str, Any], depths: list[int], width: int = 640, height: int = 300) -> str:
    """Share found by depth, a line a case."""
    left, top, right, bottom = 46, 14, 196, 40
    across, down = width - left - right, height - top - bottom

    def at(depth: float, share: float) -> tuple[float, float]:
        return left + across * (depth - depths[0]) / (depths[-1] - depths[0]), top + down * (1 - share)

    font = 'font-family="sans-serif" font-size="11"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {font}>']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(depths[0], share)
        parts.append(f'<path d="M{x} {y:.1f}h{across}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4:.1f}" text-anchor="end">{share:g}</text>')
    for depth in depths[:: max(1, len(depths) // 6)]:
        x, y = at(depth, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{depth}</text>')
    parts.append(f'<text x="{left + across / 2}" y="{height - 6}" text-anchor="middle">position of the needle</text>')
    for number, (name, case) in enumerate(figures.items()):
        line = " ".join("{:.1f},{:.1f}".format(*at(d, case["by depth"][d])) for d in depths)
        color, dash = COLORS[number % len(COLORS)], ' stroke-dasharray="5 5"' if number % 2 else ""
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
        y = top + 20 + 20 * number
        parts.append(f'<path d="M{width - right + 10} {y - 4}h14" stroke="{color}" stroke-width="2"{dash}/>')
        parts.append(f'<text x="{width - right + 28}" y="{y}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
