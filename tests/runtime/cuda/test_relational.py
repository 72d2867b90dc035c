"""Relational programs as CUDA kernels: what is generated, that it compiles, and on a GPU that it is right."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from planish import relational as rel
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.relational.autodiff import differentiate
from planish.ir.relational.interpret import interpret
from planish.ir.relational.lowering import lower
from planish.ir.relational.models import hgt, rgat, rgcn
from planish.runtime.cuda import cache, driver, toolchain
from planish.runtime.cuda.relational.engine import CudaEngine
from planish.runtime.cuda.relational.text import header
from planish.runtime.cuda.relational.values import broadcast, combine, literal
from planish.runtime.cuda.relational.work import items
from tests.ir.relational.graphs import graphs, random_graph, random_values

torch = pytest.importorskip("torch")
gpu = pytest.mark.skipif(not (torch.cuda.is_available() and driver.available()), reason="no GPU")

GRAPHS = {name: graph for name, graph in graphs().items() if name != "any types"}
GRAPHS["500 types"] = random_graph(11, (20, 13), 500, 700)
for end, label in enumerate(("power law out", "power law in")):  # rows of all lengths, long ones at one end
    ends = np.random.default_rng(5).random((2, 30_000)) ** np.array([[6, 1], [1, 6]])[end][:, None]
    GRAPHS[label] = rel.Graph(
        (2011 * ends).astype(np.int64), np.arange(30_000) % 97 // 33, num_nodes=2011, num_edge_types=3
    )
GRAPHS["hub"] = rel.Graph(  # most edges lead to one node, through many tiles
    np.stack([np.arange(9000) % 37, np.where(np.arange(9000) % 50 < 49, 3, np.arange(9000) % 37)]),
    np.minimum(np.arange(9000) ** 2 % 11, 7),
    num_nodes=37,
    num_edge_types=8,
)


def plain(inputs: int, outputs: int) -> rel.Program:
    g = rel.Layer("plain")
    g.input("x", rel.NODE, inputs)
    w = g.weight("W", rel.EDGE_TYPE, inputs, outputs)
    for n in g.nodes():
        for e in n.incoming():
            n.h += rel.linear(e.src.x, w[e.type]) / rel.count(e, "dst_pair")
    return g.build(n.h)


def engine(program: rel.Program, deterministic: bool = False) -> CudaEngine:
    return CudaEngine(lower(rel.run_passes(program).program, scatter=not deterministic, recompute=True), deterministic)


# ---- text


def test_gathered_rows_are_reduced_multiplied_and_added_in_one_kernel() -> None:
    (kernel,) = engine(plain(64, 32)).kernels.values()
    text = kernel.text
    assert [launch.grid for launch in kernel.launches] == ["parts", "items"]  # the first for long rows only
    for part in (
        "const float* __restrict__ m_x, const float* __restrict__ m_W, float* m_h",
        "load_matrix<64, 32, 40, 256>(weights, matrix, 64, 32, 0, 0);",  # once for an item of work
        "S64::load<true>",
        "(m_x + (long long)src",
        "multiply<64, 2, 2, 68, 1, 40>(sums, x_tile",
        "S32::add((m_h + (long long)rows_of[",
    ):
        assert part in text, part
    assert kernel.room == 0  # nothing by edge, nor by pair


def test_sums_in_a_fixed_order_go_through_memory() -> None:
    first, second = engine(plain(64, 32), deterministic=True).kernels.values()
    assert "::add(" not in first.text + second.text and "atomicAdd" not in first.text + second.text
    assert "S32::store((m_div" in first.text and "t_dst_node_ptr" in second.text


def test_lanes_share_the_edges_of_a_node_where_there_is_one_number_for_each() -> None:
    softmax = next(k for k in engine(rgat(64, 64)).kernels.values() if "a_max" in str(k.kernel))
    assert "constexpr int G = 8;" in softmax.text and "+ lane; p < " in softmax.text
    assert "join<Most, G>" in softmax.text and "join<Plus, G>" in softmax.text


def test_long_loops_are_cut_into_parts() -> None:
    gemm, scores = (
        next(k for k in engine(rgat(64, 64)).kernels.values() if name in str(k.kernel)) for name in ("tile:", "a_max")
    )
    for part in ("__syncthreads_or(threadIdx.x < rows_here", "p += 32)", "join_parts<Plus, 256>(joined", "find_row("):
        assert part in gemm.text, part
    assert (gemm.long, gemm.long_room, gemm.long_rows) == ("dst_pair_ptr", 64, 0)
    assert "> 512) return;" in scores.text and "listed[blockIdx.x]" in scores.text
    assert [launch.grid for launch in scores.launches] == ["groups", "parts", "parts", "listed"]
    first, second, last = scores.text.split("__global__")[2:]
    assert "join_parts" not in first
    assert second.count("join_parts<Most, 256>") == last.count("join_parts<Most, 256>") == 1  # the softmax's maximum
    assert "join_parts<Plus, 256>" in last and "expf" in second and "expf" not in last


def test_results_that_a_long_loop_reads_go_to_memory() -> None:
    kernel = next(k for k in engine(hgt(12, 6, 2)).kernels.values() if k.long_rows)
    assert [launch.grid for launch in kernel.launches] == ["items", "parts"]
    assert (kernel.long_room, kernel.long_rows) == (0, 12)


def test_gradients_of_weights_are_summed_by_items_in_order() -> None:
    both = differentiate(plain(64, 64), ("x", "W"))
    outer = next(k for k in engine(both.backward).kernels.values() if k.kernel.gemm and k.kernel.gemm.kind == "outer")
    assert [launch.grid for launch in outer.launches] == ["items", "rows"]
    assert outer.room == 64 * 64 and "sum_parts(m_outer" in outer.text


def test_indices() -> None:
    for shape, source in (((3, 4), (4,)), ((3, 4), (3, 1)), ((2, 3, 4), (2, 1, 4)), ((5,), ()), ((2, 3), (2, 3))):
        size = int(np.prod(shape))
        wanted = np.broadcast_to(np.arange(int(np.prod(source))).reshape(source), shape).reshape(-1)
        for i in range(size):
            text = str(broadcast("i", shape, source)).replace("/", "//")
            assert broadcast(i, shape, source) == wanted[i] == eval(text, {"i": i})  # noqa: S307
    turned = np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1).reshape(-1)
    for i in range(24):
        text = str(combine("i", (4, 2, 3), (1, 12, 4))).replace("/", "//")
        assert combine(i, (4, 2, 3), (1, 12, 4)) == turned[i] == eval(text, {"i": i})  # noqa: S307
    assert [literal(v) for v in (1.0, 0.2, 1e-20)] == ["1.0f", "0.2f", "1e-20f"]


def test_items_of_work() -> None:
    pointers = np.array([0, 0, 5, 700, 701, 701])
    work, starts = items(pointers, 64, 1, 4)
    assert starts.tolist() == [0, 0, 1, 12, 13, 13]
    rows = np.concatenate([np.arange(b, e) for _, b, e, _ in work])
    assert (rows == np.arange(701)).all() and (np.diff(work[:, 1:3]) <= 64).all()
    assert items(np.array([0, 10**6]), 64, 1, 4)[0][0].tolist() == [0, 0, 256, 0]
    some, starts = items(pointers, 64, 1, 4, np.array([1, 3]))
    assert some[0].tolist() == [0, 0, 5, 0] and some[1].tolist() == [1, 700, 701, 1] and starts.tolist() == [0, 1, 2]
    empty, starts = items(np.array([0]), 64, 1, 4)
    assert len(empty) == 0 and starts.tolist() == [0]


# ---- errors


def test_what_can_not_be_is_said() -> None:
    program = plain(8, 8)
    with pytest.raises(InputError, match="device is 'gpu'; it must be cpu or cuda"):
        rel.compile(program, device="gpu")
    with pytest.raises(InputError, match="leave them out with device='cuda'"):
        rel.compile(program, device="cuda", threads=2)
    layer = rel.compile(program, device="cuda")
    graph = GRAPHS["hub"]
    with pytest.raises(InputError, match="'x' is torch.float32 on cpu; it must be float32 on a GPU"):
        layer(graph, x=torch.zeros(37, 8), W=torch.zeros(8, 8, 8))
    with pytest.raises(InputError, match="'x' is a ndarray; it must be a tensor on a GPU"):
        layer(graph, x=np.zeros((37, 8), np.float32), W=np.zeros((8, 8, 8), np.float32))
    with pytest.raises(UnsupportedError, match="rows of 2048 and 8 numbers in 1[0-9]+ bytes of shared memory"):
        engine(plain(2048, 8))


@pytest.mark.skipif(toolchain.nvcc() is None, reason="no nvcc")
def test_a_kernel_compiles_for_turing() -> None:
    """The oldest architecture: 64 KB of shared memory, no tensor cores for such products."""
    (kernel,) = engine(plain(16, 8)).kernels.values()
    assert cache.compiled(kernel.symbol, header() + kernel.text, "sm_75")[:4] == b"\x50\xed\x55\xba"
    assert max(launch.shared for launch in kernel.launches) <= 64 << 10


# ---- on a GPU

PROGRAMS = [rgcn(64, 64), rgcn(5, 37), rgat(9, 7, 3), hgt(12, 6, 2)]


def compare(program: rel.Program, built: CudaEngine, graph: rel.Graph, what: str, tolerance: float = 1e-5) -> None:
    values = {name: array.astype(np.float32) for name, array in random_values(program, graph, 3).items()}
    wanted = interpret(program, graph, values)
    given = {name: torch.tensor(array, device="cuda") for name, array in values.items()}
    found = built.call(graph, given)
    again = built.call(graph, given)
    for name, array in wanted.items():
        scale = max(1.0, float(np.abs(array).max(initial=0)))
        np.testing.assert_allclose(found[name].cpu(), array, rtol=0, atol=tolerance * scale, err_msg=f"{what}: {name}")
        if built.deterministic:
            assert torch.equal(found[name], again[name]), (what, name)


@gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: f"{p.name}-{p.inputs[0].shape[0]}")
def test_layers_and_their_gradients_on_every_graph(program: rel.Program, deterministic: bool) -> None:
    both = differentiate(rel.run_passes(program).program, tuple(v.name for v in program.arguments))
    for part in (program, both.forward, both.backward):
        built = engine(part, deterministic)
        for label, graph in GRAPHS.items():
            compare(part, built, graph, label, 1e-5 if part is program else 5e-5)


@gpu
def test_training_through_autograd() -> None:
    program, graph = plain(8, 8), GRAPHS["hub"]
    layer, reference = rel.compile(program, device="cuda"), rel.compile(program, device="cuda", deterministic=True)
    x = torch.randn(37, 8, device="cuda", requires_grad=True)
    w = torch.randn(8, 8, 8, device="cuda", requires_grad=True)
    wanted = torch.zeros(37, 8, device="cuda", dtype=torch.float64)
    src, dst, kinds = (torch.tensor(a, device="cuda") for a in (graph.src, graph.dst, graph.edge_type))
    count = torch.bincount(dst * 8 + kinds, minlength=37 * 8)[dst * 8 + kinds]
    message = torch.einsum("ei,eio->eo", x.double()[src], w.double()[kinds]) / count[:, None]
    wanted = wanted.index_add(0, dst, message)
    for compiled in (layer, reference):
        y = compiled(graph, x=x, W=w)
        assert (y - wanted).norm() <= 1e-5 * wanted.norm()
        gradients = torch.autograd.grad((y * y).sum(), [x, w])
        for a, b in zip(
            gradients, torch.autograd.grad((wanted * wanted).sum(), [x, w], retain_graph=True), strict=True
        ):
            assert (a - b).norm() <= 1e-5 * b.norm()


@gpu
def test_a_thread_that_has_no_context() -> None:
    """As those of torch's backward passes, before torch has done anything there."""
    layer, graph = rel.compile(plain(8, 8), device="cuda"), GRAPHS["typed"]
    x, w = torch.randn(graph.num_nodes, 8, device="cuda"), torch.randn(graph.num_edge_types, 8, 8, device="cuda")
    wanted = layer(graph, x=x, W=w)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(layer, graph, x=x, W=w).result()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@gpu
