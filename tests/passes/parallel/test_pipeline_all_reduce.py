"""pipeline-all-reduce: what works by rows in chunks, in turn, so that each sum has another chunk beside it."""

from __future__ import annotations

import numpy as np
import pytest

from planish.ir.compare import compare_outputs
from planish.ir.errors import InputError
from planish.ir.parallel import is_all_reduce
from planish.ir.program import Calibration
from planish.ir.target import Target
from planish.passes.base import PassContext
from planish.passes.lowering.lower_cuda_normalization import LowerCudaNormalization
from planish.passes.parallel.pipeline_all_reduce import PipelineAllReduce
from planish.passes.parallel.split import tensor_parallel
from planish.passes.parallel.tile_all_reduce import TileAllReduce
from planish.passes.pipeline import parse_pipeline
from planish.passes.testing import apply_pass, check_declines, check_rewrite, check_untouched, run_reference
from planish.runtime.parallel.lockstep import LockStep
from tests.parallel_models import feeds, rank_program, transformer

OPSETS = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
NETWORK = f"""{OPSETS} g (float[1,6,8] x, float[1,6,8] t) => (float[1,6,8] y)
    {{ p = MatMul(t, w) s = com.microsoft.AllReduce(p) r = Add(x, s) h = MatMul(r, u) y = Softmax<axis = 1>(h) }}"""


def shaped(text: str, **more: tuple[int, ...]):  # type: ignore[no-untyped-def]
    whole = dict.fromkeys("psrh", (1, 6, 8))
    return rank_program(text, w=(8, 8), u=(8, 8), **(whole | more))


def test_before_and_after() -> None:
    """Both sums are begun before one is read; what mixes rows gets all of them."""
    after = f"""{OPSETS} g (float[1,6,8] x, float[1,6,8] t) => (float[1,6,8] y)
        <int64[1] zero = {{0}}, int64[1] half = {{3}}, int64[1] all = {{6}}, int64[1] one = {{1}}> {{
        x0 = Slice(x, zero, half, one) x1 = Slice(x, half, all, one)
        t0 = Slice(t, zero, half, one) p0 = MatMul(t0, w) s0 = com.microsoft.AllReduce(p0)
        t1 = Slice(t, half, all, one) p1 = MatMul(t1, w) s1 = com.microsoft.AllReduce(p1)
        r0 = Add(x0, s0) h0 = MatMul(r0, u) r1 = Add(x1, s1) h1 = MatMul(r1, u)
        h = Concat<axis = 1>(h0, h1) y = Softmax<axis = 1>(h) }}"""
    result = check_rewrite(
        PipelineAllReduce(2, 3), shaped(NETWORK), rank_program(after, w=(8, 8), u=(8, 8)).main, edits=1
    )
    assert not result.declined


def test_a_sum_is_read_behind_the_nodes_of_another_chunk() -> None:
    program = tensor_parallel(transformer(length=64), 2).programs[0]
    assert apply_pass(PipelineAllReduce(2, 8), program).fired == 4
    nodes = list(program.main.graph)
    for node in filter(is_all_reduce, nodes):
        reader = next(user for user, _ in node.outputs[0].uses())
        between = nodes[nodes.index(node) + 1 : nodes.index(reader)]
        last = node is [n for n in nodes if is_all_reduce(n)][-1]
        assert any(n.op_type == "MatMul" for n in between) != last, node.name
    # Attention is whole, and its operands are joined by three nodes in each layer that follows a sum.
    assert [n.op_type for n in nodes].count("Attention") == 2
    assert [n.op_type for n in nodes].count("Concat") == 4  # and the output


@pytest.mark.parametrize("form", ["decoder", "encoder", "cached", "parallel"])
@pytest.mark.parametrize("chunks", [2, 5])
def test_numbers_stay_at_any_length(form: str, chunks: int) -> None:
    whole = transformer(form)
    made = tensor_parallel(whole, 2)
    for program in made.programs:
        program.calibration = Calibration([feeds(form, 17)])
        result = apply_pass(PipelineAllReduce(chunks, 2), program)
        assert result.fired == 4 and not result.declined
    ranks = LockStep(made.programs)
    assert ranks.reduces == 4 * chunks
    for length in (17, 1, 3, 4, 20):  # shorter than the chunks are many, and no multiple
        given = feeds(form, length, seed=length)
        assert compare_outputs(run_reference(whole, given), ranks.run(given)).relative_l2 < 1e-6, length


