"""Which operators of a program ONNX Runtime has kernels for, before a session is made."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from planish.ir.blocks import op_name

if TYPE_CHECKING:
    import onnx_ir as ir

    from planish.ir.program import Program

_ANY_VERSION = 1 << 30


@dataclass
class Coverage:
    """Operators by how the target runs them, each with its number of nodes.

    Attributes:
        kernels: the runtime has a kernel for this version.
        functions: no kernel; the runtime runs the operator's function body instead.
        missing: neither: a session with this operator fails.
    """

    kernels: dict[str, int] = field(default_factory=dict)
    functions: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the nodes that have a kernel."""
        total = sum(map(sum, (self.kernels.values(), self.functions.values(), self.missing.values())))
        return sum(self.kernels.values()) / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.share}


def ort_cpu_coverage(program: Program) -> Coverage | None:
    """Coverage of a program on ONNX Runtime's CPU provider; None if this build does not list its kernels.

    Looks at names and versions of operators, not at element types: a kernel may still refuse a type.
    """
    kernels = _kernels()
    if kernels is None:
        return None
    counts: dict[str, Counter[str]] = {"kernels": Counter(), "functions": Counter(), "missing": Counter()}
    for model in program.entries.values():
        functions = {(f.domain, f.name) for f in model.functions.values()}
        for node in model.graph.all_nodes():
            counts[_kind(node, model, kernels, functions)][op_name(node)] += 1
    return Coverage(*(dict(counts[kind].most_common()) for kind in ("kernels", "functions", "missing")))


def _kind(
    node: ir.Node,
    model: ir.Model,
    kernels: dict[tuple[str, str], list[tuple[int, int]]],
    functions: Iterable[tuple[str, str]],
) -> str:
    version = node.version or model.opset_imports.get(node.domain, 1)
    if any(low <= version <= high for low, high in kernels.get((node.domain, node.op_type), ())):
        return "kernels"
    if (node.domain, node.op_type) in functions or _has_body(node.domain, node.op_type, version):
        return "functions"
    return "missing"


def _has_body(domain: str, op: str, version: int) -> bool:
    import onnx

    try:
        schema = onnx.defs.get_schema(op, version, domain)
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


@functools.cache
def _kernels() -> dict[tuple[str, str], list[tuple[int, int]]] | None:
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        listed = state.get_all_opkernel_def()
    except (ImportError, AttributeError):
        return None
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for kernel in listed:
        if kernel.provider == "CPUExecutionProvider":
            low, high = kernel.version_range
            domain = "" if kernel.domain == "ai.onnx" else kernel.domain
            found.setdefault((domain, kernel.op_name), []).append((low, high if high > 0 else _ANY_VERSION))
    return found or None
