"""Low precision against plain ONNX Runtime and OpenVINO, in one interleaved run: speed, error and memory.

    python benchmarks/precision.py [--rows BERT GPT-2] [--peers bf16 openvino_bf16] [--seconds 20] [--small]
                                   [--models FOLDER] [--json FILE]

Models, processes, timing and ratios are those of ``benchmarks/fusion.py``: every peer is a process of its own, one
thread, processor time, rounds of shuffled order, ratios within a round, 95 % bootstrap intervals. planish's peers are
artifacts that another process has exported. Error is relative L2 against plain ONNX Runtime in float32 on the timed
inputs, the worst over the outputs. Memory is that of the whole process, Python and libraries included: resident when it
is warm, and the peak since it started.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.fusion import say, versions, write  # noqa: E402
from benchmarks.fusion_peers import Job  # noqa: E402
from benchmarks.fusion_rows import ROWS, Row, slug  # noqa: E402
from benchmarks.fusion_workers import Workers, entry, error, pair  # noqa: E402
from planish.runtime.measure import ratio  # noqa: E402

SCRIPT = "precision_peers.py"
#: What planish makes, by name: approximate passes beside the exact ones.
PIPELINES = {
    "kernels": "",
    "bf16": "bf16",
    "int8": "quantize",
    "weights8": "quantize-weights{bits=8}",
    "weights4": "quantize-weights{bits=4}",
}
#: Rounded weights pay where one row goes through a product, rounded activations where many do.
ONLY_PREFILL, ONLY_DECODE = ("int8",), ("weights8", "weights4")
PEERS = ("ort", *PIPELINES, "openvino", "openvino_bf16")
#: The peer that low precision is measured against, and those that count as low precision.
RIVAL, LOW = "openvino_bf16", tuple(name for name in PIPELINES if name != "kernels")
PREFILL = ("BERT s128", "BERT s512", "ViT-B/16", "GPT-2 s512", "Llama-4L s256")
DECODE = ("GPT-2 decode p512", "Llama-4L decode p512")
MORE = ("MiniLM b1 s32", "MiniLM b8 s128")


def measure(row: Row, folder: Path, peers: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """One row: `folder` holds the model's file."""
    place = Path(given.scratch) / slug(row.name)
    timed = folder / slug(row.name) / "timed.npz"
    base = Job("ort", str(folder / "model.onnx"), str(timed), "", row=row.name, small=given.small, threads=1)
    jobs, made = {}, {}
    for peer in peers:
        job = replace(base, peer=peer, folder=str(place / peer))
        if peer in PIPELINES:
            made[peer] = _export(replace(job, peer="export", pipeline=PIPELINES[peer]))
            job = replace(job, peer="artifact", model=str(place / peer / "artifact"))
        jobs[peer] = job
    with Workers(jobs, SCRIPT) as workers:
        workers.build()
        expected = workers.outputs("ort", timed)
        entries = {peer: entry(workers, peer, None) for peer in peers}
        for peer in peers:
            entries[peer]["relative_l2"] = error(expected, workers.outputs(peer, timed))
            entries[peer] |= made.get(peer, {})
        times = workers.time([peer for peer in peers if entries[peer]["status"] == "ok"], given.seconds)
        pair(entries, times, "ort")
    for peer in LOW:
        for key, other in (("against_rival", RIVAL), ("against_f32", "kernels")):
            if peer in times and other in times:
                entries[peer][key] = ratio(times[other], times[peer]).to_dict()
    return {"row": row.name, "rounds": max(map(len, times.values()), default=0), "peers": entries}


def _export(job: Job) -> dict[str, Any]:
    """Makes an artifact; what is known of it, or why there is none."""
    with Workers({"export": job}, SCRIPT) as workers:
        workers.build()
        found = entry(workers, "export", None)
    about = found.get("about", {})
    failed = {key: found[key] for key in ("status", "reason") if found["status"] != "ok" and key in found}
    return failed | {key: about[key] for key in ("fired", "remarks", "bytes") if key in about}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best of planish's low precision on each row against the rival: speed, and whose error is smaller."""
    best = {}
    for row in rows:
        found = {p: row["peers"][p] for p in LOW if "against_rival" in row["peers"].get(p, {})}
        limit = row["peers"].get(RIVAL, {}).get("relative_l2")
        good = {p: item for p, item in found.items() if limit is not None and item["relative_l2"] <= limit}
        if found:
            peer = max(good or found, key=lambda p: found[p]["against_rival"]["median"])
            best[row["row"]] = {
                "peer": peer,
                "speed": found[peer]["against_rival"]["median"],
                "error": found[peer]["relative_l2"],
                "rival_error": limit,
            }
    speeds = [item["speed"] for name, item in best.items() if name in PREFILL]
    mean = math.exp(sum(map(math.log, speeds)) / len(speeds)) if speeds else None
    decode = {}
    for row in rows:
        ratios = {p: row["peers"][p]["against_f32"]["median"] for p in LOW if "against_f32" in row["peers"].get(p, {})}
        if ratios and row["row"] in DECODE:
            peer = max(ratios, key=lambda p: ratios[p])
            decode[row["row"]] = {"peer": peer, "speed": ratios[peer]}
    return {"best": best, "prefill_geomean": mean, "prefill_least": min(speeds, default=None), "decode": decode}


