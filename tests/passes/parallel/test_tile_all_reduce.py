"""tile-all-reduce: sums in chunks of the sequence, in the order that lets them overlap; the numbers stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.compare import compare_outputs
from planish.ir.errors import InputError
from planish.ir.parallel import is_all_reduce
from planish.ir.program import Calibration
from planish.passes.parallel.split import tensor_parallel
from planish.passes.parallel.tile_all_reduce import TileAllReduce
from planish.passes.pipeline import parse_pipeline
from planish.passes.testing import apply_pass, check_declines, check_rewrite, check_untouched, run_reference
from planish.runtime.parallel.lockstep import LockStep
from tests.parallel_models import feeds, rank_program, transformer

OPSETS = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'


def attention(length: str | int = 6, causal: int = 1, more: str = "", outputs: str = "", past: str = "") -> str:
    inputs = f"float[1,{length},8] q, float[1,{length},8] k, float[1,{length},8] v{more}"
    counts = f"is_causal = {causal}, q_num_heads = 2, kv_num_heads = 2"
    return (
        f"{OPSETS} g ({inputs}) => (float[1,{length},16] y{outputs}) {{ "
        f"a{', pk, pv' if outputs else ''} = Attention<{counts}>(q, k, v{past}) p = MatMul(a, w) "
        "y = com.microsoft.AllReduce(p) }"
    )


def of(text: str, length: int | str = 6):  # type: ignore[no-untyped-def]
    return rank_program(text, w=(8, 16), a=(1, length, 8), p=(1, length, 16))


def with_weight(text: str) -> ir.Model:
    return of(text).main


def test_before_and_after() -> None:
    """The second chunk has the keys of the first as its past; its product comes behind the sum of the first."""
    after = f"""{OPSETS} g (float[1,6,8] q, float[1,6,8] k, float[1,6,8] v) => (float[1,6,16] y)
        <int64[4] sizes = {{0, 0, 2, 4}}, int64[1] zero = {{0}}, int64[1] half = {{3}}, int64[1] all = {{6}},
         int64[1] one = {{1}}, int64[1] two = {{2}}> {{
        k4 = Reshape(k, sizes) kt = Transpose<perm = [0, 2, 1, 3]>(k4)
        v4 = Reshape(v, sizes) vt = Transpose<perm = [0, 2, 1, 3]>(v4)
        q0 = Slice(q, zero, half, one) k0 = Slice(k, zero, half, one) v0 = Slice(v, zero, half, one)
        a0 = Attention<is_causal = 1, q_num_heads = 2, kv_num_heads = 2>(q0, k0, v0)
        p0 = MatMul(a0, w) r0 = com.microsoft.AllReduce(p0)
        q1 = Slice(q, half, all, one) k1 = Slice(k, half, all, one) v1 = Slice(v, half, all, one)
        pk = Slice(kt, zero, half, two) pv = Slice(vt, zero, half, two)
        a1, ak, av = Attention<is_causal = 1, q_num_heads = 2, kv_num_heads = 2>(q1, k1, v1, , pk, pv)
        p1 = MatMul(a1, w) r1 = com.microsoft.AllReduce(p1)
        y = Concat<axis = 1>(r0, r1) }}"""
    program = of(attention())
    result = check_rewrite(TileAllReduce(chunks=2, least=3), program, rank_program(after, w=(8, 16)).main, edits=1)
    assert not result.declined


def test_each_chunk_is_summed_before_the_next_is_computed() -> None:
    program = of(attention())
    apply_pass(TileAllReduce(chunks=3, least=1), program)
    order = [node.op_type for node in program.main.graph if node.op_type in ("Attention", "MatMul", "AllReduce")]
    assert order == ["Attention", "MatMul", "AllReduce"] * 3


@pytest.mark.parametrize("form", ["decoder", "encoder", "cached", "parallel"])
@pytest.mark.parametrize("chunks", [2, 5])
def test_numbers_stay_at_any_length(form: str, chunks: int) -> None:
    whole = transformer(form)
    made = tensor_parallel(whole, 2)
    for program in made.programs:
        program.calibration = Calibration([feeds(form, 17)])
        result = apply_pass(TileAllReduce(chunks=chunks, least=2), program)
        assert result.fired == 4 and not result.declined
    ranks = LockStep(made.programs)
    assert ranks.reduces == 4 * chunks
    for length in (17, 1, 3, 4, 20):  # shorter than the chunks are many, and no multiple
        given = feeds(form, length, seed=length)
        assert compare_outputs(run_reference(whole, given), ranks.run(given)).relative_l2 < 1e-6, length


def test_a_length_that_is_known_is_cut_at_full_tiles() -> None:
    whole = transformer(length=1000)
    made = tensor_parallel(whole, 2)
    for program in made.programs:
        assert apply_pass(TileAllReduce(chunks=3, least=256), program).fired == 4
        graph = program.main.graph
        rows = {v.shape[1] for n in graph if is_all_reduce(n) for v in n.outputs}
        assert rows == {320, 360} and not any(n.op_type == "Shape" for n in graph)  # cut at 320 and 640
    given = feeds(length=1000, batch=1)
    assert compare_outputs(run_reference(whole, given), LockStep(made.programs).run(given)).relative_l2 < 1e-6


def test_an_additive_mask_beside_causal_attention() -> None:
    text = attention(7, 1, ", float[1,2,7,7] m", past=", m")
    program = of(text, 7)
    random = np.random.default_rng(2)
    given = {n: random.standard_normal((1, 7, 8)).astype("f4") for n in "qkv"}
    given["m"] = random.standard_normal((1, 2, 7, 7)).astype("f4")
    alone = of(text, 7)
    for item in (program, alone):
        item.provenance |= {"rank": "0", "ranks": "1"}
    assert apply_pass(TileAllReduce(chunks=3, least=2), program).fired == 1
    want, got = LockStep([alone]).run(given), LockStep([program]).run(given)
    assert compare_outputs(want, got).relative_l2 < 1e-6


def test_networks_may_be_left_whole() -> None:
    program = tensor_parallel(transformer(length=512), 2).programs[0]
    result = apply_pass(TileAllReduce(least=256, feed_forward=False), program)
    assert result.fired == 2
    assert [d.reason for d in result.declined] == ["it sums a feed-forward network, and feed_forward is off"] * 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (attention(1), "it sums one token: there is nothing to split"),
        (attention(500), "has 500 rows, and two chunks of at least 256 take more"),
        (attention("S"), "the length 'S' is not known: no calibration inputs say it"),
        (
            attention(512, 1, ", float[1,2,9,4] a0, float[1,2,9,4] b0", past=", , a0, b0"),
            "its attention reads a cache of past keys",
        ),
        (
            attention(512, 1, outputs=", float[1,2,512,4] pk, float[1,2,512,4] pv"),
            "its attention gives caches or scores too",
        ),
        (
            f"{OPSETS} g (float[1,512,16] x) => (float[1,512,16] y) {{ y = com.microsoft.AllReduce(x) }}",
            "what it sums is no product with a weight",
        ),
        (
            f"{OPSETS} g (float[512,8] a) => (float[512,16] y) {{ p = MatMul(a, w) y = com.microsoft.AllReduce(p) }}",
            "not of the form (batch, sequence, width)",
        ),
    ],
)
def test_what_is_left_alone_and_why(text: str, reason: str) -> None:
    length = next((n for n in (1, 500, 512) if f"[1,{n}," in text), "S")
    sizes = {"w": (8, 16)} if "MatMul" in text else {}
    if "Attention" in text:
        sizes |= {"a": (1, length, 8), "p": (1, length, 16)}
    elif sizes:
        sizes |= {"p": (512, 16)}
    check_declines(TileAllReduce(least=256), rank_program(text, **sizes), reason, count=1)


def test_a_calibrated_length_that_is_too_short() -> None:
    program = tensor_parallel(transformer(), 2).programs[0]
    program.calibration = Calibration([feeds(length=300)])
    check_declines(TileAllReduce(least=256), program, "has 300 rows, and two chunks of at least 256 take more", count=4)


def test_a_program_without_sums_is_left_alone() -> None:
    check_untouched(TileAllReduce(least=256), transformer(length=2048))


def test_options() -> None:
    (parsed,) = parse_pipeline("tile-all-reduce{chunks=8,least=128,feed_forward=False}")
    assert parsed == TileAllReduce(8, 128, False) and parsed.kind == "exact"
    for wrong in ({"chunks": 1}, {"chunks": True}, {"least": 0}):
        with pytest.raises(InputError, match="is a number from"):
            TileAllReduce(**wrong)
