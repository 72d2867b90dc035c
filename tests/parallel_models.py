"""Small transformers as text, recognized and not lowered, for what shares them out among devices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from planish.ir.names import ensure_names
from planish.ir.parallel import RANK, RANKS
from planish.ir.program import Program

WIDTH, HEADS, SIZE, HIDDEN = 32, 4, 8, 48


def transformer(
    form: str = "decoder", layers: int = 2, length: str | int = "sequence", kv_heads: int = HEADS, hidden: int = HIDDEN
) -> Program:
    """A whole model.

    Args:
        form: ``"decoder"``: RMS norms first, causal, a gated network, no biases. ``"encoder"``: norms behind, a padding
            mask, biases everywhere. ``"cached"``: a decoder whose keys and values are outputs. ``"flat"``: tokens in
            rows, products as Gemm with a bias. ``"parallel"``: attention and network of a layer side by side.
    """
    random, weights = np.random.default_rng(7), []

    def weight(name: str, *sizes: int) -> str:
        made = random.standard_normal(sizes).astype(np.float32) / np.float32(sizes[0] ** 0.5)
        weights.append(ir.tensor(made + np.float32(len(sizes) == 1), name=name))
        return name

    inputs, outputs, lines, at = [_typed(form, length, "x")], [], [], "x"
    if form == "encoder":
        inputs.append(f"bool[batch, 1, {length}, {length}] mask")
    if form == "flat":
        weights.append(ir.tensor(np.array([1, -1, WIDTH], np.int64), name="batched"))
        weights.append(ir.tensor(np.array([-1, WIDTH], np.int64), name="rows"))
    if form == "cached":
        weights.append(ir.tensor(np.array([0, 0, kv_heads, SIZE], np.int64), name="by_head"))
    for i in range(layers):
        end = "y" if i == layers - 1 else f"x{i}"
        lines.append(_FORMS[form](i, at, end, weight, kv_heads, hidden))
        if form == "cached":
            outputs += [f"float[batch, {kv_heads}, {length}, {SIZE}] present_{i}_{part}" for part in ("key", "value")]
        at = end
    opsets = '<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>'
    signature = f"g ({', '.join(inputs)}) => ({', '.join([_typed(form, length, 'y'), *outputs])})"
    model = ir.from_onnx_text(f"{opsets} {signature} {{ {' '.join(lines)} }}", initializers=weights)
    ensure_names(model)
    return Program.single(model)


def _typed(form: str, length: str | int, name: str) -> str:
    return f"float[{length}, {WIDTH}] {name}" if form == "flat" else f"float[batch, {length}, {WIDTH}] {name}"


def _attention(i: int, kv_heads: int, causal: int, operands: str = "", outputs: str = "") -> str:
    counts = f"is_causal = {causal}, q_num_heads = {HEADS}, kv_num_heads = {kv_heads}"
    return f"t{i}{outputs} = Attention<{counts}>(q{i}, k{i}, v{i}{operands}) "


def _decoder(i, at, end, weight, kv_heads, hidden):  # type: ignore[no-untyped-def]
    kv = kv_heads * SIZE
    return (
        f"a{i} = RMSNormalization<axis = -1>({at}, {weight(f'n{i}', WIDTH)}) "
        f"q{i} = MatMul(a{i}, {weight(f'wq{i}', WIDTH, WIDTH)}) k{i} = MatMul(a{i}, {weight(f'wk{i}', WIDTH, kv)}) "
        f"v{i} = MatMul(a{i}, {weight(f'wv{i}', WIDTH, kv)}) {_attention(i, kv_heads, 1)}"
        f"p{i} = MatMul(t{i}, {weight(f'wo{i}', WIDTH, WIDTH)}) r{i} = Add({at}, p{i}) "
        f"b{i} = RMSNormalization<axis = -1>(r{i}, {weight(f'm{i}', WIDTH)}) "
        f"g{i} = MatMul(b{i}, {weight(f'wg{i}', WIDTH, hidden)}) "
        f"u{i} = MatMul(b{i}, {weight(f'wu{i}', WIDTH, hidden)}) s{i} = planish.SwiGLU(g{i}, u{i}) "
        f"z{i} = MatMul(s{i}, {weight(f'wd{i}', hidden, WIDTH)}) {end} = Add(r{i}, z{i})"
    )


def _cached(i, at, end, weight, kv_heads, hidden):  # type: ignore[no-untyped-def]
    line = _decoder(i, at, end, weight, kv_heads, hidden)
    for name, part in (("k", "key"), ("v", "value")):
        line += (
            f" h{name}{i} = Reshape({name}{i}, by_head) present_{i}_{part} = Transpose<perm = [0, 2, 1, 3]>(h{name}{i})"
        )
    return line


def _encoder(i, at, end, weight, kv_heads, hidden):  # type: ignore[no-untyped-def]
    lines = []
    for name in "qkv":
        lines.append(f"m{name}{i} = MatMul({at}, {weight(f'w{name}{i}', WIDTH, WIDTH)})")
        lines.append(f"{name}{i} = Add(m{name}{i}, {weight(f'b{name}{i}', WIDTH)})")
    return " ".join(lines) + (
        f" {_attention(i, kv_heads, 0, ', mask')}"
        f"p{i} = MatMul(t{i}, {weight(f'wo{i}', WIDTH, WIDTH)}) o{i} = Add(p{i}, {weight(f'bo{i}', WIDTH)}) "
        f"r{i} = Add(o{i}, {at}) e{i} = LayerNormalization(r{i}, {weight(f'n{i}', WIDTH)}, {weight(f'c{i}', WIDTH)}) "
        f"f{i} = MatMul(e{i}, {weight(f'wu{i}', WIDTH, hidden)}) l{i} = Add(f{i}, {weight(f'bu{i}', hidden)}) "
        f"s{i} = Gelu(l{i}) z{i} = MatMul(s{i}, {weight(f'wd{i}', hidden, WIDTH)}) "
        f"w{i} = Add(z{i}, {weight(f'bd{i}', WIDTH)}) j{i} = Add(w{i}, e{i}) "
        f"{end} = LayerNormalization(j{i}, {weight(f'nn{i}', WIDTH)}, {weight(f'cc{i}', WIDTH)})"
    )


def _flat(i, at, end, weight, kv_heads, hidden):  # type: ignore[no-untyped-def]
    lines = [f"a{i} = RMSNormalization<axis = -1>({at}, {weight(f'n{i}', WIDTH)})"]
    for name in "qkv":
        lines.append(f"m{name}{i} = Gemm(a{i}, {weight(f'w{name}{i}', WIDTH, WIDTH)}, {weight(f'b{name}{i}', WIDTH)})")
        lines.append(f"{name}{i} = Reshape(m{name}{i}, batched)")
    return " ".join(lines) + (
        f" {_attention(i, kv_heads, 1)} o{i} = Reshape(t{i}, rows) "
        f"p{i} = Gemm<beta = 0.5>(o{i}, {weight(f'wo{i}', WIDTH, WIDTH)}, {weight(f'bo{i}', WIDTH)}) "
        f"r{i} = Add({at}, p{i}) e{i} = RMSNormalization<axis = -1>(r{i}, {weight(f'mm{i}', WIDTH)}) "
        f"f{i} = Gemm<transB = 1>(e{i}, {weight(f'wu{i}', hidden, WIDTH)}, {weight(f'bu{i}', hidden)}) "
        f"s{i} = Relu(f{i}) z{i} = Gemm(s{i}, {weight(f'wd{i}', hidden, WIDTH)}, {weight(f'bd{i}', WIDTH)}) "
        f"{end} = Add(r{i}, z{i})"
    )


def _parallel(i, at, end, weight, kv_heads, hidden):  # type: ignore[no-untyped-def]
    return (
        f"a{i} = RMSNormalization<axis = -1>({at}, {weight(f'n{i}', WIDTH)}) "
        f"q{i} = MatMul(a{i}, {weight(f'wq{i}', WIDTH, WIDTH)}) k{i} = MatMul(a{i}, {weight(f'wk{i}', WIDTH, WIDTH)}) "
        f"v{i} = MatMul(a{i}, {weight(f'wv{i}', WIDTH, WIDTH)}) {_attention(i, kv_heads, 1)}"
        f"p{i} = MatMul(t{i}, {weight(f'wo{i}', WIDTH, WIDTH)}) u{i} = MatMul(a{i}, {weight(f'wu{i}', WIDTH, hidden)}) "
        f"s{i} = Gelu(u{i}) z{i} = MatMul(s{i}, {weight(f'wd{i}', hidden, WIDTH)}) "
        f"b{i} = Add(p{i}, z{i}) {end} = Add(b{i}, {at})"
    )


_FORMS = {"decoder": _decoder, "encoder": _encoder, "cached": _cached, "flat": _flat, "parallel": _parallel}


def feeds(form: str = "decoder", length: int = 17, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a transformer."""
    random = np.random.default_rng(seed)
    sizes: Sequence[int] = (length, WIDTH) if form == "flat" else (batch, length, WIDTH)
    found = {"x": random.standard_normal(sizes).astype(np.float32)}
    if form == "encoder":
        # Rows differ, so that a chunk with the rows of another shows.
        seen = random.random((batch, 1, length, length)) < 0.6
        found["mask"] = seen | np.eye(length, dtype=bool)
    return found


def rank_program(text: str, rank: int = 0, ranks: int = 2, **sizes: tuple[int, ...]) -> Program:
    """A program of one rank from text; `sizes` of weights, or shapes of values inside."""
    random = np.random.default_rng(1)
    model = ir.from_onnx_text(text)
    ensure_names(model)
    values = {v.name: v for node in model.graph for v in (*node.inputs, *node.outputs) if v is not None}
    for name, dims in sizes.items():
        value = values[name]
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(dims)
        if value.producer() is None:
            value.const_value = ir.tensor(random.standard_normal(dims).astype(np.float32), name=name)
            model.graph.register_initializer(value)
    return Program({"main": model}, provenance={RANK: str(rank), RANKS: str(ranks)})
