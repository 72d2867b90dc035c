"""What an optimization itself costs: seconds and peak memory for BERT-base (12 layers, dynamic batch and sequence).

    python benchmarks/optimize_cost.py [--json FILE]

Seconds and memory are taken in processes of their own. Seconds are those of a first call, what it imports included.
Memory is the resident set, sampled every 5 ms, in a process that has optimized one small layer before: `before` is that
process with the model at hand (a torch module holds its weights then, a file holds nothing), `peak` the highest during
`planish.optimize`. `of weights` is what the optimization and the model take together, (peak - before + weights already
held) / weights; what importing torch and its exporter takes is left out.
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


def warm_up(source: str) -> None:
    """Optimizes one layer, so that what is imported on the way is there."""
    import planish

    if source == "module":
        import torch

        layer = torch.nn.Linear(8, 8).eval()
        planish.optimize(layer, example_inputs=(torch.ones(2, 8),), budget=planish.Budget(seconds=0.1))
    else:
        import onnx_ir as ir

        text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => (float[n] y) { y = Relu(x) }'
        planish.optimize(ir.from_onnx_text(text), budget=planish.Budget(seconds=0.1))


def measure(source: str, gates: bool, path: str, what: str) -> dict[str, Any]:
    """Half a row: `source` is "module" or "file", `what` is "seconds" or "memory"."""
    import planish
    import planish.driver  # imports are no part of an optimization

    budget = planish.Budget(gates=gates)
    if what == "memory":
        warm_up(source)
    if source == "module":
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
    if what == "seconds":
        return {"seconds": seconds, "verdict": executable.report.verdict}
    weights = executable.report.before.weight_bytes
    held = weights if source == "module" else 0
    return {
        "from": source,
        "gates": gates,
        "weights_mb": weights / 1e6,
        "before_mb": memory.before / 1e6,
        "peak_mb": memory.peak / 1e6,
        "of_weights": (memory.peak - memory.before + held) / weights,
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
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_file(arguments.write)
        return 0
    if arguments.one:
        source, gates, path, what = arguments.one
        print(_RESULT + json.dumps(measure(source, gates == "on", path, what)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bert.onnx"
        child("--write", str(path))
        for source in ("module", "file"):
            for gates in ("off", "on"):
                row: dict[str, Any] = {}
                for what in ("memory", "seconds"):
                    lines = child("--one", source, gates, str(path), what).splitlines()
                    row |= json.loads(next(x for x in lines if x.startswith(_RESULT))[len(_RESULT) :])
                rows.append(row)
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
