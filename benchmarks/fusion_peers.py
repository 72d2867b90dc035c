"""One peer of ``benchmarks/fusion.py`` in a process of its own: builds one model, then answers on a pipe.

Started by the benchmark as ``python benchmarks/fusion_peers.py <description as JSON>``; not for calling by hand. One
line of JSON in is one request, one line out its answer:

    {"do": "build"}                              makes the peer ready and runs it twice
    {"do": "run"}                                one timed sample: {"seconds": ...}
    {"do": "outputs", "feeds": F, "to": T}       runs on the arrays of the file F, writes the outputs to T
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

Feeds = dict[str, np.ndarray]


class NotInstalled(Exception):
    """The peer's package is not there."""


class NotApplicable(Exception):
    """The peer has nothing for this model."""


@dataclass(frozen=True)
class Job:
    """What a worker is to build.

    Attributes:
        peer: key of :data:`PEERS`.
        model: the ONNX file.
        timed: the file with the timed inputs.
        folder: a place for the peer's own files.
        row: name of the row, for peers that take the module.
        small: the small model.
        threads: of the peer.
        outputs: names of the outputs that are asked for; all if empty.
        flush: a plain session treats denormal numbers as zero.
        model_type, num_heads, hidden_size: for ``onnxruntime.transformers.optimizer``.
        pipeline: passes behind the exact ones of target ``ort-cpu:kernels``, for ``precision_peers.py``.
    """

    peer: str
    model: str
    timed: str
    folder: str
    row: str = ""
    small: bool = False
    threads: int = 1
    outputs: tuple[str, ...] = ()
    flush: bool = False
    model_type: str | None = None
    num_heads: int = 0
    hidden_size: int = 0
    pipeline: str = ""


@dataclass
class Built:
    """A peer that is ready.

    Attributes:
        prepared: gives a function without arguments that runs on these inputs.
        arrays: the outputs, in the file's order, of what that function returned.
        about: more to record.
    """

    prepared: Callable[[Feeds], Callable[[], Any]]
    arrays: Callable[[Any], list[np.ndarray]] = list
    about: dict[str, Any] = field(default_factory=dict)


def session(path: str, job: Job) -> Built:
    """A session with all of ONNX Runtime's optimizations, as anybody makes it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if job.flush:
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
    made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = list(job.outputs) or [output.name for output in made.get_outputs()]
    return Built(lambda feeds: lambda: made.run(names, feeds))


def plain(job: Job) -> Built:
    return session(job.model, job)


def planish(job: Job, features: str = "") -> Built:
    """What planish makes of the file; gates are off, as this benchmark measures."""
    import onnx_ir as ir

    import planish

    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => (float[n] y) { y = Relu(x) }'
    planish.optimize(ir.from_onnx_text(text), budget=planish.Budget(gates=False))  # imports are no part of the cost
    started, used = time.monotonic(), time.process_time()
    target = f"ort-cpu:threads={job.threads}{features}"
    made = planish.optimize(job.model, target, budget=planish.Budget(gates=False))
    about = {
        "optimize_seconds": time.monotonic() - started,
        "optimize_processor_seconds": time.process_time() - used,
        "nodes_before": made.report.before.nodes,
        "nodes_after": made.report.after.nodes,
        "ops_after": made.report.after.ops,
        "fired": {entry.name: entry.fired for entry in made.report.ledger.entries if entry.fired},
        "notes": list(made.report.ledger.notes),
    }
    runner = made.runners["main"]
    return Built(runner.prepared, lambda result: list(result.values()), about)


def kernels(job: Job) -> Built:
    """The same with generated kernels."""
    import importlib.util

    if importlib.util.find_spec("tvm") is None:
        raise NotInstalled("apache-tvm")
    return planish(job, ",kernels")


def transformers(job: Job) -> Built:
    from onnxruntime.transformers.optimizer import optimize_model

    if job.model_type is None:
        raise NotApplicable("no model type")
    made = optimize_model(job.model, job.model_type, num_heads=job.num_heads, hidden_size=job.hidden_size)
    path = str(Path(job.folder) / "transformers.onnx")
    made.save_model_to_file(path, use_external_data_format=True)
    return session(path, job)


def ort_fusions(job: Job) -> Built:
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    made, counts = optimize_for_ort(ir.load(job.model))
    path = str(Path(job.folder) / "fused.onnx")
    ir.save(made, path, external_data="fused.onnx.data")
    built = session(path, job)
    built.about["fused"] = {name: count for name, count in counts.items() if count}
    return built


def module(job: Job, wrap: Callable[[Any], Any]) -> Built:
    import torch

    from benchmarks.fusion_models import arguments, build, outputs
    from benchmarks.fusion_rows import ROWS

    made = wrap(build(ROWS[job.row], job.small))

    def prepared(feeds: Feeds) -> Callable[[], Any]:
        given = arguments(feeds)

        def run() -> Any:
            with torch.inference_mode():
                return made(**given)

        return run

    return Built(prepared, lambda result: [value.numpy() for value in outputs(result)])


def eager(job: Job) -> Built:
    return module(job, lambda model: model)


def compiled(job: Job) -> Built:
    import torch

    return module(job, torch.compile)


def frozen(job: Job) -> Built:
    """torch.compile with the weights as constants, which lets it pack them."""
    import torch
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return module(job, torch.compile)


def openvino(job: Job, precision: str = "f32") -> Built:
    try:
        import openvino
    except ImportError as error:
        raise NotInstalled(str(error)) from error

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": str(job.threads),
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
    }
    made = core.compile_model(core.read_model(job.model), "CPU", settings)
    request = made.create_infer_request()

    def prepared(feeds: Feeds) -> Callable[[], Any]:
        return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)

    return Built(prepared, lambda result: [np.array(result[output]) for output in made.outputs])


def broken(job: Job) -> Built:
    """Serves the benchmark's own test."""
    raise RuntimeError("this peer always fails")


