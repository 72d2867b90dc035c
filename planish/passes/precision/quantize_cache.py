"""quantize-cache: keys and values of earlier tokens in 8 bits or float16, for steps over long contexts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from planish.ir.causal_lm import DECODE
from planish.ir.errors import InputError, unknown
from planish.ir.ledger import Declined
from planish.ir.program import Program
from planish.ir.target import Target
from planish.passes.base import ApproximatePass, Decline, PassContext, PassResult
from planish.passes.precision.cache_edits import by_token, fixed, half
from planish.passes.precision.cache_scales import Ranges, measure, partners
from planish.passes.precision.cache_sites import CacheSite, layers_of, site_of
from planish.passes.registry import register
from planish.passes.sparsity.splice import Splicer

_FORMATS = ("int8", "float16")
_SCALES = ("token", "channel", "head")
_FLOAT_BYTES = 4


@dataclass
class _Run:
    """What one run of the pass gathers."""

    splicer: Splicer
    kernels: bool
    scales: str
    ranges: dict[str, Ranges]
    #: Bytes of a token in all caches, before and after.
    before: int = 0
    after: int = 0


@register
@dataclass(frozen=True)
class QuantizeCache(ApproximatePass):
    """Keeps the caches of a causal language model as int8, a quarter of float32, or as float16, half of it.

    A step over a long context reads all of its cache for one token. Prompts attend in float32 as before, and what they
    leave in the cache is rounded. With scales by token keys are divided by what their channels range over first (KIVI,
    arXiv:2402.02750, finds channels that are large for all tokens in keys, and none in values): that is measured on the
    calibration inputs, and if it is off, nothing is clipped.

    Options:
        format: ``"int8"``, or ``"float16"``, which has no scales.
        scales: of int8: ``"token"``, one for each token and head, found when the token is written (by a generated
            kernel); ``"channel"`` or ``"head"``, fixed by the calibration inputs, by com.microsoft's
            GroupQueryAttention, which clips what is larger. None: by token where there are generated kernels, else by
            channel.
        margin: of fixed scales: how many times what calibration saw fits.
        layers: the layers whose caches change; None: all.
    """

    name: ClassVar[str] = "quantize-cache"
    gives_up: ClassVar[str] = "Keys and values of earlier tokens keep 8 bits, or the 11 of float16."
    saves: ClassVar[str] = "memory of caches"
    order: ClassVar[int] = 61
    lowered: ClassVar[bool] = True

    format: str = "int8"
    scales: str | None = None
    margin: float = 1.5
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.format not in _FORMATS:
            raise unknown("format", self.format, _FORMATS)
        if self.scales is not None and self.scales not in _SCALES:
            raise unknown("scales", self.scales, _SCALES)
        if self.scales is not None and self.format != "int8":
            raise InputError(f"scales is '{self.scales}', and {self.format} has none; give one of the two.")
        if not 1 <= self.margin <= 16:
            raise InputError(f"margin is {self.margin:g}; it is a factor from 1 to 16.")

    def entry_names(self, program: Program) -> list[str]:
        return [DECODE] if DECODE in program.entries else list(program.entries)

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        """Raises InputError: fixed scales without anything to measure on, or `layers` that have no cache."""
        known = layers_of(program)
        reason = _refused(ctx.target) if known else "there is no cache that a step writes; task='causal-lm' has such"
        if reason:
            return PassResult(False, 0, [Declined(self.name, program.default_entry, reason)], [reason])
        for layer in self.layers or ():
            if layer not in known:
                raise InputError(f"layers names layer {layer}; there are caches of {', '.join(map(str, known))}.")
        sites: list[CacheSite] = []
        declined: list[Declined] = []
        for layer in known if self.layers is None else self.layers:
            try:
                sites.append(site_of(program, layer))
            except Decline as decline:
                declined.append(Declined(self.name, f"layer {layer}", decline.reason))
        chosen = self._scales(ctx.target, sites)
        run = _Run(Splicer(program, self.name), ctx.target.kernels, chosen, self._measure(program, ctx, sites, chosen))
        for site in sites:
            self._site(run, site)
        notes = [self._note(run, len(sites))] if sites else sorted({d.reason for d in declined})
        return PassResult(bool(sites), len(sites), declined, notes)

    # --- how ---------------------------------------------------------------------------------------------------

    def _scales(self, target: Target, sites: list[CacheSite]) -> str:
        several = next((site.layer for site in sites if site.tokens != 1), None)
        if self.scales is None:
            return "token" if target.kernels and several is None else "channel"
        if self.scales == "token" and several is not None:
            raise InputError(
                f"scales='token' is for steps of one token, and decode reads several at once (layer {several}); give "
                "scales='channel'."
            )
        return self.scales

    def _measure(self, program: Program, ctx: PassContext, sites: list[CacheSite], scales: str) -> dict[str, Ranges]:
        if self.format != "int8" or not sites:
            return {}
        itself = {site.presents[1]: np.arange(site.size) for site in sites}
        found = measure(program, ctx, {site.presents[0]: partners(site.keys, site.size) for site in sites} | itself)
        if not found and scales != "token":
            raise InputError(
                f"scales by {scales} are fixed by calibration inputs, and there is nothing to run them with; give "
                "calibration=, or scales='token'."
            )
        return found

    def _site(self, run: _Run, site: CacheSite) -> None:
        numbers = 2 * site.kv_heads * site.size
        run.before += numbers * _FLOAT_BYTES
        key, value = (run.ranges.get(name) for name in site.presents)
        if self.format == "float16":
            run.after += numbers * 2
            half(run.splicer, site, run.kernels)
        elif run.scales == "token":
            run.after += numbers + 2 * site.kv_heads * _FLOAT_BYTES
            ones = np.ones((site.kv_heads, site.size), np.float32)
            by_token(run.splicer, site, ones if key is None else key.channels())
        else:
            run.after += numbers
            assert key is not None and value is not None
            fixed(run.splicer, site, *(ranges.scales(self.margin, run.scales == "head") for ranges in (key, value)))

    def _note(self, run: _Run, count: int) -> str:
        kind = f"int8 with a scale by {run.scales}" if self.format == "int8" else self.format
        return (
            f"caches of {count} layer{'s' * (count != 1)} in {kind}: {run.before} bytes a token before, {run.after} "
            f"after ({run.after / run.before:.3f})"
        )


def _refused(target: Target) -> str:
    if target.name != "ort-cpu":
        return f"target '{target}' has no attention over a cache in fewer bits; 'ort-cpu' has"
    return ""
