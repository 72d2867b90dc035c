"""Typed graphs: what is refused, what the tables hold, and other forms of graphs."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from planish.ir.errors import InputError
from planish.ir.relational.domains import DST_PAIR, EDGE, EDGE_TYPE, NODE, NODE_TYPE, NONE, SRC_PAIR, node_of
from planish.ir.relational.graph import Graph

INDEX = np.array([[0, 1, 1, 2, 4, 1], [1, 0, 0, 2, 3, 3]])
TYPES = np.array([2, 0, 0, 0, 2, 2])


def random_graph(seed: int, nodes: int = 20, edges: int = 90, types: int = 5) -> Graph:
    random = np.random.default_rng(seed)
    index = random.integers(0, nodes, (2, edges))
    return Graph(index, random.integers(0, types, edges), num_nodes=nodes, num_edge_types=types)


@pytest.mark.parametrize(
    ("index", "types", "options", "message"),
    [
        (INDEX, TYPES, {"num_nodes": 4}, "edge_index holds 4; there are 4 nodes, so 0 to 3"),
        (INDEX - 1, TYPES, {}, "edge_index holds -1"),
        (INDEX, TYPES, {"num_edge_types": 2}, "edge_type holds 2; there are 2 edge types, so 0 to 1"),
        (INDEX, TYPES - 1, {}, "edge_type holds -1"),
        (INDEX, TYPES[:3], {}, r"edge_type has shape \(3,\)"),
        (INDEX.T, TYPES, {}, r"edge_index has shape \(6, 2\)"),
        (INDEX.astype(float), TYPES, {}, "edge_index has dtype float64; it must be integers"),
        (INDEX, TYPES.astype("f4"), {}, "edge_type has dtype float32"),
        (INDEX, TYPES, {"node_ptr": [0, 3, 4]}, "edge_index holds 4; there are 4 nodes"),
        (INDEX, TYPES, {"node_ptr": [0, 5], "num_nodes": 6}, "node_ptr ends at 5"),
        (INDEX, TYPES, {"node_ptr": [1, 5]}, "ascends from 0"),
        (INDEX, TYPES, {"node_ptr": [0, 2, 5], "edge_ends": [[0, 0]] * 3}, "but edge_ends says"),
        (INDEX, TYPES, {"edge_ends": [[0, 0]] * 2}, "there are 2 edge types"),
        (INDEX, TYPES, {"node_names": ["a", "b"]}, "node_names has 2 names for 1 types"),
    ],
)
def test_what_is_no_graph_is_refused(index, types, options, message) -> None:
    with pytest.raises(InputError, match=message):
        Graph(index, types, **options)


def test_tables_of_an_unsorted_graph() -> None:
    g = Graph(INDEX, TYPES)
    assert (g.num_nodes, g.num_edges, g.num_edge_types) == (5, 6, 3)
    src, dst, types = (g.table(name) for name in ("src", "dst", "type"))
    assert list(zip(types, dst, src, strict=True)) == sorted(zip(TYPES, INDEX[1], INDEX[0], strict=True))
    assert list(g.table("edge_ptr")) == [0, 3, 3, 6]
    assert list(g.table("order")[g.table("place")]) == list(range(6))
    assert list(zip(g.table("src_pair_type"), g.table("src_pair_node"), strict=True)) == [
        (0, 1), (0, 2), (2, 0), (2, 1), (2, 4),
    ]  # fmt: skip
    assert g.compaction == (5 / 6, 4 / 6)


@pytest.mark.parametrize("seed", range(4))
def test_tables_agree_with_each_other(seed: int) -> None:
    g = random_graph(seed, types=(1, 5, 40, 300)[seed])
    for side, order in (("src", g.table("src_pair_edges")), ("dst", np.arange(g.num_edges))):
        pair_node, pair_type, pointers = (g.table(f"{side}_pair_{name}") for name in ("node", "type", "ptr"))
        assert len(pair_node) == len(set(zip(g.table(side).tolist(), g.table("type").tolist(), strict=True)))
        pair = np.repeat(np.arange(len(pair_node)), np.diff(pointers))
        assert (pair_node[pair] == g.table(side)[order]).all()
        assert (pair_type[pair] == g.table("type")[order]).all()
        assert (g.table(f"{side}_pair_of")[order] == pair).all()
        assert list(np.repeat(np.arange(g.num_edge_types), np.diff(g.table(f"{side}_pair_type_ptr")))) == list(
            pair_type
        )
        nodes = np.repeat(np.arange(g.num_nodes), np.diff(g.table(f"{side}_node_ptr")))
        assert (pair_node[g.table(f"{side}_node_pairs")] == nodes).all()
    for side, prefix in (("dst", "in"), ("src", "out")):
        nodes = np.repeat(np.arange(g.num_nodes), np.diff(g.table(f"{prefix}_ptr")))
        assert (g.table(side)[g.table(f"{prefix}_edges")] == nodes).all()


def test_maps_between_domains_are_in_the_order_of_the_given_edges() -> None:
    g = Graph(INDEX, TYPES, node_ptr=[0, 5, 6], num_nodes=6)
    assert list(g.map(EDGE, NODE, "src")) == list(INDEX[0])
    assert list(g.map(EDGE, EDGE_TYPE)) == list(TYPES)
    pair = g.map(EDGE, DST_PAIR)
    assert list(g.map(DST_PAIR, NODE)[pair]) == list(INDEX[1])
    assert list(g.map(DST_PAIR, EDGE_TYPE)[pair]) == list(TYPES)
    assert list(g.map(SRC_PAIR, NODE)[g.map(EDGE, SRC_PAIR)]) == list(INDEX[0])
    assert list(g.map(NODE, NODE_TYPE)) == [0] * 5 + [1]
    assert list(g.map(DST_PAIR, NODE_TYPE, "src")) == [0] * 4
    assert (g.rows(node_of(1)), g.rows(NONE)) == (1, 1)
    with pytest.raises(InputError, match="no map leads"):
        g.map(NODE, EDGE)


@pytest.mark.parametrize(("nodes", "edges", "types"), [(0, 0, 0), (1, 0, 0), (1, 3, 1), (4, 0, 7)])
def test_smallest_graphs(nodes: int, edges: int, types: int) -> None:
    g = Graph(np.zeros((2, edges), int), np.zeros(edges, int), num_nodes=nodes, num_edge_types=types).prepare()
    assert len(g.table("in_ptr")) == nodes + 1
    assert g.rows(SRC_PAIR) == g.rows(DST_PAIR) == min(edges, 1)


def test_types_of_ends_are_read_off_the_edges() -> None:
    g = Graph([[0, 3], [3, 0]], [0, 1], node_ptr=[0, 2, 4])
    assert g.table("edge_ends").tolist() == [[0, 1], [1, 0]]
    with pytest.raises(InputError, match="lead between different types of nodes"):
        Graph([[0, 3], [3, 0]], [0, 0], node_ptr=[0, 2, 4]).table("edge_ends")


def test_save_and_load(tmp_path: Path) -> None:
    g = Graph(INDEX, TYPES, node_names=["n"], edge_names=[("n", str(i), "n") for i in range(3)])
    g.save(tmp_path / "g.npz")
    back = Graph.load(tmp_path / "g.npz")
    assert back.same_as(g.edge_index, g.edge_type)
    assert (back.num_nodes, back.node_names, back.edge_names) == (g.num_nodes, g.node_names, g.edge_names)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04")
    for path in (tmp_path / "bad.npz", tmp_path / "none.npz"):
        with pytest.raises(InputError, match="is not a graph that planish saved"):
            Graph.load(path)
    np.savez(tmp_path / "p.npz", edge_index=np.array([{}], object))
    with pytest.raises(InputError, match="is not a graph"):
        Graph.load(tmp_path / "p.npz")


def test_from_networkx() -> None:
    multi = nx.MultiDiGraph()
    multi.add_node("b", kind=1)
    multi.add_node("a", kind=0)
    multi.add_edge("a", "b", type="r")
    multi.add_edge("a", "b", type="q")
    g = Graph.from_networkx(multi, node_type="kind")
    assert g.edge_index.tolist() == [[0, 0], [1, 1]]
    assert g.edge_type.tolist() == [1, 0]
    assert (g.num_node_types, g.num_edge_types) == (2, 2)
    plain = nx.Graph([(0, 1), (1, 1)])
    assert Graph.from_networkx(plain).edge_index.tolist() == [[0, 1, 1], [1, 1, 0]]
    plain.add_edge(0, 2, type=3)
    with pytest.raises(InputError, match="2 of 3 edges have no attribute 'type'"):
        Graph.from_networkx(plain)


def test_from_hetero_data() -> None:
    torch = pytest.importorskip("torch")
    HeteroData = pytest.importorskip("torch_geometric.data").HeteroData
    data = HeteroData()
    data["p"].x = torch.zeros(3, 2)
    data["q"].num_nodes = 2
    data["p", "to", "q"].edge_index = torch.tensor([[0, 2], [1, 0]])
    data["q", "by", "p"].edge_index = torch.tensor([[1], [2]])
    g = Graph.from_hetero_data(data)
    assert g.edge_index.tolist() == [[0, 2, 4], [4, 3, 2]]
    assert g.table("edge_ends").tolist() == [[0, 1], [1, 0]]
    assert g.edge_names == (("p", "to", "q"), ("q", "by", "p"))
    data["p", "to", "q"].edge_index = torch.tensor([[0, 3], [1, 0]])
    with pytest.raises(InputError, match="holds 3; there are 3 nodes of type 'p'"):
        Graph.from_hetero_data(data)
