"""Relational layers on a graph in the form that each competitor takes: PyG's module, torch.compile of it, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import relational_strong as strong
from benchmarks.relational_graphs import Typed

MODELS = ("RGCN", "RGAT", "HGT")
GIB = 2**30


@dataclass
class Case:
    """One model on one graph at one width.

    Attributes:
        model, graph, width: which.
        pyg: PyG's module.
        by_hand: the hand-written one, which shares its parameters; takes `x`.
        x: (nodes, width) features.
        arguments: from features, what forward of `pyg` takes.
        joined: from what `pyg` gives, a result over all nodes as `by_hand` has it.
    """

    model: str
    graph: Typed
    width: int
    pyg: Any
    by_hand: torch.nn.Module
    x: torch.Tensor
    arguments: Callable[[torch.Tensor], tuple[Any, ...]]
    joined: Callable[[Any], torch.Tensor]

    def pyg_bytes(self, training: bool) -> int:
        """An estimate of what PyG's module allocates at once, from its source.

        RGATConv takes a copy of a relation's weights for each edge, (edges, width, width), beside features of both
        ends; its backward has the gradient of that copy too. The others hold a few features for each edge, HGTConv
        also keys and values of all nodes of the source type for each edge type.
        """
        edges, width = self.graph.edges, self.width
        if self.model == "RGAT":
            return 4 * edges * width * (width * (2 if training else 1) + 6)
        if self.model == "HGT":
            sizes = self.graph.node_ptr[1:] - self.graph.node_ptr[:-1]
            rows = int(sizes[self.graph.ends[:, 0]].sum())
            return 4 * width * (rows * 6 + edges * 6) * (2 if training else 1)
        # Autograd keeps each relation's aggregated features and its part of the sum, over all nodes.
        kept = 2 * self.graph.edge_types if training else 4
        return 4 * width * (edges + self.graph.nodes * kept)


def make(model: str, graph: Typed, width: int) -> Case:
    """A case with random weights; heads: 1."""
    from torch_geometric.nn import HGTConv, RGATConv, RGCNConv

    torch.manual_seed(0)
    x = torch.randn(graph.nodes, width)
    index, types = torch.from_numpy(graph.edge_index), torch.from_numpy(graph.edge_type)
    if model == "RGCN":
        rgcn = RGCNConv(width, width, graph.edge_types)
        return Case(
            model, graph, width, rgcn, strong.Rgcn(rgcn, graph), x, lambda x: (x, index, types), lambda result: result
        )
    if model == "RGAT":
        rgat = RGATConv(width, width, graph.edge_types)
        with torch.no_grad():
            rgat.l2.zero_()  # PyG leaves it uninitialized; nothing of it is used
        return Case(
            model, graph, width, rgat, strong.Rgat(rgat, graph), x, lambda x: (x, index, types), lambda result: result
        )
    names = [f"t{k}" for k in range(len(graph.node_ptr) - 1)]
    triples = [(names[a], f"e{number}", names[b]) for number, (a, b) in enumerate(graph.ends)]
    start = torch.from_numpy(graph.node_ptr)
    edges = {}
    for number, (a, b) in enumerate(graph.ends):
        part = index[:, types == number]
        edges[triples[number]] = part - torch.stack([start[a], start[b]])[:, None]
    hgt = HGTConv(width, width, (names, triples))
    sizes = (start[1:] - start[:-1]).tolist()

    def joined(result: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [result.get(name) for name in names]
        zeros = (x.new_zeros(size, width) for size in sizes)
        return torch.cat([zero if part is None else part for part, zero in zip(parts, zeros, strict=True)])

    return Case(
        model, graph, width, hgt, strong.Hgt(hgt, graph), x,
        lambda x: (dict(zip(names, x.split(sizes), strict=True)), edges), joined,
    )  # fmt: skip
