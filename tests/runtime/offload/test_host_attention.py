from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.printer import parse_model
from planish.runtime.offload import host_attention

pytestmark = pytest.mark.skipif(
    host_attention.library() is None, reason="no C compiler with OpenMP, or a processor without AVX2"
)


def model_of(heads: int, groups: int, size: int, dtype: type, more: str = "") -> ir.Model:
    kind = "float16" if dtype is np.float16 else "float"
    row, cache = f"{kind}[batch,1,{{}}]", f"{kind}[batch,{groups},capacity,{size}]"
    q, k = row.format(heads * size), row.format(groups * size)
    return parse_model(
        f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        one ({q} q, {k} k, {k} v, int32[batch] last, int32[1] total, {cache} keys, {cache} values)
            => ({q} y, {cache} new_keys, {cache} new_values) {{
            y, new_keys, new_values = com.microsoft.GroupQueryAttention
                <num_heads={heads}, kv_num_heads={groups}, scale={size**-0.5}{more}>(q, k, v, keys, values, last, total)
        }}"""
    )


def reference(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, last: np.ndarray, window: int, softcap: float
) -> np.ndarray:
    """In float64, over caches (batch, groups, capacity, size) that hold the new token."""
    batch, groups, capacity, size = keys.shape
    heads = q.shape[-1] // size
    k, v = (np.repeat(x.astype(np.float64), heads // groups, 1) for x in (keys, values))
    scores = np.einsum("bhd,bhtd->bht", q.reshape(batch, heads, size).astype(np.float64), k) * size**-0.5
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    at = np.arange(capacity)
    seen = (at <= last[:, None]) & (at > last[:, None] - window)
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bht,bhtd->bhd", weights / weights.sum(-1, keepdims=True), v)
    return np.asarray(mixed.reshape(batch, 1, heads * size))


@pytest.mark.parametrize("level", [2, 1], ids=["avx512", "avx2"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("heads", "groups", "size", "capacity", "last", "window", "softcap"),
    [
        (8, 2, 128, 1300, (3, 1299), 0, 0.0),
        (4, 4, 16, 7, (0,), 0, 0.0),
        (6, 1, 80, 65, (0, 63, 64), 0, 0.0),
        (4, 2, 64, 700, (699, 512, 511), 40, 0.0),
        (2, 1, 256, 100, (77,), 0, 5.0),
    ],
)
def test_is_attention_over_the_cache_with_the_new_token_in_it(
    heads: int,
    groups: int,
    size: int,
    capacity: int,
    last: tuple[int, ...],
    window: int,
    softcap: float,
    dtype: type,
    level: int,
) -> None:
    random = np.random.default_rng(heads + size)
    batch = len(last)
    more = (f", local_window_size={window}" if window else "") + (f", softcap={softcap}" if softcap else "")
    model = model_of(heads, groups, size, dtype, more)

    def draw(*shape: int) -> np.ndarray:
        return (2 * random.standard_normal(shape)).astype(dtype)

    q, k, v = draw(batch, 1, heads * size), draw(batch, 1, groups * size), draw(batch, 1, groups * size)
    keys, values = draw(batch, groups, capacity, size), draw(batch, groups, capacity, size)
    at, total = np.array(last, np.int32), np.array([max(last) + 1], np.int32)
    wanted = [keys.copy(), values.copy()]
    for row, place in enumerate(last):
        wanted[0][row, :, place], wanted[1][row, :, place] = k[row].reshape(groups, size), v[row].reshape(groups, size)
        keys[row, :, place + 1 :] = values[row, :, place + 1 :] = np.nan  # nobody may look there
    y = np.full_like(q, np.nan)
    inputs = [a.ctypes.data for a in (q, k, v, at, total, keys, values)]
    sizes = {"batch": batch, "tokens": 1, "capacity": capacity}
    run = host_attention.bind(model, inputs, [y.ctypes.data, inputs[5], inputs[6]], sizes, 2, level)
    assert run is not None
    run()
    for row, place in enumerate(last):
        for cache, want in zip((keys, values), wanted, strict=True):
            np.testing.assert_array_equal(cache[row, :, : place + 1], want[row, :, : place + 1])
    expected = reference(q, *wanted, at, window or capacity, softcap)
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert error < (1e-6 if dtype is np.float32 else 6e-4)


def test_what_it_is_not_written_for_is_left_to_onnx_runtime() -> None:
    assert host_attention.fits(model_of(4, 2, 64, np.float16))
    assert not host_attention.fits(model_of(4, 2, 8, np.float16))  # heads of 8
    assert not host_attention.fits(model_of(4, 2, 64, np.float16, ", do_rotary=1"))
    model = model_of(4, 2, 64, np.float16)
    assert host_attention.bind(model, [0] * 7, [0] * 3, {"batch": 1, "tokens": 2, "capacity": 4}, 1) is None
