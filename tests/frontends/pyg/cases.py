"""Random graphs made to break relational layers, and PyG layers with every option, to be compared on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch_geometric")

WIDTH, OUT = 8, 12


@dataclass(frozen=True)
class Case:
    """A graph of one node type; edges are in random order."""

    name: str
    nodes: int
    types: int
    index: Any
    edge_type: Any

    @property
    def edges(self) -> int:
        return int(self.edge_type.numel())


def _case(name: str, nodes: int, types: int, source: Any, destination: Any, edge_type: Any) -> Case:
    order = np.random.default_rng(5).permutation(len(edge_type))
    index = np.stack([np.asarray(source), np.asarray(destination)])[:, order].astype(np.int64).reshape(2, -1)
    return Case(name, nodes, types, torch.from_numpy(index), torch.from_numpy(np.asarray(edge_type, np.int64)[order]))


def graphs() -> list[Case]:
    """Empty types, isolated nodes, self-loops, duplicates, one node, no edge, one type, 500 types, a hub."""
    random = np.random.default_rng(0)

    def some(count: int, edges: int) -> np.ndarray:
        return random.integers(0, count, edges)

    loops = np.arange(9)
    few = some(20, 30)
    return [
        _case("empty-types", 20, 6, some(20, 70), some(20, 70), random.choice([1, 4], 70)),
        _case("isolated-nodes", 31, 3, some(9, 40), 22 + some(9, 40), some(3, 40)),
        _case("self-loops", 9, 4, np.append(loops, some(9, 21)), np.append(loops, np.append(loops, some(9, 12))),
              some(4, 30)),
        _case("duplicate-edges", 20, 3, np.tile(few, 3), np.tile(few[::-1], 3), np.tile(some(3, 30), 3)),
        _case("one-node", 1, 3, [0] * 7, [0] * 7, some(2, 7)),
        _case("no-edges", 5, 2, [], [], []),
        _case("one-type", 17, 1, some(17, 60), some(17, 60), np.zeros(60)),
        _case("500-types", 40, 500, some(40, 700), some(40, 700), some(500, 700)),
        _case("skewed", 50, 8, some(50, 300), np.where(random.random(300) < 0.8, 3, some(50, 300)),
              np.minimum(random.zipf(1.6, 300) - 1, 7)),
    ]  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A PyG layer and its arguments: `make(graph)` builds it with weights that no initialization left at 0 or 1."""

    name: str
    make: Callable[[Case], Any]
    arguments: Callable[[Case], tuple[Any, ...]]


def randomize(module: Any) -> Any:
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.eval()


def _features(case: Case, width: int = WIDTH) -> Any:
    return torch.from_numpy(np.random.default_rng(2).normal(size=(case.nodes, width)).astype("f"))


def rgcn_layers() -> Iterator[Layer]:
    from torch_geometric.nn import FastRGCNConv, RGCNConv

    options: list[dict[str, Any]] = [
        {}, {"num_bases": 3}, {"num_blocks": 4}, {"root_weight": False}, {"bias": False},
        {"num_blocks": 2, "bias": False}, {"num_bases": 1, "root_weight": False},
    ]  # fmt: skip
    for kind, reductions in ((RGCNConv, ("mean", "add", "max", "min")), (FastRGCNConv, ("mean", "add"))):
        for aggr in reductions:
            for given in options:
                label = f"{kind.__name__}-{aggr}-{'-'.join(f'{k}={v}' for k, v in given.items())}"
                yield Layer(
                    label,
                    lambda case, kind=kind, aggr=aggr, given=given: kind(WIDTH, OUT, case.types, aggr=aggr, **given),
                    lambda case: (_features(case), case.index, case.edge_type),
                )
        for given in options[:2]:
            yield Layer(
                f"{kind.__name__}-embeddings-{given}",
                lambda case, kind=kind, given=given: kind(case.nodes, OUT, case.types, **given),
                lambda case: (None, case.index, case.edge_type),
            )


def rgat_layers() -> Iterator[Layer]:
    from torch_geometric.nn import RGATConv

    options: list[dict[str, Any]] = [
        {}, {"heads": 3}, {"heads": 2, "concat": False}, {"heads": 2, "num_bases": 2, "bias": False},
        {"heads": 2, "num_blocks": 4}, {"heads": 2, "edge_dim": 3}, {"negative_slope": 0.5, "concat": False},
    ]  # fmt: skip
    for mode in ("additive-self-attention", "multiplicative-self-attention"):
        for mechanism in ("across-relation", "within-relation"):
            for mod in (None, "additive", "scaled", "f-additive", "f-scaled"):
                for given in options if mod is None else options[1:3]:
                    more = {} if mode.startswith("additive") else {"dim": 2}
                    label = "-".join(f"{k}={v}" for k, v in given.items())
                    yield Layer(
                        f"RGATConv-{mode[:3]}-{mechanism[:6]}-{mod}-{label}",
                        lambda case, mode=mode, mechanism=mechanism, mod=mod, given=given, more=more: RGATConv(
                            WIDTH, 6, case.types, mod=mod, attention_mode=mode, attention_mechanism=mechanism,
                            **given, **more,
                        ),
                        lambda case, given=given: (
                            _features(case), case.index, case.edge_type,
                            *([torch.randn(case.edges, 3)] if "edge_dim" in given else []),
                        ),
                    )  # fmt: skip


