"""The number of layers that a measured ratio asks for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.infer import infer_shapes
from planish.ir.program import Program
from planish.passes.base import ApproximatePass
from planish.passes.layers.predict import shares_gone
from planish.passes.layers.skip_layers import SkipLayers
from planish.passes.layers.tuning import tuned
from planish.passes.testing import apply_pass, program_of
from tests.layer_stacks import stack

LAYERS = 12
PROGRAM = program_of(stack(LAYERS))
infer_shapes(PROGRAM.main)
#: Each example looks for the layers, and counts costs, anew.
SHORT = settings(deadline=None, max_examples=25)


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


def share() -> float:
    """What the cost model takes the layers of the program for."""
    whole = SkipLayers(speedup=2)
    return shares_gone(whole, PROGRAM, [2.0])[0] * 2


def bisected(asked: float, machine: Machine) -> int:
    """How many variants bisection measures: the nominal one, the strongest, then halves of what lies between."""
    ratios = sorted(LAYERS / n for n in range(2, LAYERS) if LAYERS / n > asked)
    if machine.of(int(LAYERS / asked + 1e-9)) >= asked or not ratios:
        return 1
    count, low, high = 2, -1, len(ratios) - 1
    while machine.of(2) >= asked and high - low > 1:
        middle, count = (low + high) // 2, count + 1
        low, high = (low, middle) if machine.of(round(LAYERS / ratios[middle])) >= asked else (middle, high)
    return count


@SHORT
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
        assert machine.of(count) >= speedup and note.endswith(f"measured for the asked {speedup:g}x")
    else:  # the rest of the model takes too long
        assert found.nominal is None and "can not be measured" in note
    assert machine.measured <= 4


@SHORT
@given(st.floats(1.0, 6.0))
def test_where_the_cost_model_is_right_two_measurements_are_enough(speedup: float) -> None:
    machine = Machine(share())
    tuned(SkipLayers(speedup=speedup), PROGRAM, machine.gain)
    assert machine.measured <= 2


def test_fewer_measurements_than_by_bisection() -> None:
    asked = [1 + k / 5 for k in range(1, 13)]
    for part in (0.6, 0.85, share()):
        machine = Machine(part)
        for speedup in asked:
            tuned(SkipLayers(speedup=speedup), PROGRAM, machine.gain)
        assert machine.measured <= 0.75 * sum(bisected(speedup, machine) for speedup in asked)


@SHORT
@given(st.floats(1.05, 3.0), st.integers(0, 1000))
def test_what_is_taken_was_measured_to_be_enough(speedup: float, seed: int) -> None:
    """Whatever the machine says, and however far from a straight line its times are."""
    random = np.random.default_rng(seed)
    times = np.sort(random.uniform(0.05, 1.0, LAYERS + 1))
    known: dict[SkipLayers, float] = {}

    def gain(p: ApproximatePass, asked: float) -> float:
        assert isinstance(p, SkipLayers) and p not in known, "measured twice"
        known[p] = 1 / float(times[int(LAYERS / (p.nominal or p.speedup or 1.0) + 1e-9)])
        return known[p]

    found, note = tuned(SkipLayers(speedup=speedup), PROGRAM, gain)
    assert isinstance(found, SkipLayers)
    if "can not be measured" in note:
        assert 1 / times[2] < speedup and found.nominal is None
    else:
        assert known[found] >= speedup


def test_the_variant_says_what_was_asked_for_and_what_is_taken() -> None:
    found, note = tuned(SkipLayers(speedup=1.5), PROGRAM, Machine(0.85).gain)
    assert str(found) == "skip-layers{speedup=1.5,nominal=1.7142857142857142}"
    assert kept(found) == 7 and kept(SkipLayers(speedup=1.5)) == 8
    predicted = 1 / (1 - share() * 5 / 12)
    assert note == f"skip-layers: 1.71x nominal, {predicted:.3g}x predicted, 1.55x measured for the asked 1.5x"
    found, note = tuned(SkipLayers(speedup=3), PROGRAM, Machine(0.5).gain)
    assert found == SkipLayers(speedup=3)
    assert note.startswith("skip-layers: speedup=3 can not be measured here: at most 6x nominal, ")
    assert note.endswith("x predicted, 1.71x measured; 3x nominal is taken")


def test_prediction_counts_what_is_outside_of_the_layers() -> None:
    """Weights of matrices alone would say 12 / 12.4 of a stack with an embedding and a head of one matrix each."""
    assert 0.9 < share() < 1
    attention, ffn = (shares_gone(SkipLayers(speedup=2, part=p), PROGRAM, [2.0])[0] for p in ("attention", "ffn"))
    assert 0 < ffn < attention < share() / 2
    assert attention + ffn <= share() / 2 + 1e-9
    short = program_of(stack(3))
    infer_shapes(short.main)
    assert shares_gone(SkipLayers(speedup=2), short, [1.0, 1.5, 3.0])[::2] == [0.0, 0.0]
    assert shares_gone(SkipLayers(speedup=2, by="importance"), short, [3.0])[0] > 0.5


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


def test_a_transposed_weight_takes_no_time() -> None:
    """An embedding that is the head too: its transpose is folded, and only the product reads it in each run."""
    text = stack(8, width=16)
    tied = text.replace("y = MatMul(last, wl)", "wt = Transpose<perm = [1, 0]>(wl)  y = MatMul(last, wt)")
    assert tied != text
    found = []
    for source in (text, tied):
        program = program_of(source)
        infer_shapes(program.main)
        found += shares_gone(SkipLayers(speedup=2), program, [2.0])
    assert found[0] == found[1] > 0
