"""A step over a cache of 8 bits inside ONNX Runtime: operator, body and float64 reference; in place or copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.errors import UnsupportedError
from planish.ir.ops import import_functions
from planish.ir.ops.cache_attention import CACHE_STEPS
from planish.ir.printer import parse_model
from planish.runtime.kernels.cache_attention_ops import CacheAttentionKernel
from planish.runtime.kernels.library import Library, library_for

pytest.importorskip("tvm")

SIZE, HEADS, KV_HEADS = 24, 6, 2
WINDOW = 70


def model_of(window: int | None = None, size: int | str = SIZE) -> ir.Model:
    wide, narrow = (size * n if isinstance(size, int) else f"W{n}" for n in (HEADS, KV_HEADS))
    codes, scales = (f"B, {KV_HEADS}, C, {last}" for last in (size, 1))
    more = "" if window is None else f", window = {window}"
    model = parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g (float[B, 1, {wide}] q, float[B, 1, {narrow}] k, float[B, 1, {narrow}] v, int8[{codes}] pk, int8[{codes}] pv,
           float[{scales}] ks, float[{scales}] vs, int32[B] n, float[{KV_HEADS}, {size}] c)
          => (float[B, 1, {wide}] y, int8[{codes}] nk, int8[{codes}] nv, float[{scales}] nks, float[{scales}] nvs) {{
          y, nk, nv, nks, nvs = planish.CacheAttention
            <q_num_heads = {HEADS}, kv_num_heads = {KV_HEADS}, scale = 0.3{more}> (q, k, v, pk, pv, ks, vs, n, c)
        }}
        """
    )
    import_functions(model)
    return model


