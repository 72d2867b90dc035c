"""Token merging inside ONNX Runtime: the kernel against the float64 reference, and its templates."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.errors import UnsupportedError
from planish.ir.ops import DIALECT, import_functions
from planish.ir.printer import parse_model
from planish.runtime.kernels.library import Library, library_for
from planish.runtime.kernels.template import aligned, function
from planish.runtime.kernels.token_matching import TokenDirections, TokenScores
from tests.runtime.kernels.levels import VECTORS, level

pytest.importorskip("tvm")


def model_of(attributes: dict[str, Any]) -> ir.Model:
    listed = ", ".join(f"{key} = {value}" for key, value in attributes.items())
    model = parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g (float[B, T, C] x, float[B, T, K] keys, float[B, T] sizes)
          => (float[B, N, C] y, float[B, N] merged, int64[B, T] index) {{
            y, merged, index = planish.MergeTokens {f"<{listed}>" if listed else ""} (x, keys, sizes)
        }}
        """
    )
    import_functions(model)
    return model


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        found = library_for([model_of({})])
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert found is not None and [kernel.op for kernel in found.kernels] == ["MergeTokens"]
    return found


def run(attributes: dict[str, Any], arrays: list[np.ndarray], library: Library, threads: int = 1) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library.path))
    proto = ir.to_proto(model_of(attributes)).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return [np.asarray(v) for v in session.run(None, dict(zip(("x", "keys", "sizes"), arrays, strict=True)))]


def check(attributes: dict[str, Any], arrays: list[np.ndarray], library: Library, threads: int = 1) -> None:
    got = run(attributes, arrays, library, threads)
    want = DIALECT["MergeTokens"].reference(*arrays, **attributes)
    np.testing.assert_array_equal(got[2], want[2])
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6, atol=1e-6)


def arrays(shape: tuple[int, int, int], keys: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, shape[:2]).astype(np.float32)
    return [rng.standard_normal(shape, np.float32), rng.standard_normal((*shape[:2], keys), np.float32), sizes]


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "shape, heads, size", [((2, 40, 24), 3, 8), ((1, 197, 96), 2, 64), ((3, 17, 1), 1, 5), ((2, 7, 33), 4, 1)]
)
def test_kernel_equals_reference(
    shape: tuple[int, int, int], heads: int, size: int, protected: int, library: Library
) -> None:
    attributes = {"r": 6, "protected": protected, "heads": heads}
    given = arrays(shape, heads * size, protected)
    if size == 1:  # directions are -1 and 1 then, and many are equal
        given[1] = np.sign(given[1])
    check(attributes, given, library)


@pytest.mark.parametrize("batch, tokens", [(0, 9), (2, 0), (2, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("protected", [0, 1, 7])
def test_few_tokens(batch: int, tokens: int, protected: int, library: Library) -> None:
    check({"r": 4, "protected": protected, "heads": 2}, arrays((batch, tokens, 4), 8), library)


def test_share_threads_and_ties(library: Library) -> None:
    check({"ratio": 0.25, "r": 1}, arrays((2, 41, 512), 64), library, threads=2)
    given = arrays((2, 30, 6), 16)
    rng = np.random.default_rng(5)
    given[1] = rng.choice(np.array([-1, 1], np.float32), (4, 16))[rng.integers(0, 4, (2, 30))]
    check({"r": 11, "protected": 1}, given, library)


def test_wrong_shapes_are_refused(library: Library) -> None:
    x, keys, sizes = arrays((2, 8, 4), 8)
    with pytest.raises(Exception, match="one batch and one number of tokens"):
        run({}, [x, keys, sizes[:, :7]], library)
    with pytest.raises(Exception, match="keys of width 8 can not be 3 heads"):
        run({"heads": 3}, [x, keys, sizes], library)


@pytest.mark.parametrize("name", VECTORS)
def test_templates(name: str) -> None:
    cpu = level(name)
    rng = np.random.default_rng(1)
    directions, scores = (function(template, cpu) for template in (TokenDirections(), TokenScores()))
    for width in (1, 7, 64, 80):
        keys = aligned(rng.standard_normal((10, 3, width)).astype("f4"))
        keys[4] = 0
        unit = aligned(np.empty((10, width), "f4"))
        directions(keys, unit)
        np.testing.assert_allclose(unit, TokenDirections().reference(keys), rtol=1e-6, atol=1e-6)
        first, out = aligned(np.array([2, 1])), aligned(np.empty((2, 2, 2), "f4"))
        pair = aligned(unit.reshape(2, 5, width))
        scores(pair, first, out)
        np.testing.assert_allclose(out, TokenScores().reference(pair, first, out), rtol=1e-6, atol=1e-6)