PEERS: dict[str, Callable[[Job], Built]] = {
    "ort": plain,
    "planish": planish,
    "kernels": kernels,
    "transformers": transformers,
    "ort_fusions": ort_fusions,
    "eager": eager,
    "compile": compiled,
    "compile_frozen": frozen,
    "openvino": openvino,
    "broken": broken,
}


class Worker:
    """Answers the requests of one process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.built = Built(lambda feeds: lambda: None)
        self.run: Callable[[], Any] = lambda: None
        self.repeats, self.short = 1, False

    def build(self) -> dict[str, Any]:
        from planish.runtime.measure import SAMPLE_SECONDS, SHORT_SECONDS

        if self.job.peer in ("eager", "compile", "compile_frozen"):
            import torch

            torch.set_num_threads(self.job.threads)
        started = time.monotonic()
        self.built = PEERS[self.job.peer](self.job)
        spent = time.monotonic() - started
        self.run = self.built.prepared(load(self.job.timed))
        started = time.monotonic()
        self.run()
        first = time.monotonic() - started
        seconds = self._sample()
        self.repeats = min(max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-7))), 10_000)
        self.short = seconds < SHORT_SECONDS
        gc.collect()
        gc.freeze()
        gc.disable()
        return {"build_seconds": spent, "first_run_seconds": first, "about": self.built.about}

    def sample(self) -> dict[str, float]:
        if self.short:  # the worker before has emptied the caches
            self.run()
        seconds = self._sample()
        if self.job.threads > 1:
            self._settle()
        return {"seconds": seconds}

    def outputs(self, feeds: str, to: str) -> dict[str, Any]:
        arrays = self.built.arrays(self.built.prepared(load(feeds))())
        np.savez(to, *arrays)
        return {}

    def _sample(self) -> float:
        # One thread: processor time, which other work on the machine disturbs little.
        now = time.process_time if self.job.threads == 1 else time.perf_counter
        started = now()
        for _ in range(self.repeats):
            self.run()
        return (now() - started) / self.repeats

    def _settle(self) -> None:
        """Keeps the turn while worker threads of this process still spin."""
        from planish.runtime.measure import SETTLE_SECONDS

        limit = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < limit:
            before = time.process_time()
            time.sleep(0.001)
            if time.process_time() - before < 0.0003:
                return


def load(path: str) -> Feeds:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request; a failure is an answer too."""
    try:
        if request["do"] == "build":
            return worker.build()
        if request["do"] == "run":
            return worker.sample()
        return worker.outputs(request["feeds"], request["to"])
    except NotInstalled as error:
        return {"status": "not installed", "reason": str(error)}
    except NotApplicable as error:
        return {"status": "n/a", "reason": str(error)}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"
        return {"status": "failed", "reason": reason, "error": str(error), "trace": traceback.format_exc()}


def main(worker: type[Worker] = Worker) -> int:
    given = json.loads(sys.argv[1])
    given["outputs"] = tuple(given.get("outputs", ()))
    job = Job(**given)
    os.chdir(job.folder)
    # Whatever a peer prints goes to the log; the answers have the pipe for themselves.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    made = worker(job)
    for line in sys.stdin:
        pipe.write(json.dumps(answer(made, json.loads(line))) + "\n")
        pipe.flush()
    # Threads of a peer may wait for each other at the end; nothing of this process is needed any more.
    pipe.close()
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
