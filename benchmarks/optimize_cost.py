"""What an optimization itself costs: seconds and peak memory for BERT-base (12 layers, dynamic batch and sequence).

    python benchmarks/optimize_cost.py [--json FILE]

Each row is a process of its own. Memory is the resident set, sampled every 5 ms: `before` is the process with the
libraries imported and the model at hand (a torch module holds its weights then, a file holds nothing), `peak` the
highest during `planish.optimize`. `of weights` is what the optimization and the model take together,
(peak - before + weights already held) / weights; the interpreter and torch's libraries are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_RESULT = "RESULT "
LENGTH = 128


def bert() -> Any:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()
    with torch.no_grad():  # fresh biases are zero, and a bias of zero is no work
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return model


def examples() -> tuple[Any, Any]:
    import torch

    return torch.randint(0, 30_000, (1, LENGTH)), torch.ones(1, LENGTH, dtype=torch.long)


class PeakMemory:
    """Samples the resident set of this process while it is open."""

    def __enter__(self) -> PeakMemory:
        import psutil

        self.process, self.open = psutil.Process(), True
        self.before = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.open:
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.open = False
        self.thread.join()


def measure(source: str, gates: bool, path: str) -> dict[str, Any]:
    """One row: `source` is "module" or "file"."""
    import planish
    import planish.driver  # imports are no part of an optimization

    budget = planish.Budget(gates=gates)
    if source == "module":
        import planish.frontends.torch

        model, inputs = bert(), examples()
        names = {0: "batch", 1: "sequence"}
        more: dict[str, Any] = {"example_inputs": inputs, "dynamic_shapes": (names, names)}
    else:
        import numpy as np

        ids = np.random.default_rng(0).integers(0, 30_000, (1, LENGTH))
        model, more = path, {"calibration": (ids, np.ones_like(ids))}
    with PeakMemory() as memory:
        started = time.monotonic()
        executable = planish.optimize(model, budget=budget, **more)
        seconds = time.monotonic() - started
    weights = executable.report.before.weight_bytes
    held = weights if source == "module" else 0
    return {
        "from": source,
        "gates": gates,
        "seconds": seconds,
        "weights_mb": weights / 1e6,
        "before_mb": memory.before / 1e6,
        "peak_mb": memory.peak / 1e6,
        "of_weights": (memory.peak - memory.before + held) / weights,
        "verdict": executable.report.verdict,
    }


def write_file(path: Path) -> None:
    """BERT-base as an ONNX file, as a user has it."""
    import torch

    names = {0: "batch", 1: "sequence"}
    shapes = (names, names)
    program = torch.onnx.export(bert(), examples(), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(str(path), external_data=True)


def child(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "optimize_cost.json")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_file(arguments.write)
        return 0
    if arguments.one:
        source, gates, path = arguments.one
        print(_RESULT + json.dumps(measure(source, gates == "on", path)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bert.onnx"
        child("--write", str(path))
        for source in ("module", "file"):
            for gates in ("off", "on"):
                lines = child("--one", source, gates, str(path)).splitlines()
                rows.append(json.loads(next(x for x in lines if x.startswith(_RESULT))[len(_RESULT) :]))
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{'from':8} {'gates':6} {'seconds':>8} {'before MB':>10} {'peak MB':>8} {'of weights':>11}")
    for row in rows:
        print(
            f"{row['from']:8} {'on' if row['gates'] else 'off':6} {row['seconds']:8.1f} {row['before_mb']:10.0f} "
            f"{row['peak_mb']:8.0f} {row['of_weights']:10.2f}x"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