def test_modules_of_pyg() -> None:
    pytest.importorskip("torch_geometric")
    from torch_geometric.nn import RGCNConv

    graph = GRAPHS["hub"]
    conv = RGCNConv(16, 12, 8).cuda()
    compiled = rel.compile(conv, device="cuda")
    index, types = (torch.tensor(a, device="cuda") for a in (graph.edge_index, graph.edge_type))
    x, given = torch.randn(37, 16, device="cuda", requires_grad=True), torch.randn(37, 12, device="cuda")
    results = []
    for net in (conv, compiled):
        y = net(x, index, types)
        results.append([y, *torch.autograd.grad(y, [x, *net.parameters()], given)])
    for wanted, found in zip(*results, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@gpu
@pytest.mark.skipif("PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ, reason="torch allocates outside of its cache")
def test_a_stream_and_a_graph() -> None:
    program, graph = plain(64, 64), GRAPHS["hub"]
    layer = rel.compile(program, device="cuda")
    x, w = torch.randn(37, 64, device="cuda"), torch.randn(8, 64, 64, device="cuda")
    y = layer(graph, x=x, W=w)
    stream = torch.cuda.Stream()
    captured = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(captured, stream=stream):  # which fails if something synchronizes
        z = layer(graph, x=x, W=w)
    x.mul_(2)
    captured.replay()
    torch.testing.assert_close(z, 2 * y, rtol=1e-5, atol=1e-5)


@gpu
def test_the_form_for_turing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its PTX on the GPU at hand: products without tensor cores, vectors that are added number by number."""

    def compiled(name: str, text: str, arch: str) -> bytes:
        (tmp_path / f"{name}.cu").write_text(text)
        return toolchain.fatbin(f"{name}.cu", architectures=(), ptx="compute_75", folder=tmp_path)

    monkeypatch.setattr(cache, "_loaded", {})
    monkeypatch.setattr(cache, "compiled", compiled)
    for program in (rgcn(64, 64), rgat(9, 7, 3)):
        both = differentiate(rel.run_passes(program).program, tuple(v.name for v in program.arguments))
        for part in (both.forward, both.backward):
            for label in ("typed", "hub"):
                compare(part, engine(part), GRAPHS[label], f"{program.name} {label}", 5e-5)
