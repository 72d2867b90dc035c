"""PyG layers as kernels: results within 1e-4 of PyG's and gradients within 1e-3, on graphs made to break them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch_geometric")
pytest.importorskip("tvm")

from planish import relational  # noqa: E402
from planish.frontends.pyg import read_call  # noqa: E402
from tests.frontends.pyg.cases import (  # noqa: E402
    Layer,
    graphs,
    hgt_layers,
    randomize,
    relative_error,
    rgat_layers,
    rgcn_layers,
    simple_layers,
    typed_graphs,
)

#: A layer of every kind of kernel.
FEW = {
    "RGCNConv-mean-",
    "RGCNConv-max-",
    "FastRGCNConv-add-num_blocks=4",
    "RGATConv-add-across-None-heads=3",
    "GATConv-heads=3",
}
MORE = {
    "RGCNConv-embeddings-{}",
    "RGATConv-add-across-None-heads=2-num_blocks=4",
    "RGATConv-add-within-scaled-heads=2-concat=False",
    "RGATConv-mul-within-None-heads=2-edge_dim=3",
    "RGATConv-mul-across-f-additive-heads=2-concat=False",
    "SAGEConv-aggr=max",
    "GCNConv-",
}
#: All layers take a quarter of an hour: PLANISH_TEST_LAYERS=all.
ALL = os.environ.get("PLANISH_TEST_LAYERS") == "all"
LAYERS = [*rgcn_layers(), *rgat_layers(), *simple_layers()]
assert {layer.name for layer in LAYERS} >= FEW | MORE
REST = {layer.name for layer in LAYERS} - FEW if ALL else MORE
_COMPILED: dict[Any, Any] = {}


def compiled(module: Any) -> Callable[..., Any]:
    """As `relational.compile` makes it, but programs are compiled once for all modules."""

    def forward(*arguments: Any) -> Any:
        call = read_call(module, *arguments)
        if call.program not in _COMPILED:
            _COMPILED[call.program] = relational.compile(call.program)
        graph = relational.Graph(
            call.edge_index,
            call.edge_type,
            num_edge_types=call.num_edge_types,
            node_ptr=np.concatenate([[0], np.cumsum(call.node_counts)]).astype(np.int64),
            edge_ends=call.type_ends,
        )
        return call.result(_COMPILED[call.program].run(graph, call.operands))

    return forward


def with_gradients(module: Any, forward: Callable[..., Any], arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The result, and the gradients of parameters and features for fixed random gradients of the results."""
    given = []
    leaves: dict[str, Any] = {}

    def leaf(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        leaves[name] = value.detach().clone().requires_grad_()
        return leaves[name]

    for number, argument in enumerate(arguments):
        if isinstance(argument, dict):
            given.append({key: leaf(f"{number}.{key}", value) for key, value in argument.items()})
        else:
            given.append(leaf(str(number), argument))
    leaves |= dict(module.named_parameters())
    for value in leaves.values():
        value.grad = None
    result = forward(*given)
    parts = list(result.values()) if isinstance(result, dict) else [result]
    generator = torch.Generator().manual_seed(0)
    sum((part * torch.randn(part.shape, generator=generator)).sum() for part in parts).backward()
    zeros = {name: torch.zeros_like(value) for name, value in leaves.items()}
    return result, {name: zeros[name] if v.grad is None else v.grad.clone() for name, v in leaves.items()}


def compare(name: str, module: Any, arguments: Any) -> None:
    expected, wanted = with_gradients(module, module, arguments)
    found, gradients = with_gradients(module, compiled(module), arguments)
    assert relative_error(_detached(found), _detached(expected)) < 1e-4, name
    # A gradient that cancels to nothing is the rounding of what cancels: it is held to the largest one.
    largest = max((float(g.norm()) for g in wanted.values()), default=0.0)
    for key, gradient in wanted.items():
        difference = float((gradients[key] - gradient).norm())
        assert difference <= 1e-3 * max(float(gradient.norm()), 1e-2 * largest), f"{name}: gradient of {key}"


def _detached(value: Any) -> Any:
    return {k: v.detach() for k, v in value.items()} if isinstance(value, dict) else value.detach()


def _on_all_graphs(layer: Layer) -> None:
    for case in graphs():
        # A weight that underflows is where f-additive jumps, in PyG too: smaller parameters keep away from there.
        module = randomize(layer.make(case))
        if "f-additive" in layer.name:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(0.4)
        compare(f"{layer.name} on {case.name}", module, layer.arguments(case))


@pytest.mark.parametrize("layer", [item for item in LAYERS if item.name in FEW], ids=lambda item: item.name)
def test_layers(layer: Layer) -> None:
    _on_all_graphs(layer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [item for item in LAYERS if item.name in MORE or (ALL and item.name not in FEW)],
    ids=lambda item: item.name,
)
def test_more_layers(layer: Layer) -> None:
    _on_all_graphs(layer)


_FORMS = [f"HGTConv-{heads}-{form}" for heads in (1, 2, 4) for form in ("skip", "no-skip", "mixed")]


@pytest.mark.slow
@pytest.mark.parametrize("wanted", _FORMS if ALL else ["HGTConv-2-skip", "HGTConv-4-mixed"])
def test_hgt(wanted: str) -> None:
    for graph in typed_graphs():
        for name, module, arguments in hgt_layers(graph):
            if name == wanted:
                compare(f"{name} on {graph.name}", module, arguments)


def test_where_reordering_and_compaction_pay() -> None:
    """Far more edges than types and nodes: products of weights, and rows by pair."""
    from torch_geometric.nn import RGATConv

    torch.manual_seed(0)
    x, index, types = torch.randn(60, 24), torch.randint(0, 60, (2, 3000)), torch.randint(0, 4, (3000,))
    module = randomize(RGATConv(24, 20, 4, heads=2))
    program = read_call(module, x, index, types).program
    layer = relational.compile(program)
    optimized = str(layer.inference(relational.Graph(index, types)).lowered)
    assert "over edge_type" in optimized and "over src_pair" in optimized
    compare("RGATConv", module, (x, index, types))


def test_a_net_trains_as_with_pyg() -> None:
    from torch_geometric.nn import RGATConv, RGCNConv

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = RGCNConv(8, 12, 4), torch.nn.LayerNorm(12)
            self.second = RGATConv(12, 3, 4)

        def forward(self, x: Any, index: Any, types: Any) -> Any:
            return self.second(self.norm(self.first(x, index, types)).relu(), index, types)

    losses = []
    for fast in (False, True):
        torch.manual_seed(0)
        net = randomize(Net())
        model = relational.compile(net) if fast else net
        x, index, types = torch.randn(30, 8), torch.randint(0, 30, (2, 90)), torch.randint(0, 4, (90,))
        target = torch.randint(0, 3, (30,))
        step = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(12):
            step.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x, index, types), target)
            loss.backward()
            step.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] < 1.0


def test_bad_graphs_are_refused_before_a_kernel_runs() -> None:
    from torch_geometric.nn import RGCNConv

    from planish.ir.errors import InputError

    model = relational.compile(randomize(RGCNConv(8, 12, 3)))
    x, index, types = torch.randn(10, 8), torch.randint(0, 10, (2, 40)), torch.randint(0, 3, (40,))
    for text, arguments in (
        ("edge_index holds 10; there are 10 nodes", (x, index.clone().fill_(10), types)),
        ("edge_index holds -1", (x, index.clone().fill_(-1), types)),
        ("edge_type holds 3; there are 3 edge types", (x, index, types.clone().fill_(3))),
        ("edge_type holds -2", (x, index, types.clone().fill_(-2))),
        ("must be \\(rows, 8\\)", (x[:, :7], index, types)),
        ("must be float32", (x.double(), index, types)),
    ):
        with pytest.raises(InputError, match=text):
            model(*arguments)
