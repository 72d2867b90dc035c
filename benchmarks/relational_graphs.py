"""Random graphs with the node, edge and type counts, and the skew, of the data sets of relational graph networks.

The sets themselves can not be downloaded by a benchmark; what decides a kernel's time is how many edges each type has,
how often a node is an end, and how many types there are. The RDF sets (aifb, mutag, bgs, am) and FB15k-237 hold every
edge in both directions, each direction a type of its own. Counts: Schlichtkrull et al. 2018 (arXiv:1703.06103) and
DGL's documentation for the RDF sets, Toutanova and Chen 2015 for FB15k-237, Hu et al. 2020 (arXiv:2005.00687) for
ogbn-mag.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    """Counts of a data set.

    Attributes:
        nodes, edges: of the whole graph, inverse edges included.
        node_types, edge_types: an edge type is a relation between one type of source and one of destination.
        inverse: whether the second half of the edge types inverts the first.
        type_skew: edges of the type of rank k are in proportion to k ** -type_skew.
        hub_skew: likewise for how often a node is the object (the destination of an edge that is no inverse).
        known: node counts by type, and (source type, destination type, edges) by edge type, where they are published.
    """

    name: str
    nodes: int
    edges: int
    node_types: int
    edge_types: int
    inverse: bool = True
    type_skew: float = 1.1
    hub_skew: float = 0.75
    known: tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]] | None = None


_MAG = (
    (736_389, 1_134_649, 8_740, 59_965),  # paper, author, institution, field of study
    ((1, 2, 1_043_998), (1, 0, 7_145_660), (0, 0, 5_416_271), (0, 3, 7_505_078)),
)
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("aifb", 7_262, 48_810, 7, 104),
        Shape("mutag", 27_163, 148_100, 5, 50),
        Shape("bgs", 94_806, 672_884, 27, 122),
        Shape("am", 881_680, 5_668_682, 7, 108),
        Shape("fb15k-237", 14_541, 620_232, 1, 474, hub_skew=0.6),
        Shape("ogbn-mag", 1_939_743, 21_111_007, 4, 4, inverse=False, hub_skew=0.6, known=_MAG),
    )
}
#: What the full table scales the large ones by, so that the hand-written torch version fits into memory and time.
SCALES = {"am": 0.25, "ogbn-mag": 0.05}


@dataclass(frozen=True)
class Typed:
    """A graph: nodes of one type are consecutive, edges are in random order.

    Attributes:
        node_ptr: (node types + 1,) int64; nodes of type t are node_ptr[t] … node_ptr[t + 1] - 1.
        edge_index: (2, edges) int64, source and destination.
        edge_type: (edges,) int64.
        ends: (edge types, 2): the type of the source and of the destination of each edge type.
    """

    name: str
    node_ptr: np.ndarray
    edge_index: np.ndarray
    edge_type: np.ndarray
    ends: np.ndarray

    @property
    def nodes(self) -> int:
        return int(self.node_ptr[-1])

    @property
    def edges(self) -> int:
        return int(self.edge_type.size)

    @property
    def edge_types(self) -> int:
        return len(self.ends)

    @property
    def compaction(self) -> tuple[float, float]:
        """Distinct pairs of (source, edge type), and of (destination, edge type), over edges."""
        source, destination = (np.unique(ends + self.nodes * self.edge_type).size for ends in self.edge_index)
        return source / self.edges, destination / self.edges


def generate(name: str, scale: float | None = None, seed: int = 0) -> Typed:
    """A random graph of the shape `name`, with `scale` times its nodes and edges (None: as :data:`SCALES` says)."""
    shape = SHAPES[name]
    scale = SCALES.get(name, 1.0) if scale is None else scale
    random = np.random.default_rng(seed)
    if shape.known is None:
        counts = _split(round(shape.nodes * scale), shape.node_types, 1.0)
        triples = _edge_types(shape, round(shape.edges * scale), counts, random)
    else:
        counts = np.array([max(1, round(n * scale)) for n in shape.known[0]])
        triples = [(a, b, max(1, round(n * scale))) for a, b, n in shape.known[1]]
    node_ptr = np.concatenate([[0], np.cumsum(counts)])
    popular = [random.permutation(int(n)) for n in counts]
    parts: list[np.ndarray] = []
    half = len(triples) // 2 if shape.inverse else len(triples)
    for subject, obj, number in triples[:half]:
        source = random.integers(0, counts[subject], number) + node_ptr[subject]
        ranks = _zipf(int(counts[obj]), number, shape.hub_skew, random)
        parts.append(np.stack([source, popular[obj][ranks] + node_ptr[obj]]))
    if shape.inverse:
        parts += [part[::-1] for part in parts]
    types = np.repeat(np.arange(len(parts)), [part.shape[1] for part in parts])
    order = random.permutation(types.size)
    index = np.ascontiguousarray(np.concatenate(parts, axis=1)[:, order])
    ends = np.array([(a, b) for a, b, _ in triples])
    return Typed(name, node_ptr, index, np.ascontiguousarray(types[order]), ends)


def _edge_types(
    shape: Shape, edges: int, counts: np.ndarray, random: np.random.Generator
) -> list[tuple[int, int, int]]:
    forward = shape.edge_types // 2
    numbers = _split(edges // 2, forward, shape.type_skew)
    # A larger type of nodes is an end of more types of edges.
    share = np.sqrt(counts) / np.sqrt(counts).sum()
    ends = random.choice(len(counts), (forward, 2), p=share)
    triples = [(int(a), int(b), int(n)) for (a, b), n in zip(ends, numbers, strict=True)]
    return triples + [(b, a, n) for a, b, n in triples]


def _split(total: int, parts: int, skew: float) -> np.ndarray:
    """`total` in `parts` of at least 1, in proportion to rank ** -skew."""
    weights = np.arange(1, parts + 1) ** -skew
    sizes = 1 + np.floor((total - parts) * weights / weights.sum()).astype(np.int64)
    sizes[0] += total - sizes.sum()
    return sizes


def _zipf(size: int, number: int, skew: float, random: np.random.Generator) -> np.ndarray:
    """`number` ranks below `size`, rank k in proportion to (k + 1) ** -skew (skew below 1), by the inverse integral."""
    ranks = size * random.random(number) ** (1 / (1 - skew))
    return np.minimum(ranks.astype(np.int64), size - 1)
