"""Token merging, and attention with a number for each key, as operators of ONNX Runtime's CUDA provider."""

from __future__ import annotations

import ctypes

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.ops import dialect_op, import_functions
from planish.ir.target import Target
from planish.runtime import ort_cuda
from planish.runtime.cuda import driver, ort_library, toolchain
from tests.runtime.cuda.compilers import stand_in_compiler
from tests.runtime.cuda.merge_margins import clear

HALF, FLOAT, INT64 = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT64
TYPES = {"sizes": FLOAT, "key_bias": FLOAT, "key_shift": FLOAT, "merged_sizes": FLOAT, "logs": FLOAT, "index": INT64}
MERGES = ("MergeTokens", "MergeTokensMaxNorm", "MergeTokensEnergy", "MergeTokensEnergyMaxNorm")
FUSED = ("AddMergeTokensNorm", "AddMergeTokensEnergyNorm")


def model_of(op: str, shapes: dict[str, tuple[int, ...]], attributes: dict[str, object], half=HALF) -> ir.Model:
    """One node, with inputs of these shapes."""
    inputs = [
        ir.Value(name=name, type=ir.TensorType(TYPES.get(name, half)), shape=ir.Shape(shape))
        for name, shape in shapes.items()
    ]
    schema = dialect_op(op).schema
    outputs = [ir.Value(name=o.name, type=ir.TensorType(TYPES.get(o.name, half))) for o in schema.outputs]
    node = ir.node(op, inputs, attributes, domain="planish", name="node", outputs=outputs)
    for value, info in zip(outputs, dialect_op(op).infer_node(node), strict=True):
        value.shape = ir.Shape(info.dims)
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports={"": 23, "planish": 1})
    model = ir.Model(graph, ir_version=10)
    import_functions(model)
    return model


def merge_case(op, batch, tokens, heads, size, width, r, protected, first=0):
    """Shapes and attributes; `first` columns of keys are something else."""
    settings = {"r": r, "protected": protected, "heads": heads} | ({"margin": 0.05} if "Energy" in op else {})
    x, sizes = (batch, tokens, width), (batch, tokens)
    if op not in FUSED:
        return {"x": x, "keys": (batch, tokens, heads * size), "sizes": sizes}, settings
    settings |= {"size": size, "first": first, "epsilon": 1e-6}
    shapes = {"x": x, "added": x, "added_shift": (width,), "keys": (batch, tokens, 2 * first + heads * size)}
    return shapes | {"key_shift": (size,), "sizes": sizes, "gain": (width,), "shift": (width,)}, settings


def attention_case(op, batch, tokens, heads, size, keys=None):
    width, keys = heads * size, keys or tokens
    if op == "FlashAttentionKeyBias":
        shapes = {"q": (batch, tokens, width), "k": (batch, keys, width), "v": (batch, keys, width)}
        settings = {"q_num_heads": heads, "kv_num_heads": heads, "scale": 0.1}
    else:
        shapes = {"qkv": (batch, tokens, 3 * width), "shift": (3 * width,)}
        settings = {"num_heads": heads, "scale": 0.1}
    return shapes | ({"key_bias": (batch, keys)} if "Bias" in op else {}), settings


def has_kernel(op, case, **options) -> bool:
    return ort_library.has_kernel(next(iter(model_of(op, *case, **options).graph)))


def test_what_has_a_kernel():
    for op in (*MERGES, *FUSED):
        assert has_kernel(op, merge_case(op, 2, 50, 2, 64, 128, 5, 1))
        assert has_kernel(op, merge_case(op, 2, 50, 2, 64, 128, 5, 1), half=FLOAT) == (op in MERGES)
        assert not has_kernel(op, merge_case(op, 1, 2721, 2, 64, 128, 5, 1))
    assert not has_kernel("MergeTokensEnergy", merge_case("MergeTokensEnergy", 1, 1745, 2, 64, 128, 5, 1))
    for size, width, fits in ((64, 1024, True), (64, 1032, False), (64, 100, True), (64, 132, False), (20, 136, False)):
        assert has_kernel(FUSED[0], merge_case(FUSED[0], 1, 50, 2, size, width, 5, 1)) == fits
        assert has_kernel(MERGES[0], merge_case(MERGES[0], 1, 50, 2, size, width, 5, 1))
    for op in ("PackedAttention", "PackedAttentionKeyBias", "FlashAttentionKeyBias"):
        assert has_kernel(op, attention_case(op, 2, 50, 2, 64)) and has_kernel(op, attention_case(op, 2, 50, 2, 128))
        assert not has_kernel(op, attention_case(op, 2, 50, 2, 32))
        assert not has_kernel(op, attention_case(op, 2, 50, 2, 64), half=FLOAT)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    yield from stand_in_compiler(tmp_path, monkeypatch)


