"""Whole layers on two GPUs: sums by NCCL or by copies, all rows at once or in chunks that overlap.

    python benchmarks/cuda_exchange.py [--json FILE] [--lengths 4096 ...] [--ways copy nccl nccl:4] [--brief]

Two layers of Llama-7B's shape (width 4096, 32 heads of 128, a gated network of 11008), float16, batch 1, causal, shared
out by `tensor_parallel`. Attention is cuDNN's, whole, in all variants; the residual with its norm, and SwiGLU, are one
kernel each in all but "apart". Variants:

    copy      one process, `Group` with exchange="copy"; k=2, k=4: `pipeline-all-reduce`; eager, and as one CUDA graph
    nccl      two processes, `Rank` with NCCL on a second stream, as a CUDA graph whose nodes keep their priorities;
              "compute": without sums; nccl:4 with NCCL_MAX_CTAS=4
    group     one process, `Group` with exchange="nccl", eager

Each way is a process of its own, with a time limit. Outputs are compared with the whole program on one GPU first. Times
are medians of interleaved rounds; of two processes those of the slower rank. They are taken twice: with a pause of some
milliseconds before each call, and with none, which keeps GPUs at the clocks of a long computation.

`--brief`: without k=4 and "apart". `--cpu`: small sizes on CPUs, no times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import onnx_ir as ir
import torch
from cuda_all_reduce import Worker, _Nothing, cudnn, error
from cuda_all_reduce_models import layers

from planish.ir.infer import infer_shapes
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.base import PassContext
from planish.passes.lowering.lower_cuda_normalization import LowerCudaNormalization
from planish.passes.parallel.pipeline_all_reduce import PipelineAllReduce
from planish.passes.parallel.split import tensor_parallel
from planish.runtime.parallel.exchange import _CudaLane
from planish.runtime.parallel.group import Group
from planish.runtime.parallel.rank import Rank
from planish.runtime.parallel.torch_ops import contiguous_attention

WIDTH, HIDDEN, FIRST = 4096, 11008, 8192
CHUNKS = (2, 4)


# --- programs ------------------------------------------------------------------------------------------------------


def made(cpu: bool) -> tuple[Program, list[Program]]:
    """The whole program and those of both ranks, of FIRST rows; of small ones on a CPU."""
    whole = layers(FIRST, 256 if cpu else WIDTH, 512 if cpu else HIDDEN)
    infer_shapes(whole.main)
    return whole, tensor_parallel(whole, 2).programs


def fused(program: Program) -> Program:
    copy = program.clone()
    copy.target = Target.parse("ort-cuda")
    assert LowerCudaNormalization().apply(copy, PassContext(copy.target)).fired
    return copy


def of_length(program: Program, length: int) -> Program:
    """The same with another number of rows; weights are shared."""
    copy = program.clone()
    graph = copy.main.graph
    for value in {*graph.inputs, *(v for node in graph for v in node.outputs)}:
        if value.shape is not None and len(value.shape) == 3:
            value.shape = ir.Shape([1, length, value.shape[2]])
    return copy


def chunked(program: Program, chunks: int, least: int) -> Program:
    copy = program.clone()
    assert PipelineAllReduce(chunks, least).apply(copy, PassContext()).fired == 4
    return copy


def sleep(devices: list[str]) -> None:
    """Keeps GPUs busy while the host fills their queues, as the layers before would."""
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda._sleep(16_000_000)


def whole_width(whole: Program) -> int:
    return int(whole.main.graph.inputs[0].shape[2])  # type: ignore[index, arg-type]


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGUN:5.1f} s] {text}", flush=True)


BEGUN = time.monotonic()


# --- one process ---------------------------------------------------------------------------------------------------


class Timed(_CudaLane):
    """A lane that notes when it copies, and how long the rank stands still."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.copies: list[tuple[Any, Any, int]] = []
        self.waits: list[tuple[Any, Any]] = []

    def copy(self, to: Any, origin: Any, read: Any) -> Any:
        self.stream.wait_event(self.mark())
        start = self._event(self.stream)
        done = super().copy(to, origin, read)
        self.copies.append((start, self._event(self.stream), origin.numel() * origin.element_size()))
        return done

    def wait(self, event: Any) -> None:
        here = torch.cuda.current_stream(self.device)
        start = self._event(here)
        super().wait(event)
        self.waits.append((start, self._event(here)))

    def _event(self, stream: Any) -> Any:
        with torch.cuda.device(self.device):
            made = torch.cuda.Event(enable_timing=True)
            made.record(stream)
        return made


