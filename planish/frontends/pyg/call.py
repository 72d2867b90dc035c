"""One call of a PyG layer, read as a relational program with its graph, inputs and weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from planish.ir.errors import InputError, UnsupportedError
from planish.ir.relational.inter import Program


@dataclass(frozen=True)
class LayerCall:
    """What a layer computes in one call of its forward.

    Attributes:
        program: inputs and weights by name, and what is done with them.
        edge_index: (2, E) int64, source and destination among all nodes.
        edge_type: (E,) int64.
        node_counts: nodes of each type; ints, or SymInts while torch.export traces.
        num_edge_types: edge types, those without edges included.
        inputs: the program's inputs: node and edge features.
        weights: the program's weights, as differentiable functions of the module's parameters.
        result: the program's outputs → what forward returns.
        type_ends: node types of the ends of each edge type, or None for a graph with one node type.
    """

    program: Program
    edge_index: Tensor
    edge_type: Tensor
    node_counts: tuple[Any, ...]
    num_edge_types: int
    inputs: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    result: Callable[[Sequence[Tensor]], Any]
    type_ends: tuple[tuple[int, int], ...] | None = None

    @property
    def operands(self) -> list[Tensor]:
        """Inputs, then weights, in the program's order."""
        return [self.inputs[v.name] for v in self.program.inputs] + [self.weights[v.name] for v in self.program.weights]


@dataclass(frozen=True)
class Ends:
    """Features of both ends of edges, on one set of nodes.

    A bipartite call has features for sources and others for destinations, each numbered from 0. Both are put on the
    nodes 0 … n - 1 with n the larger count; node i then has the features of source i and those of destination i.

    Attributes:
        source, destination: (n, features); the same tensor if the call is not bipartite.
        nodes: n.
        rows: how many destinations there are: rows of the result.
    """

    source: Tensor
    destination: Tensor | None
    nodes: Any
    rows: Any

    @classmethod
    def of(cls, where: str, x: Any) -> Ends:
        """From what PyG's layers take: a tensor, or a pair of which the second may be None."""
        if isinstance(x, Tensor):
            return cls(x, x, x.shape[0], x.shape[0])
        if not isinstance(x, tuple | list) or len(x) != 2 or not isinstance(x[0], Tensor):
            raise InputError(f"{where}: x is a {type(x).__name__}; give a tensor, or a pair (sources, destinations).")
        source, destination = x
        if destination is None:
            raise UnsupportedError(
                f"{where}: x is a pair without destination features, so the number of destinations would be read off "
                "the edges; give destination features (zeros where there are none)."
            )
        count, rows = source.shape[0], destination.shape[0]
        if isinstance(count, int) and isinstance(rows, int):
            nodes: Any = max(count, rows)
        else:
            nodes = count + rows  # not known while tracing which is larger
        return cls(_padded(source, nodes), _padded(destination, nodes), nodes, rows)


def _padded(x: Tensor, nodes: Any) -> Tensor:
    if isinstance(nodes, int) and x.shape[0] == nodes:
        return x
    return torch.cat([x, x.new_zeros(nodes - x.shape[0], *x.shape[1:])])


def check_plain(module: Any) -> str:
    """Checks what holds for every message-passing layer; returns its name for messages.

    Raises:
        UnsupportedError: hooks, explanations or a decomposition, which an opaque layer would pass by.
    """
    name = type(module).__name__
    held = vars(module)
    if any(held.get(key) for key in _HOOKS):
        raise UnsupportedError(f"{name}: it has hooks on its messages, which a compiled layer would not call.")
    if getattr(module, "explain", None):
        raise UnsupportedError(f"{name}: explanations need PyG's own forward; set module.explain = False.")
    if module not in _CHECKED:
        _check_parameters(module, name)
        _CHECKED.add(module)
    return name


