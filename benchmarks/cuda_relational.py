"""Relational layers on a GPU: ours, torch by hand, and PyG's modules, forward and forward + backward.

    python benchmarks/cuda_relational.py [--json FILE] [--sizes aifb,bgs,am] [--layers rgcn,rgat,hgt] [--rounds N]

"operator" is the exported layer on target ort-cuda with kernels, "planish" what `planish.relational.compile` gives.

Graphs are random, of the sizes of the data sets: types by Zipf's law, sources uniform, destinations skewed; edges are
sorted by type for everybody. Destinations of am-1.0 (or another exponent) are by Zipf's law too, and 60 % of those of
am-hub are one node. One layer, 64 × 64, float32 without TF32. CUDA events, medians, peers interleaved in one process,
each timed at its second call in a row; memory is the peak above what there was before the call. Peers that do not fit
are left out. Errors are relative, L2, against the layer in float64 (torch by hand, or PyG's), where that fits.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from planish import relational as rel

SIZES = {"aifb": (7262, 48810, 78), "bgs": (94806, 672884, 96), "am": (881680, 5668682, 96)}
WIDTH = 64
Call = Callable[[], Any]


class Case:
    """A graph on the GPU, its features, and what each layer compares."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes, self.edges, self.types = SIZES[name.partition("-")[0]]
        random = np.random.default_rng(1)
        share = 1 / np.arange(1, self.types + 1)
        types = np.sort(random.choice(self.types, self.edges, p=share / share.sum()))
        src = random.integers(0, self.nodes, self.edges)
        dst = self.destinations(random)
        self.graph = rel.Graph(np.stack([src, dst]), types, num_nodes=self.nodes, num_edge_types=self.types)
        self.index = torch.tensor(np.stack([src, dst]), device="cuda")
        self.type = torch.tensor(types, device="cuda")
        self.lengths = np.bincount(types, minlength=self.types).tolist()
        pair = self.index[1] * self.types + self.type
        self.scale = (1 / torch.bincount(pair, minlength=self.nodes * self.types)[pair].double())[:, None]
        self.scale32 = self.scale.float()
        torch.manual_seed(0)
        self.x = torch.randn(self.nodes, WIDTH, device="cuda")
        self.y_gradient = torch.randn(self.nodes, WIDTH, device="cuda")

    def destinations(self, random: np.random.Generator) -> np.ndarray:
        """Skewed; after Zipf's law with the exponent that the name ends in; or for ``hub``, 60 % are one node."""
        kind = self.name.partition("-")[2]
        if kind == "hub":
            return np.where(random.random(self.edges) < 0.6, 7, random.integers(0, self.nodes, self.edges))
        if kind:
            shares = np.cumsum(np.arange(1, self.nodes + 1) ** -float(kind))
            rank = np.searchsorted(shares, random.random(self.edges) * shares[-1])
            return random.permutation(self.nodes)[np.minimum(rank, self.nodes - 1)]
        return np.minimum((random.random(self.edges) ** 2 * self.nodes).astype(np.int64), self.nodes - 1)

    def grouped(self) -> dict[tuple[str, str, str], torch.Tensor]:
        parts = self.index.split(self.lengths, 1)
        return {("n", f"r{i}", "n"): part.contiguous() for i, part in enumerate(parts) if part.shape[1]}


