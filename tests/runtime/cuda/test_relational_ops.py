"""Relational layers as operators of ONNX Runtime on CUDA: tables and plans in C, and on a GPU what they compute."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish import relational as rel
from planish.ir.ops import import_functions
from planish.ir.ops.relational import PROGRAM, relational_name
from planish.ir.relational.models import rgat, rgcn
from planish.ir.target import Target
from planish.runtime import ort_cuda
from planish.runtime.cuda import cache, driver, ort_library, toolchain
from planish.runtime.cuda.ort_ops.relational import TABLES, _described
from planish.runtime.cuda.relational.work import items
from planish.runtime.kernels.linker import link
from planish.runtime.relational.plan import place_values
from tests.ir.relational.graphs import graphs, random_graph, random_values

GRAPHS = {name: graph for name, graph in graphs().items() if name != "any types"}
GRAPHS["power law"] = rel.Graph(  # rows of all lengths, long ones at both ends
    (61 * np.random.default_rng(5).random((2, 40_000)) ** 6).astype(np.int64),
    np.arange(40_000) % 97 // 33,
    num_nodes=61,
    num_edge_types=3,
)


def optimized(program: rel.Program) -> rel.Program:
    return rel.run_passes(program).program


def parts(inputs: int, outputs: int) -> rel.Program:
    """A layer on two types of nodes, whose features come apart."""
    text = f"""program parts(x_0: node[0]({inputs}), x_1: node[1]({inputs}), W: edge_type({inputs}, {outputs}) weight, \
V: node_type({inputs}, {outputs}) weight) {{
      x: node({inputs}) = join(x_0, x_1)
      m: edge({outputs}) = linear(x@src, W)
      h: node({outputs}) = sum(m, over=edge, by=dst)
      own: node({outputs}) = linear(x, V)
      y: node({outputs}) = add(h, own)
      return y
    }}"""
    from planish.ir.relational.text import parse_program

    return parse_program(text)


def model_of(program: rel.Program, graph: rel.Graph, constant: bool = False, fixed: bool = False) -> ir.Model:
    """A model of one layer; with `constant`, its edges are."""
    text = str(program)
    inputs = []
    arrays = {"edge_index": graph.edge_index, "edge_type": graph.edge_type}
    for name, array in arrays.items():
        shape = ir.Shape(array.shape if fixed or constant else (*array.shape[:-1], "edges"))
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=shape)
        if constant:
            value.const_value = ir.tensor(array, name=name)
        inputs.append(value)
    for v in program.arguments:
        lead = () if v.domain.kind == "none" else (graph.rows(v.domain) if fixed else f"rows_{v.domain}",)
        inputs.append(ir.Value(name=v.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((*lead, *v.shape))))
    outputs = []
    for name in program.outputs:
        v = program.variable(name)
        shape = (graph.rows(v.domain) if fixed else f"rows_{v.domain}", *v.shape)
        outputs.append(ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape)))
    node = ir.node(relational_name(text), inputs, {PROGRAM: text}, domain="planish", name="layer", outputs=outputs)
    made = ir.Graph(
        inputs[2 if constant else 0 :], outputs, nodes=[node], initializers=inputs[:2] if constant else [],
        opset_imports={"": 23, "planish": 1},
    )  # fmt: skip
    model = ir.Model(made, ir_version=10)
    import_functions(model)
    return model


def feeds_of(program: rel.Program, graph: rel.Graph, seed: int = 0, constant: bool = False) -> dict[str, np.ndarray]:
    values = {name: array.astype(np.float32) for name, array in random_values(program, graph, seed).items()}
    return values if constant else {"edge_index": graph.edge_index, "edge_type": graph.edge_type} | values


def wanted(program: rel.Program, graph: rel.Graph, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return rel.interpret(program, graph, {v.name: feeds[v.name].astype(float) for v in program.arguments})


# ---- tables and plans, in C

_SOURCE = r"""
#include "launch_relational.h"
#define EXPORT __attribute__((visibility("default")))
#ifdef PROGRAM
#include "program.h"
#endif

