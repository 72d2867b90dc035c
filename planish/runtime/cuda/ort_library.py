"""A shared library of CUDA kernels for ONNX Runtime: what a program's dialect operators need on its CUDA provider.

Fat binaries with the C glue of ``native/`` around them, made and linked on a machine without a GPU; the driver
is looked for when a kernel first runs. A model keeps the operators' functions, so that it runs without the library too.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from planish.ir.graphs import dims_of
from planish.ir.machine import Version
from planish.ir.schemas import DIALECT_DOMAIN
from planish.runtime.cuda import toolchain
from planish.runtime.cuda.cache import binary
from planish.runtime.kernels.library import ORT_MINORS
from planish.runtime.kernels.linker import link
from planish.runtime.scratch import process_folder

if TYPE_CHECKING:
    import onnx_ir as ir

#: Attention with kernels for float16, and whether it takes lists of blocks.
ATTENTION = {"FlashAttention": 0, "BlockSparseAttention": 1}
SWIGLU = "SwiGLU"
SIZES = (64, 128)
_TILE = 64
_FLOAT16, _INT32 = 10, 6
_NATIVE = Path(__file__).with_name("native")
_HOST = Path(__file__).parents[1] / "kernels" / "native"
#: What drivers must take for machine code and PTX of a compiler of version 13.
_CUDA: Version = (13, 0)


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
    if node.domain != DIALECT_DOMAIN or any(v is None or v.dtype is None for v in node.inputs[:2]):
        return False
    kinds = {int(v.dtype) for v in node.inputs[: 2 if node.op_type == SWIGLU else 3]}  # type: ignore[union-attr, arg-type]
    if kinds != {_FLOAT16}:
        return False
    return node.op_type == SWIGLU or (node.op_type in ATTENTION and _head_size(node) in SIZES)


def _head_size(node: ir.Node) -> int:
    """Of attention; 0 where kernels do not take it."""
    q, k = (dims_of(value) for value in node.inputs[:2])
    heads = node.attributes.get_int("q_num_heads", 1)
    if q is None or k is None or not isinstance(q[-1], int) or q[-1] % heads:
        return 0
    if node.op_type == "FlashAttention" and bool(node.attributes.get_int("is_causal", 0)) and q[1] != k[1]:
        return 0
    if node.op_type == "BlockSparseAttention" and node.attributes.get_int("block_size", 64) % _TILE:
        return 0
    return q[-1] // heads


def library_for(models: Iterable[ir.Model]) -> CudaLibrary | None:
    """The library with the kernels of all dialect operators in `models` that have one; None if no operator has.

    Raises:
        UnsupportedError: there is no nvcc or no C compiler.
        PlanishError: compiling or linking failed.
    """
    nodes = [n for model in models for n in model.graph.all_nodes() if n.domain == DIALECT_DOMAIN]
    # ONNX Runtime takes a library's operator for all nodes of its name, so it must fit all of them.
    without = {node.op_type for node in nodes if not has_kernel(node)}
    found: dict[str, set[int]] = {}
    for node in nodes:
        if node.op_type not in without:
            found.setdefault(node.op_type, set()).add(0 if node.op_type == SWIGLU else _head_size(node))
    if not found:
        return None
    return _library(tuple((op, tuple(sorted(found[op]))) for op in sorted(found)))


@functools.cache
def _library(needed: tuple[tuple[str, tuple[int, ...]], ...]) -> CudaLibrary:
    folder = Path(tempfile.mkdtemp(prefix="cuda-", dir=process_folder("planish-cuda-")))
    families = sorted({"cuda_swiglu" if op == SWIGLU else "cuda_attention" for op, _ in needed})
    lines = [
        "/* Generated: the operators of this library, and their code. */",
        *(f'#include "{family}.h"' for family in families),
        "#define FAT_BINARY(symbol, file) \\",
        '  __asm__(".section .rodata,\\"a\\"\\n.balign 16\\n" #symbol ":\\n.incbin \\"" file "\\"\\n.previous\\n"); \\',
        '  extern const unsigned char symbol[] __attribute__((visibility("hidden")));',
    ]
    for size in sorted({size for _, found in needed for size in found}):
        for label, (source, macros) in _codes(size).items():
            file = folder / f"{label}_{size}.fatbin"
            file.write_bytes(binary(source, tuple(sorted(macros.items()))))
            lines.append(f'FAT_BINARY(code_{label}_{size}, "{file}")')
    for op, found in needed:
        lines += _attention(op, found) if op in ATTENTION else _swiglu()
    names = [op for op, _ in needed]
    setups = {op: "planish_cuda_attention" if op in ATTENTION else "planish_cuda_swiglu" for op in names}
    lines += [
        "planish_op *const planish_ops[] = {", *(f"  &op_{op}.base," for op in names), "  0};",
        "void planish_setup(void) {", *(f"  {setups[op]}(&op_{op});" for op in names), "}",
        "const char *const planish_features[] = {0};",
        f"const int planish_minor_first = {ORT_MINORS[0]}, planish_minor_last = {ORT_MINORS[1]};",
    ]  # fmt: skip
    table = folder / "table.c"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = folder / "kernels.so"
    sources = [_HOST / "host.c", _NATIVE / "driver.c", *(_NATIVE / f"{family}.c" for family in families), table]
    link(sources, [], path, [_NATIVE, _HOST], [])
    return CudaLibrary(path, (*toolchain.ARCHITECTURES, toolchain.PTX), _CUDA)


def _codes(size: int) -> dict[str, tuple[str, dict[str, int]]]:
    """Name of a form → its source and macros, for attention with heads of a size; for 0, SwiGLU's."""
    if not size:
        return {"swiglu": ("swiglu.cu", {"ELEMENT_BF16": 0})}
    prefill = {"HEAD": size, "ELEMENT_BF16": 0, "BIAS": 0}
    return {
        "one": ("attention.cu", prefill | {"GROUPS": 1}),
        "two": ("attention.cu", prefill | {"GROUPS": 2}),
        "decode": ("attention_decode.cu", {"HEAD": size, "ELEMENT_BF16": 0, "SHARED": 1}),
    }


