"""A shared library of CUDA kernels for ONNX Runtime: what a program's dialect operators need on its CUDA provider.

Fat binaries with the C glue of ``native/`` around them, made and linked on a machine without a GPU; the driver
is looked for when a kernel first runs. A model keeps the operators' functions, so that it runs without the library too.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from planish.ir.machine import Version
from planish.ir.schemas import DIALECT_DOMAIN
from planish.runtime.cuda import toolchain
from planish.runtime.cuda.ort_ops import family_of
from planish.runtime.cuda.ort_ops.family import Code, Family
from planish.runtime.kernels.library import ORT_MINORS
from planish.runtime.kernels.linker import link
from planish.runtime.scratch import process_folder

if TYPE_CHECKING:
    import onnx_ir as ir

_NATIVE = Path(__file__).with_name("native")
_HOST = Path(__file__).parents[1] / "kernels" / "native"
#: What drivers must take for machine code and PTX of a compiler of version 13.
_CUDA: Version = (13, 0)
_INCLUDE = (
    "#define FAT_BINARY(symbol, file) \\",
    '  __asm__(".section .rodata,\\"a\\"\\n.balign 16\\n" #symbol ":\\n.incbin \\"" file "\\"\\n.previous\\n"); \\',
    '  extern const unsigned char symbol[] __attribute__((visibility("hidden")));',
)


@dataclass(frozen=True)
class CudaLibrary:
    """A compiled library.

    Attributes:
        path: of the ``.so``; it is removed when the process ends.
        code: what its kernels are compiled for, such as ``"sm_80"`` and ``"compute_80"``.
        cuda: the version of CUDA that a driver must take.
        features: of the processor that it needs: none.
    """

    path: Path
    code: tuple[str, ...]
    cuda: Version
    features: frozenset[str] = frozenset()


def has_kernel(node: ir.Node) -> bool:
    """Whether there is a kernel for a node, by its types, sizes and attributes."""
    return _form(node) is not None


def _form(node: ir.Node) -> Hashable | None:
    family = family_of(node.op_type) if node.domain == DIALECT_DOMAIN else None
    return None if family is None else family.form(node)


def _has_one_form(op: str) -> bool:
    return bool(getattr(family_of(op), "one_form", False))


def library_for(models: Iterable[ir.Model]) -> CudaLibrary | None:
    """The library with the kernels of all dialect operators in `models` that have one; None if no operator has.

    Raises:
        UnsupportedError: there is no nvcc or no C compiler.
        PlanishError: compiling or linking failed.
    """
    nodes = [n for model in models for n in model.graph.all_nodes() if n.domain == DIALECT_DOMAIN]
    forms = [(node.op_type, _form(node)) for node in nodes]
    # ONNX Runtime takes a library's operator for all nodes of its name, so it must fit all of them.
    without = {op for op, form in forms if form is None}
    found: dict[str, set[Hashable]] = {}
    for op, form in forms:
        if op not in without:
            found.setdefault(op, set()).add(form)
    found = {op: forms for op, forms in found.items() if len(forms) == 1 or not _has_one_form(op)}
    if not found:
        return None
    return _library(tuple((op, tuple(sorted(found[op], key=repr))) for op in sorted(found)))


@functools.cache
def _library(needed: tuple[tuple[str, tuple[Hashable, ...]], ...]) -> CudaLibrary:
    folder = Path(tempfile.mkdtemp(prefix="cuda-", dir=process_folder("planish-cuda-")))
    family: dict[str, Family] = {op: found for op, _ in needed if (found := family_of(op)) is not None}
    families = sorted({family[op].native for op, _ in needed})
    codes: dict[str, Code] = {code.label: code for op, forms in needed for code in family[op].codes(op, forms)}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        binaries = list(pool.map(lambda code: code.binary(), codes.values()))
    lines = ["/* Generated: the operators of this library, and their code. */"]
    lines += [f'#include "{family}.h"' for family in families]
    lines += _INCLUDE
    for label, binary in zip(codes, binaries, strict=True):
        file = folder / f"{label}.fatbin"
        file.write_bytes(binary)
        lines.append(f'FAT_BINARY(code_{label}, "{file}")')
    for op, forms in needed:
        lines += family[op].define(op, forms)
    lines += [
        "planish_op *const planish_ops[] = {", *(f"  &op_{op}.base," for op, _ in needed), "  0};",
        "void planish_setup(void) {", *(f"  planish_{family[op].native}(&op_{op});" for op, _ in needed), "}",
        "const char *const planish_features[] = {0};",
        f"const int planish_minor_first = {ORT_MINORS[0]}, planish_minor_last = {ORT_MINORS[1]};",
    ]  # fmt: skip
    table = folder / "table.c"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = folder / "kernels.so"
    sources = [_HOST / "host.c", _NATIVE / "driver.c", *(_NATIVE / f"{family}.c" for family in families), table]
    link(sources, [], path, [_NATIVE, _HOST], [])
    return CudaLibrary(path, (*toolchain.ARCHITECTURES, toolchain.PTX), _CUDA)
