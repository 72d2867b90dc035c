"""The ledger of a run: per pass, what it changed, what that cost, what it gained, and the verdict. Pure data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ErrorStats:
    """How far some outputs are from the expected ones, the worst over outputs and batches.

    Attributes:
        relative_l2: ‖got − expected‖ / ‖expected‖; for integer and bool outputs the share of unequal elements.
        max_abs: largest absolute difference.
        cosine: smallest cosine similarity (1.0 for equal outputs).
        metric: value of the user's metric, if one was given.
        output: the output where relative_l2 is worst.
    """

    relative_l2: float
    max_abs: float
    cosine: float
    metric: float | None = None
    output: str | None = None

    @property
    def cost(self) -> float:
        """What a budget is held against: the user's metric, else relative L2."""
        return self.relative_l2 if self.metric is None else self.metric

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ErrorStats:
        return cls(**data)


@dataclass(frozen=True)
class Ratio:
    """A measured speed-up: time of the first program divided by time of the second (above 1 is faster).

    Attributes:
        median: median of the paired ratios.
        low, high: bootstrap confidence interval of the median.
        runs: number of pairs.
        confidence: level of the interval.
        noisy: the machine did not let the interval decide within the time.
        baseline_ms, candidate_ms: median times in milliseconds.
    """

    median: float
    low: float
    high: float
    runs: int
    confidence: float = 0.95
    noisy: bool = False
    baseline_ms: float | None = None
    candidate_ms: float | None = None

    @property
    def faster(self) -> bool:
        """The whole interval lies above 1: measurably faster."""
        return self.low > 1.0

    @property
    def slower(self) -> bool:
        """The whole interval lies below 1: measurably slower."""
        return self.high < 1.0

    def __str__(self) -> str:
        return f"{self.median:.3f}x [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Ratio:
        return cls(**data)


@dataclass(frozen=True)
class Declined:
    """A place where a rule could have fired and did not."""

    rule: str
    node: str
    reason: str


@dataclass(frozen=True)
class EntryMeasure:
    """What was measured of one entry of a program of several: error against the original, and gain."""

    error: ErrorStats | None = None
    speedup: Ratio | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EntryMeasure:
        error, speedup = data.get("error"), data.get("speedup")
        return cls(ErrorStats(**error) if error else None, Ratio(**speedup) if speedup else None)


@dataclass
class LedgerEntry:
    """One pass of a run. `passes` with kind ``"composition"`` are the check of all together at the end.

    For a program of several entries `by_entry` holds what was measured of each; `speedup` is then the slowest of
    those that became slower, else the largest, and the errors are the worst.
    """

    name: str
    kind: str  # "exact" | "approximate" | "composition"
    nodes_before: int = 0
    nodes_after: int = 0
    fired: int = 0
    declined: list[Declined] = field(default_factory=list)
    error_previous: ErrorStats | None = None
    error_original: ErrorStats | None = None
    speedup: Ratio | None = None
    peak_memory_before: int | None = None
    peak_memory_after: int | None = None
    kept: bool = True
    verdict: str = "kept"
    seconds: float = 0.0
    reproducer: str | None = None
    by_entry: dict[str, EntryMeasure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LedgerEntry:
        data = dict(data)
        data["declined"] = [Declined(**item) for item in data.get("declined", [])]
        for key in ("error_previous", "error_original"):
            data[key] = ErrorStats(**data[key]) if data.get(key) else None
        data["speedup"] = Ratio(**data["speedup"]) if data.get("speedup") else None
        data["by_entry"] = {name: EntryMeasure.from_dict(item) for name, item in data.get("by_entry", {}).items()}
        return cls(**data)


@dataclass
class Ledger:
    """The entries of a run in order, and what holds for the run as a whole."""

    entries: list[LedgerEntry] = field(default_factory=list)
    synthetic: bool = False
    measured: bool = True
    tolerance: float | None = None
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> LedgerEntry:
        for entry in self.entries:
            if entry.name == name or entry.name.partition("{")[0] == name:
                return entry
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Ledger:
        data = dict(data)
        data["entries"] = [LedgerEntry.from_dict(item) for item in data.get("entries", [])]
        return cls(**data)