def _attention(op: str, sizes: Iterable[int]) -> list[str]:
    types = [_FLOAT16] * 3 + [_INT32] * 3 * ATTENTION[op] + [_FLOAT16]
    forms = [
        f"  {{{size}, {_code('one', size, 1)}, {_code('two', size, 2)}, {_code('decode', size, 0)}}}," for size in sizes
    ]
    return [
        f"static const int types_{op}[] = {{{', '.join(map(str, types))}}};",
        f"static const cuda_attention_form forms_{op}[] = {{", *forms, "  {0}};",
        f'static cuda_attention_op op_{op} = {{{{{{0}}, "{op}", {len(types) - 1}, 1, types_{op}}}, '
        f"{ATTENTION[op]}, forms_{op}}};",
    ]  # fmt: skip


def _swiglu() -> list[str]:
    return [
        f"static const int types_{SWIGLU}[] = {{{_FLOAT16}, {_FLOAT16}, {_FLOAT16}}};",
        f'static cuda_swiglu_op op_{SWIGLU} = {{{{{{0}}, "{SWIGLU}", 2, 1, types_{SWIGLU}}}, '
        '{"swiglu", code_swiglu_0, 0, 0, 0}};',
    ]


def _code(label: str, size: int, groups: int) -> str:
    """A form with the shared memory that it has on Turing, Ampere and Hopper, as its source computes it."""
    name = "attention" if groups else "attention_decode"
    row = 2 * _TILE * size
    shared = [(groups + 2 * n) * row + 64 if groups else 2 * min(n, 2) * row for n in (1, 2, 3)]
    return f'{{"{name}", code_{label}_{size}, {", ".join(map(str, shared))}}}'
