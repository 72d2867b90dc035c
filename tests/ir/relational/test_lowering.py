"""Lowering: which kernels programs become, and what goes through memory."""

from __future__ import annotations

import pytest

from planish.ir.errors import InputError
from planish.ir.relational.autodiff import differentiate
from planish.ir.relational.builder import Builder, dst, src
from planish.ir.relational.domains import DST_PAIR, EDGE, EDGE_TYPE, NODE, NODE_TYPE, NONE, SRC_PAIR
from planish.ir.relational.inter import Program
from planish.ir.relational.intra import Lowered, View
from planish.ir.relational.lowering import lower
from planish.ir.relational.models import hgt, rgat, rgcn
from planish.ir.relational.schedules import choose
from planish.ir.relational.statistics import NOMINAL, Statistics
from planish.passes.relational.pipeline import run_passes
from tests.ir.relational.programs import random_program


def lowered(program: Program, rows: Statistics = NOMINAL, **options: bool) -> Lowered:
    return lower(run_passes(program, rows).program, **options)


def between(program: Lowered) -> dict[str, str]:
    """Values in memory that are neither arguments nor outputs, with their domains."""
    known = {v.name for v in program.arguments} | set(program.outputs)
    written = {name for kernel in program.kernels for name in kernel.writes()} - known
    return {name: str(program.values[name].domain) for name in written}


def test_rgcn_is_two_products_and_keeps_no_messages() -> None:
    made = lowered(rgcn(16, 16))
    assert [kernel.template for kernel in made.kernels] == ["segment GEMM"] * 2
    assert set(between(made).values()) == {"node"}
    assert "+=" in str(made.kernels[0])
    # Messages by source are added to their destinations where there are fewer of those.
    few = lowered(rgcn(16, 16), Statistics(1000, 40_000, 5_000, 30_000, 20))
    assert "src_pair" in [str(kernel.rows) for kernel in few.kernels]
    assert set(between(few).values()) <= {"node", "dst_pair"}


def test_attention_keeps_numbers_by_edge_not_vectors() -> None:
    for program in (rgat(16, 16), hgt(16, 16)):
        made = lowered(program)
        for name, domain in between(made).items():
            if domain in ("edge", "src_pair", "dst_pair"):
                assert made.values[name].shape in ((), (1,)), f"{program.name}: {name} {made.values[name]}"


def test_a_dot_after_a_product_is_in_its_kernel() -> None:
    b = Builder("p")
    x, w = b.input("x", NODE, 8), b.weight("W", EDGE_TYPE, 8, 8)
    m = b.emit("linear", src(x), w, over=SRC_PAIR)
    made = lower(b.build(b.emit("dot", m, dst(x), over=EDGE, name="y")))
    (kernel,) = made.kernels
    assert between(made) == {}
    assert "y[order[e]] := y = dot(linear, x[dst[e]])" in str(kernel)


def test_sums_start_from_what_is_added_to_them() -> None:
    b = Builder("p")
    x, w = b.input("x", NODE, 8), b.weight("W", EDGE_TYPE, 8, 8)
    root = b.emit("linear", x, b.weight("R", NONE, 8, 8), over=NODE, name="root")
    h = b.emit("sum", b.emit("linear", src(x), w, over=EDGE), over=EDGE, domain=NODE, by="dst")
    made = lower(b.build(b.emit("add", h, root, name="y")))
    assert made.start == {"y": "root"}
    b = Builder("q")
    x = b.input("x", NODE, 8)
    one = b.emit("sum", src(x), over=EDGE, domain=NODE, by="dst")
    two = b.emit("sum", dst(x), over=EDGE, domain=NODE, by="src")
    total = b.emit("add", b.emit("add", one, x), two)
    made = lower(b.build(total))
    assert len(made.kernels) == 2  # the additions are part of them


def test_several_threads_get_no_scatters() -> None:
    for program in (rgcn(8, 8), rgat(8, 8), hgt(8, 8)):
        made = choose(lowered(program, scatter=False), NOMINAL, threads=2)
        assert not any(kernel.writes()[name] for kernel in made.kernels for name in kernel.writes())
        assert all(kernel.schedule.parallel for kernel in made.kernels)


def test_values_are_written_once_and_before_they_are_read() -> None:
    programs = [random_program(seed, canonical=True) for seed in range(60)]
    programs += [differentiate(program).backward for program in (*programs[:20], rgcn(4, 4), rgat(4, 4, 2), hgt(4, 4))]
    for program in programs:
        made = lowered(program)
        known = {v.name for v in made.arguments}
        for step in made.steps:
            if isinstance(step, View):
                known.add(step.result.name)
                continue
            reads = {made.aliases.get(name, name) for name in step.reads()}
            assert reads <= known | set(step.writes()), str(made)
            for name, adds in step.writes().items():
                assert adds or name not in known, f"{name} is written twice\n{made}"
            known |= set(step.writes())
        assert set(made.outputs) <= known, str(made)


def test_schedules_can_be_overridden() -> None:
    made = choose(lowered(rgcn(8, 8)), NOMINAL, tile_rows=12)
    assert {kernel.schedule.tile_rows for kernel in made.kernels} == {12}
    wide, narrow = (choose(lowered(rgcn(n, n)), NOMINAL).kernels[0].schedule.tile_rows for n in (128, 16))
    assert wide < narrow
    with pytest.raises(InputError, match="no 'tiles'"):
        choose(made, NOMINAL, tiles=3)
    with pytest.raises(InputError, match="tile_rows is 0"):
        choose(made, NOMINAL, tile_rows=0)


def test_reductions_that_no_list_serves() -> None:
    b = Builder("r")
    x = b.input("x", EDGE, 4)
    made = lower(b.build(b.emit("sum", x, over=EDGE, domain=NODE_TYPE, by="dst")))
    assert "+=" in str(made)
    b = Builder("r")
    x = b.input("x", EDGE, 4)
    program = b.build(b.emit("max_rows", x, over=EDGE, domain=NODE_TYPE, by="dst"))
    with pytest.raises(InputError, match="max_rows over edge into node_type has no kernel"):
        lower(program)


def test_text_of_kernels() -> None:
    b = Builder("gcn")
    x, w = b.input("x", NODE, 8), b.weight("W", NONE, 8, 4)
    h = b.emit("linear", x, w, over=NODE)
    y = b.emit("mean", src(h), over=EDGE, domain=NODE, by="dst", name="y")
    text = str(lower(b.build(y)))
    assert "segment GEMM gcn_0 over node" in text
    assert "tile: linear[r] := linear = x[r] W[0]" in text
    assert "for e in in_edges[in_ptr[r] : in_ptr[r + 1]]:  # edge\n    y[r] := y = mean(linear[src[e]])" in text
    assert str(DST_PAIR) not in text
