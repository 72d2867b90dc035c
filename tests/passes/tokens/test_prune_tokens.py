"""prune-tokens against pruning in plain torch: logits, caches of every layer, and greedy decoding over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import planish  # noqa: E402
from planish.ir.causal_lm import DECODE, IDS, LENGTHS, LOGITS, PREFILL  # noqa: E402
from planish.passes.defaults import default_pipeline  # noqa: E402
from tests.token_pruning import IMAGE, Recipe, head, llava, prefill, step  # noqa: E402

BEFORE, AFTER = default_pipeline("ort-cpu").split(",lower-feed-forward,")
FREE = planish.Budget(gates=False)
RECIPES = (
    Recipe("feather", (1, 3), (0.3, 0.5)),
    Recipe("feather", (2,), (0.5,), stride=0),
    Recipe("fastv", (2,), (0.25,)),
    Recipe("efficientvla", (1,), (7,)),
    Recipe("efficientvla", (1, 2), (9, 0.5), key=3, relevance=0.0),
)


def pipeline(options: str, after: str = "") -> str:
    """The exact pipeline with prune-tokens where it belongs."""
    return f"{BEFORE},prune-tokens{{{options}}},{after or 'lower-feed-forward,' + AFTER}"


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_prefill_and_decode(recipe: Recipe) -> None:
    """Rows of several lengths; image tokens are those at the places 2 to 17, whatever they are."""
    model = llava()
    exe = planish.optimize(model, task="causal-lm", passes=pipeline(f"{recipe},span=(2, 16)"), budget=FREE)
    rng = np.random.default_rng(0)
    lengths = np.array([25, 20, 23])
    ids = rng.integers(0, IMAGE, (3, 25))
    ids[np.arange(25) >= lengths[:, None]] = 0
    got = exe.run({IDS: ids, LENGTHS: lengths}, entry=PREFILL)
    rows = []
    for at, n in enumerate(lengths):
        embeds = model.model.language_model.embed_tokens(torch.from_numpy(ids[at : at + 1, :n])).detach()
        row = prefill(model, embeds, list(range(2, 18)), recipe)
        rows.append(row)
        np.testing.assert_allclose(got[LOGITS][at], head(model, row.hidden)[0, -1], rtol=1e-4, atol=1e-5)
        for layer, kept in enumerate(row.cache.layers):
            for part, want in (("key", kept.keys), ("value", kept.values)):
                have = got[f"present_{layer}_{part}"][at]
                gone = sum(map(len, row.dropped[: sum(layer >= start for start in recipe.layers)]))
                assert have.shape[1] == 25 - gone and want.shape[2] == n - gone
                np.testing.assert_allclose(have[:, : n - gone], want[0], rtol=1e-4, atol=1e-5)
    _check_greedy(exe, model, ids, lengths, rows, got[LOGITS])


def _check_greedy(exe: Any, model: Any, ids: Any, lengths: Any, rows: Any, logits: Any) -> None:
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    tokens = exe.generate(ids, max_new_tokens=6, attention_mask=mask)[:, ids.shape[1] :]
    for at, row in enumerate(rows):
        following = logits[at]
        for new in range(6):
            want = int(np.argmax(following))
            assert tokens[at, new] == want
            following = step(model, row, want, int(lengths[at]) + new).numpy()


def test_decode_over_caches_of_several_lengths() -> None:
    """One step of `decode` on the caches that `prefill` gave, with numbers and not only the likeliest token."""
    model, recipe = llava(), RECIPES[0]
    exe = planish.optimize(model, task="causal-lm", passes=pipeline(f"{recipe},span=(2, 16)"), budget=FREE)
    ids = np.random.default_rng(1).integers(0, IMAGE, (1, 21))
    first = exe.run({IDS: ids, LENGTHS: np.array([21])}, entry=PREFILL)
    feeds: dict[str, Any] = {IDS: np.array([[7]]), LENGTHS: np.array([21])}
    held = []
    for spec in exe.program.inputs(DECODE):  # type: ignore[union-attr]
        if spec.name.startswith("past_"):
            present = first[spec.name.replace("past", "present")]
            held.append(present.shape[2])
            feeds[spec.name] = np.concatenate([present, np.full_like(present[:, :, :3], 9)], axis=2)
    assert held == [21, 21, 13, 13, 13, 13, 9, 9]  # 16 image tokens, then 8, then 4
    got = exe.run(feeds, entry=DECODE)[LOGITS][0]
    row = prefill(model, model.model.language_model.embed_tokens(torch.from_numpy(ids)), list(range(2, 18)), recipe)
    np.testing.assert_allclose(got, step(model, row, 7, 21), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_images(recipe: Recipe) -> None:
    """The whole model: image tokens are found by their id, at other places in each row."""
    model = llava()
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, IMAGE, (2, 24)))
    places = [list(range(5, 21)), [*range(1, 9), *range(10, 18)]]
    for at, found in enumerate(places):
        ids[at, found] = IMAGE
    torch.manual_seed(3)
    given = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32), "use_cache": True}
    options = f"{recipe},image_token={IMAGE}"
    exe = planish.optimize(model, example_inputs=given, passes=pipeline(options), budget=FREE)
    got = exe.run({name: given[name] for name in ("input_ids", "pixel_values")})
    with torch.no_grad():
        features = model.model.get_image_features(given["pixel_values"], vision_feature_layer=-1)
    for at, found in enumerate(places):
        embeds = model.model.language_model.embed_tokens(ids[at : at + 1]).detach()
        embeds[0, found] = features.pooler_output[at]
        row = prefill(model, embeds, found, recipe)
        np.testing.assert_allclose(got["logits"][at], head(model, row.hidden)[0], rtol=1e-4, atol=2e-5)
        lengths = [v.shape[2] for k, v in got.items() if k.startswith("past_key_values_")]
        assert sorted(lengths) == sorted(2 * [layer.keys.shape[2] for layer in row.cache.layers])
