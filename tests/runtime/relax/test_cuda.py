"""What is generated for GPUs, as source: nvcc is left out, so that many forms cost little."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from planish.ir.errors import UnsupportedError
from planish.ir.infer import infer_shapes
from planish.ir.spec import TensorSpec
from planish.runtime.cuda import toolchain
from tests.runtime.models import model

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(toolchain.nvcc() is None, reason="no nvcc, and the CUDA runtime comes with it")


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, object]]:
    """Text and weights of a program → its CUDA source, and what `build` gives."""
    from planish.runtime.relax.cuda import assemble
    from planish.runtime.relax.cuda.build import build

    sources: list[str] = []

    def fatbin(self: object, source: str, folder: Path, **defines: int) -> bytes:
        sources.append((folder / source).read_text())
        return b"\0"

    monkeypatch.setattr(assemble.Codes, "fatbin", fatbin)

    def run(text: str, weights: dict[str, np.ndarray] | None = None, opset: int = 20) -> tuple[str, object]:
        made = model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}', weights)
        infer_shapes(made)
        inputs = [TensorSpec.of(v) for v in made.graph.inputs if v.name not in made.graph.initializers]
        sources.clear()
        compiled = build(made, inputs, "sm_75")
        text = "".join(sources)
        return text[text.find('extern "C"') :] if sources else "", compiled

    return run


def kernels(source: str) -> set[str]:
    return set(re.findall(r"(\w+)_kernel\(", source))


def weight(*shape: int, dtype: str = "float16") -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def test_a_product_takes_bias_and_residual_along(generate: Callable[..., tuple[str, object]]) -> None:
    text = """g (float16[n, 64] x) => (float16[n, 64] y) {
      a = MatMul(x, w)  b = Add(a, c)  y = Add(b, x)
    }"""
    source, compiled = generate(text, {"w": weight(64, 64), "c": weight(64)})
    assert source == "" and compiled.device.calls == {"planish_linear"}  # type: ignore[attr-defined]


def test_elementwise_operators_are_one_kernel_with_wide_loads(generate: Callable[..., tuple[str, object]]) -> None:
    source, compiled = generate(
        "g (float16[n, 512] x, float16[n, 512] z) => (float16[n, 512] y) { a = Gelu(x) b = Mul(a, z) y = Sigmoid(b) }"
    )
    assert len(kernels(source)) == 1 and source.count("uint4*") >= 3 and "erff" in source
    assert compiled.planned is None  # type: ignore[attr-defined]


def test_what_is_not_in_order_is_read_one_by_one(generate: Callable[..., tuple[str, object]]) -> None:
    """Neighbours that do not lie beside each other, or not at a multiple of a vector, are no vector."""
    source, _ = generate(
        "g (float16[8, 64] x) => (float16[64, 8] y) { t = Transpose<perm = [1, 0]>(x) y = Identity(t) }"
    )
    assert "make_uint4" not in source
    constants = {"a": np.array([1]), "b": np.array([65]), "axis": np.array([1])}
    source, _ = generate("g (float16[8, 72] x) => (float16[8, 64] y) { y = Slice(x, a, b, axis) }", constants)
    assert "make_uint4" not in source and not re.search(r"\*\(uint4\*\)\(x_ptr", source)


def test_every_store_is_inside(generate: Callable[..., tuple[str, object]]) -> None:
    """15 vectors of 4: no block of threads is full, so that each is checked, one number at a time."""
    source, _ = generate("g (float16[5, 12] x) => (float16[5, 12] y) { a = Gelu(x) y = Mul(a, x) }")
    (body,) = re.findall(r"_kernel\([^)]*\) \{(.*?)\n\}", source, re.S)
    assert re.match(r"\s*if \(\(\(int\)threadIdx\.x\) < 60\) \{.*\}\s*$", body, re.S)


def test_rows_are_reduced_by_shuffles(generate: Callable[..., tuple[str, object]]) -> None:
    text = """g (float16[n, 768] x) => (float16[n, 768] y, float16[n, 768] s, float16[n] m) {
      y = LayerNormalization(x, w, c)  s = Softmax(x)  m = ReduceMean<keepdims = 0>(x, axes)
    }"""
    source, _ = generate(text, {"w": weight(768), "c": weight(768), "axes": np.array([1])})
    assert {"norm", "softmax", "reduce"} <= kernels(source)
    assert "__shfl_xor_sync" in source and "uint4*" in source


def test_attention_is_ours_where_it_fits(generate: Callable[..., tuple[str, object]]) -> None:
    def form(size: int, mask: str, dtype: str = "float16") -> tuple[set[tuple[int, bool]], set[str]]:
        kind = f"{dtype}[2, 9, {2 * size}]"
        text = f"""g ({kind} q, {kind} k{mask}) => ({kind} o) {{
          o = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, k{", m" if mask else ""})
        }}"""
        source, compiled = generate(text, opset=23)
        ours = [(code.size, dict(code.defines)) for code in compiled.device.ours]  # type: ignore[attr-defined]
        forms = {(size, bool(macros["BIAS"])) for size, macros in ours}
        return forms, kernels(source)

    assert form(64, "") == ({(64, False)}, set())
    with pytest.raises(UnsupportedError, match="sm_75: bfloat16 takes sm_80 or later"):
        form(64, "", "bfloat16")
    assert form(128, ", bool[2, 1, 1, 9] m") == ({(128, True)}, {"key_bias"})
    for ours, found in (form(64, ", bool[2, 1, 9, 9] m"), form(64, "", "float"), form(32, "")):
        assert not ours and "softmax" in found


def test_images(generate: Callable[..., tuple[str, object]]) -> None:
    text = """g (float16[2, 3, 17, 19] x) => (float16[2, 8, 4, 4] y) {
      a = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w, c)  r = Relu(a)
      d = Conv<group = 8>(r, wd)  p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(d)  y = Slice(p, s, e, axes)
    }"""
    weights = {"w": weight(8, 3, 3, 3), "c": weight(8), "wd": weight(8, 1, 1, 1)}
    cuts = {"s": np.array([0, 0]), "e": np.array([4, 4]), "axes": np.array([2, 3])}
    source, compiled = generate(text, weights | cuts)
    assert {"patches", "depthwise", "pool"} <= kernels(source) and compiled.planned > 0  # type: ignore[attr-defined]


def test_indices_are_held_inside_and_told(generate: Callable[..., tuple[str, object]]) -> None:
    source, _ = generate("g (int64[n] i) => (float16[n, 64] y) { y = Gather(table, i) }", {"table": weight(100, 64)})
    assert {"indices", "wrong_indices", "reduce", "gather"} <= kernels(source)


def test_dtypes_are_named() -> None:
    from planish.runtime.relax.cuda.build import build

    made = model('<ir_version: 10, opset_import: ["" : 20]> g (double[2, 2] a) => (double[2, 2] o) { o = Softmax(a) }')
    with pytest.raises(UnsupportedError, match="is float64; it takes float32 and float16 and bfloat16"):
        build(made, [TensorSpec.of(v) for v in made.graph.inputs], None)


def test_what_attention_is_launched_with_is_what_its_sources_have() -> None:
    """A header in C repeats what the sources define; whoever changes one changes both."""
    from planish.runtime.relax.cuda import assemble

    header = (assemble._LAUNCHES / "launch_attention.h").read_text()

    def fields(text: str, pattern: str) -> list[str]:
        struct = re.search(pattern, text, re.S)
        assert struct is not None
        plain = re.sub(r"//[^\n]*|/\*.*?\*/|#if SHIFT.*?#endif", "", struct[1], flags=re.S)
        return [re.findall(r"\w+", part)[-1] for item in plain.split(";") if item.strip() for part in item.split(",")]

    for source, name in (("attention.cuh", "attention_prefill"), ("attention_decode.cu", "attention_step")):
        kernel = (toolchain._SOURCE / source).read_text()
        caller = fields(header, rf"typedef struct \{{([^{{}}]*?)\}} {name};")
        assert fields(kernel, r"struct Parameters \{(.*?)\};") == caller
    kernel = (toolchain._SOURCE / "attention.cu").read_text()
    assert "#define STAGES (AHEAD + 2)" in kernel and kernel.count("#define STAGES") == 3
