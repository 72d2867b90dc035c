"""Makes a tensor-parallel set of programs out of one: heads and hidden units are shared out (arXiv 1909.08053).

Each program keeps its share of the query heads (with the heads of keys and values that they read) and of the hidden
units of every feed-forward network: columns of the weights that make them, rows of the weight that reads them. What
that last product gives is then one addend, and an AllReduce behind it makes the sum. Everything else is the same on
all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from planish.ir.errors import InputError, UnsupportedError
from planish.ir.graphs import constant_tensor
from planish.ir.ledger import Declined
from planish.ir.parallel import ALL_REDUCE, RANK, RANKS, SHARD_AXIS
from planish.ir.program import Program
from planish.passes.base import Decline, PassContext
from planish.passes.canonicalize.editing import Editor
from planish.passes.canonicalize.eliminate_dead_code import EliminateDeadCode
from planish.passes.layers.head_edits import Memo, cut_heads, require_sizes, require_untied
from planish.passes.layers.head_flow import Cut, HeadFlow
from planish.passes.layers.head_sites import find_sites
from planish.passes.layers.units import units_of
from planish.passes.parallel.hidden_flow import HiddenFlow, hidden_flow

_NAME = "tensor-parallel"


@dataclass(frozen=True)
class TensorParallel:
    """Programs that compute one model together, by rank.

    Attributes:
        programs: one for each rank, with the entries of the whole one.
        attentions, networks: how many attentions and feed-forward networks are shared out, in all entries.
        declined: those that every rank computes as a whole, with the reason.
    """

    programs: list[Program]
    attentions: int
    networks: int
    declined: list[Declined] = field(default_factory=list)


def tensor_parallel(program: Program, ranks: int) -> TensorParallel:
    """Shares a program out among `ranks` devices.

    Takes a program as the recognizing passes leave it (`planish.passes.defaults.RECOGNIZE`): attention is one
    operator, and nothing is lowered yet. `program` is not changed.

    Raises:
        InputError: `ranks` is less than 2, or the program is one of several already.
        UnsupportedError: nothing in the program can be shared out; the message has the first reasons.
    """
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 2:
        raise InputError(f"ranks is {ranks!r}; tensor parallelism takes at least 2.")
    if RANKS in program.provenance:
        raise InputError(f"the program is one of {program.provenance[RANKS]} already; share out the whole one.")
    made = [_share(program, rank, ranks) for rank in range(ranks)]
    first = made[0]
    if not first.attentions + first.networks:
        reasons = "; ".join(dict.fromkeys(item.reason for item in first.declined[:3])) or "no repeated layers"
        raise UnsupportedError(f"nothing of the program can be shared out among {ranks} ranks: {reasons}.")
    programs = [share.programs[0] for share in made]
    return TensorParallel(programs, first.attentions, first.networks, first.declined)


def _share(program: Program, rank: int, ranks: int) -> TensorParallel:
    """The program of one rank."""
    from planish.ir.infer import infer_shapes
    from planish.ir.names import ensure_names

    mine = program.clone()
    mine.calibration = None
    mine.provenance |= {RANK: str(rank), RANKS: str(ranks)}
    for model in mine.entries.values():
        ensure_names(model)
        infer_shapes(model)
    editor, memo = Editor(mine, _NAME), Memo()
    networks, declined = _networks(mine, ranks)
    stacks, others = find_sites(mine, None, False, _NAME)
    attentions = [flow for stack in stacks for site in stack.sites for flow in _heads(site.flows, ranks, others, site)]
    for flow in attentions:
        _cut(flow, rank, ranks, editor, memo)
    for flow in networks:
        _cut(flow, rank, ranks, editor, memo)
    for flow in (*attentions, *networks):
        for cut in flow.projections:
            _reduce(editor, cut.node)
    for model in mine.entries.values():
        if editor.fired:
            model.graph.opset_imports.setdefault(ALL_REDUCE[0], 1)
    EliminateDeadCode().apply(mine, PassContext(mine.target))
    return TensorParallel([mine], len(attentions), len(networks), [*others, *declined])


def _heads(flows: dict[str, HeadFlow], ranks: int, declined: list[Declined], site: object) -> list[HeadFlow]:
    found = list(flows.values())
    counts = found[0].counts
    if counts["kv"] % ranks:
        reason = f"{counts['kv']} heads of keys and values are not shared evenly by {ranks} ranks"
        declined.append(Declined(_NAME, getattr(site, "name", "attention"), reason))
        return []
    return found


def _networks(program: Program, ranks: int) -> tuple[list[HeadFlow], list[Declined]]:
    """The feed-forward networks of all entries whose hidden units can be told apart."""
    from planish.ir.analyses.layers import find_layers

    found: list[HeadFlow] = []
    declined: list[Declined] = []
    for model in program.entries.values():
        for stack in find_layers(model).stacks:
            for unit in units_of(stack, "ffn"):
                part = unit.part
                assert part is not None
                try:
                    if stack.tied:
                        raise Decline(f"the layers of '{stack.name}' share their weights")
                    if part.kind == "moe":
                        raise Decline("it is a mixture of experts")
                    flow: HiddenFlow = hidden_flow(model.graph, part)
                    if flow.counts["q"] % ranks:
                        raise Decline(f"{flow.counts['q']} hidden units are not shared evenly by {ranks} ranks")
                    require_sizes(flow)
                    found.append(flow)
                except Decline as decline:
                    declined.append(Declined(_NAME, f"{unit.layer.name} {part.kind}", decline.reason))
    try:
        require_untied(program, found)
    except Decline as decline:
        return [], [*declined, Declined(_NAME, "feed-forward networks", decline.reason)]
    return found, declined


def _cut(flow: HeadFlow, rank: int, ranks: int, editor: Editor, memo: Memo) -> None:
    """Leaves a rank's part of the heads, and notes which inputs and outputs hold a part only."""
    kept: dict[str, Sequence[int]] = {
        role: [int(i) for i in np.array_split(np.arange(count), ranks)[rank]] for role, count in flow.counts.items()
    }
    cut_heads(flow, kept, editor, memo)
    for value, layout in flow.layouts.items():
        if value.is_graph_input() or value.is_graph_output():
            value.metadata_props[SHARD_AXIS] = str(layout.axis)


