"""Relational layers as one would write them by hand in torch for speed: edges sorted by type beforehand, one matrix
product for each type's segment, index_add; softmax by scatter_reduce. They share the parameters of a PyG module.

Everything that depends on the graph alone (the order, the segments, the norms) is made once, outside of what is timed.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.relational_graphs import Typed


class Segments:
    """A graph with its edges sorted by type, and by destination within a type."""

    def __init__(self, graph: Typed) -> None:
        order = np.lexsort((graph.edge_index[1], graph.edge_type))
        source, destination = graph.edge_index[:, order]
        types = graph.edge_type[order]
        ends = np.concatenate([[0], np.cumsum(np.bincount(types, minlength=graph.edge_types))])
        self.nodes, self.edges = graph.nodes, graph.edges
        #: (type, first edge, end) of the types that have edges.
        self.parts = [(t, int(a), int(b)) for t, (a, b) in enumerate(pairwise(ends)) if b > a]
        self.source, self.destination = torch.from_numpy(source.copy()), torch.from_numpy(destination.copy())
        _, inverse, counts = np.unique(types * graph.nodes + destination, return_inverse=True, return_counts=True)
        self.norm = torch.from_numpy((1.0 / counts[inverse]).astype(np.float32)).unsqueeze(1)
        self.node_ptr, self.type_ends = graph.node_ptr.tolist(), graph.ends

    def softmax(self, logits: Tensor) -> Tensor:
        """Over the incoming edges of each node; logits (edges, heads)."""
        index = self.destination[:, None].expand_as(logits)
        with torch.no_grad():
            most = logits.new_full((self.nodes, logits.shape[1]), -torch.inf)
            most = most.scatter_reduce_(0, index, logits, "amax")[self.destination]
        part = torch.exp(logits - most)
        total = part.new_zeros(self.nodes, logits.shape[1]).index_add(0, self.destination, part)
        return part / (total + 1e-16)[self.destination]


class Rgcn(torch.nn.Module):
    """RGCNConv with mean aggregation, root weight and bias."""

    def __init__(self, conv: Any, graph: Typed) -> None:
        super().__init__()
        self.conv, self.at = conv, Segments(graph)

    def forward(self, x: Tensor) -> Tensor:
        at, out = self.at, torch.addmm(self.conv.bias, x, self.conv.root)
        weight = self.conv.weight.unbind()  # its gradient is one stack, not a sum of as many tensors as types
        for t, a, b in at.parts:
            message = (x[at.source[a:b]] * at.norm[a:b]) @ weight[t]
            out.index_add_(0, at.destination[a:b], message)
        return out


class Rgat(torch.nn.Module):
    """RGATConv, additive attention across relations, concatenated heads."""

    def __init__(self, conv: Any, graph: Typed) -> None:
        super().__init__()
        self.conv, self.at = conv, Segments(graph)

    def forward(self, x: Tensor) -> Tensor:
        conv, at = self.conv, self.at
        heads, width = conv.heads, conv.out_channels
        weight = conv.weight.unbind()
        logits, messages = [], []
        for t, a, b in at.parts:
            z = x[at.source[a:b]] @ weight[t]
            of_destination = (x[at.destination[a:b]] @ weight[t]) @ conv.q
            logits.append(of_destination + z @ conv.k)
            messages.append(z)
        alpha = at.softmax(torch.nn.functional.leaky_relu(torch.cat(logits), conv.negative_slope))
        z = torch.cat(messages).view(-1, heads, width) * alpha.unsqueeze(-1)
        out = x.new_zeros(at.nodes, heads * width).index_add(0, at.destination, z.view(-1, heads * width))
        return out + conv.bias


class Hgt(torch.nn.Module):
    """HGTConv on node features of one width; x and the result are over all nodes, those of one type consecutive.

    The keys and values of an edge type are multiplied by its weights for each edge, or for each node of the source
    type, whichever are fewer.
    """

    def __init__(self, conv: Any, graph: Typed) -> None:
        super().__init__()
        self.conv, self.at = conv, Segments(graph)
        starts = np.asarray(self.at.node_ptr)
        self.plans = []
        for t, a, b in self.at.parts:
            kind = int(graph.ends[t][0])
            first, end = int(starts[kind]), int(starts[kind + 1])
            by_node = end - first < b - a
            self.plans.append((t, a, b, (first, end, self.at.source[a:b] - first) if by_node else None))

    def forward(self, x: Tensor) -> Tensor:
        conv, at = self.conv, self.at
        heads, width = conv.heads, conv.out_channels // conv.heads
        ranges = list(pairwise(at.node_ptr))
        parts = [conv.kqv_lin.lins[name](x[a:b]) for name, (a, b) in zip(conv.node_types, ranges, strict=True)]
        k, q, v = torch.cat(parts).view(-1, 3, heads, width).unbind(1)
        kinds = len(conv.edge_types)
        weights = [layer.weight.view(heads, kinds, width, width).unbind(1) for layer in (conv.k_rel, conv.v_rel)]
        by_edge_k, by_edge_v = [], []
        for t, a, b, by_node in self.plans:
            found = []
            for rows, by_type in zip((k, v), weights, strict=True):
                w = by_type[t]
                if by_node is not None:
                    first, end, local = by_node
                    found.append(_heads(rows[first:end], w)[local])
                else:
                    found.append(_heads(rows[at.source[a:b]], w))
            scale = conv.p_rel["__".join(conv.edge_types[t])] / math.sqrt(width)
            by_edge_k.append((q[at.destination[a:b]] * found[0]).sum(-1) * scale)
            by_edge_v.append(found[1])
        alpha = at.softmax(torch.cat(by_edge_k))
        message = torch.cat(by_edge_v) * alpha.unsqueeze(-1)
        summed = x.new_zeros(at.nodes, heads * width).index_add(0, at.destination, message.flatten(1))
        results = []
        for name, (a, b) in zip(conv.node_types, ranges, strict=True):
            if name not in conv.dst_node_types:
                results.append(x.new_zeros(b - a, heads * width))
                continue
            out = conv.out_lin.lins[name](torch.nn.functional.gelu(summed[a:b]))
            if out.shape[1] == x.shape[1]:
                skip = conv.skip[name].sigmoid()
                out = skip * out + (1 - skip) * x[a:b]
            results.append(out)
        return torch.cat(results)


def _heads(rows: Tensor, weight: Tensor) -> Tensor:
    """(rows, heads, a) times (heads, a, b)."""
    if weight.shape[0] == 1:
        return (rows.squeeze(1) @ weight[0]).unsqueeze(1)
    return torch.einsum("nha,hab->nhb", rows, weight)
