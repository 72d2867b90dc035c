"""What of a machine and its software a measurement or a floating-point result depends on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Instruction sets that change which kernels a runtime takes, as Linux names them.
_X86 = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16")
_AMX = ("amx_tile", "amx_int8", "amx_bf16")
_ARM = ("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme")
_FEATURES = frozenset((*_X86, *_AMX, *_ARM))


def fingerprint() -> dict[str, Any]:
    """Operating system, processor, instruction sets, cores, and the version of ONNX Runtime."""
    import onnxruntime

    processor, features = _processor()
    return {
        "os": platform.system(),
        "machine": platform.machine(),
        "processor": processor,
        "features": features,
        "cores": os.cpu_count() or 0,
        "onnxruntime": onnxruntime.__version__,
    }


def differences(made: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In what this machine differs from the one of an artifact, one line for each key."""
    lines = []
    for key in sorted(made.keys() & here.keys()):
        if made[key] != here[key]:
            lines.append(f"{key}: made with {_shown(made[key])}, here {_shown(here[key])}")
    return lines


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def processor_name() -> str:
    """The model of this machine's processor, as the system has it."""
    return _processor()[0]


def _processor() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor(), []
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", platform.processor()), sorted(flags & _FEATURES)
