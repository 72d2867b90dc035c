"""Attention, output projection and AllReduce on two GPUs: one after the other, or in chunks that overlap.

    python benchmarks/cuda_all_reduce.py [--json FILE] [--quick] [--cpu]

Two processes, one for each GPU. A rank runs its program node by node (`planish.runtime.parallel.rank`), captured as a
CUDA graph, its sums by NCCL on a second stream; `tile-all-reduce` makes the chunks. Two programs: attention with its
projection and sum alone, and two whole layers shared out by `tensor_parallel`. float16, batch 1, causal, heads of 128.

Every variant is compared with the whole program on one GPU first (sampled rows of attention in float64). Times are
those of the slower rank, medians of interleaved rounds that both ranks begin together. `--cpu`: small sizes, by gloo,
no times.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from cuda_all_reduce_models import HEAD, RANKS_HERE, layers, part

from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.parallel.split import tensor_parallel
from planish.passes.parallel.tile_all_reduce import TileAllReduce
from planish.runtime.cuda import driver
from planish.runtime.parallel.rank import GlooReducer, NcclReducer, Rank
from planish.runtime.parallel.torch_ops import contiguous_attention

CHUNKS = (2, 4, 8)


def tiled(program: Program, chunks: int) -> Program | None:
    """The program with its sums in chunks; None where the pass declines."""
    copy = program.clone()
    result = TileAllReduce(chunks=chunks, least=4 if length_of(program) < 512 else 128).apply(copy, PassContext())
    for declined in result.declined:
        print(f"declined: {declined.reason}", flush=True)
    return copy if result.fired else None


def length_of(program: Program) -> int:
    return int(program.main.graph.inputs[0].shape[1])  # type: ignore[index, arg-type]


# --- one rank ------------------------------------------------------------------------------------------------------


class Replay:
    """A captured graph whose nodes keep the priorities of their streams, so that the blocks of a sum may go before
    those of the computation that was begun with it.
    """

    def __init__(self, graph: Any, kept: Any) -> None:
        self.kept, self.handle = (graph, kept), ctypes.c_void_p()
        by_node_priority = ctypes.c_ulonglong(8)  # CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY
        source = ctypes.c_void_p(graph.raw_cuda_graph())
        code = driver.library().cuGraphInstantiateWithFlags(ctypes.byref(self.handle), source, by_node_priority)
        driver.check(code, "making a graph")

    def __call__(self) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        driver.check(driver.library().cuGraphLaunch(self.handle, stream), "launching a graph")


class Worker:
    """What one process does."""

    def __init__(self, rank: int, folder: Path, cpu: bool, ours: bool) -> None:
        self.rank, self.cpu = rank, cpu
        self.device, self.dtype = ("cpu", None) if cpu else (f"cuda:{rank}", "float16")
        self.attend = contiguous_attention
        if cpu:
            store = f"file://{folder / 'store'}"
            torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS_HERE)
            self.reducer: Any = GlooReducer()
            return
        from planish.runtime.cuda import attention as kernels
        from planish.runtime.parallel.nccl import Communicator, new_id

        torch.cuda.set_device(rank)
        torch.zeros(1, device=self.device)
        self.reducer = NcclReducer(Communicator(shared(folder, rank, new_id), rank, RANKS_HERE))
        if ours:
            self.attend = lambda q, k, v, mask, causal, scale: kernels.attention(q, k, v, causal=causal, scale=scale)

    def make(self, program: Program, attend: Any = None, sums: Any = None) -> Rank:
        given = {"attend": attend or self.attend, "device": self.device, "dtype": self.dtype}
        return Rank(program, sums or self.reducer, **given)

    def random(self, seed: int, *sizes: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        dtype = torch.float32 if self.cpu else torch.float16
        return torch.randn(sizes, generator=generator, device=self.device, dtype=dtype)

    def agreed(self, number: float) -> float:
        """The mean over the ranks, which decide alike by it."""
        tensor = torch.tensor([number], device=self.device)
        self.reducer.begin(tensor)()
        return tensor.item() / RANKS_HERE

    def graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.synchronize()
        made = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(made, stream=stream, capture_error_mode="relaxed"):
            kept = call()
        try:
            return Replay(made, kept)
        except Exception as reason:
            print(f"without priorities: {reason}", flush=True)
            made.instantiate()
            return made.replay

    def times(self, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        """Milliseconds of each round; both ranks begin a call together."""
        found: dict[str, list[float]] = {name: [] for name in calls}
        flag = torch.zeros(1, device=self.device)
        for _ in range(rounds):
            for name, call in calls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.reducer.begin(flag)()
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                found[name].append(start.elapsed_time(end))
        return found


def shared(folder: Path, rank: int, make: Callable[[], bytes]) -> bytes:
    """What rank 0 makes, for all."""
    path = folder / "id"
    if rank == 0:
        path.with_suffix(".new").write_bytes(make())
        path.with_suffix(".new").rename(path)
    while not path.exists():
        time.sleep(0.01)
    return path.read_bytes()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Rows of the whole attention and projection, float64."""
    found = []
    for row in rows:
        split = [x[0, : row + 1].double().unflatten(-1, (-1, HEAD)) for x in (k, v)]
        query = q[0, row].double().unflatten(-1, (-1, HEAD))
        scores = torch.einsum("hd,thd->ht", query, split[0]) / HEAD**0.5
        found.append(torch.einsum("ht,thd->hd", scores.softmax(-1), split[1]).flatten() @ weight.double())
    return torch.stack(found)