def test_the_library(stand_in):
    cases = [(op, merge_case(op, 2, 50, 2, 64, 128, 5, 1)) for op in (*MERGES, *FUSED)]
    cases += [
        (op, attention_case(op, 2, 50, 2, size))
        for op, size in (("PackedAttention", 64), ("PackedAttentionKeyBias", 128), ("FlashAttentionKeyBias", 64))
    ]
    library = ort_library.library_for([model_of(op, *case) for op, case in cases])
    raw = library.path.read_bytes()
    # Both ways to combine share code; each attention has two forms.
    assert raw.count(b"FATBIN ") == 4 + 6
    assert raw.count(b"-DFUSED=1 ") == 2 and raw.count(b"-DSHIFT=1 ") == 4 and raw.count(b"-DBIAS=1 ") == 4
    assert all(op.encode() in raw for op, _ in cases)
    assert hasattr(ctypes.CDLL(str(library.path)), "RegisterCustomOps")


def test_both_types_in_one_program_have_no_kernel(stand_in):
    models = [
        model_of("MergeTokens", *merge_case("MergeTokens", 2, 50, 2, 64, 128, 5, 1), half) for half in (HALF, FLOAT)
    ]
    assert ort_library.library_for(models) is None
    assert b"-DVALUE=2" in ort_library.library_for(models[1:]).path.read_bytes()


here = ort_cuda.PROVIDER in ort.get_available_providers() and driver.available() and toolchain.nvcc() is not None
gpu = pytest.mark.skipif(not here, reason="no GPU, no nvcc, or an ONNX Runtime without CUDA")


def feeds_of(shapes, seed, kind):
    random = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        array = random.integers(1, 5, shape) if name == "sizes" else random.standard_normal(shape)
        made[name] = array.astype("f4" if name in TYPES else kind)
    return made


def clear_images(op, feeds, settings):
    """Those that no rounding decides."""
    keys = feeds["keys"].astype("f8")
    if op in FUSED:
        keys = keys[:, :, settings["first"] :][:, :, : settings["heads"] * settings["size"]]
        keys = keys + np.tile(feeds["key_shift"].astype("f8"), settings["heads"])
    found = clear(keys, *(settings[name] for name in ("heads", "r", "protected", "margin")))
    assert (~found).sum() <= 2 + len(found) // 10
    return found


def check(op, case, graphs, limit=1e-3, half=HALF):
    shapes, settings = case
    model = model_of(op, shapes, settings, half)
    library = ort_library.library_for([model])
    assert library is not None
    runner = ort_cuda.compile_ort_cuda(model, Target.parse(f"ort-cuda:kernels,graphs={graphs}"), library=library)
    for seed in range(2):
        feeds = feeds_of(shapes, seed, "f2" if half == HALF else "f4")
        wide = [array.astype("f8") if array.dtype == "f2" else array for array in feeds.values()]
        want = dialect_op(op).reference(*wide, **settings)
        got = runner.run(feeds)
        of = clear_images(op, feeds, settings) if "Energy" in op else np.ones(next(iter(shapes.values()))[0], bool)
        for operand, expected in zip(dialect_op(op).schema.outputs, want, strict=True):
            found = got[operand.name]
            assert found.shape == expected.shape
            found, expected = found[of], expected[of]
            if operand.name == "index":
                assert np.array_equal(found, expected)
            elif operand.name in TYPES:
                np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
            else:
                assert np.isfinite(found).all()
                assert np.linalg.norm(found.astype("f8") - expected) <= limit * np.linalg.norm(expected)


SIZES = [  # batch, tokens, heads, size, width, r, protected
    (3, 197, 12, 64, 768, 16, 1),
    (2, 33, 3, 20, 30, 7, 3),
    (1, 1, 2, 8, 16, 4, 1),
    (2, 3, 2, 8, 16, 4, 5),
    (66, 50, 4, 64, 128, 99, 1),
]


@gpu
@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("op", MERGES)
def test_merging_on_a_gpu(op, case):
    check(op, merge_case(op, *case), case[1] % 2)


@gpu
@pytest.mark.parametrize("case", SIZES[:3])
def test_merging_in_float32_on_a_gpu(case):
    check("MergeTokens", merge_case("MergeTokens", *case), 1, 1e-6, FLOAT)


@gpu
@pytest.mark.parametrize(("case", "first"), [*((case, 24) for case in SIZES), ((2, 60, 16, 64, 1024, 8, 1), 0)])
@pytest.mark.parametrize("op", FUSED)
def test_merging_between_sum_and_norm_on_a_gpu(op, case, first):
    check(op, merge_case(op, *case, first=first), case[1] % 2)


@gpu
@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 90, 133, 197, 300])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("op", ["PackedAttention", "PackedAttentionKeyBias", "FlashAttentionKeyBias"])
def test_attention_on_a_gpu(op, size, tokens):
    check(op, attention_case(op, 2, tokens, 3, size), tokens % 2)


@gpu
def test_cross_attention_with_a_bias_on_a_gpu():
    check("FlashAttentionKeyBias", attention_case("FlashAttentionKeyBias", 3, 70, 2, 64, keys=150), 1)
