"""Images with their channels last: patches as rows of a matrix, depthwise convolution and pooling; float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.runtime.kernels.cpu import Cpu
from planish.runtime.kernels.loops import argument, const, prim_func, script, size, store
from planish.runtime.kernels.template import Template


@dataclass(frozen=True)
class Window:
    """Where the pixels of an output pixel are.

    Attributes:
        kernel, strides, dilations: (height, width).
        begins: rows above the image and columns left of it.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    begins: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        return "_".join("x".join(map(str, part)) for part in (self.kernel, self.strides, self.dilations, self.begins))

    def corner(self, axis: int, at: Any) -> Any:
        """The first row (column) of the window of an output row (column)."""
        return at * self.strides[axis] - self.begins[axis]

    def patches(self, x: np.ndarray, rows: int, columns: int, fill: float) -> Any:
        """(batch, rows, columns, kernel height · kernel width, channels), `fill` outside of the image."""
        batch, height, width, channels = x.shape
        made = np.full((batch, rows, columns, self.kernel[0] * self.kernel[1], channels), fill)
        for r, c, ky, kx in np.ndindex(rows, columns, *self.kernel):
            at = (self.corner(0, r) + ky * self.dilations[0], self.corner(1, c) + kx * self.dilations[1])
            if 0 <= at[0] < height and 0 <= at[1] < width:
                made[:, r, c, ky * self.kernel[1] + kx] = x[:, at[0], at[1]]
        return made


