"""Fused graphs against every peer, in one interleaved run: whole models, causal attention, the optimizer's cost.

    python benchmarks/fusion.py [--only models causal cost] [--rows BERT ResNet-50] [--peers planish openvino]
                                [--seconds 20] [--threads 1] [--small] [--json FILE]

Each model is exported once with ``torch.onnx.export`` (dynamic batch and length), and all peers that take ONNX read
that file. Every peer of a row is a process of its own, so that the threads, allocators and floating-point modes of one
do not touch another; all of them are built and warm before the first sample. Then one after the other is asked for a
run, in rounds of shuffled order. Ratios are taken within a round, against plain ONNX Runtime with all its
optimizations; the interval is a bootstrap of the median (95 %). One thread is timed in processor time, more threads in
wall time, on a machine of your own. Outputs are compared with eager torch in float32, those of planish and of plain
ONNX Runtime at a dozen other batches and lengths too. A peer that fails, or is wrong, is shown as such.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.fusion_peers import PEERS, Job  # noqa: E402
from benchmarks.fusion_rows import MINE, ROWS, Row, slug  # noqa: E402
from benchmarks.fusion_summary import summary  # noqa: E402
from benchmarks.fusion_workers import HERE, Workers, entry, environment, error, finite, pair  # noqa: E402

TABLES = ("models", "causal", "cost")
#: Peers that are measured unless others are asked for.
SHOWN = [peer for peer in PEERS if peer not in ("ort", "compile_frozen", "broken")]
CAUSAL, CAUSAL_SMALL = (512, 1024, 2048), (48,)
LADDER, LADDER_SMALL = (4, 12, 48, 96), (1, 2)
PACKAGES = ("onnxruntime", "torch", "transformers", "onnxscript", "openvino", "onnx")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write(folder: Path, *arguments: str) -> str:
    """Runs ``fusion_models.py``; its last line if it failed."""
    folder.mkdir(parents=True)
    what, *rest = arguments
    command = [sys.executable, str(HERE / "fusion_models.py"), what, str(folder), *rest]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(1))
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
    return "" if done.returncode == 0 else lines[-1]


def measure(row: Row, folder: Path, peers: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """One row: `folder` holds the model's file."""
    place = folder / slug(row.name)
    timed = place / "timed.npz"
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    more = {"row": row.name, "small": given.small, "threads": given.threads, "model_type": row.model_type, **about}
    model = str(folder / "model.onnx")
    # Eager is the reference even where it is not timed.
    jobs = {
        peer: Job(peer=peer, model=model, timed=str(timed), folder=str(place / peer), **more)
        for peer in dict.fromkeys(("eager", *peers))
    }
    with Workers(jobs) as workers:
        workers.build()
        expected = workers.outputs("eager", timed)
        distances = {peer: error(expected, workers.outputs(peer, timed)) for peer in peers}
        entries = {peer: entry(workers, peer, distances[peer]) for peer in peers}
        times = workers.time([peer for peer in peers if entries[peer]["status"] == "ok"], given.seconds)
        for peer in peers:
            entries[peer] |= workers.processes[peer].failure or {}
        pair(entries, times, "ort")
        lengths = check(workers, row, place, [peer for peer in (*MINE, "ort") if peer in times], given.small)
    rounds = max(map(len, times.values()), default=0)
    return {
        "row": row.name,
        "transformer": row.transformer,
        "batch": row.batch,
        "length": row.small if given.small else row.length,
        "rounds": rounds,
        "peers": entries,
        "lengths": lengths,
    }


def check(workers: Workers, row: Row, place: Path, peers: list[str], small: bool) -> dict[str, dict[str, Any]]:
    """The artifact at other batches and lengths, against eager: relative L2 by ``<batch>x<length>``, and the worst."""
    result: dict[str, dict[str, Any]] = {peer: {"relative_l2": {}, "worst": 0.0} for peer in peers}
    for batch, length in row.pairs(small):
        feeds = place / f"{batch}x{length}.npz"
        expected = workers.outputs("eager", feeds)
        for peer in peers:
            distance = error(expected, workers.outputs(peer, feeds))
            found = result[peer]
            found["relative_l2"][f"{batch}x{length}"] = finite(distance)
            # What could not be run or compared is no small error.
            distance = math.inf if distance is None else distance
            found["worst"] = finite(max(distance, math.inf if found["worst"] is None else found["worst"]))
            if (failure := workers.processes[peer].failure) is not None:
                found.setdefault("failure", failure | {"at": f"{batch}x{length}"})
    return result


