"""Dense flash attention for CPUs, float32; see :mod:`.attention_task` for its inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.ir.ops.flash_attention import attention, causal
from planish.runtime.kernels.attention_task import LOG2E, Task, fixed
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, const, prim_func, script, size, store
from planish.runtime.kernels.template import Template

MASKS = ("none", "float", "bool")
#: Vectors of queries in a task, and keys that it takes at a time: the softmax is rescaled once for so many.
_VECTORS, _KEYS = 8, 64


class Operands:
    """The arguments that all kinds have, and the place of the task in them."""

    def __init__(self, head_size: int) -> None:
        self.d = head_size
        self.batch, self.length, self.width, self.keys, self.narrow = size(), size(), size(), size(), size()
        self.q = argument("q", (self.batch, self.length, self.width))
        self.k = argument("k", (self.batch, self.keys, self.narrow))
        self.v = argument("v", (self.batch, self.keys, self.narrow))
        self.heads = self.width // head_size

    def close(self, lse: bool = False) -> None:
        self.y = argument("y", (self.batch, self.length, self.width))
        self.lse = argument("lse", (self.batch, self.heads, self.length)) if lse else None

    def place(self, head: Any, batch: Any, first: Any, rows: Any, lanes: int) -> None:
        """The task: `rows` queries of a head from `first` on."""
        T = script()
        self.head, self.b, self.first, self.rows = head, batch, first, rows
        self.kv = fixed(head // (self.heads // T.max(self.narrow // self.d, 1)))
        self.vectors = fixed((rows + lanes - 1) // lanes)

    def start(self, task: Task, scale: Any) -> None:
        T = script()
        factor = T.Bind(scale[0] * const(LOG2E))

        def load(row: Any, d: Any) -> Any:
            last = T.min(self.first + row, self.length - 1)
            return self.q[self.b, last, self.head * self.d + d] * factor

        task.start(self.vectors, load)

    def gather(self, task: Task, into: Any, at: Any, count: Any) -> None:
        """`count` keys and values from key `at` on."""
        task.gather(
            into,
            count,
            lambda r, d: self.k[self.b, at + r, self.kv * self.d + d],
            lambda r, d: self.v[self.b, at + r, self.kv * self.d + d],
        )

    def finish(self, task: Task) -> None:
        def write(row: Any, d: Any, value: Any) -> None:
            store(self.y, value, self.b, self.first + row, self.head * self.d + d)

        task.finish(self.rows, write)
        if self.lse is not None:
            task.log_sums(self.rows, lambda row, value: store(self.lse, value, self.b, self.head, self.first + row))


@dataclass(frozen=True)
class FlashAttention(Template):
    """softmax(scale · q kᵀ + mask) v by heads, with heads side by side as a graph has them. Arguments, compact:

    - ``q`` (batch, queries, heads · head_size), float32;
    - ``k``, ``v`` (batch, keys, kv heads · head_size), float32; heads is a multiple of kv heads;
    - ``mask`` (batch or 1, heads or 1, queries or 1, keys or 1), if there is one: float32, added to the scaled scores,
      or bool, true where a key is seen;
    - ``scale`` (1,), float32;
    - ``offset`` (1,), int64, if `causal`: query i sees keys 0 … i + offset. In ONNX's Attention that is the length of
      the past, 0 without one, however many keys there are;
    - ``y`` as q, out.

    A query that sees no key gives zeros, as ONNX's Attention says; a float mask hides a key by -inf or by the lowest
    float32 (by anything below -2.3e38).

    Attributes:
        head_size: size of a head of q, k and v.
        causal: see `offset`.
        mask: ``"none"``, ``"float"`` or ``"bool"``.
    """

    head_size: int
    causal: bool = False
    mask: str = "none"

    def __post_init__(self) -> None:
        check_head(self.head_size)
        if self.mask not in MASKS:
            raise ValueError(f"mask is one of {', '.join(MASKS)}, not '{self.mask}'")

    @property
    def symbol(self) -> str:
        mask = "" if self.mask == "none" else f"_{self.mask}_mask"
        return f"flash_attention_f32_d{self.head_size}{'_causal' * self.causal}{mask}"

    def build(self, cpu: Cpu) -> Any:
        T, lanes = script(), cpu.lanes
        most = _VECTORS * lanes
        with prim_func(self.symbol) as built:
            at = Operands(self.head_size)
            mask = None
            if self.mask != "none":
                dtype = "float32" if self.mask == "float" else "bool"
                mask = argument("mask", [size() for _ in range(4)], dtype)
            scale = argument("scale", (1,))
            offset = argument("offset", (1,), "int64") if self.causal else None
            at.close()
            # Blocks of about equal height, in whole vectors.
            count = T.max((at.length + most - 1) // most, 1)
            even = ((at.length + count - 1) // count + lanes - 1) // lanes * lanes
            height = T.Bind(T.max(even, lanes))
            blocks = T.Bind((at.length + height - 1) // height)
            with T.parallel(at.batch * at.heads * blocks) as t:
                first = fixed(t % blocks * height)
                rows = fixed(T.min(height, at.length - first))
                at.place(fixed(t // blocks % at.heads), fixed(t // blocks // at.heads), first, rows, lanes)
                task = Task(cpu, self.head_size, most, _KEYS)
                at.start(task, scale)
                self._keys(task, at, mask, offset)
                at.finish(task)
        return built[0]

    def _keys(self, task: Task, at: Operands, mask: Any, offset: Any) -> None:
        T = script()
        seen = at.keys if offset is None else T.min(at.keys, at.first + at.rows + offset[0])
        seen = fixed(T.max(seen, 0))
        with T.serial((seen + _KEYS - 1) // _KEYS) as p:
            key = fixed(p * _KEYS)
            n = fixed(T.min(_KEYS, seen - key))
            at.gather(task, T.int64(0), key, n)

            def hide(row: Any, query: Any, acc: Any, shape: tuple[int, int]) -> None:
                if mask is not None:
                    add_mask(mask, at, key + row, query, acc, shape, task.lanes)
                if offset is not None:
                    crosses = key + n - 1 > at.first + offset[0]
                    lanes = task.lanes
                    hide_later(crosses, lambda r: key + r, offset, at, row, query, acc, shape, n, lanes)

            def needed(queries: Any) -> Any:
                return T.min(n, T.max(at.first + queries + offset[0] - key, 0))

            task.attend(at.rows, at.vectors, n, hide, None if offset is None else needed)

    def reference(self, *arguments: np.ndarray) -> np.ndarray:
        q, k, v, *rest = arguments
        mask = rest.pop(0) if self.mask != "none" else None
        scale = float(rest.pop(0)[0])
        queries, keys = q.shape[1], k.shape[1]
        seen = causal(queries, keys, int(rest.pop(0)[0]) if self.causal else keys)
        if mask is not None and mask.dtype == bool:
            seen, mask = seen & mask, None
        return attention((q, k, v), heads_of(q, k, self.head_size), scale, seen, mask)


def heads_of(q: np.ndarray, k: np.ndarray, size: int) -> tuple[int, int]:
    return q.shape[2] // size, k.shape[2] // size


def check_head(head_size: int) -> None:
    if head_size < 1:
        raise ValueError(f"head_size is {head_size}; it must be 1 or more")


def add_mask(mask: Any, at: Operands, key: Any, query: Any, acc: Any, shape: tuple[int, int], lanes: int) -> None:
    from tvm import tirx

    T = script()
    # Axes of size 1 are broadcast.
    batch, head, column = (tirx.Select(mask.shape[i] == 1, T.int64(0), T.int64(1)) for i in (0, 1, 3))
    hidden = const(float("-inf"))

    def change(at_query: Callable[[Any, Any], Any]) -> None:
        with T.unroll(shape[0]) as r, T.unroll(shape[1]) as c, T.vectorized(lanes) as j:
            # Tiles reach past the last key and the last query.
            at_key = T.min(key + r, at.keys - 1)
            item = mask[at.b * batch, at.head * head, at_query(c, j), at_key * column]
            if mask.dtype == "bool":
                store(acc, tirx.Select(item, acc[r, c, j], hidden), r, c, j)
            else:
                store(acc, acc[r, c, j] + item * const(LOG2E), r, c, j)

    # The same for all queries, as padding is: one number for a vector.
    with T.If(mask.shape[2] == 1):
        with T.Then():
            change(lambda c, j: T.int64(0))
        with T.Else():
            change(lambda c, j: T.min(at.first + query + c * lanes + j, at.length - 1))


def hide_later(
    crosses: Any,
    position: Any,
    offset: Any,
    at: Operands,
    row: Any,
    query: Any,
    acc: Any,
    shape: tuple[int, int],
    count: Any,
    lanes: int,
) -> None:
    """Hides keys past the query's own position."""
    from tvm import tirx

    T = script()
    with T.If(crosses), T.Then(), T.unroll(shape[0]) as r, T.unroll(shape[1]) as c, T.vectorized(lanes) as j:
        oldest = position(T.min(row + r, count - 1)) - at.first - offset[0]
        sees = query + c * lanes + j >= oldest
        store(acc, tirx.Select(sees, acc[r, c, j], const(float("-inf"))), r, c, j)
