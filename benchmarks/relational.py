"""Relational graph networks: planish's compiled layers against PyG's modules, torch.compile, and torch by hand.

    python benchmarks/relational.py [--quick] [--graphs aifb am] [--models RGCN] [--seconds S] [--json FILE]

Graphs are random, with the node, edge and type counts and the skew of the data sets that they are named after
(benchmarks/relational_graphs.py); the largest are scaled down by the factor shown. One thread, processor time, all
competitors of a row interleaved in one process; kernels, sorted edges and plans are made before. *By hand* is torch
with edges sorted by type beforehand, one matrix product for each type's segment, and index_add; softmax by
scatter_reduce (benchmarks/relational_strong.py). Every result is compared with the hand-written one's first, and that
with PyG's where PyG runs; gradients likewise.

*Inference* and *training* (forward, and backward to all weights and x): times of the others over planish's. Where an
estimate of what PyG's module allocates is above the limit, it is not run and the estimate is shown.
*Passes*: planish without linear operator reordering and compact materialization, with each, and with both; the
compaction ratio is that of (source, edge type) pairs to edges, and of (destination, edge type). *Memory*: what one call
allocates at most; of torch by the high-water mark of the process, of planish by its own account. *New graph*: a call
with a graph that is new each time, sorting included on both sides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.relational_cases import GIB, MODELS, Case, make  # noqa: E402
from benchmarks.relational_graphs import SCALES, SHAPES, Typed, generate  # noqa: E402
from benchmarks.relational_strong import Segments  # noqa: E402
from planish import relational  # noqa: E402
from planish.frontends.pyg import read_call  # noqa: E402
from planish.passes.relational.pipeline import DEFAULT  # noqa: E402
from planish.runtime.measure import bootstrap, interleave  # noqa: E402
from planish.runtime.memory import trim  # noqa: E402

_AROUND = ("canonicalize,cse,hoist,", "canonicalize,cse,dce")
#: Pipelines for the effect of two passes, alone and together.
VARIANTS = {
    "neither": "".join(_AROUND),
    "reorder": "reorder,".join(_AROUND),
    "compact": "compact,".join(_AROUND),
    "both": "reorder,compact,".join(_AROUND),
}
WIDTHS = (32, 64, 128)
#: Graphs on which widths other than 64 are measured too.
SMALL = ("aifb", "mutag", "fb15k-237")
#: What is wanted (issue: relational networks): of torch by hand in geometric mean, and of each; of PyG; in training.
WANTED = {"mean": 2.5, "each": 1.5, "PyG": 30.0, "training": 2.0}


def timed(fns: dict[str, Callable[[], object]], seconds: float) -> dict[str, Any]:
    """Milliseconds of each, and the ratios of the others to planish with their 95 % intervals."""
    times = interleave(fns, seconds=seconds, clock="process", max_runs=60)
    found: dict[str, Any] = {"ms": {name: float(np.median(values)) * 1e3 for name, values in times.items()}}
    for name in fns:
        if name != "planish":
            ratios = np.asarray(times[name]) / np.maximum(np.asarray(times["planish"]), 1e-9)
            found[name] = [float(np.median(ratios)), *bootstrap(ratios)]
    return found


def check(name: str, found: torch.Tensor, expected: torch.Tensor, limit: float = 1e-4) -> float:
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    if not error <= limit:
        raise SystemExit(f"{name}: differs by {error:.1e} relative L2 (limit {limit:.0e})")
    return error


def peak(fn: Callable[[], object]) -> int:
    """Bytes that `fn` allocates at most, by the resident set of the process; 0 where that can not be told."""
    try:
        trim()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        fn()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return 0


def own_memory(case: Case, passes: str = DEFAULT, *, training: bool = False) -> int:
    """Bytes that planish allocates in a call, results included: its kernels know it. Index tables of a graph, which
    are made once, are not among them, as sorted edges are not among those of torch by hand."""
    call = read_call(case.pyg, *case.arguments(case.x))
    pointers = np.concatenate([[0], np.cumsum(call.node_counts)]).astype(np.int64)
    graph = relational.Graph(
        call.edge_index, call.edge_type, node_ptr=pointers, num_edge_types=call.num_edge_types, edge_ends=call.type_ends
    )
    found = relational.compile(call.program, passes=passes).memory(graph, training=training)
    return sum(part.peak for part in found) if isinstance(found, tuple) else int(found.peak)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(key)


def inference(case: Case, compiled: Any, seconds: float, limit: float, *, with_compile: bool) -> dict[str, Any]:
    """One row of the first table."""
    given = case.arguments(case.x)
    label = f"{case.model} on {case.graph.name}"
    with torch.no_grad():
        expected = case.by_hand(case.x)
        error = check(label, case.joined(compiled(*given)), expected)
        fns: dict[str, Callable[[], object]] = {
            "planish": lambda: compiled(*given),
            "by hand": lambda: case.by_hand(case.x),
        }
        estimate = case.pyg_bytes(False)
        if estimate < limit:
            check(f"{label}, by hand", expected, case.joined(case.pyg(*given)))
            fns["PyG"] = lambda: case.pyg(*given)
        note = "" if estimate < limit else f"not run: {estimate / GIB:.0f} GiB"
        if with_compile and estimate < limit:
            faster, note = _torch_compile(case, given)
            if faster is not None:
                fns["torch.compile"] = faster
        row = timed(fns, seconds)
        others = {name: peak(fn) for name, fn in fns.items() if name not in ("planish", "torch.compile")}
        row["memory"] = {"planish": own_memory(case), **others}
    return {"error": error, "note": note, "pyg_estimate": estimate, **row}


def _torch_compile(case: Case, given: tuple[Any, ...]) -> tuple[Callable[[], object] | None, str]:
    """PyG's module compiled by torch, or why not."""
    try:
        faster = torch.compile(case.pyg)
        check(f"torch.compile of {case.model}", case.joined(faster(*given)), case.by_hand(case.x))
    except (Exception, SystemExit) as error:
        return None, f"torch.compile fails: {type(error).__name__}"
    return lambda: faster(*given), ""


