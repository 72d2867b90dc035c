"""Which low precision a processor or a GPU has fast instructions for, and what it gets where it has none.

The passes decide by these rules, and `planish inspect` shows them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from planish.ir.machine import Gpu
from planish.ir.processor import AMX_BF16

#: Any of these: sums of products of 8 by 8 bits in 32 (VNNI, Arm's dot products).
DOT = (frozenset({"avx512_vnni"}), frozenset({"avx_vnni"}), frozenset({"asimddp"}))
#: Any of these: what ONNX Runtime has kernels for that read weights in blocks of few bits as they are.
BLOCKS = (frozenset({"avx2"}), frozenset({"asimddp"}))


@dataclass(frozen=True)
class Support:
    """What one kind of low precision is on a machine.

    Attributes:
        name: of the pass, or of the number format.
        fast: there are instructions made for it.
        form: what it becomes there, and why.
    """

    name: str
    fast: bool
    form: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def has_any(needed: Collection[frozenset[str]], features: Collection[str]) -> bool:
    """Whether a processor has all features of one of the alternatives."""
    return any(one <= set(features) for one in needed)


def bf16(features: Collection[str]) -> Support:
    """Products in bfloat16: float32 stays without matrix units."""
    if lacking := sorted(AMX_BF16 - set(features)):
        words = f"this processor lacks {', '.join(lacking)}, without which bfloat16 is no faster: float32 stays"
        return Support("bf16", False, words)
    return Support("bf16", True, "products on AMX's tiles, sums in float32")


def int8(features: Collection[str]) -> Support:
    """Products in 8-bit integers: with 7 bits of weights where sums of two products must fit 16 bits."""
    if has_any(DOT, features):
        unit = "AMX's tiles or VNNI" if "amx_int8" in features else "dot products of 8 bits"
        return Support("quantize", True, f"8-bit products, by {unit}")
    return Support(
        "quantize", False, "this processor has no instructions for sums of 8-bit products: weights keep 7 bits"
    )


def weights(features: Collection[str]) -> Support:
    """Weights in few bits: float32 stays where they would be unpacked at every step."""
    if has_any(DOT, features):
        return Support("quantize-weights", True, "codes are multiplied as they are, by dot products of 8 bits")
    if has_any(BLOCKS, features):
        words = (
            "this processor has no instructions for sums of 8-bit products: codes are multiplied by AVX2, "
            "so that what is gained is less reading"
        )
        return Support("quantize-weights", False, words)
    words = (
        "this processor lacks avx2 (or asimddp), without which weights of few bits are unpacked at every step, "
        "which is slower: float32 stays"
    )
    return Support("quantize-weights", False, words)


def keeps_float32(support: Support) -> bool:
    """Whether the pass changes nothing there."""
    return not support.fast and support.form.endswith("float32 stays")


def on_processor(features: Collection[str], runtime: str = "ort") -> list[Support]:
    """Of every pass of low precision, on ``"ort"`` or ``"tvm"``."""
    if runtime == "tvm":
        form = "the target compiles floating point in float32 only"
        return [Support(name, False, form) for name in ("bf16", "quantize", "quantize-weights")]
    return [bf16(features), int8(features), weights(features)]


def on_gpu(gpu: Gpu) -> list[Support]:
    """Of every number format, by compute capability."""
    arch = f"sm_{gpu.arch}"
    half = gpu.arch >= 70
    found = [
        Support("float16", half, "tensor cores, sums in float32" if half else f"{arch} has no tensor cores: float32"),
        Support("bfloat16", True, "tensor cores, sums in float32")
        if gpu.arch >= 80
        else Support("bfloat16", False, f"{arch} has no bfloat16: {'float16' if half else 'float32'} in its place"),
        Support("float8", True, "tensor cores")
        if gpu.arch >= 89
        else Support("float8", False, f"{arch} has no 8-bit floats: {'int8' if gpu.arch >= 61 else 'float32'} instead"),
    ]
    if gpu.arch >= 75:
        found.append(Support("int8", True, "tensor cores, sums in int32"))
    elif gpu.arch >= 61:
        found.append(Support("int8", False, f"{arch} has no tensor cores for int8: dot products (dp4a)"))
    else:
        found.append(Support("int8", False, f"{arch} has no 8-bit products: float32"))
    found.append(Support("int4", False, "weights only: unpacked to registers, so that less is read"))
    return found