def timeline(group: Group, placed: Any) -> list[dict[str, Any]]:
    """By rank, in ms from its start: begin and end of each copy and of each wait."""
    kept = group.exchange._lanes  # type: ignore[attr-defined]
    lanes = [Timed(device) for device in group.devices]
    group.run(placed)
    group.synchronize()
    group.exchange.forget()
    group.exchange._lanes = lanes  # type: ignore[attr-defined]
    sleep(group.devices)
    starts = [lane._event(torch.cuda.current_stream(lane.device)) for lane in lanes]
    group.run(placed)
    ends = [lane._event(torch.cuda.current_stream(lane.device)) for lane in lanes]
    group.synchronize()
    group.exchange.forget()
    group.exchange._lanes = kept  # type: ignore[attr-defined]
    found = []
    for lane, start, end in zip(lanes, starts, ends, strict=True):
        copies = [(start.elapsed_time(a), start.elapsed_time(b), size) for a, b, size in lane.copies]
        waits = [(start.elapsed_time(a), start.elapsed_time(b)) for a, b in lane.waits]
        found.append({"ms": start.elapsed_time(end), "copies": copies, "waits": waits})
    return found


def rounds_of(
    calls: dict[str, Callable[[], Any]], devices: list[str], rounds: int, rest: bool = True
) -> dict[str, list[float]]:
    """Milliseconds by variant; without `rest` GPUs are kept busy, and as warm as by a long prefill."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if rest:
                sleep(devices)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            here = [torch.cuda.current_stream(device) for device in devices]
            here[0].wait_stream(here[1])
            start.record(here[0])
            here[1].wait_event(start)
            call()
            here[0].wait_stream(here[1])
            end.record(here[0])
            for device in devices:
                torch.cuda.synchronize(device)
            found[name].append(start.elapsed_time(end))
    return found


def rounds_at(length: int) -> int:
    return 7 if length > 16384 else 11


def group_rows(kind: str, options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """All variants of one process."""
    cpu, devices = options.cpu, options.devices
    attend = contiguous_attention if cpu else cudnn
    whole, parts = made(cpu)
    parts = [fused(part) for part in parts]
    say("programs are made")
    dtype, least = (None if cpu else "float16"), (8 if cpu else 128)
    alone = Rank(fused(whole), _Nothing(), device=devices[0], dtype=dtype, attend=attend)
    like = Group(parts, devices, kind, dtype=dtype, attend=attend)
    say("weights are there")
    graphs = kind == "copy" and not cpu
    for length in options.lengths:
        program = of_length(fused(whole), length)
        x = torch.randn(1, length, whole_width(whole))
        feeds = {"x": x if cpu else x.half().to(devices[0])}
        want = Rank(program, _Nothing(), device=devices[0], dtype=dtype, attend=attend, like=alone).run(feeds)["y"]
        own = [of_length(part, length) for part in parts]
        row: dict[str, Any] = {"way": options.way, "length": length, "errors": {}}
        calls: dict[str, Callable[[], Any]] = {}
        for chunks in (1, *CHUNKS[: 1 if options.brief else None]):
            name = "one" if chunks == 1 else f"k={chunks}"
            mine = own if chunks == 1 else [chunked(part, chunks, least) for part in own]
            group = Group(mine, devices, kind, dtype=dtype, attend=attend, like=like)
            placed = group.place(feeds)
            for _ in range(2):
                got = group.run(placed)["y"]
            row["errors"][name] = error(got[0], want[0])
            if cpu:
                continue
            calls[name] = lambda group=group, placed=placed: group.run(placed)  # type: ignore[misc]
            if kind == "copy" and length == options.timeline:
                row[f"timeline {name}"] = timeline(group, placed)
            if graphs:
                try:
                    graph = group.graph(feeds)
                    row["errors"][f"{name} graph"] = error(graph()["y"][0], want[0])
                    calls[f"{name} graph"] = graph
                except Exception as reason:
                    graphs = False
                    say(f"no graph of {name}: {type(reason).__name__}: {reason}")
                    traceback.print_exc()
        if not cpu:
            group.synchronize()
            row["ms"] = rounds_of(calls, devices, rounds_at(length))
            busy = {name: call for name, call in calls.items() if name.endswith("graph")}
            row["busy ms"] = rounds_of(busy, devices, 2 * rounds_at(length), False)
        keep(row)


# --- two processes -------------------------------------------------------------------------------------------------


def times_of(
    worker: Worker, calls: dict[str, Callable[[], Any]], rounds: int, rest: bool = True
) -> dict[str, list[float]]:
    """As `rounds_of`."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    flag = torch.zeros(1, device=worker.device)
    for _ in range(rounds):
        for name, call in calls.items():
            if rest:
                sleep([worker.device])
            worker.reducer.begin(flag)()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            found[name].append(start.elapsed_time(end))
    return found


