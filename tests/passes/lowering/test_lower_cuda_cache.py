"""Steps over caches for the CUDA provider; numbers on ONNX Runtime's CPU kernels."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from planish.ir.target import Target
from planish.passes.testing import apply_pass, check_declines, program_of

PASS = "lower-cuda-cache"


def source(heads=4, groups=2, tokens="1", dtype="float", more="", bias=""):
    q, kv = 8 * heads, 8 * groups
    extra = f", , , , {bias}" if bias else ""
    positions = """r = Cast<to = 1>(total) zero = Constant<value_float = 0.0>() one = Constant<value_float = 1.0>()
      none = Constant<value_ints = [0]>() limit = Squeeze(r, none) at = Range(zero, limit, one) b = Mul(slopes, at)
      """
    return f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
      g ({dtype}[batch, {tokens}, {q}] q, {dtype}[batch, {tokens}, {kv}] k, {dtype}[batch, {tokens}, {kv}] v,
         {dtype}[batch, {groups}, room, 8] past_0_key, {dtype}[batch, {groups}, room, 8] past_0_value,
         int64[batch] lengths)
      => ({dtype}[batch, {tokens}, {q}] y, {dtype}[batch, {groups}, room, 8] present_0_key,
          {dtype}[batch, {groups}, room, 8] present_0_value)
      <float[1, {heads}, 1, 1] slopes = {{{", ".join(str(0.1 * (i + 1)) for i in range(heads))}}}>
      {{ held = Cast<to = 6>(lengths)  zeros = Constant<value_ints = [0]>()  most = ReduceMax<keepdims = 1>(held, zeros)
        i = Constant<value_ints = [1]>()  i32 = Cast<to = 6>(i)  total = Add(most, i32)  {positions if bias else ""}
        y, present_0_key, present_0_value = com.microsoft.GroupQueryAttention
          <num_heads = {heads}, kv_num_heads = {groups}, scale = 0.4{more}>
          (q, k, v, past_0_key, past_0_value, held, total{extra}) }}"""


def inputs(batch=3, heads=4, groups=2, room=11, dtype="f4", seed=0, tokens=1):
    """Lengths count all tokens that are read but one."""
    random = np.random.default_rng(seed)
    lengths = random.integers(tokens - 1, room, batch)
    lengths[0] = room - 1
    found = {
        "q": random.standard_normal((batch, tokens, 8 * heads)),
        "k": random.standard_normal((batch, tokens, 8 * groups)),
        "v": random.standard_normal((batch, tokens, 8 * groups)),
    }
    for part in ("key", "value"):
        cache = random.standard_normal((batch, groups, room, 8))
        # What is not held must not count.
        held = lengths[:, None, None, None] - (tokens - 1)
        found[f"past_0_{part}"] = np.where(np.arange(room)[:, None] < held, cache, 30)
    return {name: value.astype(dtype) for name, value in found.items()} | {"lengths": lengths}


