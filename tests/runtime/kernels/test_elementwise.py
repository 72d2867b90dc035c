"""Elementwise chains against float64: every operation, broadcasts, several outputs; the text form."""

from __future__ import annotations

import numpy as np
import pytest

from planish.ir.errors import InputError
from planish.runtime.kernels.elementwise import BINARY, KINDS, UNARY, Call, Chain, Elementwise, Input
from planish.runtime.kernels.template import aligned, function
from tests.runtime.kernels.levels import VECTORS, level

pytest.importorskip("tvm")

SHAPES = ((3, 16), (0, 4), (4, 0), (1, 1), (5, 33), (2, 4099), (7, 15))
EVERY_OPERATION = Chain.parse(
    f"x full, c column, r row, s scalar -> {', '.join(f'{op}(x)' for op in sorted(set(UNARY) - {'sqrt'}))}, "
    f"sqrt(abs(x)), {', '.join(f'{op}(x, c)' for op in sorted(BINARY))}, mul(add(x, r), s)"
)
CHAINS = (
    EVERY_OPERATION,
    Chain.parse("x full, bias column, r full -> add(gelu(add(x, bias)), r)"),
    Chain.parse("r row, c column -> mul(r, c), add(sub(r, c), 1.5)"),
    Chain.parse("x full, gate full -> mul(silu(gate), x), gate"),
)


def inputs_of(chain: Chain, rows: int, width: int, rng: np.random.Generator) -> list[np.ndarray]:
    shapes = {"full": (rows, width), "row": (rows,), "column": (width,), "scalar": (1,)}
    return [aligned(rng.normal(0, 2, shapes[kind]).astype("f")) for _, kind in chain.inputs]


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: str(len(c.outputs)))
def test_against_float64(chain: Chain, name: str) -> None:
    template, rng = Elementwise(chain), np.random.default_rng()
    call = function(template, level(name))
    for rows, width in SHAPES:
        inputs = inputs_of(chain, rows, width, rng)
        outputs = [aligned(np.full((rows, width), np.nan, np.float32)) for _ in chain.outputs]
        call(*inputs, *outputs)
        for term, got, want in zip(chain.outputs, outputs, template.reference(*inputs, outputs[0]), strict=True):
            # One rounding each of a few operations; sums of opposite numbers lose what their operands had.
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=f"{term}, {rows} x {width}")


def random_term(rng: np.random.Generator, names: list[str], depth: int) -> Input | Call:
    choice = rng.integers(0, 4) if depth else 0
    if choice == 0:
        return Input(str(rng.choice(names))) if rng.random() < 0.8 else Input(number=float(np.float32(rng.normal())))
    if choice == 1:
        return Call(str(rng.choice(["tanh", "sigmoid", "relu", "neg", "abs"])), (random_term(rng, names, depth - 1),))
    operands = (random_term(rng, names, depth - 1), random_term(rng, names, depth - 1))
    return Call(str(rng.choice(["add", "mul", "sub", "max", "min"])), operands)


def test_random_chains() -> None:
    rng = np.random.default_rng()
    for _ in range(6):
        inputs = tuple((f"x{i}", KINDS[rng.integers(0, 4)]) for i in range(4))
        names = [name for name, _ in inputs]
        chain = Chain(inputs, tuple(random_term(rng, names, 4) for _ in range(2)))
        assert Chain.parse(str(chain)) == chain
        template = Elementwise(chain)
        arrays = inputs_of(chain, 3, 37, rng)
        outputs = [aligned(np.empty((3, 37), np.float32)) for _ in range(2)]
        function(template)(*arrays, *outputs)
        for got, want in zip(outputs, template.reference(*arrays, outputs[0]), strict=True):
            scale = max(1.0, float(np.abs(want).max()))
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * scale, err_msg=str(chain))


def test_text_form() -> None:
    text = "x full, b column -> gelu(add(x, b)), mul(x, -0.5)"
    chain = Chain.parse(text)
    assert str(chain) == text and hash(chain) == hash(Chain.parse(text))
    # Equal terms are one.
    assert len(Chain.parse("x full -> mul(exp(x), exp(x))").terms()) == 3
    assert Elementwise(chain).symbol != Elementwise(EVERY_OPERATION).symbol


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x full", "there is no '->'"),
        ("x -> x", "an input is a name and a kind"),
        ("x wide -> x", "unknown kind 'wide'"),
        ("x full, x row -> x", "one of two"),
        ("x full -> y", "'y' is no input"),
        ("x full -> sin(x)", "unknown operation 'sin'"),
        ("x full -> add(x)", "takes 2"),
        ("x full -> x + 1", "neither a name"),
        ("x full -> add(x, 'a')", "neither a name"),
        ("x full -> add(x, 1e999)", "not finite"),
        ("x full -> add(x, True)", "neither a name"),
        ("x full -> gelu(", "no chain"),
        ("x full -> ", "no chain"),
    ],
)
def test_what_is_no_chain(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Chain.parse(text)