def pair_rows(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """One rank of the variants with NCCL in two processes; with gloo on CPUs."""
    cpu = options.cpu
    worker = Worker(options.rank, options.folder, cpu, False)
    attend, least = (contiguous_attention, 8) if cpu else (cudnn, 128)
    whole, parts = made(cpu)
    part = parts[options.rank]
    norms = fused(part)
    like = worker.make(part, attend)

    def rank_of(program: Program, sums: Any = None, like: Rank | None = like) -> Rank:
        given = {"device": worker.device, "dtype": worker.dtype, "attend": attend, "like": like}
        return Rank(program, sums or worker.reducer, **given)

    say("weights are there")
    for length in options.lengths:
        feeds = {"x": worker.random(9, 1, length, whole_width(whole))}
        own = of_length(norms, length)
        programs = {"one": own, "k=2": chunked(own, 2, least)}
        if not options.few and not options.brief:
            programs |= {"apart": of_length(part, length), "k=4": chunked(own, 4, least)}
        runs = {name: rank_of(program) for name, program in programs.items()}
        row: dict[str, Any] = {"way": options.way, "length": length, "errors": {}}
        if length == options.lengths[0]:
            want = rank_of(of_length(fused(whole), length), _Nothing(), None).run(feeds)["y"][0]
            row["errors"] = {name: error(run.run(feeds)["y"][0], want) for name, run in runs.items()}
        if not options.few:
            runs |= {f"compute {name}": rank_of(programs[name], _Nothing()) for name in ("one", "k=2")}
        if not cpu:
            calls = {name: worker.graph(lambda run=run, feeds=feeds: run.run(feeds)) for name, run in runs.items()}  # type: ignore[misc]
            row["ms"] = times_of(worker, calls, rounds_at(length))
            row["busy ms"] = times_of(worker, calls, 2 * rounds_at(length), False)
            del calls
        keep(row)
        del runs
        if not cpu:
            torch.cuda.empty_cache()


# --- all -----------------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    path = options.folder / f"{options.rank or 0}.json"

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        path.write_text(json.dumps(rows))
        if not options.rank:
            text = "  ".join(f"{name} {median(times):.3f}" for name, times in row.get("ms", {}).items())
            worst = max(row["errors"].values(), default=float("nan"))
            say(f"{row['way']:8} {row['length']:6}  {text}  error {worst:.1e}")

    with torch.no_grad():
        if options.rank is not None:
            pair_rows(options, keep)
        else:
            group_rows("nccl" if options.way == "group" else "copy", options, keep)


def started(way: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs one way in processes of its own; what it has measured when its time is over counts."""
    name, _, limit = way.partition(":")
    environment = os.environ | ({"NCCL_MAX_CTAS": limit} if limit else {})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv, "--way", way, "--folder", folder]
        command += ["--few"] if limit else []
        ranks = [["--rank", str(n)] for n in range(2)] if name == "nccl" else [[]]
        processes = [subprocess.Popen([*command, *rank], env=environment) for rank in ranks]
        last = time.monotonic() + options.seconds
        while any(p.poll() is None for p in processes) and time.monotonic() < last:
            if any(p.poll() not in (None, 0) for p in processes):
                break
            time.sleep(0.1)
        for p in processes:
            p.kill()
            p.wait()
        paths = [Path(folder) / f"{n}.json" for n in range(len(ranks))]
        files = [json.loads(path.read_text()) for path in paths if path.exists()]
    rows = []
    for same in zip(*files, strict=False) if len(files) == len(ranks) else ():
        row = dict(same[0])
        for kind in ("ms", "busy ms"):
            if kind in row:
                row[kind] = {n: [max(t) for t in zip(*(r[kind][n] for r in same), strict=True)] for n in row[kind]}
        row["errors"] = {n: max(r["errors"][n] for r in same) for n in row["errors"]}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Medians by length, and how much faster than NCCL without chunks: rested, and busy."""
    lines = []
    for length in sorted({row["length"] for row in rows}):
        mine = [row for row in rows if row["length"] == length]
        rested, busy = (
            {f"{r['way']} {n}": median(t) for r in mine for n, t in r.get(kind, {}).items()}
            for kind in ("ms", "busy ms")
        )
        for name in rested:
            text = f"{length:6} {name:20}"
            for times in (rested, busy):
                ratio = times["nccl one"] / times[name] if {"nccl one", name} <= times.keys() else float("nan")
                text += f" {times.get(name, float('nan')):8.3f} ms {ratio:.3f}x"
            lines.append(text)
        errors = [e for r in mine for e in r["errors"].values()]
        lines.append(f"{length:6} worst error {max(errors, default=float('nan')):.1e}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--ways", nargs="*", default=["copy", "nccl", "nccl:4", "group"])
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"])
    parser.add_argument("--timeline", type=int, default=8192, help="length of which the copies are noted")
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, for each way")
    for hidden in ("--way", "--folder", "--rank", "--few"):
        kind: dict[str, Any] = {"action": "store_true"} if hidden == "--few" else {}
        types = {"--rank": int, "--folder": Path}
        parser.add_argument(
            hidden, help=argparse.SUPPRESS, **kind, **({"type": types[hidden]} if hidden in types else {})
        )
    options = parser.parse_args()
    if options.cpu:
        options.devices, options.ways, options.lengths = ["cpu", "cpu"], ["copy", "nccl"], [130, 64]
    if options.way is not None:
        work(options)
        return
    rows: list[dict[str, Any]] = []
    for way in options.ways:
        rows += started(way, options)
        if options.json is not None:
            card = "CPU" if options.cpu else torch.cuda.get_device_name(0)
            nccl = ".".join(map(str, torch.cuda.nccl.version())) if not options.cpu else ""
            text = {"card": card, "torch": torch.__version__, "nccl": nccl, "rows": rows}
            options.json.write_text(json.dumps(text, indent=1))
    print(table(rows), flush=True)


if __name__ == "__main__":
    main()
