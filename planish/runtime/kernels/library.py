"""A shared library of kernels for ONNX Runtime: what a program's dialect operators need, compiled once per process.

The library holds compiled TIR, the C glue of ``native/`` and a table that is generated here. ONNX Runtime loads it with
``register_custom_ops_library``; a model keeps the operators' functions, so that it runs without the library too.
"""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from planish.runtime.kernels.cache import cached
from planish.runtime.kernels.linker import link
from planish.runtime.kernels.op_kernels import OpKernel, kernels_for
from planish.runtime.kernels.template import Template, compile_module
from planish.runtime.scratch import process_folder

if TYPE_CHECKING:
    import onnx_ir as ir

#: Minor versions of ONNX Runtime (1.x) whose ABI the tests have run with; a library refuses others when it is loaded.
ORT_MINORS = (26, 31)
_NATIVE = Path(__file__).with_name("native")
_built: dict[tuple[OpKernel, ...], Library] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Library:
    """A compiled library.

    Attributes:
        path: of the ``.so``; it is removed when the process ends.
        features: what a processor must have, by the names of `planish.runtime.kernels.cpu`.
        kernels: what is in it.
    """

    path: Path
    features: frozenset[str]
    kernels: tuple[OpKernel, ...]


def library_for(models: Iterable[ir.Model]) -> Library | None:
    """The library with the kernels of all dialect operators in `models` that have one; None if no operator has.

    Raises:
        UnsupportedError: TVM or a C compiler is missing, or the processor has no level that kernels are made for.
        PlanishError: compiling or linking failed.
    """
    kernels = kernels_for(node for model in models for node in model.graph.all_nodes())
    if not kernels:
        return None
    with _lock:
        if kernels not in _built:
            _built[kernels] = _build(kernels)
        return _built[kernels]


def _build(kernels: tuple[OpKernel, ...]) -> Library:
    folder = Path(tempfile.mkdtemp(prefix="kernels-", dir=process_folder("planish-kernels-")))
    templates = list(dict.fromkeys(template for kernel in kernels for template in kernel.templates()))
    objects = [_object(template) for template in templates]
    features = frozenset(feature for template in templates for feature in template.cpu().features)
    table = folder / "table.c"
    table.write_text(_table(kernels, sorted(features)), encoding="utf-8")
    glue = {name for kernel in kernels for name in (kernel.source, *kernel.needs)}
    sources = [_NATIVE / name for name in ("host.c", *sorted(glue))]
    defines = ["PLANISH_AMX"] if "amx_bf16" in features else []
    path = folder / "kernels.so"
    link([*sources, table], objects, path, [_NATIVE], defines)
    return Library(path, features, kernels)


@functools.cache
def _object(template: Template) -> Path:
    """A template compiled to an object file; programs that share operators share it."""
    path = process_folder("planish-kernels-") / f"{template.symbol}.o"
    cached(template, lambda to: compile_module([template], template.cpu()).write_to_file(str(to), "o"), path)
    return path


def _table(kernels: tuple[OpKernel, ...], features: list[str]) -> str:
    """The C file that says what is in the library."""
    symbols = sorted({template.symbol for kernel in kernels for template in kernel.templates()})
    headers = sorted({kernel.source.removesuffix(".c") + ".h" for kernel in kernels})
    lines = [
        "/* Generated: the operators of this library. */",
        *(f'#include "{header}"' for header in headers),
        *(f"extern int __tvm_ffi_{symbol}(void *, const tvm_any *, int32_t, tvm_any *);" for symbol in symbols),
        *(kernel.declaration() for kernel in kernels),
        "planish_op *const planish_ops[] = {",
        *(f"  &{name}.base," for kernel in kernels for name in kernel.variables()),
        "  0};",
        "void planish_setup(void) {",
        *(f"  {kernel.setup}(&{name});" for kernel in kernels for name in kernel.variables()),
        "}",
        "const char *const planish_features[] = {",
        *(f'  "{feature}",' for feature in features),
        "  0};",
        f"const int planish_minor_first = {ORT_MINORS[0]}, planish_minor_last = {ORT_MINORS[1]};",
    ]
    return "\n".join(lines) + "\n"
