"""Causal attention by itself, for ``benchmarks/fusion.py``: every form that ONNX Runtime has, and planish's.

All models take q, k, v (batch, length, heads × size) float32 and give y of that shape. Forms with a mask have it as a
constant for their one length, which a model with dynamic lengths could not: the comparison favours them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.fusion_rows import MINE

Constants = dict[str, np.ndarray]

HEADS, SIZE = 12, 64
WIDTH = HEADS * SIZE
CONTRIB = "com.microsoft"
#: (batch, length) pairs at which planish's artifact is compared with the formula.
LENGTHS = ((1, 1), (1, 2), (1, 7), (1, 63), (1, 64), (1, 65), (1, 127), (1, 200), (1, 513), (2, 33), (2, 300), (3, 129))


def graph(nodes: list[onnx.NodeProto], constants: Constants | None = None) -> onnx.ModelProto:
    """A model of these nodes with dynamic batch and length."""
    shape = ["batch", "length", WIDTH]
    made = helper.make_graph(
        nodes,
        "causal",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "qkv"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def mask(length: int) -> np.ndarray:
    """What is added to the scores: 0 where a key may be seen, the lowest float elsewhere."""
    seen = np.tri(length, dtype=bool)
    return np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)


def standard(length: int) -> onnx.ModelProto:
    return graph(
        [helper.make_node("Attention", list("qkv"), ["y"], q_num_heads=HEADS, kv_num_heads=HEADS, is_causal=1)]
    )


def unidirectional(length: int) -> onnx.ModelProto:
    settings: dict[str, Any] = {"domain": CONTRIB, "num_heads": HEADS, "unidirectional": 1}
    return graph([helper.make_node("MultiHeadAttention", list("qkv"), ["y"], **settings)])


def biased(length: int) -> onnx.ModelProto:
    inputs = ["q", "k", "v", "", "", "mask"]
    node = helper.make_node("MultiHeadAttention", inputs, ["y"], domain=CONTRIB, num_heads=HEADS)
    return graph([node], {"mask": mask(length)[None, None]})


def grouped(length: int) -> onnx.ModelProto:
    inputs = ["q", "k", "v", "", "", "last", "total"]
    settings: dict[str, Any] = {"domain": CONTRIB, "num_heads": HEADS, "kv_num_heads": HEADS}
    node = helper.make_node("GroupQueryAttention", inputs, ["y", "keys", "values"], **settings)
    return graph([node], {"last": np.array([length - 1], np.int32), "total": np.array([length], np.int32)})


def decomposed(length: int) -> onnx.ModelProto:
    nodes = []
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes.append(helper.make_node("Reshape", [name, "split"], [f"{name}_heads"]))
        nodes.append(helper.make_node("Transpose", [f"{name}_heads"], [f"{name}_4d"], perm=order))
    nodes += [
        helper.make_node("Mul", ["q_4d", "scale"], ["q_scaled"]),
        helper.make_node("MatMul", ["q_scaled", "k_4d"], ["scores"]),
        helper.make_node("Add", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v_4d"], ["y_4d"]),
        helper.make_node("Transpose", ["y_4d"], ["y_heads"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["y_heads", "join"], ["y"]),
    ]
    constants = {
        "split": np.array([0, 0, HEADS, SIZE]),
        "join": np.array([0, 0, WIDTH]),
        "scale": np.array(SIZE**-0.5, np.float32),
        "mask": mask(length),
    }
    return graph(nodes, constants)


FORMS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "Attention is_causal": standard,
    "MHA unidirectional": unidirectional,
    "MHA attention_bias": biased,
    "GQA": grouped,
    "decomposed": decomposed,
}


def feeds(batch: int, length: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch * 7919 + length)
    return {name: random.standard_normal((batch, length, WIDTH), dtype=np.float32) for name in "qkv"}


def reference(given: dict[str, np.ndarray]) -> np.ndarray:
    """Causal attention in float64, rounded to float32 at the end."""
    batch, length, _ = given["q"].shape
    q, k, v = (given[n].astype(np.float64).reshape(batch, length, HEADS, SIZE).transpose(0, 2, 1, 3) for n in "qkv")
    result, seen = np.empty_like(q), np.tri(length, dtype=bool)
    for place in np.ndindex(batch, HEADS):  # one head at a time: the scores of all are large
        scores = np.where(seen, q[place] @ k[place].T * SIZE**-0.5, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        result[place] = weights @ v[place] / weights.sum(-1, keepdims=True)
    return result.transpose(0, 2, 1, 3).reshape(batch, length, WIDTH).astype(np.float32)


def measure(length: int, folder: Path, seconds: float, threads: int, peers: list[str]) -> dict[str, Any]:
    """All forms at one length, each with and without flush-to-zero in a process of its own, against planish's.

    The ratios are against the operator that planish is given, ``Attention is_causal`` on plain ORT.
    """
    from benchmarks.fusion_peers import Job
    from benchmarks.fusion_rows import slug
    from benchmarks.fusion_workers import Workers, entry, error, finite, pair

    given = feeds(1, length)
    np.savez(folder / "timed.npz", **given)  # type: ignore[arg-type]
    expected = {"arr_0": reference(given)}
    jobs: dict[str, Job] = {}
    for form, make in FORMS.items():
        path = folder / f"{slug(form)}.onnx"
        onnx.save(make(length), str(path))
        for flush in (False, True):
            name = f"{form}, flushed" if flush else form
            more: dict[str, Any] = {"flush": flush, "outputs": ("y",), "threads": threads}
            jobs[name] = Job("ort", str(path), str(folder / "timed.npz"), str(folder / slug(name)), **more)
    mine = [peer for peer in MINE if peer in peers]
    for peer in mine:
        path = folder / f"{slug(next(iter(FORMS)))}.onnx"
        jobs[peer] = Job(peer, str(path), str(folder / "timed.npz"), str(folder / peer), threads=threads)
    with Workers(jobs) as workers:
        workers.build()
        distances = {name: error(expected, workers.outputs(name, folder / "timed.npz")) for name in jobs}
        entries = {name: entry(workers, name, distances[name]) for name in jobs}
        times = workers.time([name for name in jobs if entries[name]["status"] == "ok"], seconds)
        for name in jobs:
            entries[name] |= workers.processes[name].failure or {}
        pair(entries, times, next(iter(FORMS)))
        lengths: dict[str, float | None] = {}
        for peer in mine:
            worst = 0.0
            for batch, other in LENGTHS if peer in times else ():
                given = feeds(batch, other)
                np.savez(folder / "other.npz", **given)  # type: ignore[arg-type]
                distance = error({"arr_0": reference(given)}, workers.outputs(peer, folder / "other.npz"))
                worst = max(worst, float("inf") if distance is None else distance)
            lengths[peer] = finite(worst) if peer in times else None
    return {"length": length, "peers": entries, "lengths": lengths, "fastest": fastest(entries)}


def fastest(entries: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    """The fastest plain form: as ONNX Runtime is by default, and with flush-to-zero allowed."""
    plain = {name: item["ms"] for name, item in entries.items() if name not in MINE and "ms" in item}
    default = {name: ms for name, ms in plain.items() if not name.endswith("flushed")}
    return {
        "default": min(default, key=default.__getitem__, default=None),
        "any": min(plain, key=plain.__getitem__, default=None),
    }
