from __future__ import annotations

import numpy as np
import pytest

from planish.runtime.sampling import Sampling
from tests.causal_models import causal_executable, prompts

#: Chances 0.5, 0.25, 0.15, 0.06, 0.04, in another order.
CHANCES = np.array([0.06, 0.5, 0.04, 0.25, 0.15])
LOGITS = np.log(CHANCES)[None].astype(np.float32) + 3


def kept(**options: float) -> np.ndarray:
    found = Sampling(do_sample=True, **options).probabilities(LOGITS)[0]  # type: ignore[arg-type]
    assert found.sum() == pytest.approx(1.0)
    return found


def test_without_limits_the_chances_are_those_of_the_logits() -> None:
    np.testing.assert_allclose(kept(), CHANCES, rtol=1e-5)


def test_top_k_keeps_the_likeliest() -> None:
    np.testing.assert_allclose(kept(top_k=2), np.array([0, 2, 0, 1, 0]) / 3, rtol=1e-5)
    np.testing.assert_allclose(kept(top_k=99), CHANCES, rtol=1e-5)


@pytest.mark.parametrize(("top_p", "tokens"), [(0.4, [1]), (0.6, [1, 3]), (0.8, [1, 3, 4]), (0.93, [0, 1, 3, 4])])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, tokens: list[int]) -> None:
    found = kept(top_p=top_p)
    assert np.flatnonzero(found).tolist() == tokens
    np.testing.assert_allclose(found[tokens], CHANCES[tokens] / CHANCES[tokens].sum(), rtol=1e-5)


def test_temperature_comes_before_both() -> None:
    sharp = CHANCES**2 / (CHANCES**2).sum()
    np.testing.assert_allclose(kept(temperature=0.5), sharp, rtol=1e-5)
    assert np.flatnonzero(kept(temperature=0.5, top_p=0.7)).tolist() == [1]  # 0.75 of the sharper chances


def test_equal_to_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    random = np.random.default_rng(0)
    logits, rows = random.standard_normal((4, 50)).astype(np.float32) * 3, random.integers(0, 50, (4, 7))
    steps = [
        theirs.RepetitionPenaltyLogitsProcessor(1.3),
        theirs.TemperatureLogitsWarper(0.7),
        theirs.TopKLogitsWarper(12),
        theirs.TopPLogitsWarper(0.8),
    ]
    scores = torch.from_numpy(logits)
    for step in steps:
        scores = step(torch.from_numpy(rows), scores)
    from planish.runtime.sampling import _penalized

    ours = Sampling(True, 0.7, 12, 0.8).probabilities(_penalized(logits, rows, 1.3))
    np.testing.assert_allclose(ours, torch.softmax(scores.double(), -1).numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 2.0, "top_k": 4}])
def test_draws_follow_the_chances(options: dict[str, float]) -> None:
    sampling = Sampling(do_sample=True, **options)  # type: ignore[arg-type]
    count = 20_000
    logits = np.repeat(LOGITS, count, axis=0)
    drawn = sampling.choose(logits, np.zeros((count, 1), np.int64), np.random.default_rng(0))
    shares = np.bincount(drawn, minlength=5) / count
    expected = sampling.probabilities(LOGITS)[0]
    assert (shares[expected == 0] == 0).all()
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / count))


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = np.array([[1.0, 3.0, 3.0]], np.float32)
    assert Sampling().choose(logits, np.zeros((1, 1), np.int64), np.random.default_rng(0)).tolist() == [1]


def test_repetition_makes_both_signs_less_likely() -> None:
    logits = np.array([[2.0, -2.0, 1.5, -2.5]], np.float32)
    found = Sampling(repetition_penalty=2.0).choose(logits, np.array([[0, 1, 0]]), np.random.default_rng(0))
    assert found.tolist() == [2] and logits[0, 0] == 2.0


def test_a_seed_repeats_a_generation() -> None:
    exe = causal_executable("GPT-2")
    ids, mask = prompts(4, 7)
    options = {"attention_mask": mask, "do_sample": True, "top_k": 20, "temperature": 1.5}
    one, same, other = (exe.generate(ids, 12, seed=seed, **options) for seed in (1, 1, 2))  # type: ignore[arg-type]
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
