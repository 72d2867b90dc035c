"""What `planish inspect` says of the machine, and of what an artifact needs of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planish.runtime.units import printable, size

if TYPE_CHECKING:
    from planish.ir.machine import Machine, Needs
    from planish.ir.target import Target

#: Instructions worth a word that are no level of their own.
_NOTABLE = ("avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimddp", "i8mm", "sve")


def described(target: Target) -> dict[str, Any]:
    """Processor, GPUs, software; what of the target is there; and what low precision is on it."""
    from planish.ir import precision
    from planish.runtime import machine as probe

    here = probe.machine()
    found = {"kind": "machine", "target": str(target), "machine": _plain(here)}
    found |= _points(probe.needs_of_target(target), here)
    low = precision.on_processor(here.processor.features, target.runtime) if target.device == "cpu" else []
    if target.device == "cuda" and here.gpus:
        low = precision.on_gpu(here.gpus[0])
    return found | {"precision": [item.to_dict() for item in low]}


def needed(path: str | Path) -> dict[str, Any]:
    """What an artifact needs, point by point, and whether this machine has it."""
    from planish.runtime import machine as probe
    from planish.runtime.artifact import read_manifest

    manifest = read_manifest(path)
    found = _points(probe.needs_of(manifest), probe.machine())
    compiled = any(entry.file in manifest.native for entry in manifest.entries.values())
    interface = {
        role: {name: [str(spec) for spec in getattr(entry, role)] for name, entry in manifest.entries.items()}
        for role in ("inputs", "outputs")
    }
    return found | {"made_for": manifest.target, "pipeline": manifest.pipeline, "compiled": compiled} | interface


def planned(path: str | Path, target: Target, dims: Mapping[str, int]) -> dict[str, Any]:
    """The plan of an artifact under a memory budget, or why there is none; empty for other artifacts."""
    from planish.runtime.artifact import budget_table, is_budgeted, read_manifest
    from planish.runtime.offload.account import MemoryBudgetError

    if not is_budgeted(read_manifest(path)):
        return {}
    asked = target if target.name == "ort-cuda" and target.memory is not None else None
    try:
        found = budget_table(path, asked, dims)
    except MemoryBudgetError as error:
        return {"plan": None, "table": [str(error)]}
    return {} if found is None else {"plan": found[0], "table": found[1]}


def _points(needs: Needs, here: Machine) -> dict[str, Any]:
    from planish.ir.machine import points, unmet

    stated = [dataclasses.asdict(point) for point in points(needs, here)]
    return {"needs": stated, "unmet": unmet(needs, here)}


def _plain(here: Machine) -> dict[str, Any]:
    from planish.runtime.kernels.cpu import LEVELS

    processor = here.processor
    levels = [x.name for x in LEVELS.values() if x.machine == processor.machine and x.features <= processor.features]
    return {
        "processor": {
            "name": processor.name,
            "machine": processor.machine,
            "cores": processor.cores,
            "memory": processor.memory,
            "levels": levels,
            "features": [name for name in _NOTABLE if name in processor.features],
        },
        "gpus": [{**dataclasses.asdict(gpu), "arch": f"sm_{gpu.arch}", "features": gpu.features} for gpu in here.gpus],
        "driver": here.driver or None,
        "cuda": ".".join(map(str, here.cuda)) if here.cuda is not None else None,
        "no_gpu": here.no_gpu or None,
        "software": dict(here.software),
        "providers": list(here.providers),
    }


def show(found: Mapping[str, Any], console: Console) -> None:
    """The machine, the needs with whether each is met, and low precision; of `found`, what is there."""
    facts = Table.grid(padding=(0, 2))
    for label, value in [*_machine(found.get("machine")), *_artifact(found)]:
        facts.add_row(Text(label, style="bold"), Text(printable(value, 600)))
    if facts.row_count:
        console.print(facts)
    if found.get("needs"):
        console.print(_needs(found))
    if found.get("table"):
        console.print(Text("\n".join(found["table"])))
    if found.get("precision"):
        table = Table(title=Text("Low precision here", style="bold"), title_justify="left")
        for name in ("", "fast", "what it is here"):
            table.add_column(name, overflow="fold")
        for item in found["precision"]:
            table.add_row(item["name"], *_mark(item["fast"], "no"), Text(item["form"]))
        console.print(table)
    if "unmet" in found:
        what = "It" if found["kind"] == "artifact" else f"Target {found['target']}"
        count = len(found["unmet"])
        verdict = f"{what} runs on this machine." if not count else f"{what} does NOT run on this machine: see 'no'."
        console.print(Text(verdict, style="bold red" if count else "bold green"))


def _machine(here: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if here is None:
        return []
    cpu = here["processor"]
    memory = f", {size(cpu['memory'])} of memory" if cpu["memory"] else ""
    rows = [
        ("Processor", f"{cpu['name'] or 'of unknown name'} ({cpu['machine']}), {cpu['cores']} cores{memory}"),
        ("Instructions", ", ".join([*cpu["levels"], *cpu["features"]]) or "none that kernels are generated for"),
    ]
    for index, gpu in enumerate(here["gpus"]):
        free = f", {size(gpu['free'])} free" if gpu["free"] is not None else ""
        text = f"{gpu['name']}, {gpu['arch']}, {size(gpu['memory'])}{free}, {gpu['processors']} multiprocessors"
        rows += [(f"GPU {index}", text), ("", ", ".join(gpu["features"]))]
    if here["no_gpu"]:
        rows.append(("GPU", here["no_gpu"]))
    if here["cuda"]:
        rows.append(("Driver", f"{here['driver'] or 'of unknown version'}, up to CUDA {here['cuda']}"))
    rows += [(name, text) for name, text in here["software"].items()]
    return [*rows, ("Providers", ", ".join(here["providers"]))] if here["providers"] else rows


def _artifact(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    if found["kind"] != "artifact":
        return []
    rows = [("Made for", found["made_for"])]
    if found["compiled"]:  # its graph would say these
        rows = [("Artifact", found["path"]), *rows, ("Passes", found["pipeline"])]
        for role in ("inputs", "outputs"):
            rows += [(f"{role.capitalize()} of {name}", ", ".join(specs)) for name, specs in found[role].items()]
    return rows


def _needs(found: Mapping[str, Any]) -> Table:
    title = f"What {'it' if found['kind'] == 'artifact' else found['target']} needs"
    table = Table(title=Text(title, style="bold"), title_justify="left")
    for name in ("need", "met", "here"):
        table.add_column(name, overflow="fold")
    for point in found["needs"]:
        missing = "no" if point["required"] else "slower"
        table.add_row(Text(printable(point["need"], 300)), *_mark(point["met"], missing), printable(point["have"], 300))
    return table


def _mark(met: bool, otherwise: str) -> Sequence[Text]:
    return [Text("yes", style="green") if met else Text(otherwise, style="yellow" if otherwise == "slower" else "red")]
