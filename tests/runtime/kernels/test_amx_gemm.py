"""Products in bfloat16 on AMX: against float64 products of rounded operands, and of the ones that were given."""

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("tvm")

from planish.ir.errors import UnsupportedError
from planish.runtime.kernels import amx, cpu, tir_math
from planish.runtime.kernels.amx_gemm import GatedGemm, Gemm, PackWeight, pack, unpack
from planish.runtime.kernels.template import aligned, function
from tests.runtime.kernels.test_gemm import gemms, shapes


@pytest.fixture
def tiles():
    if cpu.detect("amx") is None:
        pytest.skip("this processor lacks AMX")
    if not cpu.permit_tiles():
        pytest.skip("the system does not permit the use of AMX tiles")


def operands(rng: np.random.Generator, m: int, n: int, k: int) -> dict[str, np.ndarray]:
    def normal(*shape: int) -> np.ndarray:
        return aligned(rng.standard_normal(shape).astype("f"))

    scale = np.float32(1 / max(k, 1) ** 0.5)
    return {
        "x": normal(m, k),
        "w": normal(k, n) * scale,
        "v": normal(k, n) * scale,
        "b": normal(n),
        "r": normal(m, n),
        "y": aligned(np.full((m, n), np.nan, "f")),
    }


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("template", [Gemm(t.activation, t.residual) for t in gemms()], ids=lambda t: t.symbol)
def test_gemm(template):
    rng = np.random.default_rng()
    run = function(template)
    for m, n, k in shapes(rng):
        a = operands(rng, m, n, k)
        inputs = [a["x"], aligned(pack(a["w"])), a["b"], *([a["r"]] if template.residual else [])]
        run(*inputs, a["y"])
        np.testing.assert_allclose(a["y"], template.reference(*inputs), rtol=1e-5, atol=1e-5, err_msg=f"{m} {n} {k}")


@pytest.mark.usefixtures("tiles")
def test_error_of_rounding():
    rng = np.random.default_rng()
    a = operands(rng, 70, 130, 512)
    function(Gemm("gelu"))(a["x"], aligned(pack(a["w"])), a["b"], a["y"])
    exact = tir_math.REFERENCES["gelu"](a["x"].astype(np.float64) @ a["w"] + a["b"])
    error = np.linalg.norm(a["y"] - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 1e-2  # below, it would not be bfloat16


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("template", [GatedGemm(), GatedGemm("gelu")], ids=lambda t: t.symbol)
def test_gated_gemm(template):
    rng = np.random.default_rng()
    run = function(template)
    for m, n, k in shapes(rng):
        a = operands(rng, m, n, k)
        inputs = [a["x"], aligned(pack(a["w"])), aligned(pack(a["v"])), a["y"]]
        run(*inputs)
        np.testing.assert_allclose(a["y"], template.reference(*inputs), rtol=1e-5, atol=2e-5, err_msg=f"{m} {n} {k}")


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("transposed", [False, True])
def test_pack_weight(transposed):
    rng = np.random.default_rng()
    run = function(PackWeight(transposed))
    for _, n, k in shapes(rng):
        weight = rng.standard_normal((k, n)).astype("f")
        if weight.size:
            weight.flat[0] = np.nan
        expected = pack(weight)
        packed = aligned(np.full_like(expected, 0xFFFF))
        run(aligned(weight.T if transposed else weight), packed)
        got, want = (a.view(ml_dtypes.bfloat16).astype(np.float32) for a in (packed, expected))
        np.testing.assert_array_equal(got, want)


def test_rounding_is_to_nearest_even():
    ties = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20]], np.float32)
    np.testing.assert_array_equal(unpack(pack(ties), 1, 4), [[1, 1 + 2**-6, -1, 1 + 2**-7]])


@pytest.mark.usefixtures("tiles")
def test_x_is_rounded_to_nearest_even():
    x = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20]], np.float32)
    y = aligned(np.zeros((1, 4), "f"))
    function(Gemm())(aligned(x), aligned(pack(np.eye(4, dtype="f"))), aligned(np.zeros(4, "f")), y)
    np.testing.assert_array_equal(y, [[1, 1 + 2**-6, -1, 1 + 2**-7]])


@pytest.mark.usefixtures("tiles")
def test_nan_of_x_stays_in_its_row():
    a = operands(np.random.default_rng(), 35, 40, 50)
    a["x"][33, 7] = np.nan
    function(Gemm())(a["x"], aligned(pack(a["w"])), a["b"], a["y"])
    assert np.isnan(a["y"][33]).all() and np.isfinite(np.delete(a["y"], 33, axis=0)).all()


def test_processor_without_amx(monkeypatch):
    monkeypatch.setattr(amx, "detect", lambda *levels: None)
    with pytest.raises(UnsupportedError, match="needs a processor with AMX"):
        Gemm().cpu()