def _reduce(editor: Editor, product: ir.Node) -> None:
    """Puts the sum over all ranks behind a product; a bias that the product adds comes after it, once."""
    bias = product.inputs[2] if product.op_type == "Gemm" and len(product.inputs) > 2 else None
    graph, old = product.graph, product.outputs[0]
    assert isinstance(graph, ir.Graph)
    domain, name = ALL_REDUCE
    made = ir.node(name, [old], domain=domain, name=editor.names.fresh("AllReduce_planish"))
    total = made.outputs[0]
    total.name = editor.names.fresh(f"{old.name}_sum")
    total.type, total.shape = old.type, old.shape
    users = list(old.uses())
    graph.insert_after(product, made)
    editor.mark(made, [product])
    last, end = total, made
    if bias is not None:
        beta = product.attributes.get_float("beta", 1.0)
        tensor = constant_tensor(bias)
        if beta != 1.0 and tensor is not None:
            scaled = np.asarray(beta * tensor.numpy(), tensor.numpy().dtype)
            bias = editor.constant(graph, scaled, f"{bias.name}_scaled")
        product.replace_input_with(2, None)
        end = ir.node("Add", [total, bias], name=editor.names.fresh("Add_planish"))
        last = end.outputs[0]
        last.name = editor.names.fresh(f"{old.name}_biased")
        last.type, last.shape = old.type, old.shape
        graph.insert_after(made, end)
        editor.mark(end, [product])
    output = old.is_graph_output()
    for user, index in users:
        if user is not made:
            user.replace_input_with(index, last)
    if output:
        editor.replace(old, last)
        made.replace_input_with(0, old)
    editor.fired += 1


__all__ = ["Cut", "TensorParallel", "tensor_parallel"]