static void fill(relational_graph *g, const int64_t *sizes, const int64_t *node_ptr, const int32_t *edges) {
  memset(g, 0, sizeof *g);
  g->nodes = sizes[0], g->edges = sizes[1], g->edge_types = sizes[2], g->node_types = sizes[3], g->node_ptr = node_ptr;
  for (int i = 0; i < 3; ++i) g->given[i] = edges + i * g->edges;
}

EXPORT int64_t table(
    const int64_t *sizes, const int64_t *node_ptr, const int32_t *edges, int which, int32_t *to, char *wrong) {
  relational_graph g;
  fill(&g, sizes, node_ptr, edges);
  int64_t length = relational_table(&g, which) ? -1 : g.lengths[which];
  if (length > 0) memcpy(to, g.tables[which], (size_t)length * 4);
  memcpy(wrong, g.wrong, sizeof g.wrong);
  relational_forget(&g);
  return length;
}

EXPORT int64_t cut(
    const int32_t *pointers, int64_t segments, int64_t unit, int64_t most, int64_t longest, int32_t *to,
    int32_t *starts, int32_t *listed, const int32_t *nodes) {
  relational_work w;
  if (relational_items(pointers, segments, unit, most, longest, 3, &w)) return -1;
  if (nodes) relational_order(&w, nodes);
  memcpy(to, w.items, (size_t)w.count * 16), memcpy(starts, w.starts, ((size_t)w.segments + 1) * 4);
  if (w.listed) memcpy(listed, w.listed, (size_t)w.segments * 4);
  int64_t count = w.count;
  relational_work_free(&w);
  return count;
}

