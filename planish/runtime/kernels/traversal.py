"""Traversal of a graph by destination rows: gather along incoming edges, elementwise work, and reduction in one kernel.

The traversal template of Hector (Wu, Hidayetoğlu et al. 2023, arXiv:2301.06284). Edges are sorted by destination (CSR),
each row is reduced by one thread and in the order of its edges: no atomic operations, and the same bits in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from planish.runtime.kernels import tir_math
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, blocks, const, each_lane, local, prim_func, script, size, store
from planish.runtime.kernels.template import Template

_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class _Edges(Template):
    """What traversals share. float32 with int64 indices, compact; E edges in the order of their destinations:

    - ``indptr`` (N + 1,): edges of row v are ``indptr[v]:indptr[v + 1]``;
    - ``rows`` (E,): the row of x that an edge reads: its source, or the row of x in which compact materialization has
      the value of (source, edge type);
    - ``edges`` (E,), if `indirect`: the number of each edge; then `rows` and what else belongs to edges are indexed by
      that number, and may be in any order (sorted by type, say).

    Indices must be valid: nothing checks them here.

    Attributes:
        indirect: edges are numbered.
    """

    indirect: bool = False

    def _indices(self) -> tuple[Any, Any, Any, Any]:
        """indptr, rows, the numbers of edges or None, and the symbol E of arrays by edge."""
        count, known = size(), size()
        indptr = argument("indptr", (size(),), "int64")
        rows = argument("rows", (known,), "int64")
        edges = argument("edges", (count,), "int64") if self.indirect else None
        return indptr, rows, edges, known

    def _reference_rows(
        self, arguments: tuple[np.ndarray, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Any]]:
        """(destination of each edge, its number, its row of x, other arguments), edges by destination."""
        indptr, rows, *rest = arguments
        numbers = rest.pop(0) if self.indirect else np.arange(indptr[-1])
        destination = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        return destination, numbers, rows[numbers], rest


@dataclass(frozen=True)
class Aggregate(_Edges):
    """``y[v] = reduce over edges e into v of c_e x[rows[e]] + z_e``; 0 for a row without edges. More arguments:

    - ``x`` (M, H, F): H heads of F features;
    - ``scale`` (E,) or (E, H), if `scale` is ``"edge"`` or ``"head"``;
    - ``addend`` (E, H, F), if `addend`: z;
    - ``y`` (N, H, F), out.

    Attributes:
        reduce: ``"sum"``, ``"mean"`` or ``"max"``.
        scale: a factor for each edge, or for each edge and head, or None.
        addend: something of each edge is added.
    """

    reduce: Literal["sum", "mean", "max"] = "sum"
    scale: Literal["edge", "head"] | None = None
    addend: bool = False

    @property
    def symbol(self) -> str:
        scale = f"_scale_{self.scale}" if self.scale else ""
        return f"aggregate_{self.reduce}_f32{scale}{'_add' * self.addend}{'_indirect' * self.indirect}"

    def build(self, cpu: Cpu) -> Any:
        T = script()
        with prim_func(self.symbol) as built:
            indptr, rows, edges, count = self._indices()
            heads, features = size(), size()
            x = argument("x", (size(), heads, features))
            by_head = (count, heads) if self.scale == "head" else (count,)
            scale = argument("scale", by_head) if self.scale else None
            addend = argument("addend", (count, heads, features)) if self.addend else None
            y = argument("y", (size(), heads, features))

            def message(e: Any, row: Any, h: Any, column: Any) -> Any:
                value = x[row, h, column]
                if scale is not None:
                    value = value * (scale[e, h] if self.scale == "head" else scale[e])
                return value if addend is None else value + addend[e, h, column]

            with T.parallel(y.shape[0]) as v, T.serial(heads) as h:
                begin, end = T.bind(indptr[v]), T.bind(indptr[v + 1])
                block = _Reduction(begin, end, rows, edges, self.reduce, message, y, v, h)
                blocks(cpu, features, block.emit)
        return built[0]

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        destination, numbers, rows, (x, *rest) = self._reference_rows(arguments)
        value = np.asarray(x, np.float64)[rows]
        if self.scale:
            factor = np.asarray(rest.pop(0), np.float64)[numbers]
            value = value * (factor[:, :, None] if self.scale == "head" else factor[:, None, None])
        if self.addend:
            value = value + rest.pop(0)[numbers]
        counts = np.diff(arguments[0]).reshape(-1, 1, 1)
        if self.reduce == "max":
            y = np.full((len(counts), *x.shape[1:]), -np.inf)
            np.maximum.at(y, destination, value)
            return np.where(counts > 0, y, 0.0)
        y = np.zeros((len(counts), *x.shape[1:]))
        np.add.at(y, destination, value)
        return y / np.maximum(counts, 1) if self.reduce == "mean" else y


@dataclass(frozen=True)
class _Reduction:
    """Emits the reduction over the edges of one row, for a block of features of one head."""

    begin: Any
    end: Any
    rows: Any
    edges: Any
    reduce: str
    message: Callable[[Any, Any, Any, Any], Any]
    y: Any
    v: Any
    h: Any

    def emit(self, first: Any, vectors: int, lanes: int) -> None:
        T = script()
        sums = [local(lanes) for _ in range(vectors)]
        _fill(sums, lanes, -math.inf if self.reduce == "max" else 0.0)
        with T.serial(self.end - self.begin) as p:
            e = T.bind(self.begin + p if self.edges is None else self.edges[self.begin + p])
            row = T.bind(self.rows[e])
            for i, buffer in enumerate(sums):

                def add(j: Any, buffer: Any = buffer, i: int = i) -> None:
                    value = self.message(e, row, self.h, first + i * lanes + j)
                    store(buffer, T.max(buffer[j], value) if self.reduce == "max" else buffer[j] + value, j)

                each_lane(lanes, add)
        finish: Callable[[Any], Any] = lambda value: value  # noqa: E731
        if self.reduce == "mean":
            factor = T.bind(const(1.0) / T.Cast("float32", T.max(self.end - self.begin, T.int64(1))))
            finish = lambda value: value * factor  # noqa: E731
        elif self.reduce == "max":
            some = T.bind(self.end > self.begin)
            finish = lambda value: T.if_then_else(some, value, const(0.0))  # noqa: E731
        _write(sums, lanes, first, self.y, self.v, self.h, finish)


@dataclass(frozen=True)
class EdgeSoftmax(_Edges):
    """``y[v] = sum over edges e into v of a_e x[rows[e]]``, a the softmax of the logits of the edges into v, by head.

    The softmax is that of graph attention networks (Veličković et al. 2018, arXiv:1710.10903). The largest logit of a
    row is found first, so exp does not overflow; then weights, their sum and the weighted rows are accumulated in one
    pass over x, and nothing is stored for an edge. A row without edges, or whose logits are all -inf, is 0. More
    arguments:

    - ``logits`` (E, H);
    - ``slope`` (1,), if `leaky`;
    - ``x`` (M, H, F);
    - ``y`` (N, H, F), out.

    Attributes:
        leaky: logits are ``leaky_relu(logits, slope)``; the slope is at most 1.
    """

    leaky: bool = False

    @property
    def symbol(self) -> str:
        return f"edge_softmax_f32{'_leaky' * self.leaky}{'_indirect' * self.indirect}"

    def build(self, cpu: Cpu) -> Any:
        T = script()
        with prim_func(self.symbol) as built:
            indptr, rows, edges, count = self._indices()
            heads, features = size(), size()
            logits = argument("logits", (count, heads))
            slope = argument("slope", (1,)) if self.leaky else None
            x = argument("x", (size(), heads, features))
            y = argument("y", (size(), heads, features))

            def logit(e: Any, h: Any) -> Any:
                value = logits[e, h]
                return value if slope is None else T.max(value, value * slope[0])

            with T.parallel(y.shape[0]) as v, T.serial(heads) as h:
                begin, end = T.bind(indptr[v]), T.bind(indptr[v + 1])
                most = local()
                store(most, const(_LOWEST), 0)
                with T.serial(end - begin) as p:
                    e = T.bind(begin + p if edges is None else edges[begin + p])
                    store(most, T.max(most[0], logit(e, h)), 0)
                block = _WeightedSum(begin, end, rows, edges, logit, most, x, y, v, h)
                blocks(cpu, features, block.emit)
        return built[0]

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        destination, numbers, rows, (logits, *rest, x) = self._reference_rows(arguments)
        score = np.asarray(logits, np.float64)[numbers]
        if self.leaky:
            score = np.where(score > 0, score, score * np.float64(rest[0][0]))
        count, heads = len(arguments[0]) - 1, x.shape[1]
        most = np.full((count, heads), _LOWEST, np.float64)
        np.maximum.at(most, destination, score)
        weight = np.exp(score - most[destination])
        total = np.zeros((count, heads))
        np.add.at(total, destination, weight)
        y = np.zeros((count, *x.shape[1:]))
        np.add.at(y, destination, weight[:, :, None] * np.asarray(x, np.float64)[rows])
        return y / np.where(total > 0, total, 1.0)[:, :, None]


@dataclass(frozen=True)
class _WeightedSum:
    """Emits the weighted sum over the edges of one row, for a block of features of one head."""

    begin: Any
    end: Any
    rows: Any
    edges: Any
    logit: Callable[[Any, Any], Any]
    most: Any
    x: Any
    y: Any
    v: Any
    h: Any

    def emit(self, first: Any, vectors: int, lanes: int) -> None:
        T = script()
        sums, total = [local(lanes) for _ in range(vectors)], local()
        _fill(sums, lanes, 0.0)
        store(total, const(0.0), 0)
        with T.serial(self.end - self.begin) as p:
            e = T.bind(self.begin + p if self.edges is None else self.edges[self.begin + p])
            row = T.bind(self.rows[e])
            weight = T.bind(tir_math.exp(self.logit(e, self.h) - self.most[0]))
            store(total, total[0] + weight, 0)
            for i, buffer in enumerate(sums):

                def add(j: Any, buffer: Any = buffer, i: int = i) -> None:
                    store(buffer, buffer[j] + weight * self.x[row, self.h, first + i * lanes + j], j)

                each_lane(lanes, add)
        # No edge, or weights that are all 0, leaves sums of 0.
        factor = T.bind(const(1.0) / T.Select(total[0] > const(0.0), total[0], const(1.0)))
        _write(sums, lanes, first, self.y, self.v, self.h, lambda value: value * factor)


def _fill(vectors: list[Any], lanes: int, value: float) -> None:
    for buffer in vectors:
        each_lane(lanes, partial(store, buffer, const(value)))


def _write(vectors: list[Any], lanes: int, first: Any, y: Any, v: Any, h: Any, finish: Callable[[Any], Any]) -> None:
    for i, buffer in enumerate(vectors):

        def write(j: Any, buffer: Any = buffer, start: int = i * lanes) -> None:
            store(y, finish(buffer[j]), v, h, first + start + j)

        each_lane(lanes, write)
