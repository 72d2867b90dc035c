"""Prompts whose attention rotates positions, reads one product, and gives the caches, on the CUDA provider."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from planish.ir.causal_lm import DECODE, IDS, PREFILL, Facts, cache_layer
from planish.ir.graphs import dims_of, is_op
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import Decline, ExactPass, PassContext, PassResult
from planish.passes.lowering.projections import Projection, as_one, packed
from planish.passes.lowering.rotation_tables import HALF, RotationTables, check_columns
from planish.passes.precision.cache_sites import MICROSOFT
from planish.passes.registry import register
from planish.passes.sparsity.splice import Splicer

#: Numbers of queries, of keys, and heads: what the operator's flash kernel takes.
_LARGEST_HEAD = 256


@register
@dataclass(frozen=True)
class LowerCudaPrompt(ExactPass):
    """Writes causal attention of ``prefill`` in half precision as com.microsoft's GroupQueryAttention.

    It rotates queries and keys by a table, reads queries, keys and values as one product where they are that, and
    writes keys and values as caches have them, which are kernels of their own otherwise: for each layer two rotations
    of the keys, a copy of the values, and two products more.
    """

    name: ClassVar[str] = "lower-cuda-prompt"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        if {PREFILL, DECODE} - set(program.entries) or ctx.target.name != "ort-cuda":
            reason = "there are no prompts for a cache" if ctx.target.name == "ort-cuda" else "this is for 'ort-cuda'"
            return PassResult(False, 0, [Declined(self.name, program.default_entry, reason)])
        run = _Run(Splicer(program, self.name), Facts.from_provenance(program.provenance).positions)
        declined: list[Declined] = []
        for node in [n for n in program.entry(PREFILL).graph if is_op(n, "Attention")]:
            try:
                run.attention(node)
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
        self.model = splicer.program.entry(PREFILL)

    def attention(self, node: ir.Node) -> None:
        """Rewrites one attention, or says why not."""
        q, k, v = node.inputs[:3]
        assert q is not None and k is not None and v is not None
        heads, groups = (node.attributes.get_int(f"{name}_num_heads", 0) for name in ("q", "kv"))
        size = _check(node, heads, groups)
        settings: dict[str, Any] = {"num_heads": heads, "kv_num_heads": groups}
        settings["scale"] = node.attributes.get_float("scale", 1 / math.sqrt(size))
        settings["softcap"] = node.attributes.get_float("softcap", 0.0)
        turns = [value.producer() if is_op(value.producer(), "RotaryEmbedding") else None for value in (q, k)]
        tables: list[np.ndarray] = []
        if all(turns):
            tables, interleaved = self._rotated(turns, size)
            settings |= {"do_rotary": 1, "rotary_interleaved": interleaved}
            q, k = (turn.inputs[0] for turn in turns)  # type: ignore[union-attr, misc]
        elif any(turns):
            raise Decline("one of queries and keys is rotated")
        presents = self._presents(turns[1], k, v)
        together = packed([Projection.of(value) for value in (q, k, v)])  # type: ignore[arg-type]

        def build(op: Any) -> Sequence[ir.Value]:
            given = as_one(op, (q, k, v), together)
            counted = self._counted(node) or given[0]
            total = op.Cast(op.Shape(counted, start=1, end=2), to=int(ir.DataType.INT32))
            last = op.Expand(op.Sub(total, np.int32(1)), op.Shape(counted, start=0, end=1))
            turned = [op.initializer(table, name="rotation") for table in tables]
            made: Sequence[ir.Value] = op.GroupQueryAttention(
                *given, None, None, last, total, *turned, _domain=MICROSOFT, _outputs=3, **settings
            )
            return made

        y, *caches = self.splicer.build(self.model, node, build, [node])
        y.type, y.shape = node.outputs[0].type, node.outputs[0].shape
        for old, new in zip(presents, caches, strict=True):
            new.type, new.shape = old.type, old.shape
            self.splicer.replace_output(self.model.graph, old, new)
        self.splicer.replace(node, [y])
        self.fired += 1

    def _rotated(self, turns: Sequence[ir.Node | None], size: int) -> tuple[list[np.ndarray], int]:
        """The tables by which both are rotated, (positions, columns), and whether pairs are neighbours."""
        first, second = turns
        assert first is not None and second is not None
        alike = all(a is b for a, b in zip(first.inputs[1:], second.inputs[1:], strict=True))
        kinds = [node.attributes.get_int("interleaved", 0) for node in (first, second)]
        if not alike or len([v for v in first.inputs if v is not None]) != 3 or kinds[0] != kinds[1]:
            raise Decline("queries and keys are rotated by different angles, or by positions of their own")
        every = {IDS: np.zeros((1, self.tables.end()), np.int64)}
        tables = [self.tables.of(value, every, axis=1) for value in first.inputs[1:3] if value is not None]
        check_columns(size, tables[0].shape[1])
        return tables, kinds[0]

    def _counted(self, node: ir.Node) -> ir.Value | None:
        """The ids, if the layer reads as many rows and tokens: all layers then share the lengths."""
        ids = next((v for v in self.model.graph.inputs if v.name == IDS), None)
        read = node.inputs[0]
        known = None if ids is None or read is None else (dims_of(ids), dims_of(read))
        return ids if known and known[0] is not None and known[1] is not None and known[0] == known[1][:2] else None

    def _presents(self, turn: ir.Node | None, keys: Any, values: ir.Value) -> list[ir.Value]:
        """The outputs of the graph that are these keys, rotated, and these values."""
        found: list[ir.Value] = []
        outputs = [v for v in self.model.graph.outputs if cache_layer(v.name or "") is not None]
        for part, source in (("key", keys), ("value", values)):
            here = [v for v in outputs if (v.name or "").endswith(part) and self._is_of(v, source, turn, part == "key")]
            if len(here) != 1 or here[0].uses():
                raise Decline(f"its {part}s are no cache that prefill gives")
            found += here
        return found

    @staticmethod
    def _is_of(output: ir.Value, source: ir.Value, turn: ir.Node | None, rotated: bool) -> bool:
        """Whether an output is `source` with its heads in front of the tokens, and rotated as `turn` does."""
        node = output.producer()
        if rotated and turn is not None:
            if not is_op(node, "RotaryEmbedding") or node is None or list(node.inputs[1:]) != list(turn.inputs[1:]):
                return False
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        if node is None or not is_op(node, "Transpose") or list(node.attributes.get_ints("perm", [])) != [0, 2, 1, 3]:
            return False
        view = node.inputs[0].producer() if node.inputs[0] is not None else None
        return view is not None and is_op(view, "Reshape") and view.inputs[0] is source


def _check(node: ir.Node, heads: int, groups: int) -> int:
    """The size of a head."""
    dims: Any = [dims_of(v) if v is not None else None for v in node.inputs[:3]]
    if any(d is None or len(d) != 3 for d in dims) or not heads or not groups:
        raise Decline("its heads are an axis of their own; the operator reads (batch, length, heads · size)")
    if any(value is not None for value in node.inputs[3:]) or len(node.outputs) > 1:
        raise Decline("it has a mask or a cache")
    assert node.inputs[0] is not None
    if not node.attributes.get_int("is_causal", 0) or node.inputs[0].dtype not in HALF:
        raise Decline("it is not causal in half precision")
    widths = [d[2] for d in dims]
    if any(not isinstance(w, int) for w in widths) or widths[1] != widths[2] or widths[0] * groups != widths[1] * heads:
        raise Decline("the sizes of its heads differ, or are unknown")
    size = int(widths[0]) // heads
    if size % 8 or size > _LARGEST_HEAD:
        raise Decline(f"heads of {size}; the operator takes multiples of 8 up to {_LARGEST_HEAD}")
    return size
