"""quantize: products in 8-bit integers, and convolutions where the ranges of activations are calibrated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

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
from planish.passes.layers.importance import observe
from planish.passes.precision import static
from planish.passes.precision.integer_choice import within_error
from planish.passes.precision.products import QUANTIZED, Product, named_entries, products
from planish.passes.precision.ranges import METHODS, Range, range_of
from planish.passes.registry import register

_MODES = ("dynamic", "static")
_LEAST = 1 << 12
_OBSERVED = "planish_activation_{}"


@dataclass
class _Run:
    program: Program
    ctx: PassContext
    editor: Editor
    declined: list[Declined] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: id of a table's tensor → its codes (rows, width), and the scales of its rows
    tables: dict[int, tuple[ir.Value, ir.Value]] = field(default_factory=dict)


@register
@dataclass(frozen=True)
class Quantize(ApproximatePass):
    """Multiplies in 8-bit integers: weights as int8 with a scale for each output, activations as uint8.

    Pays where many rows go through a product, such as prompts and batches. Goes in front of what lowers products
    (``lower-feed-forward``).

    Options:
        mode: ``"dynamic"``: each activation's range is measured when the model runs, over the whole tensor.
            ``"static"``: it is fixed by the calibration inputs; convolutions are quantized too, with the sums and pools
            between them.
        method: of the static ranges: ``"min-max"``, ``"percentile"`` or ``"mse"``.
        percentile: share of an activation's values that its range holds, in percent.
        embeddings: tables that ids look up too; one that is the head's weight as well is stored once.
        exclude: names of nodes that stay in float32.
        entries: the entries to change; None: all.
        error: relative L2 of the model's outputs that may be lost on the calibration inputs, each entry by itself.
            Operators are then chosen by their own errors and by what they gain (`sensitivity`); None: all of them.
    """

    name: ClassVar[str] = "quantize"
    gives_up: ClassVar[str] = "Weights and activations of products keep 8 bits."
    order: ClassVar[int] = 60

    mode: str = "dynamic"
    method: str = "min-max"
    percentile: float = 99.99
    embeddings: bool = True
    exclude: tuple[str, ...] = ()
    entries: tuple[str, ...] | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        for option in ("exclude", "entries"):
            if getattr(self, option) is not None:
                object.__setattr__(self, option, tuple(getattr(self, option)))
        for option, known in (("mode", _MODES), ("method", METHODS)):
            if getattr(self, option) not in known:
                raise unknown(option, getattr(self, option), known)
        if self.error is not None and not 0 < self.error < 1:
            raise InputError(f"error is {self.error:g}; it is a relative error between 0 and 1.")
        if not 50 < self.percentile <= 100:
            raise InputError(f"percentile is {self.percentile:g}; it is a share in percent, above 50 and up to 100.")

    def entry_names(self, program: Program) -> list[str]:
        return named_entries(program, self.entries)

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Raises InputError: there are no calibration inputs for what needs them, or they give what is not finite."""
        if self.error is not None:
            return within_error(self, program, ctx, self._candidates(program, ctx), _left)
        run = _Run(program, ctx, Editor(program, self.name))
        already = 0
        for name in self.entry_names(program):
            graph = program.entry(name).graph
            sites = self._sites(run, graph)
            already += sum(node.op_type in QUANTIZED for node in graph.all_nodes())
            if self.embeddings:
                self._tables(run, graph)
            if sites:
                self._static(run, name, sites) if self.mode == "static" else self._dynamic(run, graph, sites)
            if run.editor.fired:
                _drop_unused(graph)
        fired = run.editor.fired
        if fired and not _has_dot():
            run.notes.append(precision.int8(processor.features()).form)
        if not fired and already:
            reason = f"{already} operators are quantized already, and nothing is quantized twice"
            run.declined.append(Declined(self.name, program.default_entry, reason))
            run.notes.append(reason)
        return PassResult(fired > 0, fired, run.declined, run.notes)

    def _candidates(self, program: Program, ctx: PassContext) -> dict[str, list[ir.Node]]:
        run = _Run(program, ctx, Editor(program, self.name))
        found = {name: self._sites(run, program.entry(name).graph) for name in self.entry_names(program)}
        return {name: [s.node if isinstance(s, Product) else s for s in sites] for name, sites in found.items()}

    def _sites(self, run: _Run, graph: ir.Graph) -> list[static.Site]:
        found: list[static.Site] = []
        for item in products(graph):
            if isinstance(item, Product):
                n, k = item.sizes
                if item.node.name in self.exclude:
                    continue
                if n * k >= _LEAST and item.node.graph is graph:
                    found.append(item)
                    continue
                item = (item.node, f"its weight has {n * k} numbers; what is below {_LEAST} is not worth it")
            run.declined.append(Declined(self.name, item[0].name or item[0].op_type, item[1]))
        if self.mode == "static":
            nodes = [node for node in graph if static.is_convolution(node) and node.name not in self.exclude]
            found += nodes
        return found

    def _dynamic(self, run: _Run, graph: ir.Graph, sites: list[static.Site]) -> None:
        """x → (codes, scale, zero) once for all who read x; sums in int32; then their scales."""
        editor = run.editor
        measured: dict[ir.Value, list[ir.Value]] = {}
        for site in sites:
            assert isinstance(site, Product)
            node, x, old = site.node, site.x, site.node.outputs[0]
            if x not in measured:
                made = ir.node(
                    "DynamicQuantizeLinear", [x], num_outputs=3, name=editor.names.fresh(f"{x.name}_measured")
                )
                for value, what, dtype in zip(made.outputs, ("codes", "scale", "zero"), (2, 1, 2), strict=True):
                    value.name, value.type = editor.names.fresh(f"{x.name}_{what}"), ir.TensorType(ir.DataType(dtype))
                made.outputs[0].shape = x.shape
                made.outputs[1].shape = made.outputs[2].shape = ir.Shape(())
                graph.insert_before(node, made)
                editor.mark(made, [node])
                measured[x] = list(made.outputs)
            codes, scale, zero = measured[x]
            weight, steps = self._weight(run, graph, site)
            sums = editor.node(node, "MatMulInteger", [codes, weight, zero])
            sums.type, sums.shape = ir.TensorType(ir.DataType.INT32), old.shape
            whole = editor.node(node, "Cast", [sums], {"to": int(ir.DataType.FLOAT)}, like=old)
            factor = editor.node(node, "Mul", [scale, steps])
            factor.type, factor.shape = ir.TensorType(ir.DataType.FLOAT), steps.shape
            result = editor.node(node, "Mul", [whole, factor], like=old)
            if site.bias is not None:
                result = editor.node(node, "Add", [result, site.bias], like=old)
            _replace(editor, site, result)

    def _static(self, run: _Run, entry: str, sites: list[static.Site]) -> None:
        graph, editor = run.program.entry(entry).graph, run.editor
        values, same = static.activations(graph, sites)
        ranges = self._ranges(run, entry, [v for v in values if v not in same])
        ranges |= {value: ranges[other] for value, other in same.items()}
        ordered = {value: ranges[value] for value in values}
        static.put_pairs(editor, graph, ordered)
        scales = {value: chosen.scale for value, chosen in ordered.items()}
        for site in sites:
            if isinstance(site, Product):
                self._static_product(run, graph, site)
            else:
                read = site.inputs[0]
                assert read is not None
                static.put_weight(editor, graph, site, scales[_source(read)], _codes)
                editor.mark(site, [site])
                editor.fired += 1

    def _weight(self, run: _Run, graph: ir.Graph, site: Product) -> tuple[ir.Value, ir.Value]:
        """The codes (k, n) of a weight and its scales by outputs; those of a table that is looked up are its own."""
        if site.rows and (kept := run.tables.get(id(site.tensor))) is not None:
            codes, steps = kept
            turned = run.editor.node(site.node, "Transpose", [codes], {"perm": [1, 0]})
            turned.type, turned.shape = codes.type, ir.Shape(reversed(site.sizes))
            return turned, steps
        numbers, scales = _codes(site.weight(), 0)
        stem = site.tensor.name or "weight"
        codes = run.editor.constant(graph, np.ascontiguousarray(numbers.T), f"{stem}_codes")
        return codes, run.editor.constant(graph, scales, f"{stem}_scales")

    def _tables(self, run: _Run, graph: ir.Graph) -> None:
        """Embeddings: rows by their ids, each with its scale."""
        run.tables.clear()
        for node in list(graph):
            table = constant_tensor(node.inputs[0]) if is_op(node, "Gather") and node.inputs else None
            if table is None or node.attributes.get_int("axis", 0) != 0 or len(table.shape) != 2:
                continue
            if table.dtype != ir.DataType.FLOAT or table.size < _LEAST or node.name in self.exclude:
                continue
            old, ids, editor = node.outputs[0], node.inputs[1], run.editor
            if id(table) not in run.tables:
                numbers, scales = _codes(table.numpy(), 0)
                codes = editor.constant(graph, numbers, f"{table.name or 'table'}_codes")
                run.tables[id(table)] = codes, editor.constant(graph, scales, f"{table.name or 'table'}_scales")
            codes, steps = run.tables[id(table)]
            rows = editor.node(node, "Gather", [codes, ids], {"axis": 0})
            rows.type, rows.shape = codes.type, old.shape
            whole = editor.node(node, "Cast", [rows], {"to": int(ir.DataType.FLOAT)}, like=old)
            step = editor.node(node, "Gather", [steps, ids], {"axis": 0})
            step.type = steps.type
            last = editor.constant(graph, np.array([-1], np.int64), "last_axis")
            step = editor.node(node, "Unsqueeze", [step, last])
            step.type = steps.type
            editor.replace(old, editor.node(node, "Mul", [whole, step], like=old))
            editor.remove(node)
            editor.fired += 1

    def _static_product(self, run: _Run, graph: ir.Graph, site: Product) -> None:
        """x and the weight out of their codes, for a plain MatMul; the weight's scale is per output."""
        node, old, editor = site.node, site.node.outputs[0], run.editor
        codes, steps = self._weight(run, graph, site)
        weight = editor.node(node, "DequantizeLinear", [codes, steps], {"axis": 1})
        weight.type, weight.shape = ir.TensorType(ir.DataType.FLOAT), codes.shape
        result = editor.node(node, "MatMul", [node.inputs[0], weight], like=old)
        if site.bias is not None:
            result = editor.node(node, "Add", [result, site.bias], like=old)
        _replace(editor, site, result)

    def _ranges(self, run: _Run, entry: str, values: list[ir.Value]) -> dict[ir.Value, Range]:
        if run.ctx.run is None:
            raise InputError(
                "mode='static' measures ranges on calibration inputs, and there is nothing to run them with."
            )
        trial = Program({entry: run.program.entry(entry).clone()}, run.program.target, dict(run.program.provenance))
        graph = trial.entry(entry).graph
        by_name = {v.name: v for v in [*graph.inputs, *(v for node in graph for v in node.outputs)]}
        names = {value: _OBSERVED.format(index) for index, value in enumerate(values)}
        for value, name in names.items():
            observe(graph, by_name[value.name], name)
        batches = run.ctx.run(trial, entry)
        found = {}
        for value, name in names.items():
            arrays = [np.asarray(batch[name]) for batch in batches]
            if not all(np.isfinite(array).all() for array in arrays):
                raise InputError(f"the calibration inputs make '{value.name}' infinite or not a number; check them.")
            found[value] = range_of(arrays, self.method, self.percentile)
        return found


