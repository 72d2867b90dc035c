"""Flash attention over a sliding window, for CPUs, float32; see :mod:`.attention_task` for its inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.ir.ops.block_sparse_attention import log_sum_exp
from planish.ir.ops.flash_attention import attention
from planish.ir.ops.window_attention import window_mask
from planish.runtime.kernels.attention import Operands, add_mask, check_head, heads_of
from planish.runtime.kernels.attention_task import Task, fixed
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, const, prim_func, script, size, store
from planish.runtime.kernels.template import Template

#: Vectors of queries in a task: many, or few where the window is shorter than `_WIDE`, since the tasks of all its
#: queries share one range of keys; and keys that it takes at a time.
_VECTORS, _FEW, _WIDE, _KEYS = 8, 4, 768, 64
LEFT, RIGHT, GLOBAL_KEYS, GLOBAL_QUERIES, CAUSAL = range(5)
#: A side of a window without a limit.
UNLIMITED = 1 << 40


@dataclass(frozen=True)
class WindowFlashAttention(Template):
    """Attention to the keys around each query; see :mod:`planish.ir.ops.window_attention`. Arguments, compact:

    - ``q``, ``k``, ``v`` as of :class:`.attention.FlashAttention`;
    - ``mask`` (batch or 1, 1, 1, keys or 1), bool, if `keys`: true where a key is seen;
    - ``scale`` (1,), float32;
    - ``offset`` (1,), int64: the position of the first query, past keys that lie in a cache;
    - ``window`` (5,), int64: left, right (:data:`UNLIMITED`: no limit), global keys, global queries, causal (0 or 1);
    - ``y`` as q, out;
    - ``lse`` (batch, heads, queries), out, if `lse`: log Σ exp(score), -inf for a query that sees no key.

    Keys that no query of a task sees are neither read nor computed.

    Attributes:
        head_size: size of a head of q, k and v.
        keys, lse: see the arguments.
    """

    head_size: int
    keys: bool = False
    lse: bool = False

    def __post_init__(self) -> None:
        check_head(self.head_size)

    @property
    def symbol(self) -> str:
        return f"window_attention_f32_d{self.head_size}{'_keys' * self.keys}{'_lse' * self.lse}"

    def build(self, cpu: Cpu) -> Any:
        from tvm import tirx

        T, lanes = script(), cpu.lanes
        with prim_func(self.symbol) as built:
            at = Operands(self.head_size)
            mask = argument("mask", (size(), 1, 1, size()), "bool") if self.keys else None
            scale, offset = argument("scale", (1,)), argument("offset", (1,), "int64")
            window = argument("window", (5,), "int64")
            at.close(self.lse)
            wide = window[LEFT] + tirx.Select(window[CAUSAL] != 0, T.int64(0), window[RIGHT]) >= _WIDE
            most = fixed(tirx.Select(wide, T.int64(_VECTORS * lanes), T.int64(_FEW * lanes)))
            # Blocks of about equal height, in whole vectors.
            count = T.max((at.length + most - 1) // most, 1)
            even = ((at.length + count - 1) // count + lanes - 1) // lanes * lanes
            height = T.Bind(T.max(even, lanes))
            blocks = T.Bind((at.length + height - 1) // height)
            with T.parallel(at.batch * at.heads * blocks) as t:
                first = fixed(t % blocks * height)
                rows = fixed(T.min(height, at.length - first))
                at.place(fixed(t // blocks % at.heads), fixed(t // blocks // at.heads), first, rows, lanes)
                task = Task(cpu, self.head_size, _VECTORS * lanes, _KEYS)
                at.start(task, scale)
                _Window(task, at, mask, offset, window).attend()
                at.finish(task)
        return built[0]

    def reference(self, *arguments: np.ndarray) -> np.ndarray | tuple[np.ndarray, ...]:
        q, k, v, *rest = arguments
        mask = rest.pop(0) if self.keys else np.ones((1, 1, 1, 1), bool)
        scale, (first,), window = float(rest[0][0]), rest[1], [int(n) for n in rest[2]]
        # The positions of the queries end before the keys do, or after.
        whole = window_mask(int(first) + q.shape[1], int(first) + q.shape[1], *window)[int(first) :]
        missing = max(k.shape[1] - whole.shape[1], 0)
        if missing:
            longer = window_mask(whole.shape[1] + missing, whole.shape[1] + missing, *window)
            whole = longer[int(first) : int(first) + q.shape[1]]
        seen, heads = whole[None, None, :, : k.shape[1]] & mask, heads_of(q, k, self.head_size)
        y = attention((q, k, v), heads, scale, seen)
        return (y, log_sum_exp(q, k, heads, scale, seen)) if self.lse else y


class _Window:
    """Takes the keys of a task in: those that all see, then the range around its queries."""

    def __init__(self, task: Task, at: Operands, mask: Any, offset: Any, window: Any) -> None:
        from tvm import tirx

        T = script()
        self.task, self.at, self.mask = task, at, mask
        self.left, self.right, self.globals, self.readers = (fixed(window[i]) for i in range(4))
        self.causal = window[CAUSAL] != 0
        #: Positions of the task's first query, and past its last one.
        self.start = fixed(at.first + offset[0])
        self.stop = fixed(self.start + at.rows)
        reads_all = self.start < self.readers
        last = fixed(tirx.Select(self.causal, T.min(self.stop, at.keys), at.keys))
        self.last = last
        self.low = fixed(tirx.Select(reads_all, T.int64(0), T.min(T.max(self.start - self.left, 0), last)))
        self.high = fixed(tirx.Select(reads_all, last, T.min(T.max(self.stop + self.right, 0), last)))
        simple = T.And(self.globals == 0, self.readers == 0)
        #: A query at position i sees no key after i + reach.
        far = tirx.Select(simple, self.right, T.int64(UNLIMITED))
        self.reach = fixed(tirx.Select(self.causal, T.int64(0), far))
        #: Global keys before the range.
        self.before = fixed(T.min(T.min(self.globals, self.low), last))

    def attend(self) -> None:
        from tvm import tirx

        T, at, task = script(), self.at, self.task
        early = fixed((self.before + _KEYS - 1) // _KEYS)
        near = fixed((T.max(self.high - self.low, 0) + _KEYS - 1) // _KEYS)
        # Global keys after the range, where nothing is causal.
        behind = fixed(T.max(T.min(self.globals, self.last) - T.max(self.high, self.before), 0))
        late = fixed((behind + _KEYS - 1) // _KEYS)
        with T.serial(early + near + late) as p:
            first, middle = p < early, p < early + near
            key = fixed(
                tirx.Select(
                    first,
                    p * _KEYS,
                    tirx.Select(
                        middle,
                        self.low + (p - early) * _KEYS,
                        T.max(self.high, self.before) + (p - early - near) * _KEYS,
                    ),
                )
            )
            end = tirx.Select(first, self.before, tirx.Select(middle, self.high, T.min(self.globals, self.last)))
            n = fixed(T.min(_KEYS, end - key))
            at.gather(task, T.int64(0), key, n)

            def hide(row: Any, query: Any, acc: Any, shape: tuple[int, int], key: Any = key, n: Any = n) -> None:
                if self.mask is not None:
                    add_mask(self.mask, at, key + row, query, acc, shape, task.lanes)
                self._hide(key, n, row, query, acc, shape)

            def needed(queries: Any, key: Any = key, n: Any = n) -> Any:
                return T.min(n, T.max(self.start + queries + self.reach - key, 0))

            task.attend(at.rows, at.vectors, n, hide, needed)

    def _hide(self, key: Any, n: Any, row: Any, query: Any, acc: Any, shape: tuple[int, int]) -> None:
        from tvm import tirx

        T, lanes = script(), self.task.lanes
        crosses = T.Or(key + n > self.start + 1 + self.right, key < self.stop - 1 - self.left)
        crosses = T.Or(crosses, T.And(self.causal, key + n > self.start + 1))
        with T.If(crosses), T.Then(), T.unroll(shape[0]) as r, T.unroll(shape[1]) as c, T.vectorized(lanes) as j:
            here, place = key + row + r, self.start + query + c * lanes + j
            inside = T.And(here >= place - self.left, here <= place + self.right)
            sees = T.Or(inside, T.Or(here < self.globals, place < self.readers))
            sees = T.And(sees, T.Or(tirx.Not(self.causal), here <= place))
            store(acc, tirx.Select(sees, acc[r, c, j], const(float("-inf"))), r, c, j)
