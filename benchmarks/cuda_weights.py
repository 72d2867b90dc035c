"""A step of decoding with weights in float16, 8 and 4 bits on `ort-cuda`: ONNX Runtime's products, and our kernels.

    python benchmarks/cuda_weights.py [--rows 1 8] [--past 512] [--json FILE] [--tiny]

A Llama shape (4 layers of 4096, 32 heads on 8 of keys, a gated network of 11008, a head of 32000), one token a row,
`past` in the cache. Weights are random and made as codes, so that what is compared is time; numbers are compared with
those of the same codes in float16. Times are of CUDA graphs, from the call until the logits are there, medians of
interleaved rounds; the floor is the bytes of weights and caches over the bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from planish.ir.ops import import_functions
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.base import PassContext
from planish.passes.lowering.lower_cuda_quantized import LowerCudaQuantized

BLOCK = 32
#: Name → bits of weights, whether the kernels are ours.
KINDS = {
    "float16": (16, False), "8 bits, ONNX Runtime": (8, False), "8 bits": (8, True),
    "4 bits, ONNX Runtime": (4, False), "4 bits": (4, True),
}  # fmt: skip


def dense(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What codes of 8 bits stand for, (k, n) float16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers, by = (torch.from_numpy(array).to(device) for array in (codes, scales))
    weight = ((numbers.half() - 128) * by[..., None]).flatten(1).T.contiguous().cpu().numpy()
    assert isinstance(weight, np.ndarray)
    return weight


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    layers: int = 4
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    inner: int = 11008
    vocabulary: int = 32000

    @property
    def size(self) -> int:
        return self.width // self.heads


class Step:
    """Builds the graph of a step; weights are cut out of one pool of random bytes."""

    def __init__(self, shape: Shape, rows: int, past: int, bits: int) -> None:
        self.shape, self.rows, self.past, self.bits = shape, rows, past, bits
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self.random = np.random.default_rng(0)
        self.bytes = 0

    def constant(self, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array)
        name = f"c{len(self.constants)}"
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.constants.append(value)
        return value

    def add(self, op: str, *inputs: ir.Value | None, domain: str = "", count: int = 1, **attributes: Any) -> Any:
        at = len(self.nodes)
        outputs = [ir.Value(name=f"{op}_{at}_{i}", type=ir.TensorType(ir.DataType.FLOAT16)) for i in range(count)]
        self.nodes.append(ir.node(op, list(inputs), attributes, domain=domain, name=f"{op}_{at}", outputs=outputs))
        return outputs[0] if count == 1 else outputs

    def product(self, x: ir.Value, n: int, k: int) -> ir.Value:
        bits = min(self.bits, 8)
        codes = self.random.integers(0, 1 << 32, n * k * bits // 32, dtype=np.uint32).view(np.uint8)
        codes = codes.reshape(n, k // BLOCK, BLOCK * bits // 8)
        scales = (self.random.uniform(0.5, 1.5, (n, k // BLOCK)) / (k**0.5 * 4.6 * (16 if bits == 8 else 1))).astype(
            "f2"
        )
        self.bytes += codes.nbytes + scales.nbytes if self.bits < 16 else 2 * n * k
        if self.bits == 16:
            made = self.add("MatMul", x, self.constant(dense(codes, scales)))
        else:
            settings = {"K": k, "N": n, "bits": bits, "block_size": BLOCK}
            given = self.constant(codes), self.constant(scales.reshape(-1))
            made = self.add("MatMulNBits", x, *given, domain="com.microsoft", **settings)
        made.shape = ir.Shape((self.rows, 1, n))
        return made

    def norm(self, x: ir.Value, residual: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """The norm, and the sum before it."""
        gain = self.constant(np.ones(self.shape.width, "f2"))
        if residual is None:
            y, total = self.add("RMSNormalization", x, gain, axis=-1, epsilon=1e-5), x
        else:
            name, domain = "SkipSimplifiedLayerNormalization", "com.microsoft"
            y, mean, deviation, total = self.add(name, x, residual, gain, domain=domain, count=4, epsilon=1e-5)
            mean.name = deviation.name = ""  # left out
        y.shape = ir.Shape((self.rows, 1, self.shape.width))
        return y, total

    def attention(self, x: ir.Value, pasts: list[ir.Value], tables: list[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        s = self.shape
        qkv = self.product(x, s.width + 2 * s.kv_heads * s.size, s.width)
        settings = {"num_heads": s.heads, "kv_num_heads": s.kv_heads, "do_rotary": 1}
        y, *presents = self.add(
            "GroupQueryAttention", qkv, None, None, *pasts, *tables, domain="com.microsoft", count=3, **settings
        )
        for present in presents:
            present.shape = ir.Shape((self.rows, s.kv_heads, self.past, s.size))
        y.shape = ir.Shape((self.rows, 1, s.width))
        return self.product(y, s.width, s.width), presents

    def model(self) -> ir.Model:
        s = self.shape
        half = ir.TensorType(ir.DataType.FLOAT16)
        h = ir.Value(name="h", type=half, shape=ir.Shape((self.rows, 1, s.width)))
        angles = np.outer(np.arange(self.past), 1e4 ** (-np.arange(s.size // 2) / (s.size / 2)))
        tables = [self.constant(np.full(self.rows, self.past - 1, "i4")), self.constant(np.array(self.past, "i4"))]
        tables += [self.constant(f(angles).astype("f2")) for f in (np.cos, np.sin)]
        inputs, outputs = [h], []
        x, residual = h, None
        for layer in range(s.layers):
            cache = ir.Shape((self.rows, s.kv_heads, self.past, s.size))
            pasts = [ir.Value(name=f"past_{layer}_{kind}", type=half, shape=cache) for kind in "kv"]
            normed, total = self.norm(x, residual)
            x, presents = self.attention(normed, pasts, tables)
            normed, residual = self.norm(x, total)
            gate, up = (self.product(normed, s.inner, s.width) for _ in range(2))
            gated = self.add("SwiGLU", gate, up, domain="planish")
            gated.shape = gate.shape
            x = self.product(gated, s.width, s.inner)
            inputs += pasts
            outputs += presents
        normed, _ = self.norm(x, residual)
        logits = self.product(normed, s.vocabulary, s.width)
        opsets = {"": 23, "com.microsoft": 1, "planish": 1}
        made = ir.Graph(inputs, [logits, *outputs], nodes=self.nodes, initializers=self.constants, opset_imports=opsets)
        model = ir.Model(made, ir_version=10)
        import_functions(model)
        return model


def built(shape: Shape, rows: int, past: int, kind: str, target: Target) -> tuple[ir.Model, int]:
    """The model, and the bytes of its weights."""
    bits, ours = KINDS[kind]
    step = Step(shape, rows, past, bits)
    program = Program.single(step.model(), target)
    if ours:
        LowerCudaQuantized().apply(program, PassContext(target))
    return program.main, step.bytes


def feeds_of(model: ir.Model) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {v.name: random.standard_normal(tuple(v.shape)).astype("f2") for v in model.graph.inputs}  # type: ignore[misc, arg-type]


def opened(model: ir.Model, target: Target) -> tuple[Callable[[], Any], Callable[[], np.ndarray]]:
    """What runs a step on fixed memory, and what reads the logits."""
    from planish.runtime.cuda.ort_library import library_for
    from planish.runtime.ort_cuda import compile_ort_cuda

    runner = compile_ort_cuda(model, target, library=library_for([model]))
    for note in runner.notes:
        print("note:", note)
    buffers = runner.buffers(feeds_of(model))
    name = model.graph.outputs[0].name
    return buffers.run, lambda: buffers.view(name).float().cpu().numpy()


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Microseconds, medians of interleaved rounds."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 3:
                found[name].append(1e6 * (time.perf_counter() - start))
    return {name: median(values) for name, values in found.items()}


def row(shape: Shape, rows: int, past: int, rate: float) -> dict[str, Any]:
    target = Target.parse("ort-cuda:dtype=float16,kernels,graphs=1")
    caches = 2 * 2 * shape.layers * rows * past * shape.kv_heads * shape.size
    calls, logits, floors = {}, {}, {}
    for kind in KINDS:
        model, size = built(shape, rows, past, kind, target)
        calls[kind], read = opened(model, target)
        del model
        calls[kind]()
        logits[kind], floors[kind] = read(), 1e6 * (size + caches) / rate
    # The float16 model has the codes of 8 bits; those of 4 bits are compared with ONNX Runtime's.
    pairs = [("8 bits", "float16"), ("8 bits, ONNX Runtime", "float16"), ("4 bits", "4 bits, ONNX Runtime")]
    errors = {a: float(np.linalg.norm(logits[a] - logits[b]) / np.linalg.norm(logits[b])) for a, b in pairs}
    return {"rows": rows, "past": past, "us": measure(calls, 60), "floor_us": floors, "error": errors}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| rows | {' | '.join(KINDS)} | errors |", "|" + "---|" * (len(KINDS) + 2)]
    for item in rows:
        us, floor = item["us"], item["floor_us"]
        cells = [f"{us[k]:.0f}: {us['float16'] / us[k]:.2f}x, {floor[k] / us[k]:.0%}" for k in KINDS]
        lines.append(
            f"| {item['rows']} | {' | '.join(cells)} | {', '.join(f'{e:.0e}' for e in item['error'].values())} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--past", type=int, default=512)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from cuda_gemv import bandwidth

    shape = Shape(2, 256, 4, 2, 704, 1000) if arguments.tiny else Shape()
    rate = bandwidth()
    rows = []
    for count in arguments.rows:
        rows.append(row(shape, count, arguments.past, rate))
        print(table(rows), flush=True)
    if arguments.json:
        made = {"gpu": torch.cuda.get_device_name(), "copy_bytes_s": rate, "rows": rows}
        arguments.json.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
