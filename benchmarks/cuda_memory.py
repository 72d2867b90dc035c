"""Decoding under a memory budget on a GPU: weights that stream, caches on the host; against accelerate's offloading.

    python benchmarks/cuda_memory.py --capture decoder.gz     # anywhere: a Llama shape without its weights
    python benchmarks/cuda_memory.py [--model decoder.gz]     # on a GPU: the table, and cuda_memory.json

Each row is a process of its own. Weights are random by a seed. Peaks are what the driver counts (cuMemGetInfo, looked
at every 2 ms and after each step) less what it counted when there was a CUDA context and no session yet: the arenas of
ONNX Runtime, cuBLAS and the code of kernels are in it. For torch it is the same count, less the same.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

TARGET = "ort-cuda:sm_80"
VOCABULARY = 32000
Row = dict[str, Any]


def config(layers: int, width: int) -> dict[str, Any]:
    """A Llama shape with heads of 128 in groups of two."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "num_key_value_heads": max(width // 256, 1),
        "head_dim": 128,
        "intermediate_size": width * 11 // 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1 << 18,
        "rope_theta": 500000.0,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def capture(path: str, layers: int, width: int) -> None:
    """Writes the recognized entry `decode` of a model in float16, and the shapes of its weights."""
    import torch
    import transformers

    import planish
    from planish.ir.causal_lm import DECODE
    from planish.ir.serialize import to_proto_without_weights
    from planish.passes.defaults import RECOGNIZE

    torch.set_default_dtype(torch.float16)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config(layers, width))).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():  # no two weights are equal, or they would be one
        for at, parameter in enumerate(model.parameters()):
            parameter.view(-1)[0] = at * 1e-3
    task = planish.CausalLM(chunks=True)
    example = torch.ones(1, 2, dtype=torch.int64)
    exe = planish.optimize(
        model, TARGET, task=task, passes=",".join(RECOGNIZE), budget=planish.Budget(gates=False), example_inputs=example
    )
    proto, weights = to_proto_without_weights(exe.program.entries[DECODE])
    shapes = {name: (tensor.dtype.name, [int(d) for d in tensor.shape.numpy()]) for name, tensor in weights.items()}
    text = base64.b64encode(proto.SerializeToString()).decode()
    with gzip.open(path, "wt") as file:
        json.dump({"proto": text, "weights": shapes, "config": config(layers, width)}, file)


def load(path: str) -> tuple[Any, dict[str, Any], int]:
    """The entry with random weights, the configuration, and the bytes of the weights."""
    import onnx
    import onnx_ir as ir

    with gzip.open(path, "rt") as file:
        data = json.load(file)
    proto = onnx.ModelProto.FromString(base64.b64decode(data["proto"]))
    model = ir.from_proto(proto)
    total = 0
    for at, (name, (kind, shape)) in enumerate(sorted(data["weights"].items())):
        dtype = ir.DataType[kind].numpy()
        array = drawn(at, shape, dtype) if len(shape) > 1 or kind != "FLOAT16" else np.ones(shape, dtype)
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
        total += array.nbytes
    for name, value in model.graph.initializers.items():  # small ones came along, as the capture left them
        tensor = value.const_value
        if (
            name not in data["weights"]
            and tensor is not None
            and tensor.dtype == ir.DataType.FLOAT16
            and tensor.size > 1
        ):
            value.const_value = ir.Tensor(np.ones(tensor.shape.numpy(), np.float16), name=name)
    return model, data["config"], total


def drawn(seed: int, shape: list[int], dtype: Any) -> np.ndarray:
    """A weight by its number; rows of one run draw each only once."""
    path = Path(tempfile.gettempdir()) / "planish-memory" / f"{seed}-{'x'.join(map(str, shape))}-{np.dtype(dtype)}.npy"
    if path.exists():
        found: np.ndarray = np.load(path)
        return found
    random = np.random.Generator(np.random.SFC64(seed))
    scale = 1.0 if shape[0] == VOCABULARY else (3 / shape[0]) ** 0.5
    array = ((random.random(shape, np.float32) - np.float32(0.5)) * np.float32(2 * scale)).astype(dtype)
    path.parent.mkdir(exist_ok=True)
    np.save(path, array)
    return array


def quantized(model: Any, target: Any, bits: int) -> Any:
    """The entry with its weights in few bits, in blocks of 32."""
    from planish.ir.program import Program
    from planish.passes.base import PassContext
    from planish.passes.manager import PassManager
    from planish.passes.pipeline import as_passes

    program = Program.single(model, target)
    PassManager(as_passes(f"quantize-weights{{bits={bits},block=32}}")).apply(program, PassContext(target))
    return program.main


class Peak:
    """The least free memory of the GPU while it is looked at."""

    def __init__(self, memory: Any) -> None:
        self.memory, self.start = memory, memory()[0]
        self.least = self.start
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def look(self) -> None:
        self.least = min(self.least, self.memory()[0])

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.look()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        self.look()
        return self.start - self.least


