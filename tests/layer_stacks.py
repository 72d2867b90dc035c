"""Stacks of small layers as ONNX text, so that a test can also write down what one without some layers looks like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WIDTH = 4


def weight(name: str, *shape: int) -> str:
    """A random weight as text; a name always has the same numbers."""
    numbers = np.random.default_rng(sum(map(ord, name)) * 31 + len(name)).normal(size=shape) * 0.4
    kind = "float[" + ",".join(map(str, shape)) + "]"
    return f"{kind} {name} = {{{', '.join(f'{x:.4f}' for x in numbers.ravel())}}}"


def layer(i: int, h: str, out: str, form: str, cache: bool, shared: bool, width: int) -> tuple[list[str], list[str]]:
    """(nodes, weights) of layer `i` from hidden state `h` to `out`."""
    square, vector = (width, width), (width,)
    weights = [weight(f"{w}{i}", *square) for w in ("wq", "wk", "wv", "wa", "wb")]
    weights += [weight(f"g{i}", *vector), weight(f"e{i}", *vector)]
    keys = f"nk{i} = MatMul(n{i}, wk{i})" if not (shared and i) else f"nk{i} = Neg(k0)"
    nodes = [
        f"n{i} = LayerNormalization<axis = -1>({h}, g{i})" if form != "post" else f"n{i} = Identity({h})",
        f"q{i} = MatMul(n{i}, wq{i})",
        keys,
        f"k{i} = Concat<axis = 1>(past{i}, nk{i})" if cache else f"k{i} = Tanh(nk{i})",
        f"t{i} = Transpose<perm = [0, 2, 1]>(k{i})",
        f"s{i} = MatMul(q{i}, t{i})",
        f"m{i} = Add(s{i}, mask)",
        f"p{i} = Softmax<axis = -1>(m{i})",
        f"a{i} = MatMul(p{i}, k{i})",
    ]
    if cache:
        nodes.append(f"present{i} = Identity(k{i})")
    if form == "parallel":
        nodes += [f"f{i} = MatMul(n{i}, wa{i})", f"r{i} = Relu(f{i})", f"o{i} = MatMul(r{i}, wb{i})"]
        return [*nodes, f"ao{i} = Add(a{i}, o{i})", f"{out} = Add(ao{i}, {h})"], weights
    nodes.append(f"x{i} = Add({h}, a{i})")
    middle = f"x{i}"
    if form == "post":
        nodes.append(f"y{i} = LayerNormalization<axis = -1>(x{i}, g{i})")
        middle = f"y{i}"
    nodes += [f"f{i} = MatMul({middle}, wa{i})", f"r{i} = Relu(f{i})", f"o{i} = MatMul(r{i}, wb{i})"]
    if form == "post":
        return [*nodes, f"z{i} = Add({middle}, o{i})", f"{out} = LayerNormalization<axis = -1>(z{i}, e{i})"], weights
    return [*nodes, f"{out} = Add({middle}, o{i})"], weights


def stack(
    layers: int | Sequence[int],
    form: str = "pre",
    *,
    cache: bool = False,
    states: bool = False,
    shared: bool = False,
    head: bool = True,
    tied: bool = False,
    width: int = WIDTH,
) -> str:
    """ONNX text of a stack of layers of attention and a feed-forward network.

    Args:
        layers: how many, or which ones by number.
        form: ``pre`` or ``post`` norm, or ``parallel``.
        cache: each layer has a past and a present.
        states: every hidden state is an output.
        shared: later layers make their keys from those of layer 0.
        head: a norm and a product follow; else the last hidden state is the output.
        tied: all layers use the weights of layer 0.
    """
    numbers = list(range(layers)) if isinstance(layers, int) else list(layers)
    nodes, weights, states_out = ["h = MatMul(ids, table)"], [weight("table", width, width)], []
    nodes.append("mask0 = Neg(bias)")
    nodes.append("mask = Exp(mask0)")
    hidden = "h"
    for place, i in enumerate(numbers):
        out = f"h{i}" if head or place + 1 < len(numbers) else "y"
        made, needed = layer(i, hidden, out, form, cache, shared, width)
        if tied and i:
            made = [_tie(line, i) for line in made]
            needed = []
        nodes += made
        weights += needed
        hidden = out
        states_out += [f"float[b, s, {width}] {out}"] if states and out != "y" else []
    if head:
        nodes += ["last = LayerNormalization<axis = -1>(" + hidden + ", gl)", "y = MatMul(last, wl)"]
        weights += [weight("gl", width), weight("wl", width, 7)]
    pasts = [f"float[b, c, {width}] past{i}" for i in numbers] if cache else []
    presents = [f"float[b, d, {width}] present{i}" for i in numbers] if cache else []
    inputs = ", ".join([f"float[b, s, {width}] ids", "float[b, 1, 1] bias", *pasts])
    outputs = ", ".join([f"float[b, s, {7 if head else width}] y", *presents, *states_out])
    head_text = f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => ({outputs})'
    return f"{head_text} <{', '.join(weights)}> {{ {'  '.join(nodes)} }}"


def _tie(line: str, i: int) -> str:
    for name in ("wq", "wk", "wv", "wa", "wb", "g", "e"):
        for end in (",", ")"):
            line = line.replace(f" {name}{i}{end}", f" {name}0{end}")
    return line
