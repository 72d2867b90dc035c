"""Steps over caches that rotate positions themselves, and read queries, keys and values as one product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from planish.ir.causal_lm import IDS, LENGTHS, Facts
from planish.ir.graphs import constant_tensor, dims_of, is_op
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.lowering.projections import Projection, packed
from planish.passes.precision.cache_sites import GROUP_QUERY, MICROSOFT
from planish.passes.registry import register
from planish.passes.sparsity.splice import Splicer

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MOST = 1 << 26  # elements of a table


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
        self.splicer, self.positions, self.fired = splicer, positions, 0
        self._tables: dict[ir.Value, np.ndarray] = {}

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
        source = Projection.of(q)

        def build(op: Any) -> Sequence[ir.Value]:
            given: list[Any] = [q, k, v]
            if together is not None and source is not None:
                weight, shift = together
                one = op.MatMul(source.x, op.initializer(weight, name="qkv_weight"))
                given = [op.Add(one, op.initializer(shift, name="qkv_bias")) if shift.any() else one, None, None]
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
        tables = [self._table(value) for value in (first.cos, first.sin)]
        columns = tables[0].shape[1]
        if not isinstance(cache[3], int) or cache[3] % 16 or columns % 8 or columns > cache[3] // 2:
            raise Decline("the operator rotates heads of a multiple of 16, by a multiple of 8 angles")
        return tables

    def _table(self, value: ir.Value) -> np.ndarray:
        """What a value (batch, 1, columns) that depends on lengths is for every length."""
        if value not in self._tables:
            if self.positions is None:
                raise Decline("the model's positions have no end, so that there is no table of all rotations")
            found = evaluate(value, _every(self.positions))
            if found.ndim != 3 or found.shape[:2] != (self.positions, 1) or found.size > _MOST:
                raise Decline(f"'{value.name}' is no table of one row for each position")
            dtype = value.dtype
            assert dtype is not None
            self._tables[value] = np.ascontiguousarray(found[:, 0].astype(dtype.numpy()))
        return self._tables[value]


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


def evaluate(value: ir.Value, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """A value that is computed from these inputs of its graph, and constants, alone; of ids only the shape may count.

    Raises:
        Decline: it is not.
    """
    known: dict[ir.Value, np.ndarray] = {}
    pending = [value]
    while pending:
        item = pending[-1]
        tensor, node = constant_tensor(item), item.producer()
        if item in known:
            pending.pop()
        elif tensor is not None:
            known[item] = np.asarray(tensor.numpy())
        elif item.is_graph_input() and item.name in inputs:
            known[item] = inputs[item.name or ""]
        elif node is None or node.domain or len(node.outputs) != 1 or len(pending) > 64 or _reads_ids(node):
            raise Decline(f"'{value.name}' depends on more than the position")
        elif missing := [v for v in node.inputs if v is not None and v not in known]:
            pending += missing
        else:
            names = {v.name or "": known[v] for v in node.inputs if v is not None}
            try:
                (known[item],) = ReferenceEvaluator(ir.to_proto(node)).run(None, names)
            except Exception as error:
                raise Decline(f"'{value.name}' can not be computed beforehand: {error}") from error
    return known[value]


def _reads_ids(node: ir.Node) -> bool:
    return not is_op(node, "Shape") and any(v is not None and v.is_graph_input() and v.name == IDS for v in node.inputs)
