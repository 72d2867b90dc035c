"""``benchmarks/relational.py``: its graphs, its hand-written layers, its verdicts; no times are asserted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch_geometric")

from benchmarks import relational  # noqa: E402
from benchmarks.relational_cases import MODELS, make  # noqa: E402
from benchmarks.relational_graphs import SHAPES, generate  # noqa: E402


@pytest.mark.parametrize("name", SHAPES)
def test_graphs_have_the_counts_of_their_data_sets(name: str) -> None:
    shape, scale = SHAPES[name], min(1.0, 20_000 / SHAPES[name].edges)
    graph = generate(name, scale)
    assert len(graph.node_ptr) - 1 == shape.node_types and graph.edge_types == shape.edge_types
    assert abs(graph.edges - shape.edges * scale) <= 2 * shape.edge_types + 2
    assert abs(graph.nodes - shape.nodes * scale) <= shape.node_types + 1
    kinds = np.searchsorted(graph.node_ptr, graph.edge_index, "right") - 1
    assert (graph.ends[graph.edge_type] == kinds.T).all(), "every edge type joins its two node types"
    assert (np.bincount(graph.edge_type, minlength=graph.edge_types) > 0).all()
    source, destination = graph.compaction
    assert 0 < source < 1 and 0 < destination < 1
    if shape.inverse:
        assert source == destination, "each edge is there in both directions"


@pytest.mark.parametrize("model", MODELS)
def test_by_hand_is_what_pyg_gives(model: str) -> None:
    graph = generate("aifb", 0.05)
    case = make(model, graph, 16)
    gradient = torch.randn(graph.nodes, 16)
    found = []
    for forward in (
        lambda x: case.joined(case.pyg(*case.arguments(x))),
        case.by_hand,
    ):
        case.pyg.zero_grad()
        x = case.x.clone().requires_grad_()
        result = forward(x)
        result.backward(gradient)
        found.append([result.detach(), x.grad, *(p.grad for p in case.pyg.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None) or not (a if b is None else b).any()
        if a is not None and b is not None:
            assert float((a - b).norm()) <= 1e-4 * float(a.norm()) + 1e-5


def test_summary_and_verdicts() -> None:
    def row(model: str, graph: str, ratio: float, **more: Any) -> dict[str, Any]:
        return {"model": model, "graph": graph, "width": 64, "by hand": [ratio, ratio, ratio], **more}

    results: dict[str, Any] = {
        "inference": [
            row("RGCN", "aifb", 2.0, PyG=[40.0, 39.0, 41.0]),
            row("RGCN", "bgs", 8.0),
            row("RGAT", "aifb", 1.4),
            row("RGAT", "bgs", 40.0),
            {**row("HGT", "aifb", 9.0), "width": 32},
        ],
        "training": [row("RGCN", "aifb", 1.0)],
    }
    found = relational.summary(results)
    assert found["RGCN inference, by hand"] == {"mean": pytest.approx(4.0), "least": 2.0, "graphs": 2}
    assert not any("HGT" in name for name in found), "only width 64 counts"
    lines = relational.verdicts(found, results)
    assert [line.rsplit(": ")[-1] for line in lines if "by hand" in line] == ["holds", "MISSED", "MISSED"]
    assert lines[-1] == "RGCN on aifb, 64: 40.0 times PyG; wanted 30: holds"


def test_what_differs_stops_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="differs by"):
        relational.check("x", torch.ones(3), torch.ones(3) * 1.01)
    with pytest.raises(SystemExit, match="differs by"):
        relational.check("x", torch.full((3,), float("nan")), torch.ones(3))