def runs_of(worker: Worker, whole: Program) -> dict[str, Rank]:
    """Variants by name: attention by our kernels, and by cuDNN; in one piece, and in chunks."""
    programs = {"one": whole} | {f"k={n}": tiled(whole, n) for n in CHUNKS}
    found = {name: worker.make(program) for name, program in programs.items() if program is not None}
    if not worker.cpu:
        for name, program in programs.items():
            if program is not None and name != "k=8":
                found[f"cuDNN {name}"] = worker.make(program, cudnn)
        found["compute"] = worker.make(whole, sums=_Nothing())
        found["cuDNN compute"] = worker.make(whole, cudnn, _Nothing())
    return found


def checked(runs: dict[str, Rank], feeds: dict[str, Any], rows: Any, want: torch.Tensor) -> dict[str, float]:
    """Relative errors of all that sum; a variant that does not run is left out, with a line that says why."""
    errors = {}
    for name, run in list(runs.items()):
        try:
            got = run.run(feeds)["y"][0, rows]
        except RuntimeError as reason:
            print(f"{name}: {reason}", flush=True)
            del runs[name]
            continue
        if "compute" not in name:
            errors[name] = error(got, want)
    return errors


def parts(worker: Worker, length: int, width: int, rounds: int) -> dict[str, Any]:
    """Attention, projection and sum alone."""
    mine = slice(worker.rank * width // RANKS_HERE, (worker.rank + 1) * width // RANKS_HERE)
    q, k, v = (worker.random(i, 1, length, width) for i in range(3))
    weight = worker.random(3, width, width) / width**0.5
    feeds = {name: x[..., mine].contiguous() for name, x in (("q", q), ("k", k), ("v", v))}
    runs = runs_of(worker, part(length, width, worker.rank, weight[mine].float().cpu().numpy()))
    rows = [0, 1, length // 3, length // 2, length - 1]
    errors = checked(runs, feeds, rows, expected(q, k, v, weight, rows))
    del q, k, v
    found: dict[str, Any] = {"what": "attention", "length": length, "width": width, "errors": errors}
    if worker.cpu:
        return found
    calls = {name: worker.graph(lambda run=run: run.run(feeds)) for name, run in runs.items()}  # type: ignore[misc]
    total = torch.zeros(1, length, width, device=worker.device, dtype=torch.float16)
    calls["sum"] = worker.graph(lambda: worker.reducer.begin(total)())
    return found | {"ms": worker.times(calls, rounds)}


def cudnn(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float | None) -> Any:
    """Attention by cuDNN, the fastest that torch has. It takes causal squares only: what is before one is attended to
    apart, and both are joined by their log-sum-exps.
    """
    assert causal and mask is None
    rows, past = q.shape[1], k.shape[1] - q.shape[1]
    own, own_sum = _dense(q, k[:, past:], v[:, past:], True, scale)
    if not past:
        return own
    other, other_sum = _dense(q, k[:, :past], v[:, :past], False, scale)
    share = torch.sigmoid(other_sum.reshape(1, -1, rows) - own_sum.reshape(1, -1, rows)).transpose(1, 2)[..., None]
    return torch.lerp(own, other, share.to(own.dtype))


def _dense(q: Any, k: Any, v: Any, causal: bool, scale: float | None) -> tuple[Any, Any]:
    """(output as q, log-sum-exp by head and row)."""
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True, 0.0, causal, False, scale=scale)
    return found[0].transpose(1, 2), found[1]


class _Nothing:
    """Sums nothing: what computing alone takes."""

    def begin(self, tensor: torch.Tensor) -> Callable[[], None]:
        return lambda: None


def stack(worker: Worker, length: int, width: int, hidden: int, rounds: int) -> dict[str, Any]:
    """Two layers, shared out."""
    program = layers(length, width, hidden)
    feeds = {"x": worker.random(9, 1, length, width)}
    whole = worker.make(program, None if worker.cpu else cudnn, _Nothing())
    want = whole.run(feeds)["y"][0]
    runs = runs_of(worker, tensor_parallel(program, RANKS_HERE).programs[worker.rank])
    errors = checked(runs, feeds, slice(None), want)
    found: dict[str, Any] = {"what": "layers", "length": length, "width": width, "errors": errors}
    if worker.cpu:
        return found
    calls = {name: worker.graph(lambda run=run: run.run(feeds)) for name, run in runs.items()}  # type: ignore[misc]
    calls["cuDNN one GPU"] = worker.graph(lambda: whole.run(feeds))
    return found | {"ms": worker.times(calls, rounds)}


def work(rank: int, folder: Path, options: argparse.Namespace) -> None:
    worker = Worker(rank, folder, options.cpu, not options.torch)
    if options.cpu:
        sizes, stacks = [(40, 512), (64, 512)], [(40, 512, 256)]
    elif options.quick:
        sizes, stacks = [(2048, 4096)], [(2048, 4096, 8192)]
    else:
        sizes = [(n, width) for width in (4096, 8192) for n in (2048, 4096, 8192, 16384, 32768)]
        stacks = [(n, 4096, 8192) for n in (2048, 4096, 8192, 16384)]
    if options.lengths:
        sizes, stacks = ([row for row in rows if row[0] in options.lengths] for rows in (sizes, stacks))
    begun, found = time.monotonic(), []
    with torch.no_grad():
        for call, rows in ((parts, sizes), (stack, stacks)):
            for row in rows:
                if worker.agreed(time.monotonic() - begun) > options.seconds:
                    break
                try:
                    found.append(call(worker, *row, 9 if row[0] > 8192 else 21))  # type: ignore[operator]
                except Exception as reason:
                    print(f"rank {rank}, {call.__name__}{row}: {type(reason).__name__}: {reason}", flush=True)
                    raise
                (folder / f"{rank}.json").write_text(json.dumps(found))
                if not options.cpu:
                    torch.cuda.empty_cache()


# --- all ranks -----------------------------------------------------------------------------------------------------


def merged(folder: Path) -> list[dict[str, Any]]:
    """Rows with the median of the slower rank in each round."""
    files = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS_HERE)]
    rows = []
    for ranks in zip(*files, strict=False):
        row = dict(ranks[0])
        row["errors"] = {name: max(r["errors"][name] for r in ranks) for name in row["errors"]}
        if "ms" in row:
            rounds = {name: [max(t) for t in zip(*(r["ms"][name] for r in ranks), strict=True)] for name in row["ms"]}
            row["ms"] = {name: median(times) for name, times in rounds.items()}
            row["spread"] = {n: float(np.subtract(*np.percentile(t, [75, 25]))) for n, t in rounds.items()}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each row and each kind of attention: times, the best chunks, how much of the sum they hide."""
    lines = []
    for row in rows:
        ms, name = row.get("ms", {}), f"{row['what']:9} {row['length']:6} x {row['width']:5}"
        if not ms:
            lines.append(f"{name}  error {max(row['errors'].values()):.1e} ({', '.join(row['errors'])})")
        for kind in ("", "cuDNN ") if ms else ():
            mine = {n.removeprefix(kind): t for n, t in ms.items() if n.startswith("cuDNN") == bool(kind)}
            chunked = {n: t for n, t in mine.items() if n.startswith("k=")}
            if not chunked or "one" not in mine:
                continue
            best = min(chunked, key=chunked.__getitem__)
            hidden = (mine["one"] - chunked[best]) / (mine["one"] - mine["compute"])
            text = "  ".join(f"{n} {t:.3f}" for n, t in mine.items())
            gain = f"{best} {mine['one'] / chunked[best]:.3f}x, hides {hidden:.0%}"
            worst = max(e for n, e in row["errors"].items() if n.startswith("cuDNN") == bool(kind))
            lines.append(f"{name} {kind or 'ours  '} {text} | {gain} | error {worst:.1e}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--torch", action="store_true", help="attention by torch's kernels, not ours")
    parser.add_argument("--lengths", type=int, nargs="*", help="only these")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        work(options.rank, options.folder, options)
        return
    if not options.cpu and torch.cuda.device_count() < RANKS_HERE:
        sys.exit(f"this takes {RANKS_HERE} GPUs; there are {torch.cuda.device_count()}. --cpu checks numbers only.")
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, *sys.argv, "--folder", made]
        ranks = [subprocess.Popen([*command, "--rank", str(n)], env=os.environ) for n in range(RANKS_HERE)]
        try:
            last = time.monotonic() + options.seconds + 30
            while any(p.poll() is None for p in ranks) and time.monotonic() < last:
                if any(p.poll() not in (None, 0) for p in ranks):
                    break  # the other would wait for it for ever
                time.sleep(0.1)
        finally:
            for p in ranks:
                p.kill()
        rows = merged(Path(made))
    print(table(rows))
    if options.json is not None:
        card = "CPU" if options.cpu else torch.cuda.get_device_name(0)
        options.json.write_text(json.dumps({"card": card, "ranks": RANKS_HERE, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
