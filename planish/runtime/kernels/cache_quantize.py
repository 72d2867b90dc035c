"""Keys or values of a prompt in 8 bits, for CPUs; see :mod:`planish.ir.ops.cache_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.ir.ops.cache_attention import quantize
from planish.runtime.kernels.attention_task import fixed
from planish.runtime.kernels.cache_attention import MULTIPLE, round_row
from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, prim_func, script, size
from planish.runtime.kernels.template import Template


@dataclass(frozen=True)
class QuantizeCache(Template):
    """Codes of every token and head, and their scales. Arguments, compact:

    - ``x`` (batch, heads, tokens, head_size), float32;
    - ``channels`` (heads, head_size), float32: what it is divided by first;
    - ``codes`` as x, int8, out;
    - ``scales`` (batch, heads, tokens), float32, out.

    Attributes:
        head_size: of a head; a multiple of 8.
    """

    head_size: int

    def __post_init__(self) -> None:
        if self.head_size < MULTIPLE or self.head_size % MULTIPLE:
            raise ValueError(f"head_size is {self.head_size}; it must be a multiple of {MULTIPLE}")

    @property
    def symbol(self) -> str:
        return f"quantize_cache_i8_d{self.head_size}"

    def build(self, cpu: Cpu) -> Any:
        T = script()
        with prim_func(self.symbol) as built:
            batch, heads, tokens, d = size(), size(), size(), self.head_size
            x, channels = argument("x", (batch, heads, tokens, d)), argument("channels", (heads, d))
            codes = argument("codes", (batch, heads, tokens, d), "int8")
            scales = argument("scales", (batch, heads, tokens))
            with T.parallel(batch * heads) as t:
                b, h = fixed(t // heads), fixed(t % heads)
                row = T.alloc_buffer((d,), "float32", scope="global")
                with T.serial(tokens) as n:

                    def read(column: Any) -> Any:
                        return x[b, h, n, column] / channels[h, column]

                    round_row(cpu, row, read, (codes, b, h, n), (scales, b, h, n))
        return built[0]

    def reference(self, *arguments: np.ndarray) -> tuple[np.ndarray, ...]:
        """As in float32, which decides what is rounded up."""
        codes, scales = quantize(*arguments)
        return codes, scales[..., 0]