#: Where PyG keeps hooks of its own kind.
_HOOKS = tuple(
    f"_{kind}_forward{when}_hooks"
    for kind in ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update")
    for when in ("", "_pre")
)
#: Layers whose parameters were looked at; there may be hundreds of them. Dtypes are checked again when they are used.
_CHECKED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def _check_parameters(module: Any, name: str) -> None:
    for key, tensor in module.named_parameters():
        if isinstance(tensor, torch.nn.parameter.UninitializedParameter):
            raise InputError(f"{name}: '{key}' is not initialized yet (-1 channels); call the module once first.")
        if tensor.dtype != torch.float32:
            raise UnsupportedError(f"{name}: '{key}' is {tensor.dtype}; relational layers are float32.")


def edges(module: Any, name: str, edge_index: Any, edge_type: Any = None) -> tuple[Tensor, Tensor]:
    """edge_index and edge_type, checked; source first, whatever the flow of `module`. Without types all are 0.

    Raises:
        InputError: they are not (2, E) and (E,) integers.
        UnsupportedError: a sparse matrix in place of an edge index.
    """
    if not isinstance(edge_index, Tensor) or edge_index.layout != torch.strided:
        raise UnsupportedError(f"{name}: edge_index is sparse; give a (2, edges) tensor of integers.")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise InputError(f"{name}: edge_index has shape {tuple(edge_index.shape)}; it must be (2, edges).")
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise InputError(f"{name}: edge_index is {edge_index.dtype}; it must be int64.")
    if type(edge_index).__name__ == "EdgeIndex":
        edge_index = edge_index.as_tensor()
    if edge_type is None:
        edge_type = torch.zeros_like(edge_index[0])
    if not isinstance(edge_type, Tensor) or edge_type.dtype not in (torch.int64, torch.int32):
        raise InputError(f"{name}: edge_type is {getattr(edge_type, 'dtype', type(edge_type))}; it must be int64.")
    if edge_type.dim() != 1 or _differ(edge_type.shape[0], edge_index.shape[1]):
        raise InputError(
            f"{name}: edge_type has shape {tuple(edge_type.shape)} and edge_index {tuple(edge_index.shape)}; "
            "there must be one type for each edge."
        )
    if module.flow == "target_to_source":
        edge_index = edge_index.flip(0)
    return edge_index.long(), edge_type.long()


def features(name: str, what: str, x: Tensor, width: int) -> Tensor:
    """`x`, checked to be (rows, width) float32.

    Raises:
        InputError: it is not.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        raise InputError(f"{name}: {what} is {getattr(x, 'dtype', type(x).__name__)}; it must be float32.")
    if x.dim() != 2 or x.shape[1] != width:
        raise InputError(f"{name}: {what} has shape {tuple(x.shape)}; it must be (rows, {width}).")
    return x


def aggregation(module: Any, name: str, allowed: Mapping[str, str]) -> str:
    """The reduction operator of the module's `aggr`.

    Raises:
        UnsupportedError: an aggregation that is not among `allowed`.
    """
    aggr = getattr(module, "aggr", None)
    if not isinstance(aggr, str) or aggr not in allowed:
        known = ", ".join(sorted(allowed))
        raise UnsupportedError(f"{name}: aggr is {aggr!r}; a relational layer takes {known}.")
    return allowed[aggr]


def first_rows(count: Any) -> Callable[[Sequence[Tensor]], Tensor]:
    """The first `count` rows of the only output."""

    def rows(outputs: Sequence[Tensor]) -> Tensor:
        y = outputs[0]
        known = type(count) is int and type(y.shape[0]) is int  # not while sizes are symbols
        return y if known and y.shape[0] == count else y[:count]  # the gradient of a slice is a copy

    return rows


def _differ(a: Any, b: Any) -> bool:
    """Whether two sizes are known to differ."""
    return isinstance(a, int) and isinstance(b, int) and a != b


SUMS = {"add": "sum", "sum": "sum"}
MEANS = {**SUMS, "mean": "mean"}
ALL = {**MEANS, "max": "max_rows", "min": "min_rows"}

__all__ = [
    "ALL",
    "MEANS",
    "SUMS",
    "Ends",
    "LayerCall",
    "aggregation",
    "check_plain",
    "edges",
    "features",
    "first_rows",
]
