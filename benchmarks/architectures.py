"""The README's table: every architecture in its real size, optimized for ORT on the CPU, against plain ORT and eager.

    python benchmarks/architectures.py [--only BERT GPT-2] [--small] [--threads 1] [--seconds 20] [--json FILE]

Plain ORT is what a user has without planish: the ONNX exporter's own optimized graph (with RotaryEmbedding made
legal for ORT) in a session with all of ONNX Runtime's optimizations on. Each architecture runs in a process of its
own. Times are interleaved and paired; the interval is a bootstrap of the median ratio. One thread is timed in processor
time, which other work on the machine disturbs little; with more threads it is wall time, on a machine of your own.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

_RESULT = "RESULT "
#: Largest relative L2 to the eager module.
LIMIT = 1e-4


def measure(name: str, *, small: bool, threads: int, seconds: float) -> dict[str, Any]:
    """Captures, optimizes and times one architecture; a row of the table as plain data."""
    import torch

    import planish
    from planish.frontends.torch import capture
    from planish.ir.compare import compare_outputs
    from planish.runtime.measure import speedup
    from planish.runtime.ort import compile_ort
    from tests.architectures import ARCHITECTURES

    torch.set_num_threads(max(1, threads))
    architecture = ARCHITECTURES[name]
    module = architecture.build(small)
    example = architecture.example(module, small=small)
    arrays = {key: value.numpy() for key, value in example.items()}
    with torch.no_grad():
        result = module(**example)
    expected = {key: value.numpy() for key, value in result.items() if value is not None}
    target = f"ort-cpu:threads={threads}"
    captured = capture(module, example, architecture.dynamic_shapes, target)
    started = time.monotonic()
    executable = planish.optimize(module, target, example_inputs=example, dynamic_shapes=architecture.dynamic_shapes)
    spent = time.monotonic() - started
    plain = compile_ort(captured.program.main, captured.program.target)
    error = compare_outputs(expected, executable.run(arrays))
    ratio = speedup(
        plain.prepared(arrays),
        executable.runners["main"].prepared(arrays),
        seconds=seconds,
        threshold=1.0,
        clock="process" if threads == 1 else "wall",
    )
    return {
        "architecture": name,
        "real_weights": architecture.real_weights,
        "shapes": {key: list(value.shape) for key, value in arrays.items()},
        "weight_bytes": captured.program.weight_bytes(),
        "nodes_before": captured.program.node_count(),
        "nodes_after": executable.report.after.nodes,
        "plain_relative_l2": compare_outputs(expected, plain.run(arrays)).relative_l2,
        "relative_l2": error.relative_l2,
        "speedup": ratio.to_dict(),
        "optimize_seconds": spent,
        "verdict": executable.report.verdict,
    }


def in_child(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one architecture in a process of its own, so that nothing of the one before is left."""
    command = [sys.executable, __file__, "--one", name]
    command += ["--threads", str(arguments.threads), "--seconds", str(arguments.seconds)]
    command += ["--small"] if arguments.small else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    for line in done.stdout.splitlines():
        if line.startswith(_RESULT):
            return json.loads(line[len(_RESULT) :])  # type: ignore[no-any-return]
    lines = (done.stderr or done.stdout).strip().splitlines()
    return {"architecture": name, "error": lines[-1] if lines else f"exit code {done.returncode}"}


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text."""
    if "error" in row:
        return [row["architecture"], row["error"], "", "", "", "", "", ""]
    ratio = row["speedup"]
    shape = "×".join(str(d) for d in next(iter(row["shapes"].values())))
    interval = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" + (" noisy" if ratio["noisy"] else "")
    return [
        row["architecture"] + ("" if not row["real_weights"] else " (real weights)"),
        shape,
        f"{row['nodes_before']} → {row['nodes_after']}",
        f"{row['relative_l2']:.1e}",
        f"{ratio['baseline_ms']:.1f}" if ratio["baseline_ms"] else "",
        f"{ratio['candidate_ms']:.1f}" if ratio["candidate_ms"] else "",
        interval,
        f"{row['optimize_seconds']:.1f}",
    ]


HEADER = ["architecture", "input", "nodes", "rel. L2 to eager", "plain ORT ms", "planish ms", "speed-up", "optimize s"]


def show(rows: list[dict[str, Any]], *, markdown: bool) -> None:
    """Prints the table: for a terminal, or as Markdown."""
    if markdown:
        print("| " + " | ".join(HEADER) + " |")
        print("|" + "---|" * len(HEADER))
        for row in rows:
            print("| " + " | ".join(cells(row)) + " |")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="planish on ONNX Runtime, CPU")
    for index, column in enumerate(HEADER):
        table.add_column(column, justify="left" if index < 2 else "right")
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)


def main() -> int:
    from tests.architectures import ARCHITECTURES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--small", action="store_true", help="the tests' small configurations")
    parser.add_argument("--threads", type=int, default=1, help="1 (the default) is timed in processor time")
    parser.add_argument("--seconds", type=float, default=20.0, help="time limit of a comparison")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "architectures.json")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--one", choices=list(ARCHITECTURES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        row = measure(arguments.one, small=arguments.small, threads=arguments.threads, seconds=arguments.seconds)
        print(_RESULT + json.dumps(row))
        return 0
    rows = []
    for number, name in enumerate(arguments.only, start=1):
        print(f"[{number}/{len(arguments.only)}] {name}", file=sys.stderr, flush=True)
        rows.append(in_child(name, arguments))
    import onnxruntime
    import torch

    about = {
        "machine": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "small": arguments.small,
    }
    text = json.dumps({"about": about, "rows": rows}, indent=1)
    arguments.json.write_text(text + "\n", encoding="utf-8")
    show(rows, markdown=arguments.markdown)
    return 1 if any(wrong(row) for row in rows) else 0


def wrong(row: dict[str, Any]) -> bool:
    """Whether a row breaks what planish promises: it runs, equals eager, and is not slower than plain ORT."""
    return "error" in row or row["relative_l2"] > LIMIT or row["speedup"]["high"] < 1.0


if __name__ == "__main__":
    raise SystemExit(main())