def generate(
    engine: Any, rows: list[np.ndarray], new: int, plan: Any, look: Any, forced: np.ndarray | None = None
) -> tuple[np.ndarray, float, float, np.ndarray]:
    """Tokens (batch, new), seconds of the prompt, the median seconds of a step, and the logits.

    Args:
        forced: tokens to read in the place of those that the logits choose.
    """
    started = time.perf_counter()
    logits = engine.prompt(rows, plan)
    first = time.perf_counter() - started
    tokens, times, seen = [logits.argmax(-1)], [], [logits]
    for at in range(new - 1):
        started = time.perf_counter()
        logits = engine.step(tokens[-1] if forced is None else forced[:, at])
        times.append(time.perf_counter() - started)
        tokens.append(logits.argmax(-1))
        seen.append(logits)
        look()
    engine.close()
    return np.stack(tokens, 1), first, float(np.median(times)), np.stack(seen, 1).astype(np.float32)


def prompt_of(tokens: int) -> np.ndarray:
    return np.random.default_rng(7).integers(3, VOCABULARY, tokens)


def ours(options: argparse.Namespace) -> Row:
    """One generation with a budget, and one without to compare tokens with, if asked."""
    from dataclasses import asdict, replace

    from planish.ir.target import Target
    from planish.offload import split_for
    from planish.runtime.offload.cuda_device import CudaDevice
    from planish.runtime.offload.engine import Engine
    from planish.runtime.offload.plan import Request
    from planish.runtime.offload.planner import place

    target = Target.parse("ort-cuda")
    model, _, total = load(options.model)
    split = split_for(quantized(model, target, options.bits) if options.bits else model, target)
    limit = int(options.memory * (1 << 20)) if options.memory else None
    if options.share:
        limit = int(total * options.share)
    device = CudaDevice(limit, target)
    peak = Peak(device.memory)
    engine = Engine(split, device, Target("ort", "cpu"))
    engine.measure()
    rates, measured = engine.rates, peak.start - device.memory()[0]
    request = Request(1, options.prompt, options.new)
    # Planned as if attention on the host took no time, or ages; estimated with what was measured.
    forced = {"host": replace(rates, host=1e15, shared_host=1e15), "stream": replace(rates, host=1.0, shared_host=1.0)}
    engine.rates = forced.get(options.way, rates)
    plan = engine.plan(request)
    if options.way:
        plan = place(
            engine.parts.facts(), request, rates, chunk=plan.chunk, resident=plan.resident, kv_device=plan.kv_device,
            slots=plan.slots, kv_slots=plan.kv_slots, attended=plan.attended, budget=limit,
        )  # fmt: skip
    print(plan.table(), flush=True)
    rows = [prompt_of(options.prompt)]
    generate(engine, [rows[0][:64]], 3, plan, lambda: None)  # warm
    found, first, step, logits = generate(engine, rows, options.new, plan, peak.look)
    most = peak.stop()
    row = {
        "weights": total, "limit": limit, "peak": most, "account": device.account.peak, "planned": plan.total,
        "after_rates": measured,
        "prompt_seconds": first, "tokens_per_second": 1 / step, "plan": plan.to_dict(),
        "step_seconds": step, "estimated_seconds": plan.seconds, "rates": asdict(rates),
    }  # fmt: skip
    if options.compare:
        engine.parts._sessions.clear()
        other = Engine(split, CudaDevice(None, target), Target("ort", "cpu"), rates)
        # In chunks of the same size: products of other shapes round in another order.
        same = replace(other.plan(request), chunk=plan.chunk)
        generate(other, rows, 2, same, lambda: None)
        wanted, first, step, exact = generate(other, rows, options.new, same, lambda: None)
        row |= {"same_tokens": bool((found == wanted).all()), "equal": float((found == wanted).mean())}
        row |= {"free_prompt_seconds": first, "free_tokens_per_second": 1 / step}
        *_, exact = generate(other, rows, options.new, same, lambda: None, forced=found)
        row["logits_error"] = float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))
    return row


def theirs(options: argparse.Namespace) -> Row:
    """accelerate: as many modules on the GPU as `max_memory` lets it, the others offloaded."""
    import torch
    import transformers
    from accelerate import cpu_offload, dispatch_model, infer_auto_device_map

    with gzip.open(options.model, "rt") as file:
        shape = json.load(file)["config"]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    torch.set_default_dtype(torch.float32)
    model = model.cpu()
    torch.cuda.empty_cache()
    total = sum(p.nbytes for p in model.parameters())
    limit = int(total * options.share) if options.share else int(options.memory * (1 << 20))
    peak = Peak(torch.cuda.mem_get_info)
    if options.way == "cpu_offload":
        cpu_offload(model, execution_device=torch.device("cuda", 0))
        row: Row = {"resident": 0}
    elif options.way == "cuda":
        model = model.cuda()
        row = {"resident": shape["num_hidden_layers"]}
    else:
        room = limit - int(options.margin * (1 << 20))
        places = infer_auto_device_map(
            model, {0: max(room, 1), "cpu": 1 << 40}, no_split_module_classes=["LlamaDecoderLayer"]
        )
        layers = sum(str(k).startswith("model.layers") and v == 0 for k, v in places.items())
        model = dispatch_model(model, places, main_device=0)
        row = {"resident": layers}
    ids = torch.from_numpy(prompt_of(options.prompt))[None].cuda()
    extra = {"cache_implementation": "offloaded"} if options.offloaded_cache else {}

    def run(new: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, max_new_tokens=new, do_sample=False, **extra)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    run(2)
    one = run(1)
    many = run(options.new)
    most = peak.stop()
    step = (many - one) / (options.new - 1)
    return row | {"weights": total, "limit": limit, "peak": most, "prompt_seconds": one, "tokens_per_second": 1 / step}