def training(case: Case, compiled: Any, seconds: float, limit: float) -> dict[str, Any]:
    """One row of the second table: forward, and backward to all weights and x."""
    x = case.x.clone().requires_grad_()
    gradient = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1))
    parameters = [x, *case.pyg.parameters()]

    def step(forward: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            for parameter in parameters:
                parameter.grad = None
            forward().backward(gradient)

        return run

    def gradients(run: Callable[[], object]) -> dict[int, torch.Tensor]:
        run()
        return {k: p.grad.clone() for k, p in enumerate(parameters) if p.grad is not None}

    fns = {
        "planish": step(lambda: case.joined(compiled(*case.arguments(x)))),
        "by hand": step(lambda: case.by_hand(x)),
    }
    estimate = case.pyg_bytes(True)
    if estimate < limit:
        fns["PyG"] = step(lambda: case.joined(case.pyg(*case.arguments(x))))
    expected = gradients(fns["by hand"])
    largest = max(float(g.norm()) for g in expected.values())
    error = 0.0
    for key, found in gradients(fns["planish"]).items():
        wanted = expected.get(key, torch.zeros_like(found))
        error = max(error, float((found - wanted).norm()) / max(float(wanted.norm()), 1e-3 * largest))
    if not error <= 1e-3:
        raise SystemExit(f"{case.model} on {case.graph.name}: gradients differ by {error:.1e} (limit 1e-3)")
    row = timed(fns, seconds)
    others = {name: peak(fn) for name, fn in fns.items() if name != "planish"}
    row["memory"] = {"planish": own_memory(case, training=True), **others}
    for parameter in parameters:
        parameter.grad = None
    return {"error": error, "pyg_estimate": estimate, **row}


def effects(case: Case, seconds: float) -> dict[str, Any]:
    """Times and memory with reordering and compaction, alone and together, over those with neither."""
    given, fns, outputs = case.arguments(case.x), {}, {}
    with torch.no_grad():
        for name, passes in VARIANTS.items():
            layer = relational.compile(case.pyg, passes=passes)
            outputs[name] = case.joined(layer(*given))
            fns[name] = lambda layer=layer: layer(*given)
        for name in VARIANTS:
            check(f"{case.model} with {name}", outputs[name], outputs["neither"])
        times = interleave(fns, seconds=seconds, clock="process", max_runs=40)
        memory = {name: own_memory(case, passes) for name, passes in VARIANTS.items()}
    plain = np.asarray(times["neither"])
    found = {name: float(np.median(plain / np.asarray(times[name]))) for name in VARIANTS}
    return {"ms": float(np.median(plain)) * 1e3, "gain": found, "memory": memory}


def new_graph(case: Case, compiled: Any, seconds: float) -> dict[str, Any]:
    """A call with a graph that was never seen: planish sorts and plans in the call, torch by hand sorts too."""
    x, index, types = case.arguments(case.x)

    def by_hand() -> None:
        case.by_hand.at = Segments(case.graph)
        case.by_hand(case.x)

    def ours() -> None:
        compiled(x, index.clone(), torch.roll(types, 1))  # another graph each time: types move by one edge
        compiled(x, index.clone(), types)

    with torch.no_grad():
        times = interleave({"planish": ours, "by hand": by_hand}, seconds=seconds, clock="process", max_runs=7)
    ours_ms, hand_ms = (float(np.median(times[name])) * 1e3 for name in ("planish", "by hand"))
    return {"planish_ms": ours_ms / 2, "by_hand_ms": hand_ms, "by hand": hand_ms / (ours_ms / 2)}


def too_large(seconds: float) -> dict[str, Any]:
    """RGAT on am, not scaled: more than PyG's module could allocate on most machines."""
    graph = generate("am", 1.0)
    case = make("RGAT", graph, 64)
    compiled, given = relational.compile(case.pyg), case.arguments(case.x)
    with torch.no_grad():
        error = check("RGAT on am", case.joined(compiled(*given)), case.by_hand(case.x))
        fns = {"planish": lambda: compiled(*given), "by hand": lambda: case.by_hand(case.x)}
        row = timed(fns, seconds)
        row["memory"] = {"planish": own_memory(case), "by hand": peak(fns["by hand"])}
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"error": error, "pyg_estimate": case.pyg_bytes(False), "machine": total, **row}


