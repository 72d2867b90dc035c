"""quantize-entries: a form of the weights for each entry, by what is fastest and by the memory that there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from planish.ir.errors import InputError, unknown
from planish.ir.program import Program
from planish.passes.base import ApproximatePass, PassContext, PassResult
from planish.passes.precision.quantize import Quantize
from planish.passes.precision.quantize_weights import QuantizeWeights
from planish.passes.registry import register

FLOAT32, INT8, WEIGHTS8, WEIGHTS4 = FORMS = ("float32", "int8", "weights8", "weights4")
#: What an entry gets where nothing is measured: prompts multiply, steps of decoding read.
_UNMEASURED = {"decode": WEIGHTS8}
Choice = Mapping[str, str]


@register
@dataclass(frozen=True)
class QuantizeEntries(ApproximatePass):
    """Gives each entry a form of its own: prompts may multiply in int8 while decoding reads weights of 4 bits.

    Which is measured on the target: of the forms that keep to the error budget the fastest for each entry. Entries of
    one form share their weights; those of two forms hold them twice. Where that is more than the memory budget, the
    fastest forms that fit are taken, by the product of the entries' gains.

    Options:
        forms: what each entry gets, as ``["prefill=int8", "decode=weights4"]``; an entry that is not named stays
            float32. None: chosen by measuring. ``int8`` is `quantize`, ``weights8`` and ``weights4`` are
            `quantize-weights`.
        candidates: the forms to choose among, besides float32.
        memory: bytes that the weights of all entries may take; None: the target's memory budget, if it has one.
    """

    name: ClassVar[str] = "quantize-entries"
    gives_up: ClassVar[str] = "Weights keep 8 or 4 bits, and what they are multiplied with 8 bits."
    order: ClassVar[int] = 60
    tuned_within_error: ClassVar[bool] = True

    forms: tuple[str, ...] | None = None
    candidates: tuple[str, ...] = (INT8, WEIGHTS8, WEIGHTS4)
    memory: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(self.candidates))
        if self.forms is not None:
            object.__setattr__(self, "forms", tuple(self.forms))
        for form in (*self.candidates, *self._choice().values()):
            if form not in FORMS:
                raise unknown("form", form, FORMS)
        if self.memory is not None and self.memory < 1:
            raise InputError(f"memory is {self.memory}; it is a number of bytes.")

    def entry_names(self, program: Program) -> list[str]:
        if self.forms is None:
            return list(program.entries)
        for name in self._choice():
            program.entry(name)  # raises for an unknown one
        return [name for name, form in self._choice().items() if form != FLOAT32]

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        chosen = self._choice() if self.forms is not None else self._unmeasured(program)
        total = PassResult(False)
        for form in FORMS[1:]:
            entries = tuple(name for name in chosen if chosen[name] == form)
            if not entries:
                continue
            done = _pass(form, entries).apply(program, ctx)
            total.modified |= done.modified
            total.fired += done.fired
            total.declined += done.declined
            total.notes += [f"{', '.join(entries)} in {form}: {note}" for note in done.notes]
        return total

    def tune(self, program: Program, gain: Callable[[ApproximatePass, float], float]) -> tuple[ApproximatePass, str]:
        if self.forms is not None:
            return self, ""
        parts = program.calibration.parts if program.calibration is not None else []
        entries = [part.entry for part in parts] or list(program.entries)  # what has no inputs can not be measured
        gains = {name: {FLOAT32: 1.0} for name in entries}
        for name, form in itertools.product(entries, self.candidates):
            if form != FLOAT32:
                gains[name][form] = gain(self._with({name: form}), 1.0)
        text = "; ".join(f"{name}: {_listed(found)}" for name, found in gains.items())
        limit = self.memory if self.memory is not None else program.target.memory
        smallest: tuple[int, QuantizeEntries] | None = None
        for choice in _ranked(gains):
            variant = self._with(choice)
            size = 0 if limit is None else _weight_bytes(variant, program)
            if limit is None or size <= limit:
                shared = "" if limit is None else f"; weights of {size} bytes of the {limit} allowed"
                return variant, f"{self.name}: {_named(choice)} ({text}){shared}"
            if smallest is None or size < smallest[0]:
                smallest = size, variant
        if smallest is None:
            return self._with({}), f"{self.name}: nothing is faster within the error budget ({text})"
        size, variant = smallest
        over = f"the smallest weights take {size} bytes, {size - (limit or 0)} over the {limit} allowed"
        return variant, f"{self.name}: no choice fits the memory budget: {over}; they are taken ({text})"

    def _choice(self) -> dict[str, str]:
        found = {}
        for item in self.forms or ():
            name, equals, form = item.partition("=")
            if not equals or name in found:
                raise InputError(f"forms has '{item}'; it names each entry once, such as 'prefill=int8'.")
            found[name] = form
        return found

    def _unmeasured(self, program: Program) -> Choice:
        wanted = {name: _UNMEASURED.get(name, INT8) for name in program.entries}
        return {name: form for name, form in wanted.items() if form in self.candidates}

    def _with(self, choice: Choice) -> QuantizeEntries:
        return replace(self, forms=tuple(f"{name}={form}" for name, form in choice.items()))


def _pass(form: str, entries: tuple[str, ...]) -> ApproximatePass:
    return Quantize(entries=entries) if form == INT8 else QuantizeWeights(int(form[-1]), entries=entries)


def _ranked(gains: Mapping[str, Mapping[str, float]]) -> Iterator[dict[str, str]]:
    """Choices that slow no entry down, those of the largest product of gains first; not float32 everywhere."""
    useful = {name: [form for form, ratio in found.items() if ratio >= 1] for name, found in gains.items()}
    choices = [dict(zip(useful, forms, strict=True)) for forms in itertools.product(*useful.values())]
    choices = [choice for choice in choices if set(choice.values()) != {FLOAT32}]
    yield from sorted(choices, key=lambda choice: -math.prod(gains[name][choice[name]] for name in choice))


def _weight_bytes(variant: QuantizeEntries, program: Program) -> int:
    copy = program.clone()
    variant.apply(copy, PassContext(program.target))
    return copy.weight_bytes()


def _named(choice: Choice) -> str:
    return ", ".join(f"{form} for {name}" for name, form in choice.items())


def _listed(found: Mapping[str, float]) -> str:
    """A ratio of 0 stands for what the error budget does not allow."""
    return ", ".join(
        f"{form} {f'{ratio:.2f}x' if ratio else 'exceeds the error budget'}" for form, ratio in found.items()
    )
