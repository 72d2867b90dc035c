"""Runs the ONNX backend test suite through plain ONNX Runtime and through planish, and compares.

    python tests/conformance/run.py [--jobs 2] [--gates] [--only PATTERN]

Exit code 0: no case that passes on plain ONNX Runtime fails on ours; 1: some do, each is printed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from suite import Result, cases, run_cases

CHUNK = 25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--gates", action="store_true", help="with error and gain gates on (slower)")
    parser.add_argument("--only", default="", help="run the cases whose name matches this regular expression")
    options = parser.parse_args()
    start = time.monotonic()
    chosen = [i for i, case in enumerate(cases()) if re.search(options.only, case.name)]
    total = run_all(chosen, options.jobs, gates=options.gates)
    mode = "gates on" if options.gates else "gates off"
    print(f"ONNX backend test suite: {total.total} cases in {time.monotonic() - start:.0f} s ({mode})")
    print(f"  pass on plain ONNX Runtime   {total.plain}")
    print(f"  of these pass on planish     {total.optimized}  ({total.changed} with a changed graph)")
    reasons = ", ".join(f"{count} {name}" for name, count in total.plain_failures.most_common())
    print(f"  not run by ONNX Runtime      {total.total - total.plain}  ({reasons or 'none'})")
    print(f"  regressions                  {len(total.regressions)}")
    for name, reason in total.regressions:
        print(f"    {name}: {reason}")
    return 1 if total.regressions else 0


def run_all(chosen: list[int], jobs: int, *, gates: bool) -> Result:
    """The cases by index, in chunks over processes; a case that kills its process is named."""
    chunks = [chosen[i : i + CHUNK] for i in range(0, len(chosen), CHUNK)]
    total, lost = Result(), []
    with _pool(jobs) as pool:
        waiting = {pool.submit(_run_chunk, chunk, gates): chunk for chunk in chunks}
        for future in as_completed(waiting):
            try:
                total += future.result()
            except BrokenProcessPool:
                lost += waiting[future]
            if sys.stderr.isatty():
                print(f"\r{total.total} of {len(chosen)} cases", end="", file=sys.stderr)
    for index in lost:  # one by one, since a dead process takes all that wait with it
        with _pool(1) as pool:
            try:
                total += pool.submit(_run_chunk, [index], gates).result()
            except BrokenProcessPool:
                total += Result(total=1, plain=1, regressions=[(cases()[index].name, "the process died")])
    if sys.stderr.isatty():
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    return total


def _pool(jobs: int) -> ProcessPoolExecutor:
    # Forked, so that the cases are built once.
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork"))


def _run_chunk(indices: list[int], gates: bool) -> Result:
    return run_cases([cases()[i] for i in indices], gates=gates)


if __name__ == "__main__":
    sys.exit(main())