def half_model(window: int | None = None) -> ir.Model:
    cache, more = f"B, {KV_HEADS}, C, {SIZE}", "" if window is None else f", window = {window}"
    model = parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g (float[B, 1, {SIZE * HEADS}] q, float[B, 1, {SIZE * KV_HEADS}] k, float[B, 1, {SIZE * KV_HEADS}] v,
           float16[{cache}] pk, float16[{cache}] pv, int32[B] n)
          => (float[B, 1, {SIZE * HEADS}] y, float16[{cache}] nk, float16[{cache}] nv) {{
          y, nk, nv = planish.CacheAttentionFloat16
            <q_num_heads = {HEADS}, kv_num_heads = {KV_HEADS}, scale = 0.3{more}> (q, k, v, pk, pv, n)
        }}
        """
    )
    import_functions(model)
    return model


def arrays(lengths: list[int], capacity: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, capacity])
    batch = len(lengths)
    new = {name: rng.normal(size=(batch, 1, n * SIZE)).astype("f4") for name, n in zip("qkv", (6, 2, 2), strict=True)}
    codes = {name: rng.integers(-127, 128, (batch, KV_HEADS, capacity, SIZE)).astype("i1") for name in ("pk", "pv")}
    scales = {name: rng.uniform(0.01, 0.03, (batch, KV_HEADS, capacity, 1)).astype("f4") for name in ("ks", "vs")}
    channels = rng.uniform(0.3, 3, (KV_HEADS, SIZE)).astype("f4")
    return {**new, **codes, **scales, "n": np.array(lengths, np.int32), "c": channels}


def half_arrays(lengths: list[int], capacity: int) -> dict[str, np.ndarray]:
    given = arrays(lengths, capacity)
    caches = {name: (given[name] * 0.02).astype(np.float16) for name in ("pk", "pv")}
    return {name: given[name] for name in "qkv"} | caches | {"n": given["n"]}


def session(model: ir.Model, library: Library | None, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library.path))
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def wanted(given: dict[str, np.ndarray], name: str = "CacheAttention", **more: Any) -> tuple[np.ndarray, ...]:
    settings = {"q_num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 0.3}
    return CACHE_STEPS[name].reference(*given.values(), **settings, **more)


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        found = library_for([model_of(), half_model()])
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert found is not None and found.kernels == tuple(
        CacheAttentionKernel(name, ((SIZE, 3),)) for name in ("CacheAttention", "CacheAttentionFloat16")
    )
    return found


@pytest.mark.parametrize("window", [None, WINDOW, 1])
def test_operator_body_and_reference_agree(window: int | None, library: Library) -> None:
    model = model_of(window)
    more = {} if window is None else {"window": window}
    for lengths, capacity in (([0], 1), ([5, 0, 11], 12), ([200, 127], 201), ([128], 300)):
        given = arrays(lengths, capacity)
        want = wanted(given, **more)
        for found in (session(model, library).run(None, given), session(model, None).run(None, given)):
            np.testing.assert_allclose(found[0], want[0], rtol=1e-5, atol=2e-6)
            for have, expected in zip(found[1:], want[1:], strict=True):
                np.testing.assert_array_equal(have, expected)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_float16(window: int | None, library: Library) -> None:
    model = half_model(window)
    more = {} if window is None else {"window": window}
    for lengths, capacity in (([0], 1), ([200, 127], 201)):
        given = half_arrays(lengths, capacity)
        want = wanted(given, "CacheAttentionFloat16", **more)
        for found in (session(model, library).run(None, given), session(model, None).run(None, given)):
            np.testing.assert_allclose(found[0], want[0], rtol=1e-5, atol=2e-6)
            for have, expected in zip(found[1:], want[1:], strict=True):
                np.testing.assert_array_equal(have, expected)


def test_a_cache_is_updated_in_place(library: Library) -> None:
    """Steps that are bound to one buffer for past and present give what steps with copies give."""
    runs = session(model_of(), library)
    given = arrays([3, 9], 16)
    pairs = {"pk": "nk", "pv": "nv", "ks": "nks", "vs": "nvs"}
    bound = {name: value.copy() for name, value in given.items()}
    binding = runs.io_binding()
    y = np.empty_like(given["q"])
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(y))
    for name, value in bound.items():
        there = ort.OrtValue.ortvalue_from_numpy(value)
        binding.bind_ortvalue_input(name, there)
        if name in pairs:
            binding.bind_ortvalue_output(pairs[name], there)
    for _ in range(4):
        want = dict(zip(("y", *pairs.values()), runs.run(None, given), strict=True))
        runs.run_with_iobinding(binding)
        np.testing.assert_array_equal(y, want["y"])
        for past, present in pairs.items():
            np.testing.assert_array_equal(bound[past], want[present])
            given[past] = want[present]
        for held in (given["n"], bound["n"]):
            held += 1


def test_rows_on_several_threads(library: Library) -> None:
    given = arrays([600, 350, 1], 700)
    one, two = (session(model_of(), library, threads).run(None, given) for threads in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_is_not_hidden(library: Library) -> None:
    given = arrays([4, 4], 8)
    given["q"][0, 0, 1] = np.nan
    y = session(model_of(), library).run(["y"], given)[0].reshape(2, HEADS, SIZE)
    assert np.isnan(y[0, 0]).all() and not np.isnan(y[1]).any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": np.array([8, 0], np.int32)}, "row 0 holds 8 tokens, and its cache has room for 8"),
        ({"n": np.array([0, -1], np.int32)}, "row 1 holds -1 tokens"),
        ({"vs": np.zeros((2, KV_HEADS, 7, 1), "f4")}, "axis 2 of past_value_scale has size 7; it must be 8"),
        ({"k": np.zeros((2, 2, 48), "f4")}, "axis 1 of k has size 2; it must be 1"),
        ({"c": np.zeros((2, 2, 24), "f4")}, "channels has rank 3; it must have 2"),
    ],
)
def test_wrong_inputs_are_errors(changed: dict[str, np.ndarray], message: str, library: Library) -> None:
    model = model_of()
    for value in model.graph.inputs:
        rank = changed[value.name].ndim if value.name in changed else len(value.shape or ())
        value.shape = ir.Shape([None] * rank)
    with pytest.raises(Exception, match=message):
        session(model, library).run(None, arrays([4, 4], 8) | changed)


def test_no_kernel_where_there_is_none_for_the_heads() -> None:
    for size in ("D", 12, 4):
        assert CacheAttentionKernel.of("CacheAttention", [next(iter(model_of(size=size).graph))]) is None
