"""What the results of ``benchmarks/fusion.py`` come to."""

from __future__ import annotations

import math
from typing import Any

#: Those that planish promises not to be slower than.
HELD_AGAINST = ("ort", "ort_fusions", "compile")
#: Relative L2 to eager that an exact pass may cost on these models.
LIMIT = 1e-5


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What all tables come to.

    Returns:
        `geomean`: planish against plain ORT over `transformer_rows` rows; `slower`: [row, peer, ratio] where planish
        is slower beyond the interval; `invalid`: [row, why] where planish failed, or is further from eager than
        :data:`LIMIT`; `causal`: length → planish against the fastest form of plain ORT; `linear`: what a further
        layer costs at the end of the ladder over what it costs before.
    """
    rows = result.get("rows", [])
    gains, slower = [], []
    for row in rows:
        mine = row["peers"].get("planish", {})
        if row["transformer"] and "ratio" in mine:
            gains.append(mine["ratio"]["median"])
        for peer in HELD_AGAINST:
            against = row["peers"].get(peer, {}).get("planish_against")
            if against is not None and against["high"] < 1:
                slower.append([row["row"], peer, against])
    return {
        "geomean": math.exp(sum(map(math.log, gains)) / len(gains)) if gains else None,
        "transformer_rows": len(gains),
        "slower": slower,
        "invalid": invalid(result),
        "causal": {str(item["length"]): causal(item) for item in result.get("causal", [])},
        "linear": linear(result.get("cost", [])),
    }


def invalid(result: dict[str, Any]) -> list[list[str]]:
    """[where, why] wherever planish does not hold what it promises of outputs."""
    found = []
    for row in result.get("rows", []):
        item, lengths = row["peers"].get("planish"), row["lengths"].get("planish", {})
        if item is not None:
            found += [[row["row"], why] for why in reasons(item, lengths.get("worst", 0.0))]
    for row in result.get("causal", []):
        item = row["peers"].get("planish")
        if item is not None:
            found += [[f"causal attention, {row['length']}", why] for why in reasons(item, row["lengths"])]
    for row in result.get("cost", []):
        if row["status"] != "ok":
            found.append([f"{row['layers']} layers", f"{row['status']}: {row['reason']}"])
    return found


def reasons(item: dict[str, Any], worst: float | None) -> list[str]:
    """Why an entry of planish is not valid; `worst` is the error at other lengths, None if one failed."""
    if item["status"] != "ok":
        return [f"{item['status']}: {item.get('reason', '')}"]
    found = []
    if item["relative_l2"] is not None and item["relative_l2"] > LIMIT:
        found.append(f"relative L2 {item['relative_l2']:.1e} to eager")
    if worst is None:
        found.append("failed at another length")
    elif worst > LIMIT:
        found.append(f"relative L2 {worst:.1e} to eager at another length")
    return found


def causal(item: dict[str, Any]) -> dict[str, Any]:
    """planish against the fastest plain form, by default and with flush-to-zero allowed: [form, ratio] or None."""
    result: dict[str, Any] = {}
    for which, form in item["fastest"].items():
        against = item["peers"].get(form, {}).get("planish_against")
        result[which] = None if against is None else [form, against]
    return result


def linear(rungs: list[dict[str, Any]]) -> float | None:
    """Processor seconds of a further layer at the end of the ladder, over those of one before."""
    done = [(rung["layers"], rung["optimize_processor_seconds"]) for rung in rungs if rung["status"] == "ok"]
    if len(done) < 3:
        return None
    (few, first), (more, second), (most, last) = done[0], done[-2], done[-1]
    return float((last - second) / (most - more) / ((second - first) / (more - few)))