def by_hand(case: Case, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RGCN as one would write it: edges sorted by type, a product for each type, a sum by index."""
    gathered = x[case.index[0]].split(case.lengths)
    messages = torch.cat([rows @ w for rows, w in zip(gathered, weight.unbind(0), strict=True)])
    scale = case.scale32 if x.dtype == torch.float32 else case.scale
    return torch.zeros_like(x).index_add_(0, case.index[1], messages * scale)


def exported(module: torch.nn.Module, types: int, typed: bool = False) -> Any:
    """The layer optimized for target ort-cuda with kernels, for graphs of any size; a function of tensors on the GPU.

    Args:
        typed: the module's inputs are dicts by type; the function's are what is in them, one after the other.
    """
    import planish

    index, kinds = torch.randint(0, 50, (2, 4 * types)), torch.arange(4 * types) % types
    x = torch.randn(50, WIDTH)
    if typed:
        edges = {("n", f"r{i}", "n"): index[:, kinds == i].contiguous() for i in range(types)}
        inputs: tuple[Any, ...] = ({"n": x}, edges)
        sizes: tuple[Any, ...] = ({"n": {0: "nodes"}}, {key: {1: f"edges_{key[1]}"} for key in edges})
    else:
        inputs, sizes = (x, index, kinds), ({0: "nodes"}, {1: "edges"}, {0: "edges"})
    return planish.optimize(
        module, "ort-cuda:kernels", example_inputs=inputs, dynamic_shapes=sizes, budget=planish.Budget(gates=False)
    )


def operator(base: torch.nn.Module, case: Case, typed: bool = False) -> Any:
    """What `exported` gives, made at the first call."""
    made: list[Any] = []

    def call(*inputs: Any) -> Any:
        if not made:
            made.append(exported(copy.deepcopy(base).cpu().eval(), case.types, typed))
        return made[0](*inputs)

    return call


def rgcn(case: Case) -> dict[str, tuple[Call, list[torch.Tensor]]]:
    """By name: a call, and the tensors that it is differentiated by."""
    from torch_geometric.nn import FastRGCNConv, RGCNConv

    x = case.x.clone().requires_grad_()
    base = RGCNConv(WIDTH, WIDTH, case.types, root_weight=False, bias=False).cuda()
    fast = FastRGCNConv(WIDTH, WIDTH, case.types, root_weight=False, bias=False).cuda()
    fast.weight = base.weight
    ours, fixed = (rel.compile(base, device="cuda", deterministic=d) for d in (False, True))
    wrt = [x, base.weight]
    exact = [t.detach().double().requires_grad_() for t in wrt]
    exe = operator(base, case)
    return {
        "float64": (lambda: by_hand(case, *exact), exact),
        "planish": (lambda: ours(x, case.index, case.type), wrt),
        "operator": (lambda: exe(case.x, case.index, case.type), []),
        "deterministic": (lambda: fixed(x, case.index, case.type), wrt),
        "by hand": (lambda: by_hand(case, x, base.weight), wrt),
        "RGCNConv": (lambda: base(x, case.index, case.type), wrt),
        "FastRGCNConv": (lambda: fast(x, case.index, case.type), wrt),
    }


def rgat(case: Case) -> dict[str, tuple[Call, list[torch.Tensor]]]:
    from torch_geometric.nn import RGATConv

    x = case.x.clone().requires_grad_()
    options = {"attention_mode": "additive-self-attention", "attention_mechanism": "across-relation", "bias": False}
    base = RGATConv(WIDTH, WIDTH, case.types, heads=1, **options).cuda()
    ours, fixed = (rel.compile(base, device="cuda", deterministic=d) for d in (False, True))
    wrt = [x, *base.parameters()]
    exact = copy.deepcopy(base).double()
    x64 = x.detach().double().requires_grad_()
    exe = operator(base, case)
    return {
        "float64": (lambda: exact(x64, case.index, case.type), [x64, *exact.parameters()]),
        "planish": (lambda: ours(x, case.index, case.type), wrt),
        "operator": (lambda: exe(case.x, case.index, case.type), []),
        "deterministic": (lambda: fixed(x, case.index, case.type), wrt),
        "RGATConv": (lambda: base(x, case.index, case.type), wrt),
    }


def hgt(case: Case) -> dict[str, tuple[Call, list[torch.Tensor]]]:
    from torch_geometric.nn import HGTConv

    x, edges = case.x.clone().requires_grad_(), case.grouped()
    base = HGTConv(WIDTH, WIDTH, (["n"], list(edges)), heads=1).cuda()
    ours, fixed = (rel.compile(base, device="cuda", deterministic=d) for d in (False, True))
    wrt = [x, *base.parameters()]
    exact = copy.deepcopy(base).double()
    x64 = x.detach().double().requires_grad_()
    exe = operator(base, case, typed=True)
    return {
        "float64": (lambda: exact({"n": x64}, edges)["n"], [x64, *exact.parameters()]),
        "planish": (lambda: ours({"n": x}, edges)["n"], wrt),
        "operator": (lambda: exe(case.x, *edges.values()), []),
        "deterministic": (lambda: fixed({"n": x}, edges)["n"], wrt),
        "HGTConv": (lambda: base({"n": x}, edges)["n"], wrt),
    }


LAYERS = {"rgcn": rgcn, "rgat": rgat, "hgt": hgt}


def clear() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak(call: Call) -> float:
    """GiB above what there was."""
    clear()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def times(calls: dict[str, Call], rounds: int, most: float) -> dict[str, float]:
    """Milliseconds, medians of interleaved rounds; those longer than `most` seconds are timed twice."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            if number > 1 and min(found[name]) > most * 1000:
                continue
            if number == 0 or min(found[name]) < most * 1000:
                call()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            found[name].append(start.elapsed_time(end))
    return {name: median(values) for name, values in found.items()}


def captured(call: Call) -> Call:
    """The same as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def step(case: Case, call: Call, wrt: list[torch.Tensor]) -> Call:
    def run() -> list[torch.Tensor]:
        y = call()
        return list(torch.autograd.grad(y, wrt, case.y_gradient.to(y.dtype), allow_unused=True))

    return run


def reference(case: Case, call: Call, wrt: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result and the gradients in float64; nothing if that does not fit."""
    try:
        return [torch.no_grad()(call)(), *step(case, call, wrt)()]
    except torch.OutOfMemoryError:
        return []


def error(found: torch.Tensor | None, wanted: torch.Tensor | None) -> float:
    if found is None or wanted is None:
        return 0.0
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def rows_of(case: Case, layer: str, rounds: int, skip: set[str]) -> list[dict[str, Any]]:
    peers = {name: peer for name, peer in LAYERS[layer](case).items() if name not in skip}
    exact = reference(case, *peers.pop("float64"))
    rows = {name: {"layer": layer, "size": case.name, "who": name} for name in peers}
    forward, both = {}, {}
    for name, (call, wrt) in peers.items():
        inference = torch.no_grad()(call)
        steps = step(case, call, wrt)
        try:
            y = inference()
            if name != "operator":  # whose memory is not torch's
                rows[name]["forward_gib"] = peak(inference)
            forward[name] = inference
        except torch.OutOfMemoryError:
            rows[name]["forward_oom"] = True
            continue
        if exact:
            rows[name]["error"] = error(y, exact[0])
        del y
        if not wrt:
            continue
        try:
            gradients = steps()
            rows[name]["both_gib"] = peak(steps)
            if layer != "hgt" or case.name != "am" or name in ("planish", "deterministic"):
                both[name] = steps
            if exact:
                rows[name]["gradient_error"] = max(map(error, gradients, exact[1:]))
            del gradients
        except torch.OutOfMemoryError:
            rows[name]["both_oom"] = True
        clear()
    if case.name == "aifb":
        graphs = {f"{n} in a graph": captured(forward[n]) for n in ("planish", "by hand") if n in forward}
        for name, call in graphs.items():
            rows[name] = {"layer": layer, "size": case.name, "who": name}
            forward[name] = call
    exact.clear()
    clear()
    for column, calls in (("forward_ms", forward), ("both_ms", both)):
        for name, ms in times(calls, rounds, 0.1).items():
            rows[name][column] = ms
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| layer | graph | | forward ms | + backward ms | GiB | + backward GiB | error | of gradients |"]
    lines.append("|" + "---|" * 9)
    for row in rows:

        def cell(name: str, form: str, out: str = "", row: dict[str, Any] = row) -> str:
            return format(row[name], form) if name in row else "does not fit" if out and row.get(out) else "–"

        cells = [row["layer"], row["size"], row["who"], cell("forward_ms", ".3f", "forward_oom")]
        cells += [cell("both_ms", ".3f", "both_oom"), cell("forward_gib", ".2f"), cell("both_gib", ".2f")]
        cells += [cell("error", ".1e"), cell("gradient_error", ".1e")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--skip", default="", help="peers that are left out")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes.split(","):
        case = Case(size)
        for layer in arguments.layers.split(","):
            rows += rows_of(case, layer, arguments.rounds, set(arguments.skip.split(",")))
            clear()
            if arguments.json:
                arguments.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1))
        del case
        clear()
    print(table(rows))


if __name__ == "__main__":
    main()
