"""Generated kernels of relational programs against the interpreter in float64, on graphs made to break them."""

from __future__ import annotations

import numpy as np
import pytest

from planish.ir.errors import InputError, PlanishError
from planish.ir.relational.builder import Builder, dst, src
from planish.ir.relational.domains import DST_PAIR, EDGE, EDGE_TYPE, NODE, NODE_TYPE, NONE, node_of
from planish.ir.relational.graph import Graph
from planish.ir.relational.inter import Program
from planish.ir.relational.interpret import interpret
from planish.ir.relational.lowering import lower
from planish.ir.relational.models import hgt, rgat, rgcn
from planish.ir.relational.schedules import choose
from planish.ir.relational.statistics import NOMINAL, Statistics
from planish.passes.relational.pipeline import run_passes
from tests.ir.relational.graphs import graphs, random_graph, random_values
from tests.runtime.kernels.levels import VECTORS, level

pytest.importorskip("tvm")

from planish.runtime.relational.engine import Engine

GRAPHS = {name: graph for name, graph in graphs().items() if name != "any types"}
GRAPHS["500 types"] = random_graph(11, (20, 13), 500, 700)
GRAPHS["hub"] = Graph(
    np.stack([np.arange(400) % 37, np.where(np.arange(400) % 5 < 4, 3, np.arange(400) % 37)]),
    np.minimum(np.arange(400) ** 2 % 11, 7),
    num_nodes=37,
    num_edge_types=8,
)


def check(program: Program, engine: Engine, graph: Graph, what: str, tolerance: float = 2e-6) -> None:
    values = {name: array.astype(np.float32) for name, array in random_values(program, graph, 3).items()}
    wanted, found = interpret(program, graph, values), engine(graph, values)
    for name, array in wanted.items():
        scale = max(1.0, float(np.abs(array).max(initial=0)))
        np.testing.assert_allclose(found[name], array, rtol=0, atol=tolerance * scale, err_msg=f"{what}: {name}")


