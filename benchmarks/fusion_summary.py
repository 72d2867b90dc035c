"""What the results of ``benchmarks/fusion.py`` come to."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.fusion_rows import MINE

#: Those that planish promises not to be slower than.
HELD_AGAINST = ("ort", "ort_fusions", "compile")
#: Relative L2 to eager that an exact pass may cost on these models.
LIMIT = 1e-5


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What all tables come to.

    Returns:
        `geomean`: peer → against plain ORT over the transformer rows where both ran, for planish's own and OpenVINO;
        `transformer_rows`: how many these are for planish; `slower`: [own peer, row, peer, ratio] where it is slower
        beyond the interval; `invalid`: [where, why] where an own peer failed, or is further from eager than
        :data:`LIMIT`; `causal`: own peer → length → against the fastest form of plain ORT; `linear`: what a further
        layer costs at the end of the ladder over what it costs before.
    """
    rows = result.get("rows", [])
    gains: dict[str, list[float]] = {peer: [] for peer in (*MINE, "openvino")}
    slower = []
    for row in rows:
        for peer, found in gains.items():
            item = row["peers"].get(peer, {})
            if row["transformer"] and "ratio" in item:
                found.append(item["ratio"]["median"])
        for mine in MINE:
            for peer in HELD_AGAINST:
                against = row["peers"].get(peer, {}).get(f"{mine}_against")
                if against is not None and against["high"] < 1:
                    slower.append([mine, row["row"], peer, against])
    return {
        "geomean": {peer: math.exp(sum(map(math.log, found)) / len(found)) for peer, found in gains.items() if found},
        "transformer_rows": len(gains["planish"]),
        "slower": slower,
        "invalid": invalid(result),
        "causal": {
            mine: {
                str(item["length"]): causal(item, mine) for item in result.get("causal", []) if mine in item["peers"]
            }
            for mine in MINE
        },
        "linear": linear(result.get("cost", [])),
    }


def invalid(result: dict[str, Any]) -> list[list[str]]:
    """[where, why] wherever planish does not hold what it promises of outputs."""
    found = []
    for mine in MINE:
        for row in result.get("rows", []):
            item, lengths = row["peers"].get(mine), row["lengths"].get(mine, {})
            if item is not None and item["status"] != "not installed":
                found += [[f"{row['row']} ({mine})", why] for why in reasons(item, lengths.get("worst", 0.0))]
        for row in result.get("causal", []):
            item = row["peers"].get(mine)
            if item is not None and item["status"] != "not installed":
                where = f"causal attention, {row['length']} ({mine})"
                found += [[where, why] for why in reasons(item, row["lengths"][mine])]
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


def causal(item: dict[str, Any], mine: str) -> dict[str, Any]:
    """An own peer against the fastest plain form, by default and with flush-to-zero allowed: [form, ratio] or None."""
    result: dict[str, Any] = {}
    for which, form in item["fastest"].items():
        against = item["peers"].get(form, {}).get(f"{mine}_against")
        result[which] = None if against is None else [form, against]
    return result


def linear(rungs: list[dict[str, Any]]) -> float | None:
    """Processor seconds of a further layer at the end of the ladder, over those of one before."""
    done = [(rung["layers"], rung["optimize_processor_seconds"]) for rung in rungs if rung["status"] == "ok"]
    if len(done) < 3:
        return None
    (few, first), (more, second), (most, last) = done[0], done[-2], done[-1]
    return float((last - second) / (most - more) / ((second - first) / (more - few)))