def ratio(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return "–"
    middle, low, high = row[name]
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def size(count: float) -> str:
    return f"{count / 2**20:.0f}" if count else "?"


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, and prints rows as they come."""
    results: dict[str, Any] = {"graphs": {}, "inference": [], "training": [], "passes": [], "new graph": []}
    limit = arguments.limit * GIB
    print("| | graph | width | ms | by hand | PyG | torch.compile | MiB | by hand, PyG | error |")
    for name in arguments.graphs:
        graph = generate(name, 0.02 if arguments.quick and SHAPES[name].edges > 10**6 else None)
        results["graphs"][name] = _describe(graph)
        widths = [w for w in arguments.widths if w == 64 or (name in SMALL and not arguments.quick)]
        for model in arguments.models:
            for width in widths:
                case = make(model, graph, width)
                compiled = relational.compile(case.pyg)
                with_compile = arguments.torch_compile and name == arguments.graphs[0] and width == 64
                _inference_row(results, case, compiled, arguments.seconds, limit, with_compile)
                if width == 64:
                    _more_rows(results, case, compiled, arguments, limit)
    if not arguments.quick and arguments.memory:
        results["too large"] = too_large(arguments.seconds)
        row = results["too large"]
        ours, hand = (row["memory"][name] / GIB for name in ("planish", "by hand"))
        print(
            f"RGAT on am in full, 64: PyG's module would allocate {row['pyg_estimate'] / GIB:.0f} GiB of this "
            f"machine's {row['machine'] / GIB:.0f}; planish {ours:.2f} GiB and {row['ms']['planish']:.0f} ms, "
            f"by hand {hand:.2f} GiB, ratio {ratio(row, 'by hand')}"
        )
    return results


def _describe(graph: Typed) -> dict[str, Any]:
    sources, destinations = graph.compaction
    return {
        "nodes": graph.nodes,
        "edges": graph.edges,
        "edge_types": graph.edge_types,
        "node_types": len(graph.node_ptr) - 1,
        "scale": SCALES.get(graph.name, 1.0),
        "compaction": [sources, destinations],
    }


def _inference_row(
    results: dict[str, Any], case: Case, compiled: Any, seconds: float, limit: float, with_compile: bool
) -> None:
    row = inference(case, compiled, seconds, limit, with_compile=with_compile)
    results["inference"].append({"model": case.model, "graph": case.graph.name, "width": case.width, **row})
    memory = ", ".join(size(row["memory"].get(name, 0)) for name in ("by hand", "PyG") if name in row["memory"])
    print(
        f"| {case.model} | {case.graph.name} | {case.width} | {row['ms']['planish']:.2f} | {ratio(row, 'by hand')} | "
        f"{ratio(row, 'PyG') if 'PyG' in row else row['note']} | {ratio(row, 'torch.compile')} | "
        f"{size(row['memory']['planish'])} | {memory} | {row['error']:.0e} |",
        flush=True,
    )


def _more_rows(results: dict[str, Any], case: Case, compiled: Any, arguments: argparse.Namespace, limit: float) -> None:
    key = {"model": case.model, "graph": case.graph.name, "width": case.width}
    if arguments.training:
        row = training(case, compiled, arguments.seconds, limit)
        results["training"].append({**key, **row})
        memory = ", ".join(size(row["memory"][name]) for name in ("by hand", "PyG") if name in row["memory"])
        print(
            f"| {case.model} training | {case.graph.name} | {case.width} | {row['ms']['planish']:.2f} | "
            f"{ratio(row, 'by hand')} | {ratio(row, 'PyG')} | | {size(row['memory']['planish'])} | {memory} | "
            f"{row['error']:.0e} |",
            flush=True,
        )
    if (arguments.effects and case.model != "RGCN") or (arguments.effects and case.graph.name in SMALL):
        effect = effects(case, arguments.seconds)
        results["passes"].append({**key, **effect})
        gains = ", ".join(f"{name} {effect['gain'][name]:.2f}" for name in VARIANTS if name != "neither")
        sizes = ", ".join(size(effect["memory"][name]) for name in VARIANTS)
        share = results["graphs"][case.graph.name]["compaction"]
        print(
            f"|   passes | {case.graph.name} | {case.width} | {effect['ms']:.2f} without | {gains} | "
            f"compaction {share[0]:.2f}, {share[1]:.2f} | | {sizes} | | |",
            flush=True,
        )
    if case.model == "RGCN" and case.graph.name in SMALL:
        found = new_graph(case, compiled, arguments.seconds)
        results["new graph"].append({**key, **found})
        print(
            f"|   new graph | {case.graph.name} | {case.width} | {found['planish_ms']:.2f} | {found['by hand']:.2f} "
            f"| | | | | |",
            flush=True,
        )


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Geometric means and the smallest ratio over torch by hand, of the rows of width 64."""
    found: dict[str, Any] = {}
    for table in ("inference", "training"):
        for model in MODELS:
            rows = [r for r in results[table] if r["model"] == model and r["width"] == 64]
            for other in ("by hand", "PyG"):
                ratios = [r[other][0] for r in rows if other in r]
                if ratios:
                    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                    found[f"{model} {table}, {other}"] = {"mean": mean, "least": min(ratios), "graphs": len(ratios)}
    return found


def verdicts(found: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """What is wanted, and whether it holds."""
    lines = []
    for name, row in found.items():
        text = f"{name}: {row['mean']:.2f} in geometric mean over {row['graphs']} graphs, least {row['least']:.2f}"
        if "by hand" in name:
            inference_row = "inference" in name
            wanted = WANTED["mean"] if inference_row else WANTED["training"]
            holds = row["mean"] >= wanted and (not inference_row or row["least"] >= WANTED["each"])
            text += f"; wanted {wanted}" + (f", least {WANTED['each']}" if inference_row else "")
            text += ": holds" if holds else ": MISSED"
        lines.append(text)
    for row in results["inference"]:
        if row["model"] == "RGCN" and row["graph"] == "aifb" and row["width"] == 64 and "PyG" in row:
            holds = "holds" if row["PyG"][0] >= WANTED["PyG"] else "MISSED"
            lines.append(f"RGCN on aifb, 64: {row['PyG'][0]:.1f} times PyG; wanted {WANTED['PyG']:.0f}: {holds}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="width 64, short timings, large graphs at 2 %")
    parser.add_argument("--graphs", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--limit", type=float, default=4.0, help="GiB that PyG's module may allocate by the estimate")
    for name in ("training", "effects", "torch-compile", "memory"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.torch_compile = min(arguments.seconds, 0.3), False
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results = run(arguments)
    results["summary"] = summary(results)
    print(*verdicts(results["summary"], results), sep="\n")
    results["environment"] = {"python": platform.python_version(), "torch": torch.__version__, "cpu": _cpu()}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    raise SystemExit(main())
