"""Writes the stages of prune-tokens into the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from planish.ir.causal_lm import PRUNED_TOKENS
from planish.ir.graphs import dims_of
from planish.ir.ops import import_functions
from planish.passes.canonicalize.editing import Editor
from planish.passes.tokens.emitter import Emitter
from planish.passes.tokens.prune_plan import MICROSOFT, Plan, Stage
from planish.passes.tokens.token_edits import run_with
from planish.passes.tokens.token_scores import Image, from_query, from_text, relevant_and_diverse

if TYPE_CHECKING:
    from planish.passes.tokens.prune_tokens import PruneTokens

#: Above every score: that of tokens which stay, of the image and beside it.
_GRID, _TEXT = 4.0, 1e30


def carry_out(options: PruneTokens, plan: Plan, editor: Editor) -> str:
    """Does what was planned; returns what to note of it."""
    image, gone, listed = plan.image, 0, []
    for number, stage in enumerate(plan.stages):
        anchor = next(node for node in plan.model.graph if node in stage.flow.readers and _reads(node, stage))
        emit, hidden = Emitter(editor, anchor), stage.flow.start
        if plan.ids is not None and not number:
            token = emit.constant(np.array(options.image_token, np.int64), "image_token")
            image = Image(image.count, None, emit.add("Cast", emit.add("Equal", plan.ids, token), to=ir.DataType.INT64))
        places = image.place(emit, hidden)
        scores = _scores(options, plan, stage, emit, places, gone, number)
        if stage.grid:
            above = np.zeros((1, stage.before), np.float32)
            above[0, list(stage.grid)] = _GRID
            scores = emit.add("Add", scores, emit.constant(above, "image_grid"))
        everywhere = emit.expand(
            emit.constant(np.array(_TEXT, np.float32), "text_score"), emit.size(hidden, 0), emit.size(hidden, 1)
        )
        scores = emit.add("ScatterElements", everywhere, places, scores, axis=1)
        fewer, kept = emit.outputs("planish.PruneTokens", 2, hidden, scores, drop=stage.dropped)
        fewer.type, kept.type = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)
        image = image.after(emit, kept, stage.kept)
        run_with(stage.flow, fewer, kept, stage.dropped, editor)
        gone += stage.dropped
        listed.append(f"{stage.kept} before layer {stage.layer}")
        for node in plan.followers.get(number, ()):
            _follow(node, gone, editor)
        for value in plan.caches.get(number, ()):
            _note(value, number, gone)
        editor.fired += 1
    import_functions(plan.model)
    where = f"{plan.entry}: " if plan.entry != "main" else ""
    return f"{where}{plan.stack}: of {plan.image.count} image tokens {', '.join(listed)} are left ({options.method})"


def _reads(node: ir.Node, stage: Stage) -> bool:
    return stage.flow.start in node.inputs


def _scores(
    options: PruneTokens, plan: Plan, stage: Stage, emit: Emitter, places: ir.Value, gone: int, number: int
) -> ir.Value:
    """(batch, image tokens)."""
    hidden, attended = stage.flow.start, stage.attended
    if attended is None:
        fixed = emit.constant(_blind(options, stage, number), "token_scores")
        return emit.expand(fixed, emit.size(hidden, 0), emit.ints(1))
    query = _query(options, plan, emit, hidden, gone)
    if options.method != "efficientvla":
        every = options.method == "fastv"
        return from_query(emit, attended, places, query, all_keys=every, hide=every and plan.lengths is not None)
    if options.query is None:
        relevance = from_text(emit, attended, places, stage.before, query)
    else:
        relevance = from_query(emit, attended, places, query, all_keys=False, hide=False)
    more = int(options.relevance * (stage.kept - options.key) + 1e-9)
    return relevant_and_diverse(emit, hidden, places, relevance, options.key, options.key + more)


def _blind(options: PruneTokens, stage: Stage, number: int) -> np.ndarray:
    """Scores that look at nothing, (1, image tokens)."""
    if options.method == "random":
        return np.random.default_rng((options.seed, number)).random((1, stage.before), np.float32)
    scores = np.zeros((1, stage.before), np.float32)
    scores[0, ((np.arange(stage.kept) + 0.5) * stage.before / stage.kept).astype(int)] = 1
    return scores


def _query(options: PruneTokens, plan: Plan, emit: Emitter, hidden: ir.Value, gone: int) -> ir.Value:
    """The place of the token that attends, int64 (batch, 1), after `gone` tokens are."""
    if options.query is not None:
        assert options.span is not None
        place = options.query - (gone if options.query > options.span[0] else 0)
        return emit.expand(emit.constant(np.array([[place]]), "query"), emit.size(hidden, 0), emit.ints(1))
    if plan.lengths is not None:
        return emit.reshape(emit.add("Sub", plan.lengths, emit.ints(1 + gone)), -1, 1)
    last = emit.reshape(emit.add("Sub", emit.size(hidden, 1), emit.ints(1)), 1, 1)
    return emit.expand(last, emit.size(hidden, 0), emit.ints(1))


def _follow(node: ir.Node, gone: int, editor: Editor) -> None:
    """Tells an attention of `decode` how many tokens its cache holds."""
    if node.domain != MICROSOFT:
        return  # it reads that off the cache
    emit = Emitter(editor, node)
    for index in (5, 6):
        value = node.inputs[index]
        assert value is not None
        fewer = emit.add("Sub", value, emit.constant(np.array(gone, np.int32), "pruned"))
        fewer.type, fewer.shape = value.type, value.shape
        node.replace_input_with(index, fewer)


def _note(value: ir.Value, number: int, gone: int) -> None:
    """A cache of another length than those before has another name for it; calibration inputs must follow."""
    if value.is_graph_input():
        value.metadata_props[PRUNED_TOKENS] = str(gone)
    dims = list(dims_of(value) or ())
    if len(dims) == 4 and isinstance(dims[2], str) and not dims[2].endswith(f"_pruned_{number}"):
        dims[2] = f"{dims[2]}_pruned_{number}"
        value.shape = ir.Shape(dims)