def expected(x, heads, groups, window=None, cap=0.0, slopes=False):
    """Outputs in float64."""
    batch, room = len(x["lengths"]), x["past_0_key"].shape[2]
    caches = [x[f"past_0_{part}"].astype("f8") for part in ("key", "value")]
    tokens = x["q"].shape[1]
    y = np.zeros((batch, tokens, heads, 8))
    for row, last in enumerate(x["lengths"]):
        for cache, name in zip(caches, "kv", strict=True):
            for token in range(tokens):
                cache[row, :, last - tokens + 1 + token] = x[name][row, token].reshape(groups, 8)
        for head, token in np.ndindex(heads, tokens):
            held = last - tokens + 1 + token
            k, v = (cache[row, head // (heads // groups)] for cache in caches)
            scores = 0.4 * k @ x["q"][row, token].reshape(heads, 8)[head].astype("f8")
            scores = cap * np.tanh(scores / cap) if cap else scores
            at = np.arange(room)
            scores += 0.1 * (head + 1) * at * slopes
            scores[(at > held) | (at <= held - (window or room))] = -np.inf
            weights = np.exp(scores - scores.max())
            y[row, token, head] = weights / weights.sum() @ v
    return y.reshape(batch, tokens, -1), *caches


def run(program, x):
    from planish.runtime.ort import compile_ort

    got = compile_ort(program.main, Target()).run(x)
    return [got[name] for name in ("y", "present_0_key", "present_0_value")]


@pytest.mark.parametrize("heads, groups", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"cap": 2.0}, {"slopes": True}])
def test_in_float32(heads, groups, options):
    more = ", local_window_size = 3" * ("window" in options) + ", softcap = 2.0" * ("cap" in options)
    program = program_of(source(heads, groups, more=more, bias="b" if "slopes" in options else ""), "ort-cuda")
    apply_pass(["infer-shapes", PASS, "eliminate-common-subexpressions", "eliminate-dead-code"], program)
    ops = Counter(node.op_type for node in program.main.graph)
    assert ops["ScatterND"] == 2 and ops["MatMul"] == 2 and not ops["GroupQueryAttention"] and not ops["ReduceMax"]
    for batch, room in ((3, 11), (1, 1), (2, 64)):
        x = inputs(batch, heads, groups, room, seed=room)
        for got, want in zip(run(program, x), expected(x, heads, groups, **options), strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("heads, groups", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"cap": 2.0}, {"slopes": True}])
def test_chunks_in_float32(heads, groups, options):
    more = ", local_window_size = 3" * ("window" in options) + ", softcap = 2.0" * ("cap" in options)
    text = source(heads, groups, tokens="n", more=more, bias="b" if "slopes" in options else "")
    program = program_of(text, "ort-cuda")
    clean = ["eliminate-common-subexpressions", "eliminate-dead-code"]
    apply_pass(["infer-shapes", PASS + "{chunks=True}", *clean], program)
    ops = Counter(node.op_type for node in program.main.graph)
    assert ops["ScatterND"] == 2 and ops["MatMul"] == 2 and not ops["GroupQueryAttention"] and not ops["ReduceMax"]
    for batch, room, tokens in ((3, 11, 4), (1, 1, 1), (2, 64, 1), (1, 9, 9), (2, 40, 17)):
        x = inputs(batch, heads, groups, room, seed=room, tokens=tokens)
        for got, want in zip(run(program, x), expected(x, heads, groups, **options), strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_half_precision_takes_the_capacity():
    program = program_of(source(dtype="float16", more=", local_window_size = 5"), "ort-cuda")
    apply_pass(["infer-shapes", PASS, "eliminate-dead-code"], program)
    (node,) = (n for n in program.main.graph if n.op_type == "GroupQueryAttention")
    size = node.inputs[6].producer()
    assert size.op_type == "Cast" and size.inputs[0].producer().op_type == "Shape"
    x = inputs(room=23, dtype="f2")
    held = np.arange(23)[:, None] <= x["lengths"][:, None, None, None]  # what is behind a row is left as it likes
    for got, want, counts in zip(run(program, x), expected(x, 4, 2, window=5), (1, held, held), strict=True):
        np.testing.assert_allclose(got * counts, want * counts, rtol=5e-3, atol=5e-3)
    check_declines(PASS, program, "its length is the capacity already")


def test_declines():
    check_declines(PASS, program_of(source(), "ort-cpu"), "this is for 'ort-cuda'")
    check_declines(PASS, program_of(source(tokens="n"), "ort-cuda"), "more than one token a row")
    chunks = program_of(source(tokens="n", dtype="float16"), "ort-cuda")
    check_declines(PASS + "{chunks=True}", chunks, "a chunk in half precision has a kernel")
    check_declines(PASS, program_of(source(more=", do_rotary = 1"), "ort-cuda"), "more than attend")
    check_declines(PASS, program_of(source(more=", smooth_softmax = 1"), "ort-cuda"), "more than attend")
