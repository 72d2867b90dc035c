"""What the tests of a pass need: before and after as text, declines with reasons, numbers on plain ONNX Runtime.

Every helper runs the pass through the manager and verifies the program in full before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.ir.compare import compare_outputs, tolerance
from planish.ir.graphs import subgraphs_of
from planish.ir.hashing import structural_hash
from planish.ir.names import ensure_names
from planish.ir.ops import import_functions
from planish.ir.program import Program
from planish.passes.base import Pass, PassContext, PassResult
from planish.passes.instruments import Verify
from planish.passes.manager import PassManager
from planish.passes.pipeline import as_passes

Passes = Pass | str | Sequence[Pass | str]


def program_of(source: str | ir.Model | Program, target: str = "ort-cpu") -> Program:
    """A program of its own from ONNX text, a model, or a program; every node and value has a name."""
    if isinstance(source, Program):
        return source.clone()
    if isinstance(source, ir.Model):
        model = source.clone()
    else:
        from planish.ir.printer import parse_model

        model = parse_model(source)
    ensure_names(model)
    return Program.single(model, target)


def apply_pass(passes: Passes, program: Program, ctx: PassContext | None = None) -> PassResult:
    """Runs passes through the manager, verified in full around each."""
    found = [passes] if isinstance(passes, Pass) else as_passes(passes)
    return PassManager(found, [_VerifyStates()]).apply(program, ctx or PassContext(program.target))


class _VerifyStates(Verify):
    """Around every pass: in full where the structure is not the one that was verified last, the cheap part anyway.

    What a pass left is what the next one is given, and most passes of a pipeline leave a program as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._valid = ""

    def before(self, p: Pass, program: Program) -> None:
        state = self._look(program)
        super().before(p, program)
        self._valid = state

    def after(self, p: Pass, program: Program, result: PassResult, seconds: float) -> None:
        state = self._look(program)
        super().after(p, program, result, seconds)
        self._valid = state

    def _look(self, program: Program) -> str:
        state = structural_hash(program, contents=False)
        self.full = state != self._valid
        return state


def check_rewrite(
    passes: Passes, before: str | ir.Model | Program, after: str | ir.Model, *, edits: int | None = None
) -> PassResult:
    """Asserts that passes turn `before` into `after`, up to names of nodes and inner values, with `edits` firings.

    What nothing uses (a constant that went into an attribute) is left out on both sides; applying the passes once
    more must change nothing.
    """
    program = program_of(before)
    result = apply_pass(passes, program)
    got, want = canonical_text(program), canonical_text(program_of(after))
    assert got == want, f"the result differs.\n--- expected\n{want}\n--- got\n{got}\ndeclined: {result.declined}"
    if edits is not None:
        assert result.fired == edits, f"fired {result.fired} times, expected {edits}"
    again = apply_pass(passes, program)
    assert not again.modified, f"a second run still changes the program ({again.fired} firings)"
    return result


def check_declines(passes: Passes, source: str | ir.Model | Program, reason: str, *, count: int | None = None) -> None:
    """Asserts that passes leave a program alone and decline with a reason that contains `reason`."""
    program = program_of(source)
    text = canonical_text(program)
    result = apply_pass(passes, program)
    assert canonical_text(program) == text, f"the program was changed:\n{canonical_text(program)}"
    assert not result.modified and not result.fired, f"it fired {result.fired} times"
    found = [d.reason for d in result.declined if reason in d.reason]
    assert found, f"no decline says {reason!r}; declined: {[d.reason for d in result.declined]}"
    if count is not None:
        assert len(result.declined) == count, f"{len(result.declined)} declines, expected {count}: {result.declined}"


def check_untouched(passes: Passes, source: str | ir.Model | Program) -> None:
    """Asserts that passes find nothing: no change, and nothing declined."""
    program = program_of(source)
    text = canonical_text(program)
    result = apply_pass(passes, program)
    assert canonical_text(program) == text, f"the program was changed:\n{canonical_text(program)}"
    assert not result.declined, f"declined: {result.declined}"