@pytest.mark.parametrize("form", ["flat", "decoder"])
def test_known_lengths_and_fused_norms(form: str) -> None:
    whole = transformer(form, length=300)
    made = tensor_parallel(whole, 2)
    for program in made.programs:
        program.target = Target.parse("ort-cuda")
        fused = apply_pass(LowerCudaNormalization(), program, PassContext(program.target)).fired
        assert fused == 3
        assert apply_pass(PipelineAllReduce(2, 100), program).fired == 4
        rows = [v.shape for n in program.main.graph if is_all_reduce(n) for v in n.outputs]
        assert {shape[-2] for shape in rows} == {128, 172}  # cut at a multiple of 64
    given = feeds(form, 300, 1)
    assert compare_outputs(run_reference(whole, given), LockStep(made.programs).run(given)).relative_l2 < 1e-6


def test_chunks_are_not_cut_again() -> None:
    for first in (PipelineAllReduce(2, 8), TileAllReduce(2, 8)):
        program = tensor_parallel(transformer(length=64), 2).programs[0]
        assert apply_pass(first, program).fired == 4
        assert not apply_pass(PipelineAllReduce(2, 2), program).modified


@pytest.mark.parametrize(
    ("text", "sizes", "reason"),
    [
        (NETWORK, {}, "it sums 6 rows, and 2 chunks of at least 4 take more"),
        (NETWORK.replace("[1,6,8]", "[1,S,8]"), dict.fromkeys("psrh", (1, "S", 8)), "the length 'S' is not known"),
        (
            f"{OPSETS} g (float[9] x) => (float[9] y) {{ s = com.microsoft.AllReduce(x) y = Neg(s) }}",
            None,
            "the number of rows is not known",
        ),
    ],
)
def test_what_is_left_alone_and_why(text: str, sizes: dict[str, tuple[int, ...]] | None, reason: str) -> None:
    program = rank_program(text) if sizes is None else shaped(text, **sizes)
    check_declines(PipelineAllReduce(2, 4), program, reason, count=1)


@pytest.mark.parametrize(
    ("mixing", "count"),
    [
        ("h = MatMul(r, other)", 3),  # a product with what is no weight, beside two chunks of the first
        ("h = RMSNormalization<axis = 1>(r, scale)", 1),
        ("h = Add(r, other)", 3),  # its operand has a row for each row of another batch
        ("h = Transpose<perm = [0, 2, 1]>(r)", 1),
    ],
)
def test_what_mixes_rows_stays_whole(mixing: str, count: int) -> None:
    other = (8, 8) if "MatMul" in mixing else (4, 6, 8)
    lead = "float[4,6,8]" if "Add" in mixing else "float[1,8,6]" if "Transpose" in mixing else "float[1,6,8]"
    text = f"""{OPSETS} g (float[1,6,8] x, float[1,6,8] t, float{list(other)} other) => ({lead} h)
        {{ p = MatMul(t, w) s = com.microsoft.AllReduce(p) r = Add(x, s) {mixing} }}"""
    sizes = {"scale": (6, 8)} if "scale" in mixing else {}
    program = rank_program(text, w=(8, 8), p=(1, 6, 8), s=(1, 6, 8), r=(1, 6, 8), **sizes)
    alone = program.clone()
    assert apply_pass(PipelineAllReduce(2, 3), program).fired == 1
    kind = mixing.split(" = ")[1].split("<")[0].split("(")[0]
    assert [node.op_type for node in program.main.graph].count(kind) == count
    random = np.random.default_rng(3)
    shapes = {"x": (1, 6, 8), "t": (1, 6, 8), "other": other}
    given = {name: random.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    for item in (program, alone):
        item.provenance |= {"rank": "0", "ranks": "1"}
    assert compare_outputs(LockStep([alone]).run(given), LockStep([program]).run(given)).relative_l2 < 1e-6


def test_a_program_without_sums_is_left_alone() -> None:
    check_untouched(PipelineAllReduce(2, 2), transformer(length=64))


def test_options() -> None:
    (parsed,) = parse_pipeline("pipeline-all-reduce{chunks=4,least=128}")
    assert parsed == PipelineAllReduce(4, 128) and parsed.kind == "exact"
    for wrong in ({"chunks": 1}, {"chunks": True}, {"least": 0}):
        with pytest.raises(InputError, match="is a number from"):
            PipelineAllReduce(**wrong)