def _codes(weight: npt.NDArray[np.float32], axis: int) -> static.Codes:
    """int8 codes, and scales by the rows of `axis`, which are symmetric around zero."""
    most = 127 if _has_dot() else 63
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scales = (np.abs(weight).max(axis=others) / most).astype(np.float32)
    scales = np.where(scales == 0, np.float32(1), scales)
    shape = [1] * weight.ndim
    shape[axis] = -1
    codes = np.clip(np.rint(weight / scales.reshape(shape)), -most, most).astype(np.int8)
    return codes, scales


def _left(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    codes, scales = _codes(weight, 0)
    return codes.astype(np.float32) * scales[:, None]


def _has_dot() -> bool:
    """Without these instructions, sums of two products of 8 by 8 bits overflow 16: weights keep 7 bits then."""
    return precision.int8(processor.features()).fast


def _source(value: ir.Value) -> ir.Value:
    """The activation that a pair of QuantizeLinear and DequantizeLinear stands for."""
    restore = value.producer()
    quantize = restore.inputs[0].producer() if restore is not None and restore.inputs[0] is not None else None
    assert quantize is not None and quantize.inputs[0] is not None
    return quantize.inputs[0]


def _replace(editor: Editor, site: Product, result: ir.Value) -> None:
    editor.replace(site.node.outputs[0], result)
    editor.remove(site.node)
    if site.transpose is not None and not site.transpose.outputs[0].uses():
        editor.remove(site.transpose)
    editor.fired += 1


def _drop_unused(graph: ir.Graph) -> None:
    """Weights that nothing reads any more would go into the artifact."""
    for name, value in list(graph.initializers.items()):
        if (
            not (value.uses() or value.is_graph_output() or value.is_graph_input())
            and constant_tensor(value) is not None
        ):
            del graph.initializers[name]
