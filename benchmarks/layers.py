"""Causal language models: decoding against every peer, and what leaving layers out gains against what was asked.

    python benchmarks/layers.py [--small] [--only GPT-2] [--tables peers skips] [--rounds N] [--seconds N] [--json FILE]

Models with random weights: GPT-2 (12 layers, hidden 768) and a Llama (hidden 512, 8 heads, 2 of keys and values) of 12
layers, and of 24, in which the head takes less of a step.
One thread, processor time, interleaved in one process; prompts of 64 tokens at batch 1 and 8.

*Peers*: milliseconds of the prompt and tokens a second after it, greedy, of planish's `prefill` and `decode`,
`generate` of transformers on the eager model, its forward compiled by torch.compile over a StaticCache (the prompt runs
eagerly), and plain ONNX Runtime on an exported step with a cache that grows by Concat (it gives logits of all prompt
positions, as exported). Whether all give the same tokens is shown.

*Skips*: for each asked speed-up, `skip-layers` chooses the number of layers by the cost model and by measuring
`decode`, head of the model included. Then all variants are timed again together, with a `decode` of the first and the
last layer alone and one without any layer (embedding and head). Wanted are

- of the layers, (all - head) / (variant - head): 0.95 of the asked ratio;
- of the whole step, all / variant: 0.9 of the asked ratio. Where even the first and the last layer alone are further
  from it than that, no choice of layers can reach it: the row says so, `skip-layers` takes the nominal ratio, and the
  step is held to 0.9 of what the cost model says of that.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import planish  # noqa: E402
from benchmarks import decode as greedy  # noqa: E402
from planish.ir.analyses.layers import find_layers  # noqa: E402
from planish.ir.causal_lm import DECODE, LOGITS  # noqa: E402
from planish.ir.program import Calibration, Program  # noqa: E402
from planish.passes.base import Pass, PassContext, PassResult  # noqa: E402
from planish.passes.canonicalize.editing import Editor  # noqa: E402
from planish.passes.canonicalize.eliminate_dead_code import EliminateDeadCode  # noqa: E402
from planish.passes.gates import Gates  # noqa: E402
from planish.passes.layers.predict import shares_gone  # noqa: E402
from planish.passes.layers.selection import LEAST  # noqa: E402
from planish.passes.layers.skip_layers import SkipLayers  # noqa: E402
from planish.passes.layers.units import drop_inputs, remove, units_of  # noqa: E402
from planish.passes.manager import PassManager  # noqa: E402
from planish.passes.pipeline import parse_pipeline  # noqa: E402
from planish.runtime.bench import Bench  # noqa: E402
from planish.runtime.measure import bootstrap, interleave  # noqa: E402
from planish.runtime.ort import OrtRunner, compile_ort  # noqa: E402
from planish.runtime.ort_bound import BoundRun  # noqa: E402

TARGET = "ort-cpu:threads=1"
BATCHES = (1, 8)
ASKED = (1.25, 1.5, 2.0, 3.0)
#: What is wanted of the asked speed-up: of the layers, and of a whole step.
STACK, WHOLE = 0.95, 0.9


def gpt2(small: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 8, "n_embd": 64, "n_head": 4, "vocab_size": 300} if small else {}
    return GPT2LMHeadModel(GPT2Config(**sizes))


def llama(small: bool, layers: int = 12) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64 if small else 512,
        intermediate_size=128 if small else 1408,
        num_hidden_layers=8 if small else layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=300 if small else 32000,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config)


def deep(small: bool) -> Any:
    return llama(small, 24)


MODELS: dict[str, Callable[[bool], Any]] = {"GPT-2": gpt2, "Llama": llama, "Llama-24": deep}


def build(name: str, small: bool) -> Any:
    """A model in eval mode that never ends a row."""
    torch.manual_seed(0)
    model = MODELS[name](small).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


# --- peers -------------------------------------------------------------------------------------------------


class Compiled:
    """Greedy decoding over a StaticCache, with the forward of one token compiled for each batch."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.step = torch.compile(model.forward, dynamic=False)

    def __call__(self, ids: np.ndarray, count: int) -> np.ndarray:
        from transformers import StaticCache

        cache = StaticCache(self.model.config, max_cache_len=greedy.PROMPT + greedy.NEW + 1)
        found = [torch.from_numpy(ids)]
        with torch.no_grad():
            run, more = self.model.forward, {"logits_to_keep": 1}
            for at in range(count):
                start = 0 if at == 0 else ids.shape[1] + at - 1
                positions = torch.arange(start, start + found[-1].shape[1])[None]
                result = run(input_ids=found[-1], past_key_values=cache, position_ids=positions, use_cache=True, **more)
                found.append(result.logits[:, -1].argmax(-1, keepdim=True))
                run, more = self.step, {}
        result_ids: np.ndarray = torch.cat(found, 1).numpy()
        return result_ids