@dataclass(frozen=True)
class Patches(Template):
    """The pixels of each window side by side. Arguments, compact:

    - ``x`` (batch, height, width · channels);
    - ``y`` (batch, rows, columns, kernel height · kernel width · channels), out; 0 outside of the image.
    """

    window: Window

    @property
    def symbol(self) -> str:
        return f"patches_f32_{self.window.name}"

    def build(self, cpu: Cpu) -> Any:
        T, window = script(), self.window
        from tvm import tirx

        tall, wide = window.kernel
        with prim_func(self.symbol) as built:
            batch, height, line, rows, columns, depth = (size() for _ in range(6))
            x = argument("x", (batch, height, line))
            y = argument("y", (batch, rows, columns, depth))
            channels = T.Bind(depth // (tall * wide))
            width = T.Bind(line // T.max(channels, 1))
            with T.parallel(batch * rows) as task:
                b, r = T.Bind(task // rows), T.Bind(task % rows)
                with T.serial(columns) as c:
                    left = T.Bind(window.corner(1, c))

                    def copy(row: Any, column: Any, start: Any, count: Any, b: Any = b, r: Any = r, c: Any = c) -> None:
                        with T.serial(count) as k:
                            store(y, x[b, row, column * channels + k], b, r, c, start + k)

                    def clear(start: Any, count: Any, b: Any = b, r: Any = r, c: Any = c) -> None:
                        with T.serial(count) as k:
                            store(y, const(0.0), b, r, c, start + k)

                    with T.serial(tall) as ky:
                        row = T.Bind(window.corner(0, r) + ky * window.dilations[0])
                        start = T.Bind(ky * (wide * channels))
                        # The pixels of a row of the window are neighbours in memory, where all of them are there.
                        joined = tirx.all(row >= 0, row < height, left >= 0, left + wide <= width)
                        with T.If(joined if window.dilations[1] == 1 else T.bool(False)):
                            with T.Then():
                                copy(row, left, start, wide * channels)
                            with T.Else(), T.serial(wide) as kx:
                                column = T.Bind(left + kx * window.dilations[1])
                                inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
                                with T.If(inside):
                                    with T.Then():
                                        copy(row, column, start + kx * channels, channels)
                                    with T.Else():
                                        clear(start + kx * channels, channels)
        return built[0]

    def reference(self, *arguments: np.ndarray) -> Any:
        """Takes the sizes of the output from a last argument y."""
        x, y = arguments
        channels = y.shape[3] // (self.window.kernel[0] * self.window.kernel[1])
        pixels = np.asarray(x, np.float64).reshape(*x.shape[:2], -1, channels)
        return self.window.patches(pixels, y.shape[1], y.shape[2], 0.0).reshape(y.shape)


@dataclass(frozen=True)
class _Windowed(Template):
    """One number for each channel of a window. Arguments, compact:

    - ``x`` (batch, height, width, channels);
    - what a kind adds;
    - ``y`` (batch, rows, columns, channels), out.
    """

    window: Window

    def _more(self, channels: Any) -> tuple[Any, ...]:
        return ()

    def _start(self, more: tuple[Any, ...], channel: Any) -> Any:
        raise NotImplementedError

    def _step(self, so_far: Any, value: Any, more: tuple[Any, ...], tap: Any, channel: Any) -> Any:
        raise NotImplementedError

    def _finish(self, value: Any, count: Any) -> Any:
        return value

    def build(self, cpu: Cpu) -> Any:
        T = script()
        with prim_func(self.symbol) as built:
            batch, height, width, channels, rows, columns = (size() for _ in range(6))
            x = argument("x", (batch, height, width, channels))
            more = self._more(channels)
            y = argument("y", (batch, rows, columns, channels))
            with T.parallel(batch * rows) as task:
                b, r = T.Bind(task // rows), T.Bind(task % rows)
                with T.serial(columns) as c:
                    place = _Place(self.window, b, r, c, height, width)
                    done: Any = T.int64(0)
                    for vectors in (4, 1):
                        block = vectors * cpu.lanes
                        with T.serial((channels - done) // block) as k:
                            self._channels(place, x, more, y, T.Bind(done + k * block), block)
                        done = T.Bind(done + (channels - done) // block * block)
                    with T.serial(channels - done) as k:
                        self._channels(place, x, more, y, T.Bind(done + k), 1)
        return built[0]

    def _channels(self, place: _Place, x: Any, more: tuple[Any, ...], y: Any, first: Any, block: int) -> None:
        """`block` channels of one output pixel; the sums stay in registers."""
        T = script()
        acc = T.alloc_buffer((block,), "float32", scope="local")
        count = T.alloc_buffer((1,), "float32", scope="local")

        def each() -> Any:
            return T.vectorized(block) if block > 1 else T.serial(1)

        with each() as j:
            store(acc, self._start(more, first + j), j)
        store(count, const(0.0), 0)
        with place.pixels() as (tap, row, column):
            with each() as j:
                value = x[place.b, row, column, first + j]
                store(acc, self._step(acc[j], value, more, tap, first + j), j)
            store(count, count[0] + const(1.0), 0)
        with each() as j:
            store(y, self._finish(acc[j], count[0]), place.b, place.r, place.c, first + j)


@dataclass(frozen=True)
class _Place:
    """An output pixel."""

    window: Window
    b: Any
    r: Any
    c: Any
    height: Any
    width: Any

    @contextmanager
    def pixels(self) -> Iterator[tuple[Any, Any, Any]]:
        """A loop over the pixels of the window that are in the image: number in the window, row, column."""
        T, window = script(), self.window
        from tvm import tirx

        with T.serial(window.kernel[0]) as ky:
            row = T.Bind(window.corner(0, self.r) + ky * window.dilations[0])
            with T.If(tirx.all(row >= 0, row < self.height)), T.Then(), T.serial(window.kernel[1]) as kx:
                column = T.Bind(window.corner(1, self.c) + kx * window.dilations[1])
                with T.If(tirx.all(column >= 0, column < self.width)), T.Then():
                    yield ky * window.kernel[1] + kx, row, column


@dataclass(frozen=True)
class DepthwiseConv(_Windowed):
    """A filter for each channel. Adds ``weight`` (kernel height · kernel width, channels) and ``bias`` (channels,)."""

    @property
    def symbol(self) -> str:
        return f"depthwise_conv_f32_{self.window.name}"

    def _more(self, channels: Any) -> tuple[Any, ...]:
        return argument("weight", (size(), channels)), argument("bias", (channels,))

    def _start(self, more: tuple[Any, ...], channel: Any) -> Any:
        return more[1][channel]

    def _step(self, so_far: Any, value: Any, more: tuple[Any, ...], tap: Any, channel: Any) -> Any:
        return so_far + value * more[0][tap, channel]

    def reference(self, *arguments: np.ndarray) -> Any:
        """Takes the sizes of the output from a last argument y."""
        x, weight, bias, y = arguments
        found = self.window.patches(np.asarray(x, np.float64), y.shape[1], y.shape[2], 0.0)
        return np.einsum("brckn,kn->brcn", found, weight.astype(np.float64)) + bias


@dataclass(frozen=True)
class Pool(_Windowed):
    """The largest number of a window, or the mean of them.

    Attributes:
        kind: ``"max"``, ``"mean"`` of the pixels that are in the image, or ``"mean_padded"`` of all, 0 outside of it.
    """

    kind: str = "max"

    @property
    def symbol(self) -> str:
        return f"pool_{self.kind}_f32_{self.window.name}"

    def _start(self, more: tuple[Any, ...], channel: Any) -> Any:
        return const(float("-inf") if self.kind == "max" else 0.0)

    def _step(self, so_far: Any, value: Any, more: tuple[Any, ...], tap: Any, channel: Any) -> Any:
        return script().max(so_far, value) if self.kind == "max" else so_far + value

    def _finish(self, value: Any, count: Any) -> Any:
        if self.kind == "max":
            return value
        return value / (count if self.kind == "mean" else const(float(self.window.kernel[0] * self.window.kernel[1])))

    def reference(self, *arguments: np.ndarray) -> Any:
        """Takes the sizes of the output from a last argument y."""
        x, y = arguments
        fill = float("-inf") if self.kind == "max" else 0.0
        found = self.window.patches(np.asarray(x, np.float64), y.shape[1], y.shape[2], fill)
        if self.kind == "max":
            return found.max(3)
        if self.kind == "mean_padded":
            return found.mean(3)
        inside = self.window.patches(np.ones_like(x, np.float64), y.shape[1], y.shape[2], 0.0)
        return found.sum(3) / inside.sum(3)