def worker(arguments: list[str], seconds: float = 240) -> Row:
    """One row in a process of its own."""
    command = [sys.executable, __file__, "--worker", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {seconds} s"}
    lines = done.stdout.strip().splitlines()
    try:
        row: Row = json.loads(lines[-1])
    except (IndexError, ValueError):
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1][:300], "stderr": done.stderr[-3000:]}
    row["text"] = "\n".join(lines[:-1])
    return row


def describe(name: str, row: Row) -> str:
    if "error" in row:
        return f"| {name} | {row['error']} | | | | | | | | |"
    mib = {key: f"{row[key] / (1 << 20):.0f}" if row.get(key) else "–" for key in ("limit", "peak", "planned")}
    same = f"{row['equal']:.0%}" if "equal" in row else "–"
    error = f"{row['logits_error']:.1e}" if "logits_error" in row else "–"
    step = f"{row['estimated_seconds'] * 1e3:.1f}" if "estimated_seconds" in row else "–"
    return (
        f"| {name} | {mib['limit']} | {mib['planned']} | {mib['peak']} | {row['prompt_seconds']:.2f} | {step} | "
        f"{1e3 / row['tokens_per_second']:.1f} | {row['tokens_per_second']:.1f} | {same} | {error} |"
    )


HEADER = (
    "| row | budget, MiB | planned | peak | prompt, s | step estimated, ms | measured | tokens/s | same tokens "
    "| logits, error |\n|---|---|---|---|---|---|---|---|---|---|"
)
#: Name → arguments of its worker.
ROWS = {
    "planish, a quarter of the weights": ["ours", "--share=0.25", "--prompt=512", "--compare"],
    "planish, weights in 4 bits, the same budget": ["ours", "--share=0.25", "--prompt=512", "--bits=4", "--compare"],
    "accelerate, max_memory a quarter": ["theirs", "--share=0.25", "--prompt=512", "--way=auto"],
    "accelerate, cpu_offload": ["theirs", "--share=0.25", "--prompt=512", "--way=cpu_offload"],
    "transformers, all on the GPU": ["theirs", "--share=1", "--prompt=512", "--way=cuda"],
    "planish, 4 times the context, by the rule": [
        "ours", "--memory=768", "--prompt=34816", "--new=16", "--compare",
    ],
    "planish, 4 times the context, all attended to on the host": [
        "ours", "--memory=768", "--prompt=34816", "--new=16", "--way=host",
    ],
    "planish, 4 times the context, copied": ["ours", "--memory=768", "--prompt=34816", "--new=16", "--way=stream"],
    "accelerate and offloaded cache, 4 times the context": [
        "theirs", "--memory=768", "--margin=512", "--prompt=34816", "--new=16", "--way=auto", "--offloaded-cache",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--capture")
    parser.add_argument("--model")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", default="benchmarks/cuda_memory.json")
    parser.add_argument("--worker", choices=("ours", "theirs"))
    parser.add_argument("--share", type=float, default=0.0)
    parser.add_argument("--memory", type=float, default=0.0)
    parser.add_argument("--bits", type=int, default=0)
    parser.add_argument("--margin", type=float, default=160.0)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--way", default="")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--offloaded-cache", action="store_true")
    options = parser.parse_args()
    if options.capture:
        capture(options.capture, options.layers, options.width)
        return
    if options.worker:
        print(json.dumps((ours if options.worker == "ours" else theirs)(options)))
        return
    if not options.model:
        options.model = str(Path(tempfile.mkdtemp()) / "decoder.gz")
        subprocess.run([sys.executable, __file__, f"--capture={options.model}"], check=True)
    from planish.runtime.cuda.devices import gpus

    found: dict[str, Row] = {}
    for name, arguments in ROWS.items():
        if options.only and not any(part in name for part in options.only.split("|")):
            continue
        started = time.perf_counter()
        found[name] = worker([*arguments, f"--model={options.model}"])
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        Path(options.out).write_text(json.dumps({"gpu": gpus()[0].name, "rows": found}, indent=1))
    for name, row in found.items():
        print(
            name,
            row.get("stderr", ""),
            row.get("text", ""),
            {k: v for k, v in row.items() if k not in ("text", "stderr")},
        )
    print(HEADER)
    for name, row in found.items():
        print(describe(name, row))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