# Widths: whole vectors and panels, and none of them; heads.
PROGRAMS = [
    pytest.param(rgcn(64, 64), marks=pytest.mark.slow),
    rgcn(5, 37),
    rgat(9, 7, 3),
    pytest.param(hgt(12, 6, 2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: f"{p.name}-{p.inputs[0].shape[0]}")
def test_layers_on_every_graph(program: Program, name: str) -> None:
    cpu = level(name)
    engine = Engine(choose(lower(run_passes(program).program), NOMINAL), cpu=cpu)
    for label, graph in GRAPHS.items():
        check(program, engine, graph, label)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_give_the_same(threads: int) -> None:
    program = rgat(8, 8)
    lowered = lower(run_passes(program).program, scatter=threads == 1)
    engine = Engine(choose(lowered, NOMINAL, threads), threads=threads)
    for label, graph in GRAPHS.items():
        check(program, engine, graph, label)


@pytest.mark.parametrize("sides", [(0.2, 0.9), (0.9, 0.2)])
def test_both_sides_of_pairs(sides: tuple[float, float]) -> None:
    """Messages by source are added to destinations; dots move to the other side."""
    rows = Statistics(1000, 10_000, int(10_000 * sides[0]), int(10_000 * sides[1]), 20)
    program = hgt(8, 8)
    engine = Engine(lower(run_passes(program, rows).program))
    for label, graph in GRAPHS.items():
        check(program, engine, graph, label)


def test_tiles_of_any_size() -> None:
    program = rgcn(17, 20)
    for rows in (1, 7):
        lowered = choose(lower(run_passes(program).program), NOMINAL, tile_rows=rows)
        check(program, Engine(lowered), GRAPHS["hub"], f"{rows} rows")


def test_products_in_bfloat16_where_asked() -> None:
    from planish.runtime.kernels.cpu import detect

    if detect("amx") is None:
        pytest.skip("this processor lacks amx")
    graph = random_graph(1, (50, 30), 9, 900)
    # Sizes of whole tiles are rounded, others stay float32.
    for program, low, high in ((rgcn(64, 48), 1e-4, 5e-3), (rgcn(20, 48), 0.0, 1e-6)):
        engine = Engine(choose(lower(run_passes(program).program), NOMINAL, compute="bfloat16"))
        values = {name: array.astype(np.float32) for name, array in random_values(program, graph).items()}
        wanted, found = (f(program, graph, values) for f in (interpret, lambda _, g, v, e=engine: e(g, v)))
        for name, array in wanted.items():
            assert low <= np.linalg.norm(found[name] - array) / np.linalg.norm(array) <= high
    with pytest.raises(InputError, match="compute is 'float16'"):
        choose(lower(rgcn(4, 4)), NOMINAL, compute="float16")


def test_every_operator() -> None:
    b = Builder("all")
    x, s = b.input("x", NODE, 5), b.input("s", EDGE)
    w = b.weight("W", EDGE_TYPE, 5, 5)
    e = b.emit("mul", b.emit("linear", src(x), w, over=EDGE), s, over=EDGE)
    for kind in ("tanh", "sigmoid", "relu", "abs", "neg", "erf", "step", "exp"):
        e = b.emit("add", e, b.emit(kind, b.emit("mul", e, b.constant(0.1), over=EDGE), over=EDGE), over=EDGE)
    e = b.emit("leaky_relu", e, slope=0.3, over=EDGE)
    positive = b.emit("add", b.emit("mul", e, e, over=EDGE), b.constant(1.0), over=EDGE)
    for kind in ("log", "sqrt", "recip"):
        e = b.emit("sub", e, b.emit(kind, positive, over=EDGE), over=EDGE)
    wide = b.emit("concat", e, dst(x), over=EDGE, axis=0)
    grid = b.emit("transpose", b.emit("reshape", wide, over=EDGE, shape=(2, 5)), over=EDGE, perm=(1, 0))
    tall = b.emit("expand", b.emit("reshape", grid, over=EDGE, shape=(5, 2, 1)), over=EDGE, shape=(5, 2, 3))
    small = b.emit("fsum", tall, over=EDGE, axes=(0, 2))
    part = b.emit("slice", wide, over=EDGE, axis=0, start=3, stop=9)
    bigger = b.emit("greater", part, b.emit("min", part, b.constant(0.5), over=EDGE), over=EDGE)
    outputs = [
        b.emit("max_rows", part, over=EDGE, domain=NODE, by="dst"),
        b.emit("min_rows", part, over=EDGE, domain=DST_PAIR),
        b.emit("mean", small, over=EDGE, domain=NODE, by="src"),
        b.emit("outer", bigger, part, over=EDGE, domain=EDGE_TYPE),
        b.emit("outer", e, dst(x), over=EDGE, domain=NODE, by="src"),
        b.emit("sum", e, over=EDGE, domain=NODE_TYPE, by="dst"),
        b.emit("edge_softmax", e, over=EDGE, by="src"),
        b.emit("count", over=EDGE, domain=NODE, by="dst"),
        b.emit("equal", b.emit("max", e, s, over=EDGE), s, over=EDGE),
    ]
    program = b.build(*outputs)
    engine = Engine(lower(program))
    for label, graph in GRAPHS.items():
        check(program, engine, graph, label, 2e-5)


def test_node_types_apart_and_joined() -> None:
    b = Builder("parts")
    x = b.input("x", node_of(0), 3)
    y = b.input("y", node_of(1), 4)
    h = [b.emit("linear", v, b.weight(f"W{i}", NONE, n, 5)) for i, (v, n) in enumerate(((x, 3), (y, 4)))]
    joined = b.emit("join", *h)
    summed = b.emit("sum", src(joined), over=EDGE, domain=NODE, by="dst")
    program = b.build(b.emit("pick", summed, index=1), b.emit("tanh", b.emit("pick", summed, index=0)))
    engine = Engine(lower(program))
    for graph in (random_graph(1, (6, 5), 3, 40), random_graph(2, (4, 0), 3, 10), random_graph(3, (0, 4), 2, 9)):
        check(program, engine, graph, str(graph))


def test_memory_is_shared_and_known_before() -> None:
    program, graph = rgat(16, 16), random_graph(5, (300,), 8, 5000)
    engine = Engine(lower(run_passes(program, Statistics.of(graph)).program))
    memory = engine.memory(graph)
    assert memory.values < memory.unshared
    assert memory.peak == memory.values + memory.outputs
    assert memory.outputs == 300 * 16 * 4
    # Not a vector for each edge, nor for each pair; numbers only.
    assert memory.values < 5000 * 4 * 4


def test_large_values_share_no_memory_while_both_are_needed() -> None:
    b = Builder("chain")
    x, w = b.input("x", NODE, 8), b.weight("W", NONE, 8, 8)
    values = [x]
    for _ in range(4):
        values.append(b.emit("linear", values[-1], w, over=NODE))
    total = values[1]
    for value in values[3:]:
        total = b.emit("mul", b.emit("linear", total, w, over=NODE), value, over=NODE)
    program = b.build(total)
    engine = Engine(lower(program))
    memory = engine.memory(GRAPHS["hub"])
    assert memory.values < memory.unshared
    check(program, engine, GRAPHS["hub"], "chain", 1e-5)


def test_wrong_arguments_are_refused_before_kernels_run() -> None:
    program, graph = rgcn(8, 8), GRAPHS["hub"]
    engine = Engine(lower(run_passes(program).program))
    good = {name: array.astype(np.float32) for name, array in random_values(program, graph).items()}
    for name, array, message in (
        ("x", good["x"][:-1], r"'x' has shape \(36, 8\); this graph and 'x: node\(8\)' ask for \(37, 8\)"),
        ("W", good["W"].astype(np.float64), "'W' has dtype float64; it must be float32"),
        ("root", None, "no value was given for 'root: none"),
    ):
        with pytest.raises(InputError, match=message):
            engine(graph, good | {name: array})


def test_tables_that_a_graph_can_not_have() -> None:
    b = Builder("kinds")
    w = b.weight("W", NODE_TYPE, 4)
    program = b.build(b.emit("copy", dst(w), over=EDGE_TYPE))
    with pytest.raises(PlanishError, match="lead between different types of nodes"):
        Engine(lower(program))(random_graph(3, (4, 6), 3, 50, canonical=False), {"W": np.zeros((2, 4), np.float32)})
