"""One peer of ``benchmarks/precision.py`` in a process of its own; started as ``fusion_peers.py`` is.

What planish makes is exported by one process and loaded by another one, so that memory is that of a deployment: the
process that runs has never optimized anything.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import fusion_peers  # noqa: E402
from benchmarks.fusion_peers import Built, Job, Worker  # noqa: E402

ARTIFACT = "artifact"


def export(job: Job) -> Built:
    """Optimizes the file with approximate passes and writes the artifact; there is nothing to run."""
    import planish

    target = f"ort-cpu:threads={job.threads},kernels"
    calibration = fusion_peers.load(job.timed) if job.pipeline else None
    approximate = job.pipeline or None
    made = planish.optimize(
        job.model, target, approximate=approximate, calibration=calibration, budget=planish.Budget(gates=False)
    )
    folder = Path(job.folder) / ARTIFACT
    made.export(str(folder))
    about = {
        "fired": {entry.name: entry.fired for entry in made.report.ledger.entries if entry.fired},
        "remarks": made.report.remarks(),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }
    return Built(lambda feeds: lambda: None, about=about)


def artifact(job: Job) -> Built:
    """An artifact: `job.model` is its folder."""
    import planish

    runner = planish.load(job.model, allow_native=True).runners["main"]
    return Built(runner.prepared, lambda result: list(result.values()))


def openvino_bf16(job: Job) -> Built:
    return fusion_peers.openvino(job, "bf16")


PEERS = {"export": export, "artifact": artifact, "openvino_bf16": openvino_bf16}


class Measured(Worker):
    """A worker that says how many bytes of memory it takes when it is warm, `resident`, and at its `peak`."""

    def build(self) -> dict[str, Any]:
        answer = super().build()
        # Of the process alone: what files it maps is in it as far as it was read.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.MULTILINE))
        return answer | {"resident": int(found["VmRSS"]) << 10, "peak": int(found["VmHWM"]) << 10}


if __name__ == "__main__":
    fusion_peers.PEERS.update(PEERS)
    raise SystemExit(fusion_peers.main(Measured))
