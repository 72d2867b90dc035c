"""The programs of benchmarks/cuda_all_reduce.py: one rank's attention, and whole decoder layers."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir

from planish.ir.names import ensure_names
from planish.ir.parallel import RANK, RANKS
from planish.ir.program import Program

logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # of weights that come beside the text
RANKS_HERE, HEAD = 2, 128


def part(length: int, width: int, rank: int, weight: np.ndarray) -> Program:
    """One rank's attention with its projection and sum; inputs are its heads' queries, keys and values."""
    mine = width // RANKS_HERE
    shape = f"float[1, {length}, {mine}]"
    text = (
        f'<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> '
        f"g ({shape} q, {shape} k, {shape} v) => (float[1, {length}, {width}] y) {{ "
        f"a = Attention<is_causal = 1, q_num_heads = {mine // HEAD}, kv_num_heads = {mine // HEAD}>(q, k, v) "
        "p = MatMul(a, w) y = com.microsoft.AllReduce(p) }"
    )
    model = ir.from_onnx_text(text, initializers=[ir.tensor(weight, name="w")])
    for name, last in (("a", mine), ("p", width)):
        value = next(v for n in model.graph for v in n.outputs if v.name == name)
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, length, last])
    ensure_names(model)
    return Program({"main": model}, provenance={RANK: str(rank), RANKS: str(RANKS_HERE)})


def layers(length: int, width: int, hidden: int, count: int = 2) -> Program:
    """Decoder layers, whole: norm, attention, norm, gated network."""
    heads, weights, lines = width // HEAD, [], []
    # One block of random numbers, repeated out of step: drawing all of them would take most of the time.
    block = np.random.default_rng(0).random((1 << 20) + 7, np.float32) - np.float32(0.5)

    def weight(name: str, rows: int, columns: int) -> str:
        made = np.resize(np.roll(block, 1009 * len(weights)) * np.float32(3 / rows**0.5), (rows, columns))
        weights.append(ir.tensor(made, name=name))
        return name

    at = "x"
    for i in range(count):
        weights.append(ir.tensor(np.ones(width, np.float32), name=f"n{i}"))
        weights.append(ir.tensor(np.ones(width, np.float32), name=f"m{i}"))
        q, k, v, o = (weight(f"{name}{i}", width, width) for name in "qkvo")
        gate, up, down = weight(f"g{i}", width, hidden), weight(f"u{i}", width, hidden), weight(f"d{i}", hidden, width)
        last = "y" if i == count - 1 else f"x{i}"
        lines.append(
            f"a{i} = RMSNormalization<axis = -1>({at}, n{i}) hq{i} = MatMul(a{i}, {q}) hk{i} = MatMul(a{i}, {k}) "
            f"hv{i} = MatMul(a{i}, {v}) "
            f"t{i} = Attention<is_causal = 1, q_num_heads = {heads}, kv_num_heads = {heads}>(hq{i}, hk{i}, hv{i}) "
            f"p{i} = MatMul(t{i}, {o}) r{i} = Add({at}, p{i}) b{i} = RMSNormalization<axis = -1>(r{i}, m{i}) "
            f"hg{i} = MatMul(b{i}, {gate}) hu{i} = MatMul(b{i}, {up}) s{i} = planish.SwiGLU(hg{i}, hu{i}) "
            f"z{i} = MatMul(s{i}, {down}) {last} = Add(r{i}, z{i})"
        )
        at = last
    shape = f"float[1, {length}, {width}]"
    opsets = '<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>'
    model = ir.from_onnx_text(f"{opsets} g ({shape} x) => ({shape} y) {{ {' '.join(lines)} }}", initializers=weights)
    ensure_names(model)
    return Program.single(model)
