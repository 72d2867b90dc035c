"""Attention over caches of the host by a kernel of our own, where a compiler made it; else ONNX Runtime's serves."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.errors import PlanishError

_SOURCE = Path(__file__).with_name("native") / "host_attention.c"
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared", "-fvisibility=default")
#: Tokens of a task: enough of them for all cores, each long enough to be worth its start.
_TASK = 512
_LARGEST = 256
_KINDS = {ir.DataType.FLOAT16: 1, ir.DataType.FLOAT: 0}
_UNLIMITED = 1 << 40


class Job(ctypes.Structure):
    """planish_job of host_attention.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "keys", "values", "out", "last")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "size", "capacity", "window", "task")),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("scratch", ctypes.c_void_p),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None without a compiler with OpenMP, or a processor that it is written for."""
    from planish.runtime.kernels.linker import compiler

    folder = tempfile.TemporaryDirectory(prefix="planish-host-", ignore_cleanup_errors=True)
    path = Path(folder.name) / "host_attention.so"
    try:
        command = [*compiler(), *_FLAGS, str(_SOURCE), "-lm", "-o", str(path)]
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
        if done.returncode:
            return None
        found = ctypes.CDLL(str(path))
    except (PlanishError, OSError, subprocess.TimeoutExpired):
        return None
    found.planish_host_scratch.restype = ctypes.c_int64
    found._folder = folder  # type: ignore[attr-defined]
    return found if found.planish_host_level() else None


def fits(model: ir.Model) -> bool:
    """Whether the kernel does what this model of one attention does."""
    nodes = list(model.graph)
    node = nodes[0]
    size = _size(node)
    plain = len(node.inputs) <= 7 or all(v is None for v in node.inputs[7:])
    known = {"num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary", "smooth_softmax"}
    rest = [name for name in node.attributes if name not in known]
    flags = node.attributes.get_int("do_rotary", 0) or node.attributes.get_int("smooth_softmax", 0)
    dtype = node.inputs[3].dtype if node.inputs[3] is not None else None
    scale = node.attributes.get_float("scale", 0.0)
    return (
        len(nodes) == 1 and plain and not rest and not flags and dtype in _KINDS and size is not None
        and size % 16 == 0 and size <= _LARGEST and bool(scale)
    )  # fmt: skip


def _size(node: ir.Node) -> int | None:
    shape = node.inputs[3].shape if node.inputs[3] is not None else None
    return shape[3] if shape is not None and isinstance(shape[3], int) else None


def bind(
    model: ir.Model, inputs: Sequence[int], outputs: Sequence[int], sizes: dict[str, int], threads: int, level: int = 2
) -> Callable[[], None] | None:
    """A run of the model on addresses, one new token a row; None where the kernel is not at hand or does not fit.

    Args:
        inputs: in the order of the model; outputs: what is attended to, then the caches, which are the inputs'.
        threads: 0: one for each processor of this process.
        level: of instructions, at most: 2 AVX-512, 1 AVX2.
    """
    found = library()
    if found is None or not fits(model) or sizes["tokens"] != 1:
        return None
    node = next(iter(model.graph))
    at = dict(zip(model.graph.inputs, inputs, strict=True))
    q, k, v, keys, values, last = (at[value] for value in node.inputs[:6] if value is not None)
    size, cache = _size(node), node.inputs[3]
    assert cache is not None and cache.dtype is not None and size is not None
    attributes: Any = node.attributes
    window = attributes.get_int("local_window_size", -1)
    job = Job(
        q, k, v, keys, values, outputs[0], last,
        sizes["batch"], attributes.get_int("num_heads"), attributes.get_int("kv_num_heads"), size, sizes["capacity"],
        window if window > 0 else _UNLIMITED, _TASK,
        attributes.get_float("scale"), attributes.get_float("softcap", 0.0), None,
    )  # fmt: skip
    scratch = np.empty(found.planish_host_scratch(ctypes.byref(job)), np.float32)
    job.scratch = scratch.ctypes.data
    level = min(level, found.planish_host_level())
    count = threads or len(os.sched_getaffinity(0))
    half = _KINDS[cache.dtype]

    def run(kept: Any = scratch) -> None:
        if found.planish_host_attention(ctypes.byref(job), half, level, count):
            raise PlanishError("attention on the host refused its job")  # pragma: no cover - `fits` says before

    return run