#ifdef PROGRAM
EXPORT int64_t placed(const int64_t *sizes, const int64_t *node_ptr, const int32_t *edges, int64_t *to) {
  relational_graph g;
  relational_place places[256];
  fill(&g, sizes, node_ptr, edges);
  int64_t arena = relational_placed(&PROGRAM, &g, places);
  for (int i = 0; i < PROGRAM.value_count; ++i) to[2 * i] = places[i].base, to[2 * i + 1] = places[i].offset;
  relational_forget(&g);
  return arena;
}
#endif
"""


def native(folder: Path, program: str = "") -> ctypes.CDLL:
    here = Path(ort_library.__file__).parent / "native"
    defines = []
    if program:
        described = _described(program)
        assert described is not None
        lines = [line for line in described.lines("x") if "cuda_code" not in line]
        codes = [line for line in lines if not line.startswith('  {"')]
        (folder / "program.h").write_text("\n".join(codes).replace("};\n};", "};"))
        defines = ["PROGRAM=program_x"]
    source = folder / "harness.c"
    source.write_text(_SOURCE)
    link([source], [], folder / "harness.so", [here, folder], defines)
    return ctypes.CDLL(str(folder / "harness.so"))


def described_by(graph: rel.Graph) -> tuple[np.ndarray, ...]:
    sizes = np.array([graph.num_nodes, graph.num_edges, graph.num_edge_types, graph.num_node_types], np.int64)
    edges = np.concatenate([*graph.edge_index, graph.edge_type]).astype(np.int32)
    return sizes, np.ascontiguousarray(graph.node_ptr, np.int64), edges


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def test_tables_are_those_of_a_graph(tmp_path: Path) -> None:
    library = native(tmp_path)
    library.table.restype = ctypes.c_int64
    for label, told in GRAPHS.items():
        # Of types without edges a model says nothing.
        graph = rel.Graph(told.edge_index, told.edge_type, num_edge_types=told.num_edge_types, node_ptr=told.node_ptr)
        given = described_by(graph)
        for number, name in enumerate(TABLES):
            want = graph.table(name).reshape(-1)
            found, wrong = np.full(len(want) + 8, -7, np.int32), ctypes.create_string_buffer(256)
            length = library.table(*map(pointer, given), number, pointer(found), wrong)
            assert length == len(want) and (found[:length] == want).all(), (label, name)


def test_edges_of_a_type_that_join_different_types_of_nodes_are_told(tmp_path: Path) -> None:
    library = native(tmp_path)
    library.table.restype = ctypes.c_int64
    graph = rel.Graph([[0, 2], [1, 3]], [0, 0], node_ptr=[0, 2, 4])
    wrong = ctypes.create_string_buffer(256)
    given, found = described_by(graph), np.zeros(8, np.int32)
    assert library.table(*map(pointer, given), TABLES.index("edge_ends"), pointer(found), wrong) == -1
    assert wrong.value == b"edges of type 0 lead between different types of nodes (edge 1 is one of them)"


@pytest.mark.parametrize("longest", [-1, 50])
def test_items_of_work_are_those_of_the_engine(tmp_path: Path, longest: int) -> None:
    library = native(tmp_path)
    library.cut.restype = ctypes.c_int64
    random = np.random.default_rng(1)
    for lengths in (random.integers(0, 90, 40), np.array([0, 5000, 0, 70_000]), np.zeros(3, int), np.zeros(0, int)):
        pointers = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        chosen = np.flatnonzero(lengths > longest)
        want, want_starts = items(pointers, 64, 3, 5, chosen)
        found, starts, listed = (
            np.full(n, -7, np.int32) for n in (4 * len(want) + 8, len(lengths) + 8, len(lengths) + 8)
        )
        where = [*map(pointer, (found, starts, listed))]
        numbers = [ctypes.c_int64(n) for n in (len(lengths), 64, 5, longest)]
        assert library.cut(pointer(pointers), *numbers, *where, None) == len(want)
        assert (found[: 4 * len(want)].reshape(-1, 4) == want).all()
        assert (starts[: len(chosen) + 1] == want_starts).all()
        assert longest < 0 or (listed[: len(chosen)] == chosen).all()
        nodes = random.integers(0, 5, int(pointers[-1]) + 1).astype(np.int32)
        library.cut(pointer(pointers), *numbers, *where, pointer(nodes))
        order = np.argsort(nodes[want[:, 1]], kind="stable")
        assert (found[: 4 * len(want)].reshape(-1, 4) == want[order]).all()


@pytest.mark.parametrize("program", [rgcn(8, 8), rgat(9, 7, 3), parts(6, 4)], ids=lambda p: p.name)
def test_values_that_live_at_the_same_time_are_apart(tmp_path: Path, program: rel.Program) -> None:
    text = str(optimized(program))
    library, described = native(tmp_path, text), _described(text)
    assert described is not None
    library.placed.restype = ctypes.c_int64
    for graph in (GRAPHS["typed"], GRAPHS["power law"], random_graph(11, (20, 13), 50, 700)):
        if graph.num_node_types != described.node_types:
            continue
        found = np.zeros((len(described.lowered.values), 2), np.int64)
        given = described_by(graph)
        arena = library.placed(*map(pointer, given), pointer(found))
        want, size, _ = place_values(described.lowered, graph)
        names = list(described.lowered.values)
        fixed = [v.name for v in described.lowered.arguments] + list(described.lowered.outputs)
        assert arena == size
        for name, (base, offset) in zip(names, found.tolist(), strict=True):
            assert base == (fixed.index(want[name].base) if want[name].base else -1), name
            assert base < 0 or offset == want[name].offset, name


# ---- the library


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A compiler that writes what it was asked for."""
    program = tmp_path / "home" / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nto=$3\nshift 3\necho "FATBIN $*" > "$to"\n')
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLANISH_CACHE", "")
    kept = (toolchain.nvcc, cache.binary, cache.generated_binary, ort_library._library)
    for cached in kept:
        cached.cache_clear()
    yield
    for cached in kept:
        cached.cache_clear()


def test_the_library(stand_in) -> None:
    models = [model_of(optimized(program), GRAPHS["power law"]) for program in (rgcn(8, 8), rgat(9, 7, 3))]
    library = ort_library.library_for(models)
    assert library is not None and library.code == ("sm_75", "sm_80", "sm_90a", "compute_80")
    raw = library.path.read_bytes()
    assert raw.count(b"FATBIN ") == raw.count(b"code=sm_75") == 1 + 2 + 5
    for model in models:
        assert next(iter(model.graph)).op_type.encode() in raw
    assert hasattr(ctypes.CDLL(str(library.path)), "RegisterCustomOps")


