"""Decoding on target ort-cuda against transformers: tokens per second behind prompts of 512 and 4096 tokens, float16.

    python benchmarks/cuda_decode.py [--models llama,gpt2] [--contexts 512,4096] [--rows 1] [--json FILE] [--tiny]

"graph" is `generate`; "no graph" its step without one; "copied caches" runs the entry `decode` on tensors of the
GPU, as plain ONNX Runtime does, which copies each cache. Peers are `generate` of transformers in float16: with a static
cache, which it compiles by torch.compile(mode="reduce-overhead"), and eager. Times are from token to token, with the
choice of the token, on the host; medians of rounds that are interleaved. "error" is that of the last step's logits
against the float32 model behind the same tokens (relative L2), "agree" the share of tokens that are that model's own
choice behind the tokens before them.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

TARGET = "ort-cuda:dtype=float16"
#: Tokens, seconds from each to the next, and the logits of the last step.
Decoded = tuple[np.ndarray, list[float], Any]
Decode = Callable[[np.ndarray, int], Decoded]
LABELS = {
    "llama": "Llama shape: 8 layers of 2048, 32 heads on 8 of 64, 32000 tokens",
    "gpt2": "GPT-2: 12 layers of 768, 12 heads of 64, 50257 tokens",
}


def build(name: str, tiny: bool, positions: int) -> Any:
    """The float32 model, the same each time; on the GPU if there is one."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ends: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": None}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        if name == "llama":
            shape = {"hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8}
            small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
            sizes = {"intermediate_size": 256, "vocab_size": 500} if tiny else {"intermediate_size": 5632}
            more = {"max_position_embeddings": positions, **ends}
            model: Any = LlamaForCausalLM(
                LlamaConfig(**{"vocab_size": 32000, **sizes}, **(small if tiny else shape), **more)
            )
        else:
            small = {"n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": 500} if tiny else {}
            model = GPT2LMHeadModel(GPT2Config(**small, n_positions=positions, **ends))
    with torch.no_grad():  # larger weights than training begins with: tokens then depend on what was read
        for label, parameter in model.named_parameters():
            if parameter.dim() > 1 and not any(part in label for part in ("embed", "wte", "wpe", "lm_head")):
                parameter.normal_(0, 3.0 / parameter.shape[0 if name == "gpt2" else 1] ** 0.5)
    model.generation_config.eos_token_id = None
    return model.eval()


def halved(model: Any) -> Any:
    """The module in float16, but for the angles of its positions: as transformers loads it."""
    angles = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    model.half()
    for name, buffer in angles.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer)
    return model


def without_graph(exe: Any) -> Any:
    """The same sessions, whose steps are not captured."""
    import onnxruntime as ort

    from planish.runtime.executable import Executable

    plain = copy.copy(exe.runners["decode"])
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1")
    plain.graph, plain.kept = lambda: options, OrderedDict()
    runners = {"prefill": exe.runners["prefill"], "decode": plain}
    return Executable(None, runners, provenance=exe.provenance, target=exe.target)


def planish_decodes(model: Any, target: str) -> dict[str, Decode]:
    """By label, `generate` with and without a graph, and `decode` with caches that are copied."""
    import planish

    started = time.perf_counter()
    exe = planish.optimize(model, target, task="causal-lm", budget=planish.Budget(gates=False))
    notes = getattr(exe.runners["decode"], "notes", [])
    print(f"{target}: made in {time.perf_counter() - started:.1f} s {notes}", flush=True)

    def ours(exe: Any) -> Decode:
        def decode(ids: np.ndarray, new: int) -> Decoded:
            at: list[float] = []
            made = exe.generate(ids, new, stream=lambda _: at.append(time.perf_counter()))
            kept = list(getattr(exe.runners["decode"], "kept", {}).values())
            return made, list(np.diff(at)), torch.from_numpy(kept[-1].logits) if kept else None

        return decode

    found = {"graph": ours(exe)}
    if getattr(exe.runners["decode"], "capture", False):
        found["no graph"] = ours(without_graph(exe))

    def copied(ids: np.ndarray, new: int) -> Decoded:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        lengths = torch.full((len(ids),), ids.shape[1], device=device)
        given = exe.run({"input_ids": torch.from_numpy(ids).to(device), "lengths": lengths}, "prefill")
        logits, caches = given.pop("logits"), {}
        for name, cache in given.items():
            room = torch.zeros(*cache.shape[:2], ids.shape[1] + new, cache.shape[3], dtype=cache.dtype, device=device)
            room[:, :, : ids.shape[1]] = cache
            caches[name.replace("present", "past")] = room
        at, rows = [], [torch.from_numpy(ids)]
        for step in range(new):
            rows.append(logits.argmax(-1, keepdim=True).cpu())
            at.append(time.perf_counter())
            if step == new - 1:
                break
            feeds = {"input_ids": rows[-1].to(device), "lengths": lengths.clone(), **caches}
            given = exe.run(feeds, "decode")
            logits, lengths = given.pop("logits"), lengths + 1
            caches = {name.replace("present", "past"): cache for name, cache in given.items()}
        return torch.cat(rows, 1).numpy(), list(np.diff(at)), logits

    found["copied caches"] = copied
    return found


