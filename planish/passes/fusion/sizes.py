"""Sizes of values as terms that can be compared, and the contents of the integer vectors that shapes are made of.

A term is a number, the name of a symbolic size, ``(value, axis)``: "whatever that value has there", or a product of
such. Equal terms are equal sizes. Unlike the facts of the shape-simplifying pass, terms exist for sizes nobody named,
which is what graphs of older exporters are full of.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.graphs import constant_array, is_op


@dataclass(frozen=True)
class Product:
    """`number` times sizes that are no numbers, in a fixed order: the batch times the heads, for one."""

    number: int
    factors: tuple[str | tuple[ir.Value, int], ...]


Term = int | str | tuple[ir.Value, int] | Product
_DEPTH = 12


def product(*terms: Term) -> Term:
    """The product of sizes as one term."""
    number = 1
    factors: list[Any] = []
    for term in terms:
        if isinstance(term, Product):
            number, factors = number * term.number, [*factors, *term.factors]
        elif isinstance(term, int):
            number *= term
        else:
            factors.append(term)
    if not factors:
        return number
    if number == 1 and len(factors) == 1:
        only: Term = factors[0]
        return only
    ordered = sorted(factors, key=lambda f: (f, 0, 0) if isinstance(f, str) else ("", id(f[0]), f[1]))
    return Product(number, tuple(ordered))


def sizes(value: ir.Value | None) -> tuple[Term, ...] | None:
    """The shape of `value` as terms, or None if its rank is unknown."""
    if value is None or value.shape is None:
        return None
    found: list[Term] = []
    for axis, dim in enumerate(value.shape):
        name = dim if isinstance(dim, int) else _quotient(dim.value)
        found.append(name if name is not None else (value, axis))
    return tuple(found)


@functools.cache
def _quotient(name: str | None) -> str | None:
    """``((a*b)//a)``, as torch's exporter names a size that a model counts twice, is ``b``."""
    match = re.fullmatch(r"\(\((\w+)\*(\w+)\)//(\w+)\)", name or "")
    if match is None or match[3] not in (match[1], match[2]):
        return name
    return match[2] if match[3] == match[1] else match[1]


def rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def contents(value: ir.Value | None, depth: int = _DEPTH) -> tuple[Term | None, ...] | None:
    """Items of an integer scalar or vector as terms (None: unknown item), or None if nothing is known."""
    if value is None or depth == 0:
        return None
    array = constant_array(value, 64)
    if array is not None:
        return tuple(int(i) for i in array.ravel()) if array.dtype.kind == "i" else None
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Shape":
        dims = sizes(node.inputs[0])
        bounds = slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", None))
        return None if dims is None else dims[bounds]
    if node.op_type in ("Identity", "Unsqueeze", "Squeeze", "Reshape", "Cast"):
        return contents(node.inputs[0], depth - 1)
    if node.op_type == "Concat":
        parts = [contents(v, depth - 1) for v in node.inputs]
        return None if any(p is None for p in parts) else tuple(item for part in parts for item in part or ())
    if node.op_type == "Mul":
        return _multiplied([contents(v, depth - 1) for v in node.inputs])
    if node.op_type in ("Slice", "Gather"):
        return _select(node, depth)
    return None


def _multiplied(parts: list[tuple[Term | None, ...] | None]) -> tuple[Term | None, ...] | None:
    """Of two scalars, or vectors of one item; a -1 among them would be a number of its own."""
    if any(p is None or len(p) != 1 or p[0] is None or (isinstance(p[0], int) and p[0] < 0) for p in parts):
        return None
    return (product(*(p[0] for p in parts)),)  # type: ignore


def _select(node: ir.Node, depth: int) -> tuple[Term | None, ...] | None:
    data = contents(node.inputs[0], depth - 1)
    chosen = [constant_array(v, 64) if v is not None else None for v in node.inputs[1:]]
    if data is None or chosen[0] is None:
        return None
    if node.op_type == "Gather":
        picks = [int(i) for i in chosen[0].ravel()]
        return tuple(data[i] for i in picks) if all(-len(data) <= i < len(data) for i in picks) else None
    if len(chosen) < 2 or chosen[1] is None or (len(chosen) > 3 and (chosen[3] is None or chosen[3].item() != 1)):
        return None
    return data[int(chosen[0].item()) : int(chosen[1].item())]


def reshaped(node: ir.Node) -> tuple[Term | None, ...] | None:
    """Sizes that a Reshape gives, by what it is told; None for an item that is -1 or unknown."""
    target = contents(node.inputs[1])
    if target is None:
        return None
    source = sizes(node.inputs[0]) or ()
    keep_zero = node.attributes.get_int("allowzero", 0)
    dims: list[Term | None] = []
    for axis, item in enumerate(target):
        if item == 0 and not keep_zero:
            dims.append(source[axis] if axis < len(source) else None)
        else:
            dims.append(None if item == -1 else item)
    return tuple(dims)


def transposed_with(node: ir.Node | None, *perm: int) -> bool:
    """Whether `node` is a Transpose with exactly this permutation."""
    return is_op(node, "Transpose") and tuple(node.attributes.get_ints("perm", ())) == perm  # type: ignore[union-attr]


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element, or None."""
    array = constant_array(value, 1)
    if array is None or array.size != 1 or array.dtype.kind == "b":
        return None
    return float(array.ravel()[0])


def size_vector(op: Any, term: Term, value: ir.Value, axis: int, graph: ir.Graph) -> Any:
    """A vector of one item: the size `term` that `value` has at `axis`, an array if it is a number.

    It is read off an input of the graph where one has it, so that layers share it.
    """
    if isinstance(term, int):
        return np.array([term], dtype=np.int64)
    for candidate in graph.inputs:
        dims = sizes(candidate) or ()
        if isinstance(term, str) and term in dims:
            value, axis = candidate, dims.index(term)
            break
    node = value.producer()
    perm = node.attributes.get_ints("perm", None) if is_op(node, "Transpose") else None  # type: ignore[union-attr]
    if perm is not None:  # no need to wait for the copy
        value, axis = node.inputs[0], perm[axis]  # type: ignore
    return op.Shape(value, start=axis, end=axis + 1)