def test_what_has_a_kernel() -> None:
    graph = GRAPHS["power law"]

    def has(model: ir.Model) -> bool:
        return ort_library.has_kernel(next(iter(model.graph)))

    model = model_of(rgcn(8, 8), graph)
    assert has(model) and has(model_of(parts(6, 4), random_graph(1, (3, 4), 2, 9)))
    assert not has(model_of(optimized(rgcn(4000, 8)), graph))  # rows do not fit into shared memory
    model.graph.inputs[2].type = ir.TensorType(ir.DataType.FLOAT16)
    assert not has(model)


# ---- on a GPU

here = ort_cuda.PROVIDER in ort.get_available_providers() and driver.available() and toolchain.nvcc() is not None
gpu = pytest.mark.skipif(not here, reason="no GPU, no nvcc, or an ONNX Runtime without CUDA")


def runner_of(model: ir.Model, graphs: int = 0):
    library = ort_library.library_for([model])
    assert library is not None
    return ort_cuda.compile_ort_cuda(model, Target.parse(f"ort-cuda:kernels,graphs={graphs}"), library=library)


def check(program: rel.Program, graph: rel.Graph, feeds: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
    for name, want in wanted(program, graph, feeds).items():
        scale = max(1.0, float(np.abs(want).max(initial=0)))
        np.testing.assert_allclose(found[name], want, rtol=0, atol=1e-5 * scale)


@gpu
@pytest.mark.parametrize("program", [rgcn(64, 64), rgat(9, 7, 3), parts(6, 4)], ids=lambda p: p.name)
def test_edges_may_change_with_every_call(program: rel.Program) -> None:
    counts = (30, 20) if program.name == "parts" else (61,)
    some = [random_graph(seed, counts, 3, edges) for seed, edges in ((1, 900), (2, 900), (3, 0), (4, 3000))]
    some += [GRAPHS["power law"]] if len(counts) == 1 else []
    program = optimized(program)
    runner = runner_of(model_of(program, some[0]))
    for turn, number in enumerate([*range(len(some)), 0, 1, *range(len(some))]):
        feeds = feeds_of(program, some[number], turn)
        check(program, some[number], feeds, runner.run(feeds))


@gpu
@pytest.mark.parametrize("graphs", [0, 1])
def test_constant_edges(graphs: int) -> None:
    program, graph = optimized(rgat(9, 7, 3)), GRAPHS["power law"]
    runner = runner_of(model_of(program, graph, constant=True, fixed=True), graphs)
    for seed in range(4):
        feeds = feeds_of(program, graph, seed, constant=True)
        check(program, graph, feeds, runner.run(feeds))


@gpu
def test_edges_in_a_cuda_graph_may_not_change() -> None:
    program, graph = optimized(rgcn(8, 8)), random_graph(1, (61,), 3, 900)
    runner = runner_of(model_of(program, graph, fixed=True), graphs=1)
    for seed in range(4):
        feeds = feeds_of(program, graph, seed)
        check(program, graph, feeds, runner.run(feeds))
    other = feeds | {"edge_type": (feeds["edge_type"] + (np.arange(900) == 899)) % 3}
    assert np.isnan(runner.run(other)["y"]).all()
    check(program, graph, feeds, runner.run(feeds))


@gpu
def test_more_graphs_than_are_kept() -> None:
    program = optimized(rgcn(8, 8))
    some = [random_graph(seed, (20 + seed,), 4, 200) for seed in range(12)]
    runner = runner_of(model_of(program, some[0]))
    for graph in (*some, *some[:3]):
        feeds = feeds_of(program, graph)
        check(program, graph, feeds, runner.run(feeds))


@gpu
def test_an_edge_out_of_range_is_told() -> None:
    program, graph = optimized(rgcn(8, 8)), GRAPHS["power law"]
    runner = runner_of(model_of(program, graph))
    feeds = feeds_of(program, graph)
    feeds["edge_index"] = feeds["edge_index"].copy()
    feeds["edge_index"][1, 7] = 61
    with pytest.raises(Exception, match="destinations: edge 7 has 61; there are 61, so 0 to 60"):
        runner.run(feeds)
    feeds = feeds_of(program, graph)
    check(program, graph, feeds, runner.run(feeds))  # and it goes on
