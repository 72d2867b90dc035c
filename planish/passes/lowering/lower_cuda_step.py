"""Steps over caches that rotate positions themselves, and read queries, keys and values as one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.causal_lm import IDS, LENGTHS, Facts
from planish.ir.graphs import dims_of, is_op
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.lowering.projections import Projection, as_one, packed
from planish.passes.lowering.rotation_tables import HALF, RotationTables, check_columns
from planish.passes.precision.cache_sites import GROUP_QUERY, MICROSOFT
from planish.passes.registry import register
from planish.passes.sparsity.splice import Splicer


@register
@dataclass(frozen=True)
class LowerCudaStep(ExactPass):
    """Lets the step of one token over a cache do what is a kernel of its own in front of it, on the CUDA provider.

    com.microsoft's GroupQueryAttention rotates queries and keys by tables for all positions that the model has, which
    takes the place of the angles of this token; and where queries, keys and values are products of one value, it reads
    one product. A step is bound by the number of its kernels as much as by what they read.
    """

    name: ClassVar[str] = "lower-cuda-step"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        run = _Run(Splicer(program, self.name), Facts.from_provenance(program.provenance).positions)
        declined: list[Declined] = []
        for model in program.entries.values():
            steps = [n for n in model.graph if (n.domain, n.op_type) == (MICROSOFT, GROUP_QUERY)]
            for node in steps:
                try:
                    if ctx.target.name != "ort-cuda":
                        raise Decline(f"target '{ctx.target}' has other kernels; this is for 'ort-cuda'")
                    run.step(model, node)
                except Decline as decline:
                    declined.append(Declined(self.name, node.name or node.op_type, decline.reason))
        return PassResult(run.fired > 0, run.fired, declined)


class _Run:
    """One run over a program.

    Args:
        positions: that the model has.
    """

    def __init__(self, splicer: Splicer, positions: int | None) -> None:
        self.splicer, self.tables, self.fired = splicer, RotationTables(positions), 0

    def step(self, model: ir.Model, node: ir.Node) -> None:
        """Rewrites a step, or says why not."""
        q, k, v = node.inputs[:3]
        dims: Any = None if q is None else dims_of(q)
        if any(x is None for x in (q, k, v)) or any(x is not None for x in node.inputs[7:]):
            raise Decline("it does more than attend over the cache, or reads one product already")
        assert q is not None and k is not None and v is not None
        if q.dtype not in HALF or dims is None or len(dims) != 3 or dims[1] != 1 or node.inputs[3] is None:
            raise Decline("it is no step of one token in half precision over a cache")
        rotations = [_rotation(value) for value in (q, k)]
        tables: list[np.ndarray] = []
        if all(rotations):
            first, second = (item for item in rotations if item is not None)
            tables = self._rotated(node, first, second)
            q, k = first.x, second.x
        elif any(rotations):
            raise Decline("one of queries and keys is rotated")
        together = packed([Projection.of(value) for value in (q, k, v)])
        if not tables and together is None:
            raise Decline("positions are not rotated, and queries, keys and values are no products of one value")
        settings: dict[str, Any] = dict(node.attributes)
        if tables:
            settings |= {"do_rotary": 1, "rotary_interleaved": first.interleaved}

        def build(op: Any) -> Sequence[ir.Value]:
            given = as_one(op, (q, k, v), together)
            turned = [op.initializer(table, name="rotation") for table in tables]
            made: Sequence[ir.Value] = op.GroupQueryAttention(
                *given, *node.inputs[3:7], *turned, _domain=MICROSOFT, _outputs=3, **settings
            )
            return made

        made = self.splicer.build(model, node, build, [node])
        for new, old in zip(made, node.outputs, strict=True):
            new.type = old.type
        self.splicer.replace(node, made)
        self.fired += 1

    def _rotated(self, node: ir.Node, first: _Rotation, second: _Rotation) -> list[np.ndarray]:
        """The tables by which both are rotated, (positions, columns)."""
        if (first.cos, first.sin, first.interleaved) != (second.cos, second.sin, second.interleaved):
            raise Decline("queries and keys are rotated by different angles")
        cache: Any = dims_of(node.inputs[3])  # type: ignore[arg-type]
        every = _every(self.tables.end())
        tables = [self.tables.of(value, every, axis=0) for value in (first.cos, first.sin)]
        check_columns(cache[3], tables[0].shape[1])
        return tables


@dataclass(frozen=True)
class _Rotation:
    """RotaryEmbedding of one token a row.

    Attributes:
        x: what is rotated, (batch, 1, heads · size).
        cos, sin: (batch, 1, columns).
    """

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: int


def _rotation(value: ir.Value) -> _Rotation | None:
    node = _unviewed(value).producer()
    if not is_op(node, "RotaryEmbedding") or node is None or len([v for v in node.inputs if v is not None]) != 3:
        return None
    x, cos, sin = node.inputs[:3]
    assert x is not None and cos is not None and sin is not None
    source = _unviewed(x)
    dims: Any = dims_of(source)
    if dims is None or len(dims) != 3 or dims[1] != 1:
        return None
    return _Rotation(source, cos, sin, node.attributes.get_int("interleaved", 0))


def _unviewed(value: ir.Value) -> ir.Value:
    """What a value of one token is a view of: with one token, heads and tokens change places without any copy."""
    node = value.producer()
    while node is not None and node.inputs and node.inputs[0] is not None:
        if is_op(node, "Transpose"):
            if list(node.attributes.get_ints("perm", [])) != [0, 2, 1, 3]:
                break
        elif not is_op(node, "Reshape"):
            break
        value = node.inputs[0]
        node = value.producer()
    return value


def _every(positions: int) -> dict[str, np.ndarray]:
    """A row for each length."""
    return {LENGTHS: np.arange(positions, dtype=np.int64), IDS: np.zeros((positions, 1), np.int64)}
