"""Whole nets with PyG layers through torch.export: one operator a layer, equal results, artifacts without torch."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch_geometric")

import planish  # noqa: E402
from planish.frontends.pyg import layers  # noqa: E402
from planish.ir.errors import InputError  # noqa: E402
from tests.frontends.pyg.cases import relative_error, typed_graphs  # noqa: E402

UNGATED = planish.Budget(gates=False)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import FastRGCNConv, RGATConv, RGCNConv

        self.first = RGCNConv(8, 16, 5, num_bases=3)
        self.norm = torch.nn.LayerNorm(16)
        self.second = RGATConv(16, 4, 5, heads=2)
        self.third = FastRGCNConv(8, 8, 5, aggr="add")
        self.last = torch.nn.Linear(8, 3)

    def forward(self, x: Any, edge_index: Any, edge_type: Any) -> Any:
        h = self.norm(self.first(x, edge_index, edge_type)).relu()
        h = self.second(h, edge_index, edge_type)
        return self.last(torch.nn.functional.gelu(self.third(h, edge_index, edge_type)))


class Typed(torch.nn.Module):
    """Two HGT layers, of features of one width for each node type, then of one width."""

    def __init__(self, metadata: Any) -> None:
        super().__init__()
        from torch_geometric.nn import HGTConv

        self.first = HGTConv({"a": 6, "b": 5, "c": 4}, 8, metadata, heads=2)
        self.second = HGTConv({"a": 8, "b": 8, "c": 4}, 8, metadata, heads=2)
        self.last = torch.nn.Linear(8, 3)

    def forward(self, x: Any, edges: Any) -> Any:
        h = {key: value.relu() for key, value in self.first(x, edges).items()}
        return self.last(self.second({**h, "c": x["c"]}, edges)["a"])


class Hetero(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GATConv, GCNConv, GraphConv, HeteroConv, SAGEConv

        warnings.filterwarnings("ignore", "There exist node types")

        def layer(a: int, b: int) -> Any:
            return HeteroConv(
                {
                    ("a", "r", "b"): SAGEConv((a, b), 8),
                    ("b", "s", "a"): GATConv((b, a), 8, add_self_loops=False),
                    ("a", "t", "a"): GCNConv(a, 8),
                    ("c", "u", "a"): GraphConv((4, a), 8),
                    ("a", "v", "a"): GATConv(a, 8),
                },
                aggr="sum",
            )

        self.first, self.second = layer(6, 5), layer(8, 8)

    def forward(self, x: Any, edges: Any) -> Any:
        h = {key: value.relu() for key, value in self.first(x, edges).items()}
        return self.second({**h, "c": x["c"]}, edges)["a"]


def _graph(nodes: int, edges: int, seed: int = 0) -> tuple[Any, Any, Any]:
    torch.manual_seed(seed)
    return torch.randn(nodes, 8), torch.randint(0, nodes, (2, edges)), torch.randint(0, 5, (edges,))


def _relational(exe: Any) -> int:
    return sum(count for name, count in exe.report.after.ops.items() if name.startswith("planish::Relational"))


def test_net_of_three_layers(tmp_path: Path) -> None:
    net, example = Net().eval(), _graph(13, 60)
    shapes = ({0: "nodes"}, {1: "edges"}, {0: "edges"})
    exe = planish.optimize(net, "ort-cpu", example_inputs=example, dynamic_shapes=shapes, budget=UNGATED)
    assert _relational(exe) == 3 and len(exe.report.after.ops) <= 7
    assert len(list(layers(net))) == 3
    assert all("forward" not in vars(part) for _, part in layers(net)), "the module is as it was"
    for nodes, edges in ((13, 60), (29, 101), (2, 1), (5, 0)):
        given = _graph(nodes, edges, seed=nodes)
        with torch.no_grad():
            assert relative_error(exe(*given), net(*given)) < 1e-5
    exe.export(tmp_path / "artifact")
    _loads_without_torch(tmp_path, net)


def _loads_without_torch(folder: Path, net: Any) -> None:
    """In planish's loader, and in plain ONNX Runtime."""
    given = _graph(17, 40, seed=3)
    with torch.no_grad():
        expected = net(*given).numpy()
    np.savez(folder / "io.npz", expected=expected, **{f"i{k}": value.numpy() for k, value in enumerate(given)})
    code = """
import sys, numpy as np, planish, onnxruntime
io = np.load("io.npz")
given = [io[f"i{k}"] for k in range(3)]
loaded = planish.load("artifact")(*given)
session = onnxruntime.InferenceSession("artifact/main.onnx")
plain = session.run(None, dict(zip([i.name for i in session.get_inputs()], given)))[0]
for found in (loaded, plain):
    np.testing.assert_allclose(found, io["expected"], rtol=1e-4, atol=1e-5)
assert "torch" not in sys.modules and "torch_geometric" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=120)


def test_typed_net() -> None:
    graph = typed_graphs()[0]
    torch.manual_seed(0)
    net, x = Typed(graph.metadata).eval(), {"a": torch.randn(14, 6), "b": torch.randn(6, 5), "c": torch.randn(3, 4)}
    exe = planish.optimize(net, "ort-cpu", example_inputs=(x, graph.edges), budget=UNGATED)
    assert _relational(exe) == 2
    with torch.no_grad():
        assert relative_error(exe(*x.values(), *graph.edges.values()), net(x, graph.edges)) < 1e-5


def test_hetero_conv() -> None:
    graph = typed_graphs()[1]
    torch.manual_seed(0)
    net, x = Hetero().eval(), {"a": torch.randn(14, 6), "b": torch.randn(6, 5), "c": torch.randn(3, 4)}
    exe = planish.optimize(net, "ort-cpu", example_inputs=(x, graph.edges), budget=UNGATED)
    # Of ten, one leads to no output; both layers sum the same features over the edges from c to a.
    assert _relational(exe) == 8
    with torch.no_grad():
        assert relative_error(exe(*x.values(), *graph.edges.values()), net(x, graph.edges)) < 1e-5


def test_bad_indices_fail_in_the_body() -> None:
    net, (x, index, types) = Net().eval(), _graph(13, 60)
    exe = planish.optimize(net, "ort-cpu", example_inputs=(x, index, types), budget=UNGATED)
    for at, bad in ((1, index + 13), (1, index - 1 - index.min()), (2, types + 1 + 4 - types.max())):
        given = [x, index, types]
        given[at] = bad
        with pytest.raises(InputError, match="out of data bounds"):
            exe(*given)


def test_an_option_without_a_program_is_traced_by_torch() -> None:
    from torch_geometric.nn import SAGEConv

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.known, self.unknown = SAGEConv(8, 8), SAGEConv(8, 8, aggr="softmax")

        def forward(self, x: Any, edge_index: Any) -> Any:
            return self.known(x, edge_index) + self.unknown(x, edge_index)

    net, (x, index, _) = Two().eval(), _graph(13, 60)
    exe = planish.optimize(net, "ort-cpu", example_inputs=(x, index), budget=UNGATED)
    assert _relational(exe) == 1
    with torch.no_grad():
        assert relative_error(exe(x, index), net(x, index)) < 1e-5
