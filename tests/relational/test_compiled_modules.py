"""PyG modules compiled: they give what PyG gives, and train as PyG trains."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")
torch = pytest.importorskip("torch")
pytest.importorskip("torch_geometric")

from torch_geometric.nn import HGTConv, RGATConv, RGCNConv  # noqa: E402

from planish import relational as rel  # noqa: E402
from planish.ir.errors import InputError  # noqa: E402
from tests.frontends.pyg.cases import randomize, relative_error, typed_graphs  # noqa: E402

TYPES = 6


def edges(seed: int, nodes: int, count: int) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    index = random.integers(0, max(nodes, 1), (2, count))
    index[:, : count // 4] = index[:, count // 4 : count // 4 * 2]  # duplicates
    types = np.minimum(random.geometric(0.4, count) - 1, TYPES - 2)
    return torch.from_numpy(index), torch.from_numpy(types)


def compare(module: Any, compiled: Any, x: Any, *args: Any) -> None:
    """Results and gradients, of parameters and of x."""
    with torch.no_grad():
        assert relative_error(compiled(x, *args), module(x, *args)) < 1e-4
    found = []
    for net in (module, compiled):
        for parameter in module.parameters():
            parameter.grad = None
        given = x.clone().requires_grad_()
        y = net(given, *args)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
        found.append([y.detach(), given.grad, *(g.clone() for g in gradients)])
    for wanted, got in zip(*found, strict=True):
        scale = max(float(wanted.abs().max()) if wanted.numel() else 0.0, 1e-2)
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    "module",
    [
        RGCNConv(9, 12, TYPES),
        RGCNConv(8, 12, TYPES, aggr="max", num_blocks=4),
        pytest.param(RGATConv(9, 6, TYPES, heads=2, attention_mode="additive-self-attention"), marks=pytest.mark.slow),
    ],
    ids=lambda m: type(m).__name__,
)
def test_layers_of_pyg(module: Any) -> None:
    compiled = rel.compile(randomize(module))
    assert [id(p) for p in compiled.parameters()] == [id(p) for p in module.parameters()]
    for seed, (nodes, count) in enumerate(((30, 200), (30, 8), (1, 5), (4, 0), (50, 900))):
        x = torch.randn(nodes, module.in_channels, generator=torch.Generator().manual_seed(seed))
        compare(module, compiled, x, *edges(seed, nodes, count))


@pytest.mark.slow
def test_several_node_types() -> None:
    graph = next(g for g in typed_graphs() if g.name == "mixed")
    module = randomize(HGTConv(8, 8, graph.metadata, heads=2))
    compiled = rel.compile(module)
    x = {kind: torch.randn(count, 8) for kind, count in graph.counts.items()}
    results = []
    for net in (module, compiled):
        for parameter in module.parameters():
            parameter.grad = None
        y = net(x, graph.edges)
        sum((v * v).sum() for v in y.values() if v is not None).backward()
        results.append((y, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]))
    (wanted, gradients), (found, got) = results
    assert relative_error({k: v.detach() for k, v in found.items()}, {k: v.detach() for k, v in wanted.items()}) < 1e-4
    assert len(got) == len(gradients)
    for a, b in zip(got, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = RGCNConv(8, 8, TYPES), RGCNConv(8, 4, TYPES)
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x: Any, index: Any, types: Any) -> Any:
        return self.two(torch.relu(self.norm(self.one(x, index, types))), index, types)


def test_a_net_trains_in_place_of_the_given_one() -> None:
    torch.manual_seed(0)
    net = Net()
    compiled = rel.compile(net)
    x, (index, types) = torch.randn(40, 8), edges(1, 40, 300)
    labels = torch.randint(0, 4, (40,))
    optimizer = torch.optim.Adam(compiled.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(compiled(x, index, types), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():  # the parameters are shared
        assert relative_error(compiled(x, index, types), net(x, index, types)) < 1e-4
    # Tables of a graph are made once, also when it comes in other tensors; other edges are another graph.
    layer = compiled.one
    compare(net.one, layer, x, index.clone(), types.clone())
    index[0, 0] = (index[0, 0] + 1) % 40
    compare(net.one, layer, x, index, types)


def test_a_copy_has_parameters_of_its_own() -> None:
    net = rel.compile(RGCNConv(8, 4, TYPES))
    other = copy.deepcopy(net)
    x, (index, types) = torch.randn(10, 8), edges(1, 10, 20)
    with torch.no_grad():
        assert torch.equal(net(x, index, types), other(x, index, types))
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(x, index, types).any()
        assert net(x, index, types).any()
    assert repr(net) == repr(RGCNConv(8, 4, TYPES))
    with torch.inference_mode():
        assert net(x.clone(), index.clone(), types.clone()).any()


def test_bad_input_is_refused() -> None:
    net = rel.compile(RGCNConv(8, 8, TYPES))
    x, (index, types) = torch.randn(10, 8), edges(1, 10, 20)
    for arguments, message in (
        ((x, index + 5, types), "edge_index holds 1[0-9]; there are 10 nodes, so 0 to 9"),
        ((x, index, types + 4), "edge_type holds [0-9]; there are 6 edge types, so 0 to 5"),
        ((x, index, types - 1), "edge_type holds -1"),
        ((x.double(), index, types), "it must be float32"),
        ((x[:, :5], index, types), r"shape \(10, 5\)"),
        ((x, index.float(), types), "it must be int64"),
    ):
        with pytest.raises(InputError, match=message):
            net(*arguments)
    with pytest.raises(InputError, match="Linear has no PyG layer"):
        rel.compile(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="not a str"):
        rel.compile("rgcn")


def test_arguments_of_programs_are_checked() -> None:
    g = rel.Layer("sum")
    g.input("x", rel.NODE, 4)
    for n in g.nodes():
        for e in n.incoming():
            n.y += e.src.x
    layer = rel.compile(g.build(n.y))
    graph = rel.Graph([[0, 1], [1, 1]], [0, 0])
    x = torch.ones(2, 4)
    for values, message in (
        ({}, "'x' is missing or unknown"),
        ({"x": x, "z": x}, "'z' is missing or unknown"),
        ({"x": x.double()}, "'x' is torch.float64 on cpu; it must be float32"),
        ({"x": x[:1]}, r"'x' has shape \(1, 4\); this graph"),
        ({"x": np.ones((2, 4))}, "'x' has dtype float64"),
    ):
        with pytest.raises(InputError, match=message):
            layer(graph, **values)
    with pytest.raises(InputError, match="must be a planish.relational.Graph"):
        layer(x, x=x)
    assert layer(graph, x=x).tolist() == [[0.0] * 4, [2.0] * 4]
    assert layer.memory(graph).outputs == 32
    forward, backward = layer.memory(graph, training=True)
    assert forward.peak >= 32 and backward.peak >= 32