class _Clock:
    """A streamer of transformers that notes when tokens were on the host."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        if tokens.dim() == 1:  # the prompt comes first
            tokens.cpu()
            self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def peer(model: Any, **options: Any) -> Decode:
    """`generate` of transformers."""

    def decode(ids: np.ndarray, new: int) -> Decoded:
        clock = _Clock()
        given = torch.from_numpy(ids).to(model.device)
        more = {"streamer": clock} if len(ids) == 1 else {}
        started = time.perf_counter()
        with torch.no_grad():
            made = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False, **more, **options
            )
        result = made.cpu().numpy()
        # A streamer takes one row: of several, the mean, with the prompt in it.
        return result, list(np.diff(clock.at)) if more else [(time.perf_counter() - started) / new] * new, None

    return decode


@torch.no_grad()
def reference(model: Any, tokens: np.ndarray, prompt: int) -> tuple[float, torch.Tensor]:
    """The share of tokens that are the float32 model's choice behind those before them, and its last logits."""
    logits = model(torch.from_numpy(tokens[:, :-1]).to(model.device)).logits[:, prompt - 1 :].float()
    agree = logits.argmax(-1).cpu() == torch.from_numpy(tokens[:, prompt:])
    return float(agree.float().mean()), logits[:, -1].cpu()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float().cpu() - want).norm() / want.norm())


def rows(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    contexts = [int(text) for text in arguments.contexts.split(",")]
    model = build(name, arguments.tiny, max(contexts) + 4 * arguments.new)
    host = model.cpu()
    decodes = planish_decodes(host, arguments.target)
    model = host.to("cuda" if torch.cuda.is_available() else "cpu")
    random, prompts = np.random.default_rng(0), {}
    for context in contexts:
        prompts[context] = random.integers(3, 500, (arguments.rows, context))
    checked: dict[tuple[str, int], tuple[Any, ...]] = {}
    plain: dict[int, tuple[np.ndarray, torch.Tensor]] = {}
    for label, decode in decodes.items():
        for context, ids in prompts.items():
            try:
                tokens, _, last = decode(ids, arguments.new)
                agree, want = reference(model, tokens, context)
                plain.setdefault(context, (tokens, want))
                fresh = len(np.unique(tokens[:, context:]))
                checked[label, context] = None if last is None else relative(last, want), agree, fresh
            except Exception:
                traceback.print_exc()
    half = halved(model)
    for context, (tokens, want) in plain.items():  # what float16 makes of the same tokens there
        with torch.no_grad():
            last = half(torch.from_numpy(tokens[:, :-1]).to(half.device)).logits[:, -1]
        checked["transformers, eager", context] = relative(last, want), None, None
    peers = {"transformers, eager": peer(half)}
    if arguments.static:
        peers["transformers, static cache, compiled"] = peer(half, cache_implementation="static")
    found = []
    for context, ids in prompts.items():
        times: dict[str, list[float]] = {}
        labels = dict(decodes) | peers
        for label in list(labels):  # once to warm up, and to compile
            started = time.perf_counter()
            try:
                for _ in range(2 if "static" in label else 1):
                    labels[label](ids, arguments.new)
            except Exception:
                traceback.print_exc()
                del labels[label]
            print(f"{name} {context} {label}: warm in {time.perf_counter() - started:.1f} s", flush=True)
        for _ in range(arguments.rounds):
            for label, decode in labels.items():
                times.setdefault(label, []).append(median(decode(ids, arguments.new)[1]))
        for label, steps in times.items():
            error, agree, fresh = checked.get((label, context), (None, None, None))
            row = {
                "model": name,
                "context": context,
                "rows": arguments.rows,
                "label": label,
                "step_ms": 1e3 * median(steps),
            }
            row |= {"least_ms": 1e3 * min(steps), "most_ms": 1e3 * max(steps)}
            found.append(
                row
                | {"tokens_per_s": arguments.rows / median(steps), "error": error, "agree": agree, "distinct": fresh}
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="llama,gpt2")
    parser.add_argument("--contexts", default="512,4096")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--no-static", dest="static", action="store_false", help="leave torch.compile out")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    for name in arguments.models.split(","):
        try:
            found += rows(name, arguments)
        except Exception:
            traceback.print_exc()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"\n{card}, torch {torch.__version__}, {arguments.rows} row(s)")
    for name in arguments.models.split(","):
        print(f"\n{LABELS[name]}\n\n| context | | ms a step | tokens/s | error | agree |\n|---|---|---|---|---|---|")
        for row in (row for row in found if row["model"] == name):
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            agree = "" if row["agree"] is None else f"{row['agree']:.2f} of {row['distinct']} kinds"
            cells = row["context"], row["label"], f"{row['step_ms']:.3f}", f"{row['tokens_per_s']:.0f}", error, agree
            print("| " + " | ".join(map(str, cells)) + " |")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"card": card, "torch": torch.__version__, "rows": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
