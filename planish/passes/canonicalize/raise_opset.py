"""raise-opset: lifts a model to the opset that the other passes are written for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from planish.ir.errors import InputError, VerifyError
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.ir.provenance import provenance
from planish.ir.schemas import min_ir_version
from planish.ir.verify import verify_model
from planish.passes.base import ExactPass, PassContext, PassResult
from planish.passes.canonicalize.opset_adapters import TYPED, Blocked, Names, Site, raise_node, since
from planish.passes.canonicalize.ranks import infer_ranks
from planish.passes.opset import NEWEST, OLDEST
from planish.passes.registry import register


@register
@dataclass(frozen=True)
class RaiseOpset(ExactPass):
    """Raises every entry to opset `target`, or as far as its meaning provably stays.

    An operator is let through only if every version of it up to the target merely widens types or adds attributes
    whose default is the old behaviour, or if an adapter rewrites it (attributes that became inputs, a Softmax over
    the last axis). Anything else stops the raise of its entry below the version where that operator changes, as do
    operators whose newer version has no CPU kernel in ONNX Runtime; each such node is declined with its reason.
    `fired` counts the nodes that were adapted, and is 1 where the import alone changed.

    Attributes:
        target: 13 to 23.
    """

    name: ClassVar[str] = "raise-opset"

    target: int = NEWEST

    def __post_init__(self) -> None:
        if not OLDEST <= self.target <= NEWEST:
            raise InputError(f"raise-opset raises to an opset from {OLDEST} to {NEWEST}, not to {self.target}.")

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(False)
        for name, model in program.entries.items():
            if not _versions(model):
                continue
            raised, adapted = self._highest(model, result.declined)
            if raised is not None:
                program.entries[name] = raised  # the same tensors in a graph of its own
                result.modified = True
                result.fired += max(adapted, 1)
        return result

    def _highest(self, model: ir.Model, declined: list[Declined]) -> tuple[ir.Model | None, int]:
        """The model at the highest opset that it can be raised to, and the number of nodes adapted on the way."""
        versions = _versions(model)
        current, step = min(versions.values()), self.target
        if current >= self.target:
            return None, 0
        known = model
        if any(_asks_for_types(node) for node in model.graph.all_nodes()):
            known = model.clone()
            infer_ranks(known)
        least = max(OLDEST, current + 1, *versions.values())
        reasons: list[Declined] = []
        if least > self.target:
            newest = max(versions, key=lambda body: versions[body])
            declined.append(Declined(self.name, newest, f"{newest} imports opset {versions[newest]} already"))
            return None, 0
        while step >= least:
            attempt = _Attempt(known.clone(), step)
            attempt.run()
            if not attempt.blocked:
                declined += [Declined(r.rule, r.node, f"{r.reason}; the model is at opset {step}") for r in reasons]
                return attempt.model, attempt.adapted
            reasons = attempt.blocked
            step = min(attempt.since) - 1
        declined += [Declined(r.rule, r.node, f"{r.reason}; the model stays at opset {current}") for r in reasons]
        return None, 0


class _Attempt:
    """One try to raise a model of its own, in place, to opset `target`.

    Attributes:
        adapted: number of nodes that were rewritten.
        blocked: nodes that can not be raised so far, with reasons.
        since: for each of these the opset that is the first one out of reach.
    """

    def __init__(self, model: ir.Model, target: int) -> None:
        self.model, self.target = model, target
        self.adapted = 0
        self.blocked: list[Declined] = []
        self.since: list[int] = []

    def run(self) -> None:
        for body in _bodies(self.model):
            old = body.opset_imports.get("")
            if old is not None and old < self.target:
                self._body(body, old)
        for imports in (self.model.opset_imports, *(f.opset_imports for f in self.model.functions.values())):
            if imports.get("", self.target) < self.target:
                imports[""] = self.target
        self.model.ir_version = max(self.model.ir_version, min_ir_version(self.model))
        if self.blocked:
            return
        try:
            verify_model(self.model, full=False)
        except VerifyError as error:
            self._block("the model", f"it would not be valid: {error}", self.target)

    def _body(self, body: ir.Graph, old: int) -> None:
        names = Names(body)
        for node in list(body.all_nodes()):
            if not _is_standard(node, self.model):
                continue
            site = Site(node, old, self.target, names, RaiseOpset.name)
            try:
                raise_node(site)
            except Blocked as blocked:
                shown = node.name or f"unnamed {node.op_type}"
                first = since(node.op_type, self.target) or self.target
                if since(node.op_type, old) is None:
                    first = OLDEST  # an operator of no opset
                self._block(shown, f"{node.op_type} {blocked}", first)
                continue
            if site.changed:
                self.adapted += 1
                node.metadata_props.update(provenance(RaiseOpset.name, [node]))

    def _block(self, node: str, reason: str, first: int) -> None:
        self.blocked.append(Declined(RaiseOpset.name, node, reason))
        self.since.append(first)


def _bodies(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    yield from (function.graph for function in model.functions.values())


def _is_standard(node: ir.Node, model: ir.Model) -> bool:
    return not node.domain and node.op_identifier() not in model.functions


def _versions(model: ir.Model) -> dict[str, int]:
    """The opset of each body that uses operators of ai.onnx, by what to call it."""
    found = {}
    shown = ["the main graph", *(f"function {f.domain}::{f.name}" for f in model.functions.values())]
    for name, body in zip(shown, _bodies(model), strict=True):
        if "" in body.opset_imports and any(_is_standard(node, model) for node in body.all_nodes()):
            found[name] = body.opset_imports[""]
    return found


def _asks_for_types(node: ir.Node) -> bool:
    """Whether raising the node may ask for a type or a rank that the model does not give."""
    index = TYPED.get(node.op_type) if not node.domain else None
    if index is None or index >= len(node.inputs):
        return False
    value = node.inputs[index]
    return value is not None and (value.shape is None or value.dtype is None)