def simple_layers() -> Iterator[Layer]:
    from torch_geometric.nn import GATConv, GCNConv, GraphConv, SAGEConv

    plain: list[tuple[type, dict[str, Any]]] = [
        *((kind, {"aggr": aggr}) for kind in (SAGEConv, GraphConv) for aggr in ("mean", "add", "max", "min")),
        (SAGEConv, {"normalize": True, "project": True}),
        (SAGEConv, {"root_weight": False}),
        *((GCNConv, given) for given in ({}, {"improved": True}, {"add_self_loops": False}, {"normalize": False})),
        *((GATConv, given) for given in ({}, {"heads": 3}, {"heads": 2, "concat": False}, {"add_self_loops": False})),
        (GATConv, {"residual": True, "bias": False}),
    ]
    for kind, given in plain:
        label = "-".join(f"{k}={v}" for k, v in given.items())
        yield Layer(
            f"{kind.__name__}-{label}",
            lambda case, kind=kind, given=given: kind(WIDTH, OUT, **given),
            lambda case: (_features(case), case.index),
        )


@dataclass(frozen=True)
class Typed:
    """A graph with node types, in PyG's form."""

    name: str
    counts: dict[str, int]
    edges: dict[tuple[str, str, str], Any]

    @property
    def metadata(self) -> tuple[list[str], list[tuple[str, str, str]]]:
        return list(self.counts), list(self.edges)


def typed_graphs() -> list[Typed]:
    """Several node types; edge types without edges, a node type without nodes, one that is only a source; a hub."""
    random = np.random.default_rng(3)

    def some(counts: dict[str, int], kinds: dict[tuple[str, str, str], int], hub: bool = False) -> dict[Any, Any]:
        made = {}
        for triple, edges in kinds.items():
            ends = [random.integers(0, max(counts[end], 1), edges) for end in (triple[0], triple[2])]
            if hub:
                ends[1] = np.where(random.random(edges) < 0.8, 0, ends[1])
            made[triple] = torch.from_numpy(np.stack(ends).astype(np.int64))
        return made

    kinds = {("a", "r", "b"): 40, ("b", "s", "a"): 25, ("a", "t", "a"): 0, ("c", "u", "a"): 12, ("a", "v", "a"): 9}
    counts = {"a": 14, "b": 6, "c": 3}
    one = {"n": 11}
    many = {("n", f"e{i}", "n"): int(i % 7 == 0) for i in range(60)}
    hollow = {"a": 5, "z": 0, "b": 4}
    return [
        Typed("mixed", counts, some(counts, kinds)),
        Typed("hub", counts, some(counts, kinds, hub=True)),
        Typed("one-node-type", one, some(one, {("n", "e", "n"): 50})),
        Typed("60-types", one, some(one, many)),
        Typed("empty-node-type", hollow, some(hollow, {("a", "r", "b"): 20, ("z", "s", "a"): 0, ("b", "t", "a"): 7})),
        Typed("one-node", {"n": 1}, some({"n": 1}, {("n", "e", "n"): 4, ("n", "f", "n"): 0})),
    ]


def hgt_layers(graph: Typed) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Name, layer and arguments: heads; widths with and without a gated skip; one width for each node type."""
    from torch_geometric.nn import HGTConv

    kinds = list(graph.counts)
    for heads in (1, 2, 4):
        for label, widths in (
            ("skip", dict.fromkeys(kinds, 8)),
            ("no-skip", dict.fromkeys(kinds, 5)),
            ("mixed", {kind: 8 - 2 * number for number, kind in enumerate(kinds)}),
        ):
            module = randomize(HGTConv(widths, 8, graph.metadata, heads=heads))
            x = {kind: torch.randn(count, widths[kind]) for kind, count in graph.counts.items()}
            yield f"HGTConv-{heads}-{label}", module, (x, graph.edges)


def relative_error(found: Any, expected: Any) -> float:
    """Relative L2; over all entries of a dict the largest; 0 for two without elements."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        return max((relative_error(found[key], expected[key]) for key in expected), default=0.0)
    assert found.shape == expected.shape
    difference = float((found.double() - expected.double()).norm())
    return difference / max(float(expected.double().norm()), 1e-30) if difference else 0.0