def eager(model: Any) -> greedy.Generate:
    def run(ids: np.ndarray, count: int) -> np.ndarray:
        with torch.no_grad():
            found = model.generate(torch.from_numpy(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        result: np.ndarray = found.numpy()
        return result

    return run


def peers(name: str, model: Any, exe: planish.Executable, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the first table; a peer that can not be built or run is shown with its reason."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, Callable[[], greedy.Generate]] = {
            "planish": lambda: exe.generate,
            "transformers": lambda: eager(model),
            "torch.compile": lambda: Compiled(model),
            "plain ORT": lambda: greedy.Plain(model, Path(folder)),
        }
        variants, failed = {}, {}
        for peer, make in makers.items():
            try:
                variants[peer] = make()
                variants[peer](np.ones((1, 3), np.int64), 2)
            except Exception as error:
                failed[peer] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
                variants.pop(peer, None)
        for batch in BATCHES:
            ids = np.random.default_rng(batch).integers(0, model.config.vocab_size, (batch, greedy.PROMPT))
            tokens = {peer: run(ids, 1 + greedy.NEW) for peer, run in variants.items()}
            for peer, (first, step) in greedy.measure(variants, ids, given.rounds).items():
                same = float((tokens[peer] == tokens["transformers"])[:, greedy.PROMPT :].mean())
                row = {"model": name, "batch": batch, "peer": peer, "prompt_ms": first, "token_ms": step}
                rows.append(row | {"tokens_per_s": 1e3 * batch / step, "same_tokens": same})
    return rows + [{"model": name, "peer": peer, "failed": reason} for peer, reason in failed.items()]


# --- skips -------------------------------------------------------------------------------------------------


def chosen(program: Program, asked: float, seconds: float) -> tuple[Program, str, list[str]]:
    """The program with the layers that `skip-layers` leaves out for a measured ratio, the variant, and notes."""
    bench = Bench(program.target, program.calibration)
    context = PassContext(program.target, run=bench.run_entry)

    def apply(p: Pass, candidate: Program) -> PassResult:
        return PassManager([p]).apply(candidate, context)

    # What is lost does not matter here: the weights are random.
    budget = planish.Budget(error=1.0, metric=lambda expected, got: 0.0, seconds=seconds)
    best, ledger = Gates(bench, budget, apply).optimize(program, parse_pipeline(f"skip-layers{{speedup={asked}}}"))
    entry = next(e for e in ledger.entries if e.kind == "approximate")
    return best, entry.name if entry.kept else f"{entry.name}: {entry.verdict}", ledger.notes


def head_only(program: Program) -> Program:
    """`decode` without any layer: what is left of a step when all layers are gone."""
    trial = Program({DECODE: program.entry(DECODE).clone()}, program.target, dict(program.provenance))
    graph = trial.entry(DECODE).graph
    stack = find_layers(trial.entry(DECODE)).stacks[0]
    done = remove(graph, stack, units_of(stack, "layer"), Editor(trial, "skip-layers"))
    EliminateDeadCode().apply(trial, PassContext(trial.target))
    drop_inputs(graph, done.inputs)
    return trial


def bound(runner: OrtRunner, batch: dict[str, np.ndarray]) -> BoundRun:
    """One step of `decode` at one position, with its caches updated in place."""
    inputs = {spec.name: np.array(batch[spec.name]) for spec in runner.inputs}
    outputs = {name.replace("past_", "present_"): a for name, a in inputs.items() if name.startswith("past_")}
    shape = next(spec.shape for spec in runner.outputs if spec.name == LOGITS)
    assert shape is not None
    outputs[LOGITS] = np.zeros((len(inputs["input_ids"]), int(shape[-1] or 0)), np.float32)
    return BoundRun(runner, inputs, outputs)


def layers_of(program: Program) -> int:
    return sum(spec.name.endswith("_key") for spec in program.inputs(DECODE))


def predicted(program: Program, nominal: float) -> float:
    """The speed-up of a step that the cost model expects of a nominal ratio."""
    p = SkipLayers(speedup=nominal)
    return 1 / (1 - shares_gone(p, program, [nominal])[0])


def ends_only(program: Program) -> Program:
    """`decode` of the first and the last layer: the fastest that the rules allow."""
    trial = program.clone()
    strongest = SkipLayers(speedup=layers_of(program) / LEAST, measured=False)
    PassManager([strongest]).apply(trial, PassContext(trial.target))
    return trial


def skips(name: str, exe: planish.Executable, batch: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the second table for one model and batch."""
    assert exe.program is not None and exe.program.calibration is not None
    whole = exe.program.clone()
    prompt = next(part.batches[0] for part in exe.program.calibration.parts if part.entry == DECODE)
    feed = {key: np.repeat(value[:1], batch, axis=0) for key, value in prompt.items()}  # rows do not change the time
    whole.calibration = Calibration([feed], entry=DECODE)
    programs = {"all": whole, "head": head_only(whole), "ends": ends_only(whole)}
    about = {}
    for asked in ASKED:
        programs[str(asked)], variant, notes = chosen(whole, asked, given.seconds)
        about[asked] = {"variant": variant, "notes": notes}
    # Two ratios may lead to the same layers; each has a session of its own all the same.
    steps = {key: bound(compile_ort(p.entry(DECODE), p.target), feed) for key, p in programs.items()}
    times = {key: np.array(t) for key, t in interleave(steps, seconds=given.seconds, clock="process").items()}
    rows, total = [], layers_of(whole)
    most = float(np.median(times["all"] / times["ends"]))
    for asked in ASKED:
        own, left = times[str(asked)], layers_of(programs[str(asked)])
        stack = (times["all"] - times["head"]) / np.maximum(own - times["head"], 1e-9)
        step = times["all"] / own
        row = {"model": name, "batch": batch, "asked": asked, **about[asked], "layers": left, "total_layers": total}
        row |= {"nominal": total / left, "predicted": predicted(whole, total / left), "most": most}
        row |= {f"{key}_ms": 1e3 * float(np.median(times[key])) for key in ("all", "head", "ends")}
        row |= {"ms": 1e3 * float(np.median(own)), "runs": len(own)}
        row |= {"stack": float(np.median(stack)), "stack_interval": bootstrap(stack)}
        rows.append(row | {"step": float(np.median(step)), "step_interval": bootstrap(step)})
    return rows


# --- what is shown -----------------------------------------------------------------------------------------


def show_peers(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'model':>8} {'batch':>5} {'peer':>14} {'prompt, ms':>11} {'token, ms':>10} {'tokens/s':>9} {'same':>6}")
    for row in rows:
        if "failed" in row:
            print(f"{row['model']:>8} {'':>5} {row['peer']:>14} failed: {row['failed']}")
            continue
        print(
            f"{row['model']:>8} {row['batch']:>5} {row['peer']:>14} {row['prompt_ms']:11.1f} {row['token_ms']:10.2f} "
            f"{row['tokens_per_s']:9.1f} {row['same_tokens']:>6.0%}"
        )


def show_skips(rows: list[dict[str, Any]]) -> None:
    head = f"{'layers':>7} {'all, ms':>8} {'head, ms':>8} {'left, ms':>8} {'nominal':>7} {'predicted':>9}"
    print(f"\n{'model':>8} {'batch':>5} {'asked':>5} {head} {'step':>18} {'at most':>7} {'stack':>18}")
    for row in rows:
        step, stack = (
            f"{row[k]:.2f} {row[f'{k}_interval'][0]:.2f}–{row[f'{k}_interval'][1]:.2f}" for k in ("step", "stack")
        )
        print(
            f"{row['model']:>8} {row['batch']:>5} {row['asked']:>5g} {row['layers']:>4}/{row['total_layers']:<2} "
            f"{row['all_ms']:8.2f} {row['head_ms']:8.2f} {row['ms']:8.2f} {row['nominal']:7.2f} "
            f"{row['predicted']:9.2f} {step:>18} {row['most']:7.2f} {stack:>18}"
        )


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Geometric means against each peer, and what does not reach what is wanted of it."""
    timed = [row for row in result["peers"] if "failed" not in row]
    own = {(row["model"], row["batch"]): row for row in timed if row["peer"] == "planish"}
    ratios: dict[str, dict[str, float]] = {}
    slower = []
    for peer in dict.fromkeys(row["peer"] for row in timed if row["peer"] != "planish"):
        rows = [row for row in timed if row["peer"] == peer]
        ratios[peer] = {}
        for key in ("token_ms", "prompt_ms"):
            found = {(r["model"], r["batch"]): r[key] / own[r["model"], r["batch"]][key] for r in rows}
            ratios[peer][key] = geomean(list(found.values()))
            slower += [[*at, peer, key, ratio] for at, ratio in found.items() if ratio < 1]
    missed: dict[str, list[Any]] = {"stack": [], "step": [], "predicted": []}
    beyond = []
    for row in result["skips"]:
        at = [row["model"], row["batch"], row["asked"]]
        wanted = {"stack": STACK * row["asked"]}
        if row["most"] >= WHOLE * row["asked"]:
            wanted["step"] = WHOLE * row["asked"]
        else:
            beyond.append([*at, row["most"], row["head_ms"] / row["all_ms"]])
            wanted["predicted"] = WHOLE * row["predicted"]
        for what, least in wanted.items():
            got = row["stack" if what == "stack" else "step"]
            missed[what] += [[*at, got, least]] if got < least else []
    return {"planish_against": ratios, "slower": slower, "missed": missed, "beyond": beyond}


def verdicts(result: dict[str, Any]) -> list[str]:
    """What holds and what does not, a line each."""
    found, lines = result["summary"], []
    for peer, ratios in found["planish_against"].items():
        lines.append(f"against {peer}: {ratios['token_ms']:.2f}x decode, {ratios['prompt_ms']:.2f}x prompt (geomean)")
    for model, batch, peer, key, ratio in found["slower"]:
        lines.append(f"NOT REACHED: {model}, batch {batch}: {key} is {1 / ratio:.2f} times that of {peer}")
    rows, beyond = len(result["skips"]), len(found["beyond"])
    wanted = {
        "stack": (rows, f"{STACK:g} of the asked ratio by the layers"),
        "step": (rows - beyond, f"{WHOLE:g} of the asked ratio by the whole step, head counted, where it can be"),
        "predicted": (beyond, f"{WHOLE:g} of what the nominal ratio should give, where it can not"),
    }
    for what, (total, text) in wanted.items():
        missed = found["missed"][what]
        lines += [f"{text}: {total - len(missed)} of {total}"] if total else []
        for model, batch, asked, got, least in missed:
            lines.append(f"  NOT REACHED: {model}, batch {batch}, asked {asked:g}: {got:.2f}, wanted {least:.2f}")
    for model, batch, asked, most, head in found["beyond"]:
        lines.append(
            f"can not be: {model}, batch {batch}, asked {asked:g}: the first and the last layer alone are {most:.2f} "
            f"times as fast; the head takes {head:.0%} of a step"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "layers.json")
    parser.add_argument("--only", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tables", nargs="*", choices=["peers", "skips"], default=["peers", "skips"])
    parser.add_argument("--rounds", type=int, default=5, help="of the peers")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each choice of layers, and for timing them")
    parser.add_argument("--small", action="store_true", help="tiny models: shows that it runs")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"small": given.small, "machine": platform.processor() or platform.machine()}
    result |= {"peers": [], "skips": []}
    for name in given.only:
        print(f"{time.strftime('%H:%M:%S')} {name}: optimizing", file=sys.stderr, flush=True)
        model = build(name, given.small)
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, greedy.PROMPT))
        budget = planish.Budget(seconds=given.seconds)
        exe = planish.optimize(model, TARGET, task="causal-lm", calibration=ids, budget=budget)
        for table in given.tables:
            print(f"{time.strftime('%H:%M:%S')} {name}: {table}", file=sys.stderr, flush=True)
            if table == "peers":
                result["peers"] += peers(name, model, exe, given)
            else:
                result["skips"] += [row for batch in BATCHES for row in skips(name, exe, batch, given)]
            result["summary"] = summary(result)
            given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show_peers(result["peers"])
    show_skips(result["skips"])
    print("\n" + "\n".join(verdicts(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
