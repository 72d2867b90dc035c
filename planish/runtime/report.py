"""The report of an optimization: what was done, what it gained, what it cost. Data that prints and saves itself."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planish.ir.blocks import Block, graph_blocks
from planish.ir.ledger import EntryMeasure, ErrorStats, Ledger, LedgerEntry, Ratio
from planish.ir.spec import TensorSpec
from planish.runtime.units import number, percent_change, ratio_text
from planish.version import __version__

if TYPE_CHECKING:
    from planish.ir.program import Program

_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
#: Keys whose values are floats; a non-finite one is a string in JSON, which has no word for it.
_FLOAT_KEYS = {"relative_l2", "max_abs", "cosine", "metric", "median", "low", "high", "confidence", "baseline_ms"}
_FLOAT_KEYS |= {"candidate_ms", "seconds", "tolerance", "latency_ms", "error_budget", "flops"}


@dataclass(frozen=True)
class Stats:
    """A program in numbers.

    Attributes:
        nodes: nodes of all entries, those in subgraphs included.
        ops: operator → number of nodes.
        weight_bytes: size of the distinct weights.
        latency_ms: median time of a run in milliseconds; None when not measured.
        peak_activation_bytes: predicted peak of intermediate values; None when not known.
        flops: floating point operations of a run on the report's inputs; None when not known.
    """

    nodes: int
    ops: dict[str, int]
    weight_bytes: int
    latency_ms: float | None = None
    peak_activation_bytes: int | None = None
    flops: float | None = None

    @classmethod
    def of(cls, program: Program, latency_ms: float | None, peak: int | None, flops: float | None) -> Stats:
        from planish.ir.printer import op_counts

        return cls(program.node_count(), op_counts(program), program.weight_bytes(), latency_ms, peak, flops)


@dataclass
class Report:
    """What one call of `optimize` did. Made by :meth:`build`; the same object after a trip through JSON."""

    model: str
    target: str
    pipeline: str
    before: Stats
    after: Stats
    ledger: Ledger
    inputs: list[TensorSpec] = field(default_factory=list)
    outputs: list[TensorSpec] = field(default_factory=list)
    error: ErrorStats | None = None
    speedup: Ratio | None = None
    error_budget: float | None = None
    synthetic_inputs: bool = False
    verdict: str = ""
    seconds: float = 0.0
    version: str = __version__
    graph_before: list[Block] = field(default_factory=list)
    graph_after: list[Block] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        *,
        model: str,
        before: Program,
        after: Program,
        pipeline: str,
        ledger: Ledger,
        error: ErrorStats | None,
        speedup: Ratio | None,
        cost_before: float | None = None,
        cost_after: float | None = None,
        peak_before: int | None = None,
        peak_after: int | None = None,
        seconds: float,
        error_budget: float | None = None,
    ) -> Report:
        """Collects what a report shows.

        Args:
            before, after: the program as it came and as it leaves.
            error: of `after` against `before` on the calibration inputs, or None when not measured.
            speedup: of `after` over `before` on the target, or None when not measured.
            cost_before, cost_after: floating point operations of one run.
            peak_before, peak_after: predicted peak of activations, in bytes.
            seconds: wall time of the whole optimization.
            error_budget: what approximate passes were allowed, in the units of the gate.
        """
        base_ms, new_ms = (speedup.baseline_ms, speedup.candidate_ms) if speedup else (None, None)
        entry = after.default_entry
        report = cls(
            model=model,
            target=str(after.target),
            pipeline=pipeline,
            before=Stats.of(before, base_ms, peak_before, cost_before),
            after=Stats.of(after, new_ms, peak_after, cost_after),
            ledger=ledger,
            inputs=after.inputs(entry),
            outputs=after.outputs(entry),
            error=error,
            speedup=speedup,
            error_budget=error_budget,
            synthetic_inputs=ledger.synthetic,
            seconds=seconds,
            graph_before=graph_blocks(before),
            graph_after=graph_blocks(after),
        )
        report.verdict = report.summary()
        return report

    @property
    def passes(self) -> list[LedgerEntry]:
        """The entries of the ledger that are passes (not the check of all together)."""
        return [entry for entry in self.ledger.entries if entry.kind != "composition"]

    @property
    def idle(self) -> list[LedgerEntry]:
        """Passes that had nothing to do."""
        return [entry for entry in self.passes if is_idle(entry)]

    @property
    def acted(self) -> list[LedgerEntry]:
        """Passes that changed the program, or were rolled back."""
        return [entry for entry in self.passes if not is_idle(entry)]

    @property
    def by_entry(self) -> dict[str, EntryMeasure]:
        """For a program of several entries: error and gain of each, all passes together."""
        totals = [entry.by_entry for entry in self.ledger.entries if entry.kind == "composition"]
        return totals[-1] if totals else {}

    def summary(self) -> str:
        """The one sentence at the end: the gain, the error, the change of the graph, the passes kept."""
        parts = [self._gain_words(), self._error_words()]
        if self.speedup is None and self.error is None:
            parts = ["neither speed nor error was measured"]
        nodes = f"{self.before.nodes} → {self.after.nodes} nodes"
        if self.before.nodes == self.after.nodes:
            nodes = f"{self.after.nodes} nodes"
        acted = self.acted
        kept = sum(entry.kept for entry in acted)
        parts += [nodes, f"kept {kept} of {len(acted)} passes" if acted else "no pass had anything to do"]
        text = ", ".join(part for part in parts if part)
        return text[:1].upper() + text[1:] + "."

    def _gain_words(self) -> str:
        ratio = self.speedup
        if ratio is None:
            return "speed not measured"
        apart = {name: found.speedup for name, found in self.by_entry.items() if found.speedup is not None}
        if apart:
            return "speed of " + " and of ".join(f"{name} {ratio_text(found)}" for name, found in apart.items())
        if ratio.faster:
            return f"{ratio_text(ratio)} faster"
        if ratio.slower:
            return f"slower than before: {ratio_text(ratio)}"
        return f"no measurable change in speed ({ratio_text(ratio)})"

    def _error_words(self) -> str:
        if self.error is None:
            return "error not measured"
        if self.error.metric is not None:
            return f"metric {number(self.error.metric)}"
        return f"error {number(self.error.relative_l2)}" if self.error.relative_l2 else "error 0"

    def budget_lines(self) -> list[str]:
        """What exact and what approximate passes cost, kept apart: the first may cost rounding only."""
        exact = [e for e in self.passes if e.kind == "exact" and e.kept and e.fired]
        loose = [e for e in self.passes if e.kind == "approximate" and e.kept]
        lines = []
        if exact:
            plural = "pass" if len(exact) == 1 else "passes"
            limit = self.ledger.tolerance
            bound = f" (rounding only, held to {number(limit)})" if limit is not None else " (rounding only)"
            spent = "none of the error budget spent" if self.error is not None else "error not measured"
            lines.append(f"{len(exact)} exact {plural}: {spent}{bound if self.error is not None else ''}")
        if loose:
            plural = "pass" if len(loose) == 1 else "passes"
            cost = None if self.error is None else self.error.cost
            used = "error not measured" if cost is None else f"spent {number(cost)}"
            if cost is not None and self.error_budget:
                share = 100 * cost / self.error_budget
                used += f" of {number(self.error_budget)} ({share:.0f}% of the error budget)"
            lines.append(f"{len(loose)} approximate {plural}: {used}")
        return lines

    def remarks(self) -> list[str]:
        """What a reader must know to read the numbers right; notes of the ledger come last."""
        lines = []
        if self.synthetic_inputs and self.error is not None:
            lines.append("Inputs were synthetic (made from the input specs): give your own for an error you can trust.")
        if self.error is None and self.speedup is None and not self.ledger.notes:
            lines.append("Neither error nor speed was measured.")
        if self.speedup is not None and self.speedup.noisy:
            lines.append("The machine was too noisy to settle the speed-up within the time allowed.")
        said = [f"{e.name.partition('{')[0]}: {note}" for e in self.ledger.entries if e.kept for note in e.notes]
        return lines + said + [note for note in self.ledger.notes if note not in lines]

    def size_change(self) -> str:
        return percent_change(self.before.weight_bytes, self.after.weight_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; :meth:`from_dict` gives back an equal report."""
        data: dict[str, Any] = {
            "schema": 1,
            "version": self.version,
            "model": self.model,
            "target": self.target,
            "pipeline": self.pipeline,
            "verdict": self.verdict,
            "seconds": self.seconds,
            "synthetic_inputs": self.synthetic_inputs,
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
            "error": self.error.to_dict() if self.error else None,
            "error_budget": self.error_budget,
            "speedup": self.speedup.to_dict() if self.speedup else None,
            "before": dict(vars(self.before), ops=dict(self.before.ops)),
            "after": dict(vars(self.after), ops=dict(self.after.ops)),
            "ledger": self.ledger.to_dict(),
            "graph_before": [block.to_dict() for block in self.graph_before],
            "graph_after": [block.to_dict() for block in self.graph_after],
        }
        encoded: dict[str, Any] = encode(data)
        return encoded

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: the data is not a report.
        """
        data = _decode(data)
        error, speedup = data["error"], data["speedup"]
        return cls(
            model=data["model"],
            target=data["target"],
            pipeline=data["pipeline"],
            before=Stats(**data["before"]),
            after=Stats(**data["after"]),
            ledger=Ledger.from_dict(data["ledger"]),
            inputs=[TensorSpec.from_dict(item) for item in data["inputs"]],
            outputs=[TensorSpec.from_dict(item) for item in data["outputs"]],
            error=ErrorStats.from_dict(error) if error else None,
            speedup=Ratio.from_dict(speedup) if speedup else None,
            error_budget=data.get("error_budget"),
            synthetic_inputs=data["synthetic_inputs"],
            verdict=data["verdict"],
            seconds=data["seconds"],
            version=data["version"],
            graph_before=[Block.from_dict(item) for item in data.get("graph_before", [])],
            graph_after=[Block.from_dict(item) for item in data.get("graph_after", [])],
        )

    def print(self, console: Any = None) -> None:
        """Writes the tables to the terminal (or to the given `rich.console.Console`)."""
        from planish.runtime.report_text import print_report

        print_report(self, console)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes one page that needs no network and no other file.

        Raises:
            InputError: the path can not be written.
        """
        from planish.runtime.report_html import write_html

        write_html(self, path)


def is_idle(entry: LedgerEntry) -> bool:
    """The pass ran, and found nothing that it could change."""
    return entry.kept and not entry.fired and entry.nodes_before == entry.nodes_after and entry.speedup is None


def encode(item: Any) -> Any:
    """Data for strict JSON, which has no word for infinity and NaN: they become strings, tuples become lists."""
    if isinstance(item, dict):
        return {key: encode(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return [encode(value) for value in item]
    if isinstance(item, float) and not math.isfinite(item):
        return "nan" if math.isnan(item) else ("inf" if item > 0 else "-inf")
    return item


def _decode(item: Any) -> Any:
    if isinstance(item, dict):
        return {
            key: _NON_FINITE.get(value, value) if key in _FLOAT_KEYS and isinstance(value, str) else _decode(value)
            for key, value in item.items()
        }
    if isinstance(item, list):
        return [_decode(value) for value in item]
    return item
