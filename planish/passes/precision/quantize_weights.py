"""quantize-weights: weights in 8 or 4 bits with a scale for each block, for steps that read more than they compute."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.ir import precision, processor
from planish.ir.errors import InputError, unknown
from planish.ir.graphs import constant_tensor, is_op
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.passes.base import ApproximatePass, PassContext, PassResult
from planish.passes.canonicalize.editing import Editor
from planish.passes.precision.blocks import BITS, BLOCKS, Blocks, choose_block, corrected, round_to_nearest
from planish.passes.precision.integer_choice import within_error
from planish.passes.precision.moments import Moments, moments_of
from planish.passes.precision.products import (
    FLOAT32_ONLY,
    FLOATS,
    MICROSOFT,
    QUANTIZED,
    Product,
    named_entries,
    products,
)
from planish.passes.registry import register

_METHODS = ("nearest", "gptq")
#: Products of int8 codes with inputs that are rounded to 8 bits in blocks: what ONNX Runtime is fast with.
_ACCURACY_LEVEL = 4
_LEAST = 1 << 12


@dataclass
class _Run:
    """What one run of the pass gathers."""

    editor: Editor
    moments: Moments
    dtypes: tuple[ir.DataType, ...]
    on_cpu: bool
    declined: list[Declined] = field(default_factory=list)
    made: dict[tuple[int, bool], Blocks] = field(default_factory=dict)
    stored: dict[tuple[int, bool, str], ir.TensorProtocol] = field(default_factory=dict)
    tensors: list[ir.TensorProtocol] = field(default_factory=list)
    already: int = 0
    missed: float = 0.0
    total: float = 0.0


@register
@dataclass(frozen=True)
class QuantizeWeights(ApproximatePass):
    """Keeps weights of products, and embeddings, as 8- or 4-bit integers; inputs stay what they are, sums float32.

    A step of decoding reads every weight once for one row of inputs, so its time is that of reading them. Prompts use
    the same weights, at about the speed of float32. Goes in front of what lowers products (``lower-feed-forward``).

    Options:
        bits: 8 or 4.
        block: numbers that share a scale: 16, 32, 64, 128 or 256; None: for each matrix by how much smaller blocks
            shrink its ranges (FineQuant, arXiv:2308.09723).
        alpha: by what share a halving must shrink the mean range to be worth it.
        method: ``"nearest"``, or ``"gptq"`` (arXiv:2210.17323): what rounding a number loses is made up for by those
            after it, by the second moments of the calibration inputs.
        embeddings: tables that ids look up too; one that is the head's weight as well is stored once.
        exclude: names of nodes that stay in float32.
        entries: the entries to change; None: all, which share the weights.
        error: relative L2 of the model's outputs that may be lost on the calibration inputs, each entry by itself.
            Operators are then chosen by their own errors and by what they gain (`sensitivity`); None: all of them.
    """

    name: ClassVar[str] = "quantize-weights"
    gives_up: ClassVar[str] = "Weights keep 8 or 4 bits, and what they are multiplied with 8 bits."
    order: ClassVar[int] = 60

    bits: int = 8
    block: int | None = None
    alpha: float = 0.1
    method: str = "nearest"
    embeddings: bool = True
    exclude: tuple[str, ...] = ()
    entries: tuple[str, ...] | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        for option in ("exclude", "entries"):
            if getattr(self, option) is not None:
                object.__setattr__(self, option, tuple(getattr(self, option)))
        if self.error is not None and not 0 < self.error < 1:
            raise InputError(f"error is {self.error:g}; it is a relative error between 0 and 1.")
        if self.bits not in BITS:
            raise InputError(f"bits is {self.bits}; there are 8 and 4.")
        if self.block is not None and self.block not in BLOCKS:
            raise InputError(f"block is {self.block}; there are blocks of {', '.join(map(str, BLOCKS))}.")
        if self.method not in _METHODS:
            raise unknown("method", self.method, _METHODS)
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha is {self.alpha:g}; it is a share, between 0 and 1.")

    def entry_names(self, program: Program) -> list[str]:
        return named_entries(program, self.entries)

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Raises InputError: `method` is gptq, and there are no calibration inputs to measure with."""
        names = self.entry_names(program)
        support = precision.weights(processor.features())
        if program.target.device == "cpu" and precision.keeps_float32(support):
            return PassResult(False, 0, [Declined(self.name, program.default_entry, support.form)], [support.form])
        if self.error is not None:
            found = {name: [s.node for s in self._sites(program, name)] for name in names}
            return within_error(self, program, ctx, found, self._left)
        moments = moments_of(program, names, ctx) if self.method == "gptq" else Moments()
        run = _Run(Editor(program, self.name), moments, _dtypes(program), program.target.device == "cpu")
        for name in names:
            model = program.entry(name)
            for item in products(model.graph, run.dtypes):
                if isinstance(item, Product):
                    if item.node.name not in self.exclude:
                        self._product(run, item)
                else:
                    run.declined.append(Declined(self.name, item[0].name or item[0].op_type, item[1]))
            self._tables(run, model.graph)
            _drop_replaced(model.graph, run.tensors)
            if run.editor.fired:
                model.graph.opset_imports.setdefault(MICROSOFT, 1)
            run.already += sum(node.op_type in QUANTIZED for node in model.graph.all_nodes())
        fired = run.editor.fired
        notes = [self._note(run)] if fired else []
        if fired and program.target.device == "cpu" and not support.fast:
            notes.append(support.form)
        if not fired and run.already:
            reason = f"{run.already} products are quantized already, and nothing is quantized twice"
            run.declined.append(Declined(self.name, program.default_entry, reason))
            notes.append(reason)
        return PassResult(fired > 0, fired, run.declined, notes)

    def _sites(self, program: Program, entry: str) -> list[Product]:
        """What an error is measured for: products in the main graph that are large enough."""
        graph = program.entry(entry).graph
        found = (
            s for s in products(graph, _dtypes(program)) if isinstance(s, Product) and s.node.name not in self.exclude
        )
        return [s for s in found if s.tensor.size >= _LEAST and s.node.graph is graph]

    def _left(self, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        block = self.block if self.block is not None else choose_block(weight, self.alpha)
        return round_to_nearest(weight, self.bits, block).weight()

    def _product(self, run: _Run, found: Product) -> None:
        node, graph = found.node, found.node.graph
        n, k = found.sizes
        if n * k < _LEAST:
            reason = f"its weight has {n * k} numbers; what is below {_LEAST} is not worth it"
            run.declined.append(Declined(self.name, node.name or node.op_type, reason))
            return
        assert isinstance(graph, ir.Graph)
        blocks = self._blocks(run, found.tensor, found.rows)
        inputs: list[ir.Value | None] = [found.x, *self._values(run, graph, found.tensor, found.rows)]
        if found.bias is not None:
            inputs += [None, None, found.bias]
        level = {"accuracy_level": _ACCURACY_LEVEL} if run.on_cpu else {}
        settings = {"K": k, "N": n, **level, "bits": self.bits, "block_size": blocks.block}
        _swap(run.editor, node, "MatMulNBits", inputs, settings)
        if found.transpose is not None and not found.transpose.outputs[0].uses():
            run.editor.remove(found.transpose)

    def _tables(self, run: _Run, graph: ir.Graph) -> None:
        """Embeddings: rows by their ids."""
        for node in list(graph.all_nodes()) if self.embeddings else ():
            table = constant_tensor(node.inputs[0]) if is_op(node, "Gather") and node.inputs else None
            if (
                node.name in self.exclude
                or table is None
                or node.attributes.get_int("axis", 0) != 0
                or len(table.shape) != 2
            ):
                continue
            rows, width = (int(n) for n in table.shape.numpy())
            if table.dtype not in run.dtypes or rows * width < _LEAST or rows < 2:
                continue
            blocks = self._blocks(run, table, True)
            reason = ""
            if width % blocks.block:
                reason = f"its rows have {width} numbers, which blocks of {blocks.block} do not divide"
            elif node.inputs[1] is None or node.inputs[1].shape is None:
                reason = "the rank of the ids is not known"
            if reason:
                run.declined.append(Declined(self.name, node.name or node.op_type, reason))
                continue
            self._table(run, node, table, blocks)

    def _table(self, run: _Run, node: ir.Node, table: ir.TensorProtocol, blocks: Blocks) -> None:
        graph, old, editor = node.graph, node.outputs[0], run.editor
        assert isinstance(graph, ir.Graph)
        codes, _ = self._values(run, graph, table, True)
        scales = self._stored(run, graph, table, True, "scales_by_row", _typed(blocks, table)[..., None])
        settings = {"bits": self.bits, "block_size": blocks.block, "gather_axis": 0, "quantize_axis": 2}
        ids = node.inputs[1]
        rows = ir.node("GatherBlockQuantized", [codes, ids, scales], settings, domain=MICROSOFT)
        rows.name, rows.outputs[0].name = (editor.names.fresh(f"{old.name}_{what}") for what in ("blocks", "rows"))
        rows.outputs[0].type = old.type
        assert ids is not None and ids.shape is not None
        shape = editor.constant(graph, np.array([0] * len(ids.shape) + [blocks.depth], np.int64), f"{old.name}_shape")
        graph.insert_before(node, rows)
        editor.mark(rows, [node])
        # (…, blocks, block) → (…, width): zeros keep the axes of the ids.
        made = editor.node(node, "Reshape", [rows.outputs[0], shape], like=old)
        editor.replace(old, made)
        editor.remove(node)
        editor.fired += 1

    def _blocks(self, run: _Run, tensor: ir.TensorProtocol, rows: bool) -> Blocks:
        key = (id(tensor), rows)
        if key not in run.made:
            array, half = np.asarray(tensor.numpy(), np.float32), tensor.dtype == ir.DataType.FLOAT16
            weight = np.ascontiguousarray(array if rows else array.T)
            block = self.block if self.block is not None else choose_block(weight, self.alpha)
            moments = run.moments.get(key)
            if moments is not None:
                made = corrected(weight, moments, self.bits, block, half=half)
            else:
                made = round_to_nearest(weight, self.bits, block, half=half)
            run.made[key] = made
            run.tensors.append(tensor)  # kept, so that no other tensor gets its id
            run.missed += float(np.square(made.weight() - weight, dtype=np.float64).sum())
            run.total += float(np.square(weight, dtype=np.float64).sum())
        return run.made[key]

    def _values(self, run: _Run, graph: ir.Graph, tensor: ir.TensorProtocol, rows: bool) -> tuple[ir.Value, ir.Value]:
        blocks = self._blocks(run, tensor, rows)
        scales = _typed(blocks, tensor).reshape(-1)
        return (
            self._stored(run, graph, tensor, rows, "codes", blocks.codes),
            self._stored(run, graph, tensor, rows, "scales", scales),
        )

    def _stored(
        self, run: _Run, graph: ir.Graph, tensor: ir.TensorProtocol, rows: bool, what: str, array: Any
    ) -> ir.Value:
        """An initializer of `graph`; the same tensor serves all who ask for it, in every entry."""
        key = (id(tensor), rows, what)
        if key not in run.stored:
            run.stored[key] = ir.tensor(np.ascontiguousarray(array))
        kept = run.stored[key]
        for value in graph.initializers.values():
            if value.const_value is kept:
                return value
        return run.editor.constant(graph, kept, f"{tensor.name or 'weight'}_{what}")

    def _note(self, run: _Run) -> str:
        sizes = Counter(made.block for made in run.made.values())
        how = ", ".join(f"{size} ({count})" for size, count in sorted(sizes.items(), reverse=True))
        error = (run.missed / run.total) ** 0.5 if run.total else 0.0
        count = f"{len(run.made)} weight{'s' * (len(run.made) != 1)}"
        return f"{count} in {self.bits} bits, in blocks of {how}; relative error of the weights {error:.2g}"


def _dtypes(program: Program) -> tuple[ir.DataType, ...]:
    """Of weights that are quantized: on a CPU in float16 products would be slower than what they replace."""
    return FLOATS if program.target.device == "cuda" else FLOAT32_ONLY


def _typed(blocks: Blocks, tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """Scales in the weight's type, which they are numbers of."""
    return np.ascontiguousarray(blocks.scales, np.float16 if tensor.dtype == ir.DataType.FLOAT16 else np.float32)


def _drop_replaced(graph: ir.Graph, tensors: list[ir.TensorProtocol]) -> None:
    """Weights that nothing reads any more would go into the artifact."""
    replaced = {id(tensor) for tensor in tensors}
    for name, value in list(graph.initializers.items()):
        if id(value.const_value) in replaced and not (
            value.uses() or value.is_graph_output() or value.is_graph_input()
        ):
            del graph.initializers[name]


def _swap(editor: Editor, node: ir.Node, op_type: str, inputs: list[ir.Value | None], settings: dict[str, Any]) -> None:
    """Puts an operator of ONNX Runtime in the place of `node`."""
    old, graph = node.outputs[0], node.graph
    assert graph is not None
    made = ir.node(op_type, inputs, settings, domain=MICROSOFT, name=editor.names.fresh(f"{op_type}_planish"))
    made.outputs[0].name = editor.names.fresh(f"{old.name}_planish")
    made.outputs[0].type, made.outputs[0].shape = old.type, old.shape
    graph.insert_before(node, made)
    editor.mark(made, [node])
    editor.replace(old, made.outputs[0])
    editor.remove(node)
    editor.fired += 1
