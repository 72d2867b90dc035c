"""Which low precision is fast where, and what is said of the rest."""

from __future__ import annotations

import pytest

from planish.ir import precision
from planish.ir.machine import Gpu
from planish.ir.processor import AMX_BF16


def test_a_processor_with_all_of_it() -> None:
    assert all(s.fast for s in precision.on_processor(AMX_BF16 | {"avx2", "avx512_vnni", "amx_int8"}))


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (
            {"avx2", "avx512_bf16", "avx512_vnni"},
            {"bf16": "lacks amx_bf16, amx_tile", "quantize": "", "quantize-weights": ""},
        ),
        ({"avx2"}, {"bf16": "float32 stays", "quantize": "7 bits", "quantize-weights": "multiplied by AVX2"}),
        ({"sse2"}, {"bf16": "float32 stays", "quantize": "7 bits", "quantize-weights": "float32 stays"}),
        ({"asimd", "asimddp"}, {"bf16": "float32 stays", "quantize": "", "quantize-weights": ""}),
    ],
)
def test_what_a_processor_without_gets(features: set[str], words: dict[str, str]) -> None:
    for support in precision.on_processor(features):
        assert support.fast == (not words[support.name]) and words[support.name] in support.form
        assert precision.keeps_float32(support) == ("float32 stays" in support.form)


def test_gpus_by_arch() -> None:
    def fast(arch: int) -> set[str]:
        return {s.name for s in precision.on_gpu(Gpu("", arch, 1)) if s.fast}

    assert fast(60) == set() and fast(70) == {"float16"} and fast(75) == {"float16", "int8"}
    assert fast(80) == {"float16", "bfloat16", "int8"} and fast(89) == fast(90) == fast(80) | {"float8"}
    forms = {s.name: s.form for s in precision.on_gpu(Gpu("", 75, 1))}
    assert forms["bfloat16"] == "sm_75 has no bfloat16: float16 in its place"
