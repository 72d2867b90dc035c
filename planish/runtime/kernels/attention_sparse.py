"""Flash attention over lists of key blocks, for CPUs, float32; see :mod:`.attention_task` for its inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.ir.ops.block_sparse_attention import layout_mask, log_sum_exp
from planish.ir.ops.flash_attention import attention, causal
from planish.runtime.kernels.attention import Operands, check_head, heads_of, hide_later
from planish.runtime.kernels.attention_task import Mask, Task, fixed
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, const, local, prim_func, script, size, store
from planish.runtime.kernels.template import Template

#: Vectors of queries in a task, and keys that it takes at a time, gathered side by side.
_VECTORS, _KEYS = 4, 64


@dataclass(frozen=True)
class BlockSparseFlashAttention(Template):
    """Attention where a block of queries sees the blocks of keys that a list names. Arguments, compact:

    - ``q``, ``k``, ``v`` as of :class:`.attention.FlashAttention`;
    - ``mask`` (batch or 1, 1, 1, keys or 1), bool, if `keys`: true where a key is seen;
    - ``indptr`` (layouts, query blocks + 1), int32, and ``indices`` (entries,), int32: block r of queries sees, in
      layout l, the blocks of keys ``indices[indptr[l, r] : indptr[l, r + 1]]``, in any order, each at most once;
    - ``head_layout`` (heads,), int32: the layout of each head of q;
    - ``entry_tile`` (entries,), int32, and ``tiles`` (number, block_size, block_size), bool, if `tiles`: of an entry
      with a tile t >= 0 the query at i sees the key at j where ``tiles[t, j % block_size, i % block_size]`` is true;
    - ``scale`` (1,), float32;
    - ``offset`` (1,), int64: the position of the first query, past keys that lie in a cache; blocks of queries are
      those of positions;
    - ``y`` as q, out;
    - ``lse`` (batch, heads, queries), out, if `lse`: log Σ exp(score), -inf for a query that sees no key.

    A query that sees no key gives zeros; so does one whose position has no row in the layout.

    Attributes:
        head_size: size of a head of q, k and v.
        causal: keys after the query's position are hidden, in the blocks of the list.
        block_size: queries and keys in a block: 16 or a multiple.
        keys, tiles, lse: see the arguments.
    """

    head_size: int
    causal: bool = False
    block_size: int = 64
    keys: bool = False
    tiles: bool = False
    lse: bool = False

    def __post_init__(self) -> None:
        check_head(self.head_size)
        if self.block_size < 16 or self.block_size % 16:
            raise ValueError(f"block_size is {self.block_size}; it must be a multiple of 16")

    @property
    def symbol(self) -> str:
        more = "_keys" * self.keys + "_tiles" * self.tiles + "_lse" * self.lse
        return f"block_sparse_attention_f32_d{self.head_size}_b{self.block_size}{'_causal' * self.causal}{more}"

    def build(self, cpu: Cpu) -> Any:
        T, lanes = script(), cpu.lanes
        most = min(_VECTORS * lanes, self.block_size)
        while self.block_size % most:
            most -= lanes
        parts, room = self.block_size // most, max(_KEYS, self.block_size)
        with prim_func(self.symbol) as built:
            at = Operands(self.head_size)
            lists = _Lists(self, at)
            scale, offset = argument("scale", (1,)), argument("offset", (1,), "int64")
            at.close(self.lse)
            shift = T.Bind(offset[0] // most)
            tasks = T.Bind((offset[0] + at.length + most - 1) // most - shift)
            with T.parallel(at.batch * at.heads * tasks) as t:
                part = fixed(t % tasks + shift)
                head, b = fixed(t // tasks % at.heads), fixed(t // tasks // at.heads)
                first = fixed(T.max(part * most - offset[0], 0))
                rows = fixed(T.min(part * most + most - offset[0], at.length) - first)
                at.place(head, b, first, rows, lanes)
                task = Task(cpu, self.head_size, most, room)
                at.start(task, scale)
                _Keys(self, at, lists, task, offset).attend(fixed(part // parts))
                at.finish(task)
        return built[0]

    def reference(self, *arguments: np.ndarray) -> np.ndarray | tuple[np.ndarray, ...]:
        q, k, v, *rest = arguments
        mask = rest.pop(0) if self.keys else np.ones((1, 1, 1, 1), bool)
        indptr, indices, head_layout, *rest = rest
        tiles = (rest.pop(0), rest.pop(0)) if self.tiles else None
        scale, first = float(rest[0][0]), int(rest[1][0])
        queries, keys = q.shape[1], k.shape[1]
        seen = layout_mask(indptr, indices, self.block_size, queries, keys, first, tiles)
        if self.causal:
            seen &= causal(queries, keys, first)
        by_head, heads = seen[head_layout] & mask, heads_of(q, k, self.head_size)
        y = attention((q, k, v), heads, scale, by_head)
        return (y, log_sum_exp(q, k, heads, scale, by_head)) if self.lse else y


class _Lists:
    """The arguments between v and scale."""

    def __init__(self, template: BlockSparseFlashAttention, at: Operands) -> None:
        layouts, ends, entries = size(), size(), size()
        block = template.block_size
        self.mask = argument("mask", (size(), 1, 1, size()), "bool") if template.keys else None
        self.indptr, self.indices = (
            argument("indptr", (layouts, ends), "int32"),
            argument("indices", (entries,), "int32"),
        )
        self.layout_of = argument("head_layout", (at.heads,), "int32")
        self.entry_tile = argument("entry_tile", (entries,), "int32") if template.tiles else None
        self.tiles = argument("tiles", (size(), block, block), "bool") if template.tiles else None


class _Keys:
    """Takes the keys of a task's lists in, several blocks at a time, side by side, wherever they come from."""

    def __init__(
        self, template: BlockSparseFlashAttention, at: Operands, lists: _Lists, task: Task, offset: Any
    ) -> None:
        self.template, self.at, self.lists, self.task, self.offset = template, at, lists, task, offset
        T, room = script(), (task.keys + task.slack,)
        #: Keys gathered, the last position among them, and how many have a tile.
        self.state = local(3, dtype="int64")
        self.where = T.alloc_buffer(room, "int64", scope="global") if template.causal else None
        #: Of each gathered key where its row of a tile starts; -1 if all queries see it.
        self.row = T.alloc_buffer(room, "int64", scope="global") if template.tiles else None

    def attend(self, row: Any) -> None:
        T, at, task, block = script(), self.at, self.task, self.template.block_size
        begin, end = self._limits(row)
        seen = at.keys
        if self.template.causal:
            seen = T.min(at.keys, at.first + at.rows + self.offset[0])
        seen = fixed(seen)
        step = max(_KEYS // block, 1)
        with T.serial(T.max((end - begin + step - 1) // step, 0)) as p:
            for i in range(3):
                store(self.state, T.int64(0), i)
            with T.serial(T.min(step, end - begin - p * step)) as i:
                entry = fixed(begin + p * step + i)
                key = fixed(T.Cast("int64", self.lists.indices[entry]) * block)
                n = fixed(T.min(block, seen - key))
                with T.If(T.And(n > 0, key >= 0)), T.Then():
                    self._gather(entry, key, n)
            total = fixed(self.state[0])
            with T.If(total > 0), T.Then():
                task.attend(at.rows, at.vectors, total, self._mask(total))

    def _limits(self, row: Any) -> tuple[Any, Any]:
        """The first entry of the row's list, and the one past its last."""
        T, lists = script(), self.lists
        layouts, ends = lists.indptr.shape
        layout = T.Cast("int64", lists.layout_of[self.at.head])
        inside = T.And(T.And(row >= 0, row + 1 < ends), T.And(layout >= 0, layout < layouts))
        limits = local(2, dtype="int64")
        for i in range(2):
            store(limits, T.int64(0), i)
        with T.If(inside), T.Then():
            for i in range(2):
                found = T.Cast("int64", lists.indptr[layout, row + i])
                store(limits, T.min(T.max(found, 0), lists.indices.shape[0]), i)
        return fixed(limits[0]), fixed(limits[1])

    def _gather(self, entry: Any, key: Any, n: Any) -> None:
        from tvm import tirx

        T, state, lists = script(), self.state, self.lists
        tile: Any = None
        if lists.entry_tile is not None:
            tile = fixed(T.Cast("int64", lists.entry_tile[entry]))
            with T.If(tile >= 0), T.Then():
                store(state, state[2] + 1, 2)

        def note(into: Any, at_key: Any) -> None:
            if self.where is not None:
                store(self.where, at_key, into)
            if self.row is not None:
                block = self.template.block_size
                start = (tile * block + at_key - key) * block
                store(self.row, tirx.Select(tile >= 0, start, T.int64(-1)), into)

        if lists.mask is None:
            into = fixed(state[0])
            self.at.gather(self.task, into, key, n)
            if self.where is not None or self.row is not None:
                with T.serial(n) as r:
                    note(into + r, key + r)
            store(state, into + n, 0)
        else:
            # Only those that are seen: padding costs nothing.
            batch, column = (tirx.Select(lists.mask.shape[i] == 1, T.int64(0), T.int64(1)) for i in (0, 3))
            with T.serial(n) as r, T.If(lists.mask[self.at.b * batch, 0, 0, (key + r) * column]), T.Then():
                into = fixed(state[0])
                self.at.gather(self.task, into, key + r, T.int64(1))
                note(into, key + r)
                store(state, into + 1, 0)
        store(state, T.max(state[1], key + n - 1), 1)

    def _mask(self, total: Any) -> Mask:
        T, at, lanes = script(), self.at, self.task.lanes

        def hide(row: Any, query: Any, acc: Any, shape: tuple[int, int]) -> None:
            if self.where is not None:
                where = self.where
                crosses = self.state[1] > at.first + self.offset[0]
                hide_later(crosses, lambda r: where[r], self.offset, at, row, query, acc, shape, total, lanes)
            if self.row is not None:
                with T.If(self.state[2] > 0), T.Then():
                    self._hide_by_tile(row, query, acc, shape, total)

        return hide

    def _hide_by_tile(self, row: Any, query: Any, acc: Any, shape: tuple[int, int], total: Any) -> None:
        from tvm import tirx

        T, at, lanes, block = script(), self.at, self.task.lanes, self.template.block_size
        inside = fixed((at.first + self.offset[0]) % block + query)
        flat: Any = self.lists.tiles
        rows: Any = self.row
        for r in range(shape[0]):
            start = fixed(rows[T.min(row + r, total - 1)])
            with T.If(start >= 0), T.Then():
                tile, line = fixed(start // (block * block)), fixed(start // block % block)
                with T.unroll(shape[1]) as c:

                    def select(last: Any, c: Any = c, r: int = r, tile: Any = tile, line: Any = line) -> None:
                        with T.vectorized(lanes) as j:
                            i = inside + c * lanes + j
                            sees = flat[tile, line, i if last is None else T.min(i, last)]
                            store(acc, tirx.Select(sees, acc[r, c, j], const(float("-inf"))), r, c, j)

                    # A vector reaches past the block only where the last queries of a task do.
                    with T.If(inside + (c + 1) * lanes <= block):
                        with T.Then():
                            select(None)
                        with T.Else():
                            select(block - 1)
