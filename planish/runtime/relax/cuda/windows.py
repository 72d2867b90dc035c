"""Convolutions' patches, pooling and depthwise convolutions: a thread for each number of the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from planish.runtime.kernels.images import Window
from planish.runtime.kernels.loops import prim_func, script, store
from planish.runtime.relax.cuda.emit import argument, each, local, number, size, wide

if TYPE_CHECKING:
    from planish.runtime.relax.cuda.device import CudaDevice
    from planish.runtime.relax.translator import Translator


def patches(device: CudaDevice, t: Translator, template: Any, inputs: list[Any], types: list[Any]) -> Any:
    """The pixels of each window side by side, 0 outside of the image."""
    (lines,) = inputs
    window: Window = template.window
    tall, wide_ = window.kernel
    height, line = list(lines.ty.shape)[1:]
    depth, dtype = list(types[0].shape)[3], str(types[0].dtype)
    tir = t.tir
    channels = tir.floordiv(depth, tall * wide_)
    width = tir.floordiv(line, channels)

    def element(i: Sequence[Any], x: Any) -> Any:
        tap, channel = tir.floordiv(i[3], channels), tir.floormod(i[3], channels)
        row = window.corner(0, i[1]) + tir.floordiv(tap, wide_) * window.dilations[0]
        column = window.corner(1, i[2]) + tir.floormod(tap, wide_) * window.dilations[1]
        inside = tir.all(row >= 0, row < height, column >= 0, column < width)
        return tir.if_then_else(inside, x(i[0], row, column * channels + channel), tir.const(0.0, dtype))

    return t.force(t.compute("patches", [lines], element, list(types[0].shape), dtype))


def pool(device: CudaDevice, t: Translator, template: Any, inputs: list[Any], types: list[Any]) -> Any:
    """The largest number of a window, or the mean of them."""
    T, kind, window = script(), template.kind, template.window
    taps = float(window.kernel[0] * window.kernel[1])

    def step(so_far: Any, value: Any, tap: Any, channel: Any) -> Any:
        return T.max(so_far, value) if kind == "max" else so_far + value

    def finish(value: Any, count: Any) -> Any:
        return value if kind == "max" else value / (count if kind == "mean" else number(taps))

    start = float("-inf") if kind == "max" else 0.0
    function = _windowed(
        "pool", window, inputs[0], types[0], [], lambda more, channel: number(start), lambda more: step, finish
    )
    return device.kernel(t, function, inputs, types)


def depthwise(device: CudaDevice, t: Translator, template: Any, inputs: list[Any], types: list[Any]) -> Any:
    """A filter for each channel."""

    def steps(more: list[Any]) -> Callable[..., Any]:
        return lambda so_far, value, tap, channel: so_far + value * wide(more[0][tap, channel])

    function = _windowed(
        "depthwise",
        template.window,
        inputs[0],
        types[0],
        inputs[1:],
        lambda more, channel: wide(more[1][channel]),
        steps,
        lambda value, count: value,
    )
    return device.kernel(t, function, inputs, types)


def _windowed(
    name: str,
    window: Window,
    x: Any,
    out: Any,
    others: Sequence[Any],
    start: Callable[[list[Any], Any], Any],
    steps: Callable[[list[Any]], Callable[..., Any]],
    finish: Callable[[Any, Any], Any],
) -> Any:
    """A function of x (batch, height, width, channels), of other tensors whose last axis is channels, and of y."""
    from planish.runtime.relax.cuda.device import plain

    T = script()
    from tvm import tirx

    dtype = str(x.ty.dtype)
    with prim_func(name) as built:
        batch, height, width, channels = (size(d) for d in plain(x.ty.shape))
        rows, columns = (size(d) for d in plain(out.shape)[1:3])
        source = argument("x", (batch, height, width, channels), dtype)
        more = [
            argument(f"more{n}", (*plain(o.ty.shape)[:-1], channels), str(o.ty.dtype)) for n, o in enumerate(others)
        ]
        y = argument("y", (batch, rows, columns, channels), dtype)

        def body(at: list[Any]) -> None:
            b, r, c, channel = at
            found, count = local(), local()
            store(found, start(more, channel), 0)
            store(count, number(0.0), 0)
            with T.serial(window.kernel[0]) as ky, T.serial(window.kernel[1]) as kx:
                row = window.corner(0, r) + ky * window.dilations[0]
                column = window.corner(1, c) + kx * window.dilations[1]
                inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
                with T.If(inside), T.Then():
                    tap = ky * window.kernel[1] + kx
                    value = wide(source[b, row, column, channel])
                    store(found, steps(more)(found[0], value, tap, channel), 0)
                    store(count, count[0] + number(1.0), 0)
            store(y, T.Cast(dtype, finish(found[0], count[0])), b, r, c, channel)

        each([batch, rows, columns, channels], body)
    return built[0]