def models(rows: list[Row], peers: list[str], folder: Path, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows' results, one by one; a model's file is there as long as rows need it."""
    done = 0
    for name in dict.fromkeys(row.model for row in rows):
        same = [row for row in rows if row.model == name]
        place = folder / slug(name)
        say(f"exporting {name}")
        failure = write(place, "rows", "small" if given.small else "full", *(row.name for row in same))
        for row in same:
            done += 1
            say(f"[{done}/{len(rows)}] {row.name}")
            if failure:
                entries = {peer: {"status": "failed", "reason": f"export: {failure}"} for peer in peers}
                yield {"row": row.name, "transformer": row.transformer, "peers": entries, "lengths": {}}
                continue
            started = time.monotonic()
            yield measure(row, place, peers, given) | {"seconds": time.monotonic() - started}
        shutil.rmtree(place)


def causal(folder: Path, peers: list[str], given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Causal attention by itself, a result per length."""
    from benchmarks.fusion_causal import measure as measure_causal

    for length in CAUSAL_SMALL if given.small else CAUSAL:
        say(f"causal attention, {length}")
        place = folder / f"causal-{length}"
        place.mkdir()
        yield measure_causal(length, place, given.seconds, given.threads, peers)


def cost(folder: Path, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What `planish.optimize` costs, by the number of layers: a result per rung of the ladder."""
    for layers in LADDER_SMALL if given.small else LADDER:
        say(f"optimizing {layers} layers")
        place = folder / f"ladder-{layers}"
        failure = write(place, "ladder", str(layers))
        if failure:
            yield {"layers": layers, "status": "failed", "reason": f"export: {failure}"}
            continue
        job = Job("planish", str(place / "model.onnx"), str(place / "timed.npz"), str(place / "planish"))
        with Workers({"planish": job}) as workers:
            workers.build()
            found = entry(workers, "planish", None)
        about = found.get("about", {})
        keys = ("optimize_seconds", "optimize_processor_seconds", "nodes_before", "nodes_after")
        result = {"layers": layers, "status": found["status"], "reason": found.get("reason", "")}
        yield result | {key: about.get(key) for key in keys}


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def chosen(names: list[str] | None) -> list[Row]:
    """Rows whose name starts with one of `names`; all without any."""
    known = [row for row in ROWS.values() if row.fusion]
    if not names:
        return known
    found = [row for row in known if any(row.name.lower().startswith(name.lower()) for name in names)]
    if not found:
        raise SystemExit(f"no row starts with {' or '.join(names)}; rows: {', '.join(row.name for row in known)}")
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="tables")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=f"beginnings of: {', '.join(ROWS)}")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=SHOWN, help="besides plain ORT")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing per row; at least 7 rounds are taken")
    parser.add_argument("--threads", type=int, default=1, help="1 (the default) is timed in processor time")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the benchmark itself")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "fusion.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    from benchmarks import fusion_tables as tables

    given = parse(arguments)
    rows = chosen(given.rows)
    peers = list(dict.fromkeys(("ort", *given.peers)))
    result: dict[str, Any] = {
        "about": {
            "machine": platform.processor() or platform.machine(),
            "threads": given.threads,
            "seconds": given.seconds,
            "small": given.small,
            "versions": versions(),
        }
    }
    with tempfile.TemporaryDirectory(prefix="planish-fusion-") as name:
        folder = Path(name)
        parts = {
            "rows": models(rows, peers, folder, given) if "models" in given.only else None,
            "causal": causal(folder, peers, given) if "causal" in given.only else None,
            "cost": cost(folder, given) if "cost" in given.only else None,
        }
        for part, results in parts.items():
            for item in results or ():
                result.setdefault(part, []).append(item)
                result["summary"] = summary(result)
                # After each, so that what is measured is there if the rest is stopped.
                given.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    tables.show(result)
    return 1 if result["summary"]["invalid"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
