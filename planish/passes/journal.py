"""Decisions of the gates, kept in a JSONL file so that an interrupted run can go on where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from planish.ir.budget import Budget
from planish.ir.errors import InputError
from planish.ir.hashing import structural_hash
from planish.ir.ledger import Ratio
from planish.ir.program import Program

SCHEMA = 1


@dataclass(frozen=True)
class Decision:
    """What the gates found for a group of passes on a program: the verdict on each that failed, and the gain."""

    failed: dict[int, str] = field(default_factory=dict)
    speedup: Ratio | None = None


class DecisionJournal:
    """Decisions by key. With a path, each is appended to the file at once, so nothing is lost to a crash.

    Args:
        path: the JSONL file, or None to keep nothing.
        resume: read the decisions that the file holds; otherwise it is begun anew.

    Raises:
        InputError: the file is something else than a journal, or with `resume` than one of this schema.
        OSError: the file can not be read or written.
    """

    def __init__(self, path: str | Path | None = None, resume: bool = False) -> None:
        self.path = Path(path) if path is not None else None
        self._known: dict[str, Decision] = {}
        if self.path is None:
            return
        if resume and self.path.exists():
            self._read(self.path)
        else:
            self._require_journal(self.path)
            self.path.write_text(json.dumps({"journal": "planish", "schema": SCHEMA}) + "\n", encoding="utf-8")

    def key(self, program: Program, passes: str, budget: Budget) -> str:
        """Identifies a decision: program (weights included), target, passes, and the limits they were held to."""
        if self.path is None:
            return ""  # nothing is kept, so the weights need not be hashed
        limits = f"{budget.error} {budget.min_gain} {getattr(budget.metric, '__qualname__', budget.metric)}"
        return f"{structural_hash(program)} {program.target} {passes} {limits}"

    def find(self, key: str) -> Decision | None:
        return self._known.get(key)

    def record(self, key: str, decision: Decision) -> None:
        if self.path is not None:
            self._known[key] = decision
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **asdict(decision)}) + "\n")

    @staticmethod
    def _require_journal(path: Path) -> None:
        """A file of the user's that is no journal is not overwritten."""
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                if not file.read(64).startswith(b'{"journal": "planish"'):
                    raise InputError(f"'{path}' is there already and is no planish journal; name another file.")

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        try:
            head = json.loads(lines[0])
            if head.get("journal") != "planish" or head.get("schema") != SCHEMA:
                raise ValueError
        except (ValueError, IndexError, AttributeError):
            raise InputError(f"'{path}' is not a planish journal of schema {SCHEMA}; run without --continue.") from None
        for line in lines[1:]:
            try:
                data = json.loads(line)
                failed = {int(k): str(v) for k, v in data["failed"].items()}
                speedup = Ratio.from_dict(data["speedup"]) if data["speedup"] else None
                self._known[data["key"]] = Decision(failed, speedup)
            except (ValueError, KeyError, TypeError, AttributeError):
                break  # a line cut off by the interruption: what comes after it was never decided
