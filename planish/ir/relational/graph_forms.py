"""Graphs from other forms, and files of them: what the methods of the same names of `Graph` do."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np

from planish.ir.errors import InputError
from planish.ir.relational.graph import Graph, check_range, integers

_FILE_KEYS = ("edge_index", "edge_type", "node_ptr", "counts", "names")


def from_edge_dict(counts: Mapping[str, Any], edges: Mapping[tuple[str, str, str], Any]) -> Graph:
    """As `Graph.from_edge_dict` says."""
    names, triples = list(counts), list(edges)
    for name, count in counts.items():
        if count is None:
            raise InputError(f"how many nodes of type '{name}' there are is not known: set its num_nodes or x.")
    pointers = np.concatenate([[0], np.cumsum([int(counts[name]) for name in names], dtype=np.int64)]).astype(np.int64)
    parts = []
    for triple in triples:
        unknown = [end for end in (triple[0], triple[2]) if end not in names]
        if unknown:
            raise InputError(f"edges {triple} are of node type '{unknown[0]}', which has no nodes.")
        part = integers(f"edge_index of {triple}", edges[triple])
        if part.ndim != 2 or part.shape[0] != 2:
            raise InputError(f"edge_index of {triple} has shape {part.shape}; it must be (2, edges).")
        for row, end in zip(part, (triple[0], triple[2]), strict=True):
            check_range(f"edge_index of {triple}", row, int(counts[end]), f"nodes of type '{end}'")
        offset = [[pointers[names.index(triple[0])]], [pointers[names.index(triple[2])]]]
        parts.append(part + np.array(offset, np.int64))
    ends = [[names.index(triple[0]), names.index(triple[2])] for triple in triples]
    return Graph(
        np.concatenate(parts, 1) if parts else np.zeros((2, 0), np.int64),
        np.repeat(np.arange(len(parts)), [part.shape[1] for part in parts]).astype(np.int64),
        node_ptr=pointers,
        edge_ends=np.array(ends, np.int64).reshape(-1, 2),
        node_names=names,
        edge_names=triples,
    )


def from_networkx(graph: Any, edge_type: str, node_type: str | None) -> Graph:
    """As `Graph.from_networkx` says."""
    nodes = list(graph.nodes(data=True))
    kinds = _kinds([data.get(node_type) for _, data in nodes] if node_type else [None] * len(nodes), "nodes", node_type)
    numbers, names = kinds
    order = np.argsort(numbers, kind="stable")
    place = {nodes[old][0]: new for new, old in enumerate(order)}
    edges = list(graph.edges(data=True))
    types, relations = _kinds([data.get(edge_type) for *_, data in edges], "edges", edge_type)
    index = np.array([[place[a], place[b]] for a, b, _ in edges], np.int64).reshape(-1, 2).T
    if not graph.is_directed():
        loop = index[0] == index[1]  # an edge to itself is one edge either way
        index = np.concatenate([index, index[::-1][:, ~loop]], 1)
        types = np.concatenate([types, types[~loop]])
    counts = np.bincount(numbers, minlength=len(names))
    return Graph(
        index,
        types,
        num_edge_types=len(relations),
        node_ptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        node_names=[str(name) for name in names] if node_type else (),
    )


def save(graph: Graph, path: str | PathLike[str]) -> None:
    """As `Graph.save` says."""
    names = json.dumps([graph.node_names, graph.edge_names]).encode()
    counts = [graph.num_nodes, graph.num_edge_types]
    with open(path, "wb") as file:
        np.savez(
            file,
            edge_index=graph.edge_index,
            edge_type=graph.edge_type,
            node_ptr=graph.node_ptr,
            counts=np.array(counts, np.int64),
            names=np.frombuffer(names, np.uint8),
            edge_ends=graph.given_ends(),
        )


def load(path: str | PathLike[str]) -> Graph:
    """As `Graph.load` says."""
    try:
        with np.load(path, allow_pickle=False) as file:
            index, types, pointers, counts, names = (file[key] for key in _FILE_KEYS)
            ends = file["edge_ends"]
        nodes, edge_names = json.loads(names.tobytes())
        total, kinds = (int(count) for count in counts)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a graph that planish saved: {error}.") from error
    return Graph(
        index,
        types,
        num_nodes=total,
        num_edge_types=kinds,
        node_ptr=pointers,
        edge_ends=ends if len(ends) else None,
        node_names=nodes,
        edge_names=edge_names,
    )


def _kinds(values: list[Any], what: str, attribute: str | None) -> tuple[np.ndarray, list[Any]]:
    """The number of each value among the distinct ones in sorted order, and those."""
    missing = sum(value is None for value in values)
    if missing == len(values):
        return np.zeros(len(values), np.int64), [None]
    if missing:
        raise InputError(f"{missing} of {len(values)} {what} have no attribute '{attribute}'.")
    known = sorted(set(values), key=lambda value: (str(type(value)), value))
    place = {value: number for number, value in enumerate(known)}
    return np.array([place[value] for value in values], np.int64), known