def show(result: dict[str, Any]) -> None:
    """The table, and what it comes to."""
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    table = Table(
        title="time of plain ONNX Runtime / time of the peer (above 1: faster); error; memory",
        caption="error: relative L2 to float32; MB: of the process, warm / peak",
    )
    for column in ("row", "peer", "ms", "speed", f"speed / {RIVAL}", "error", "MB", "artifact MB"):
        table.add_column(column, justify="left" if column in ("row", "peer") else "right")
    for row in result["rows"]:
        for peer, item in row["peers"].items():
            table.add_row(row["row"] if peer == "ort" else "", peer, *_cells(item))
        table.add_section()
    console.print(table)
    total = result["summary"]
    for name, item in total["best"].items():
        errors = f"error {item['error']:.1e} against {item['rival_error']:.1e}"
        console.print(f"{name}: {item['peer']} / {RIVAL} {item['speed']:.2f}, {errors}", highlight=False)
    if total["prefill_geomean"] is not None:
        text = f"geometric mean {total['prefill_geomean']:.2f}, least {total['prefill_least']:.2f}"
        console.print(f"best low precision / {RIVAL}: {text}", highlight=False)
    for name, item in total["decode"].items():
        console.print(f"{name}: {item['peer']} / kernels in float32 {item['speed']:.2f}", highlight=False)


def _cells(item: dict[str, Any]) -> list[str]:
    if item["status"] != "ok":
        return [f"{item['status']}: {str(item.get('reason', ''))[:60]}", "", "", "", "", ""]

    def interval(key: str) -> str:
        found = item.get(key)
        return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else ""

    memory = f"{item['resident'] / 1e6:.0f} / {item['peak'] / 1e6:.0f}" if "peak" in item else ""
    size = f"{item['bytes'] / 1e6:.0f}" if "bytes" in item else ""
    distance = "" if item.get("relative_l2") is None else f"{item['relative_l2']:.1e}"
    return [f"{item.get('ms', np.nan):.1f}", interval("ratio"), interval("against_rival"), distance, memory, size]


def chosen(names: list[str] | None) -> list[Row]:
    known = [ROWS[name] for name in (*PREFILL, *DECODE, *MORE)]
    found = [row for row in known if not names or any(row.name.lower().startswith(name.lower()) for name in names)]
    if not found:
        raise SystemExit(f"no row starts with {' or '.join(names or [])}; rows: {', '.join(r.name for r in known)}")
    return found


def fitting(row: Row) -> list[str]:
    """The peers that make sense for a row."""
    others = ONLY_PREFILL if row.name in DECODE else ONLY_DECODE
    return [peer for peer in PEERS if peer not in others]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="beginnings of names")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="besides plain ORT; by default those that fit a row")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing per row; at least 7 rounds are taken")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the benchmark itself")
    parser.add_argument("--models", type=Path, help="folder for exported models, kept and used again")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "precision.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    about = {"machine": platform.machine(), "seconds": given.seconds, "small": given.small, "versions": versions()}
    result: dict[str, Any] = {"about": about, "rows": []}
    with tempfile.TemporaryDirectory(prefix="planish-precision-") as scratch:
        given.scratch = scratch
        models = given.models or Path(scratch) / "models"
        for row in chosen(given.rows):
            folder = models / slug(row.model)
            if not (folder / slug(row.name)).is_dir():
                say(f"exporting {row.model}")
                names = [r.name for r in ROWS.values() if r.model == row.model]
                if failure := write(folder, "rows", "small" if given.small else "full", *names):
                    raise SystemExit(f"export of {row.model} failed: {failure}")
            say(row.name)
            started = time.monotonic()
            peers = list(dict.fromkeys(("ort", *(given.peers or fitting(row)))))
            result["rows"].append(measure(row, folder, peers, given) | {"seconds": time.monotonic() - started})
            result["summary"] = summary(result["rows"])
            given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
