"""The number of layers that a measured ratio asks for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.ir.infer import infer_shapes
from planish.ir.program import Program
from planish.passes.base import ApproximatePass
from planish.passes.layers.skip_layers import SkipLayers
from planish.passes.layers.tuning import tuned
from planish.passes.testing import apply_pass, program_of
from tests.layer_stacks import stack

LAYERS = 12
PROGRAM = program_of(stack(LAYERS))
infer_shapes(PROGRAM.main)


class Machine:
    """A model of which the layers take `share` of the time."""

    def __init__(self, share: float) -> None:
        self.share, self.measured = share, 0

    def gain(self, p: ApproximatePass, asked: float) -> float:
        assert isinstance(p, SkipLayers)
        assert asked == p.speedup
        self.measured += 1
        ratio = p.nominal or p.speedup or 1.0
        return self.of(int(LAYERS / ratio + 1e-9))

    def of(self, kept: int) -> float:
        return 1 / (1 - self.share + self.share * kept / LAYERS)


def kept(p: ApproximatePass, program: Program = PROGRAM) -> int:
    return LAYERS - apply_pass(p, program.clone()).fired


@given(st.floats(1.0, 6.0), st.floats(0.05, 1.0))
def test_the_fewest_layers_go_that_are_fast_enough(speedup: float, share: float) -> None:
    machine = Machine(share)
    found, note = tuned(SkipLayers(speedup=speedup), PROGRAM, machine.gain)
    assert isinstance(found, SkipLayers) and found.speedup == speedup
    nominal = int(LAYERS / speedup + 1e-9)
    enough = [n for n in range(2, nominal + 1) if machine.of(n) >= speedup]
    count = int(LAYERS / (found.nominal or speedup) + 1e-9)
    if enough:
        assert count == max(enough)
        assert machine.of(count) >= speedup and bool(note) == (found.nominal is not None)
    else:  # the rest of the model takes too long
        assert found.nominal is None and ("can not be measured" in note or nominal == 2)
    assert machine.measured <= 6


def test_the_variant_says_what_was_asked_for_and_what_is_taken() -> None:
    found, note = tuned(SkipLayers(speedup=1.5), PROGRAM, Machine(0.85).gain)
    assert str(found) == "skip-layers{speedup=1.5,nominal=1.7142857142857142}"
    assert kept(found) == 7 and kept(SkipLayers(speedup=1.5)) == 8
    assert note == "skip-layers: 1.71x nominal for a measured 1.5x"


@pytest.mark.parametrize(
    "p",
    [
        SkipLayers(layers=(1,)),
        SkipLayers(speedup=2, measured=False),
        SkipLayers(speedup=2, rule="released"),
        SkipLayers(speedup=2, nominal=3),
    ],
    ids=str,
)
def test_what_is_named_exactly_is_not_tuned(p: SkipLayers) -> None:
    machine = Machine(0.5)
    assert tuned(p, PROGRAM, machine.gain) == (p, "") and machine.measured == 0