def check_numerics(
    passes: Passes,
    source: str | ir.Model | Program,
    inputs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    limit: float | None = None,
    fires: bool = True,
) -> Program:
    """Asserts that passes keep the numbers, on plain ONNX Runtime with its own optimizations off.

    Args:
        inputs: arrays by input name; None: made from the specs with `seed` and sizes `dims` of symbols.
        limit: relative L2 allowed; None: what an exact pass of the outputs' dtype may cost.
        fires: also assert that the passes changed the program.

    Returns:
        The program after the passes.
    """
    from planish.ir.inputs import synthesize

    program = program_of(source)
    original = program.clone()
    result = apply_pass(passes, program)
    if fires:
        assert result.modified, f"nothing fired; declined: {result.declined}"
    feeds = dict(inputs) if inputs is not None else synthesize(original, dims=dict(dims) if dims else None, seed=seed)
    expected, got = run_reference(original, feeds), run_reference(program, feeds)
    allowed = tolerance(expected) if limit is None else limit
    error = compare_outputs(expected, got)
    assert error.relative_l2 <= allowed, f"relative L2 {error.relative_l2:.2e} > {allowed:.2e} at '{error.output}'"
    return program


def run_reference(program: Program, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Outputs by name on ONNX Runtime's CPU kernels, with its graph optimizations off."""
    import onnxruntime

    model = program.main.clone()
    import_functions(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = ir.to_proto(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    return dict(zip(names, session.run(names, arrays), strict=True))


def canonical_text(program: Program) -> str:
    """A program as text with inner names numbered in order and unused initializers left out."""
    program = program.clone()
    for model in program.entries.values():
        _canonicalize(model)
    from planish.passes.instruments import program_text

    return program_text(program)


def _canonicalize(model: ir.Model) -> None:
    graph = model.graph
    model.metadata_props.clear()
    model.producer_name = model.producer_version = model.doc_string = None
    graph.name, graph.doc_string, model.ir_version = "main", None, 10
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
    _sort(graph)
    constants = _rename(graph)
    ordered = sorted(graph.initializers.values(), key=lambda v: constants.get(v, -1))
    for value in list(graph.initializers.values()):
        del graph.initializers[value.name or ""]
    for value in ordered:
        if value in constants:
            value.name = f"c{constants[value]}"
        graph.register_initializer(value)


def _sort(graph: ir.Graph) -> None:
    """Depth first from the outputs, so that the order in which independent nodes were built does not show."""
    done: dict[ir.Node, None] = {}
    stack = [v.producer() for v in reversed(graph.outputs)]
    while stack:
        node = stack[-1]
        if node is None or node in done or node.graph is not graph:
            stack.pop()
            continue
        needed = [v.producer() for v in [*node.inputs, *_captured(node)] if v is not None]
        waiting = [n for n in needed if n is not None and n.graph is graph and n not in done]
        if waiting:
            stack += reversed(waiting)
        else:
            done[stack.pop()] = None  # type: ignore[index]
    rest = [n for n in graph if n not in done]
    ordered = [*done, *rest]
    graph.remove(list(graph))
    graph.extend(ordered)


def _captured(node: ir.Node) -> list[ir.Value | None]:
    """Values that the subgraphs of a node take from outside."""
    found: list[ir.Value | None] = []
    for graph in subgraphs_of(node):
        for inner in graph.all_nodes():
            found += inner.inputs
        found += list(graph.outputs)
    return found


def _rename(graph: ir.Graph) -> dict[ir.Value, int]:
    """Numbers nodes and inner values; returns the number of each initializer, by first use."""
    constants: dict[ir.Value, int] = {}
    for count, node in enumerate(list(graph.all_nodes())):
        node.metadata_props.clear()
        node.doc_string, node.name = None, f"n{count}"
        for value in node.inputs:
            if value is not None and value.is_initializer() and not value.is_graph_input():
                constants.setdefault(value, len(constants))
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output() and value.name:
                value.name = f"v{count}" if index == 0 else f"v{count}_{index}"
    return {v: n for v, n in constants.items() if v.graph is graph and not v.is_graph_output()}


__all__ = [
    "apply_pass",
    "canonical_text",
    "check_declines",
    "check_numerics",
    "check_rewrite",
    "check_untouched",
    "program_of",
    "run_reference",
]
