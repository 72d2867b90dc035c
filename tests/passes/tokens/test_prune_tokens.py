"""prune-tokens against pruning in plain torch: logits, caches of every layer, and greedy decoding over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import functools  # noqa: E402

import planish  # noqa: E402
from planish.frontends.causal_lm import CapturedLM, capture_causal_lm  # noqa: E402
from planish.frontends.torch import capture  # noqa: E402
from planish.ir.causal_lm import DECODE, IDS, LENGTHS, LOGITS, PREFILL  # noqa: E402
from planish.ir.errors import InputError  # noqa: E402
from planish.ir.graphs import dims_of  # noqa: E402
from planish.ir.program import Calibration, Program  # noqa: E402
from planish.passes.base import PassContext, PassResult  # noqa: E402
from planish.passes.defaults import default_pipeline  # noqa: E402
from planish.passes.manager import PassManager  # noqa: E402
from planish.passes.pipeline import parse_pipeline  # noqa: E402
from planish.passes.testing import apply_pass  # noqa: E402
from planish.runtime.bench import Bench  # noqa: E402
from planish.runtime.executable import Executable  # noqa: E402
from tests.token_pruning import IMAGE, Recipe, finder, head, llava, prefill, step  # noqa: E402

BEFORE, AFTER = default_pipeline("ort-cpu").split(",lower-feed-forward,")
RECIPES = (
    Recipe("feather", (1, 3), (0.3, 0.5)),
    Recipe("feather", (2,), (0.5,), stride=0),
    Recipe("fastv", (2,), (0.25,)),
    Recipe("efficientvla", (1,), (7,)),
    Recipe("efficientvla", (1, 2), (9, 0.5), key=3, relevance=0.0),
)


@functools.cache
def captured() -> CapturedLM:
    return capture_causal_lm(llava())


@functools.cache
def decoder() -> Program:
    """The language model alone: `prefill` and `decode`, fused."""
    return fused(captured().program.clone())


@functools.cache
def raw() -> Program:
    """The model with its vision tower and its caches, for two rows of 24 tokens."""
    return capture(llava(), {**pictures(), "use_cache": True}).program


@functools.cache
def whole() -> Program:
    """The same, fused."""
    return fused(raw().clone())


def fused(program: Program) -> Program:
    PassManager(parse_pipeline(BEFORE)).apply(program, PassContext(program.target))
    return program


def pruned(program: Program, options: object) -> tuple[Program, PassResult]:
    copy = program.clone()
    result = apply_pass(f"prune-tokens{{{options}}}", copy)
    return copy, result


def run(program: Program, inputs: dict[str, Any], entry: str = "main") -> dict[str, Any]:
    return Bench(program.target, None).run_inputs(program, inputs, entry)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_prefill(recipe: Recipe) -> None:
    """Rows of several lengths; image tokens are those at the places 2 to 17, whatever they are."""
    model = llava()
    program, result = pruned(decoder(), f"{recipe},span=(2, 16)")
    assert result.fired == len(recipe.layers) and not result.declined
    rng = np.random.default_rng(0)
    lengths = np.array([25, 20, 23])
    ids = rng.integers(0, IMAGE, (3, 25))
    ids[np.arange(25) >= lengths[:, None]] = 0
    got = run(program, {IDS: ids, LENGTHS: lengths}, PREFILL)
    for at, n in enumerate(lengths):
        embeds = model.model.language_model.embed_tokens(torch.from_numpy(ids[at : at + 1, :n])).detach()
        row = prefill(model, embeds, list(range(2, 18)), recipe)
        np.testing.assert_allclose(got[LOGITS][at], head(model, row.hidden)[0, -1], rtol=1e-4, atol=1e-5)
        for layer, kept in enumerate(row.cache.layers):
            for part, want in (("key", kept.keys), ("value", kept.values)):
                have = got[f"present_{layer}_{part}"][at]
                gone = sum(map(len, row.dropped[: sum(layer >= start for start in recipe.layers)]))
                assert have.shape[1] == 25 - gone and want.shape[2] == n - gone
                np.testing.assert_allclose(have[:, : n - gone], want[0], rtol=1e-4, atol=1e-5)


def test_generate() -> None:
    """Greedy decoding over caches of several lengths, in the whole pipeline, token for token."""
    model, recipe = llava(), RECIPES[0]
    program, _ = pruned(decoder(), f"{recipe},span=(2, 16)")
    PassManager(parse_pipeline(f"lower-feed-forward,{AFTER}")).apply(program, PassContext(program.target))
    bench = Bench(program.target, None)
    exe = Executable(program, {entry: bench.runner(program, entry) for entry in program.entries})
    ids, lengths = np.random.default_rng(3).integers(0, IMAGE, (2, 22)), (22, 19)
    mask = np.arange(22) < np.array(lengths)[:, None]
    tokens = exe.generate(ids, max_new_tokens=6, attention_mask=mask)[:, 22:]
    for at, n in enumerate(lengths):
        embeds = model.model.language_model.embed_tokens(torch.from_numpy(ids[at : at + 1, :n])).detach()
        row = prefill(model, embeds, list(range(2, 18)), recipe)
        following = head(model, row.hidden)[0, -1]
        for new in range(6):
            want = int(following.argmax())
            assert tokens[at, new] == want
            following = step(model, row, want, n + new)


def test_calibration_of_decode_follows() -> None:
    """The error of `decode` is measured on caches that the pruned `prefill` gives, not on some of the whole ones."""
    model, recipe = llava(), RECIPES[0]
    example = captured().batches(np.random.default_rng(4).integers(0, IMAGE, (1, 24)))
    program, _ = pruned(decoder(), f"{recipe},span=(2, 16)")
    parts = [Calibration(example[entry], entry=entry) for entry in (PREFILL, DECODE)]
    parts[0].others.append(parts[1])
    got = Bench(program.target, parts[0]).run(program)[1][LOGITS][0]
    ids, new = (example[entry][0][IDS] for entry in (PREFILL, DECODE))
    row = prefill(model, model.model.language_model.embed_tokens(torch.from_numpy(ids)), list(range(2, 18)), recipe)
    np.testing.assert_allclose(got, step(model, row, int(new[0, 0]), 24), rtol=1e-4, atol=1e-5)


def test_decode_over_caches_of_several_lengths() -> None:
    """One step of `decode` on the caches that `prefill` gave, with numbers and not only the likeliest token."""
    model, recipe = llava(), RECIPES[0]
    program, _ = pruned(decoder(), f"{recipe},span=(2, 16)")
    ids = np.random.default_rng(1).integers(0, IMAGE, (1, 21))
    first = run(program, {IDS: ids, LENGTHS: np.array([21])}, PREFILL)
    feeds: dict[str, Any] = {IDS: np.array([[7]]), LENGTHS: np.array([21])}
    held = []
    for spec in program.inputs(DECODE):
        if spec.name.startswith("past_"):
            present = first[spec.name.replace("past", "present")]
            held.append(present.shape[2])
            feeds[spec.name] = np.concatenate([present, np.full_like(present[:, :, :3], 9)], axis=2)
    assert held == [21, 21, 13, 13, 13, 13, 9, 9]  # 16 image tokens, then 4 and a grid of 4, then 4
    got = run(program, feeds, DECODE)[LOGITS][0]
    row = prefill(model, model.model.language_model.embed_tokens(torch.from_numpy(ids)), list(range(2, 18)), recipe)
    np.testing.assert_allclose(got, step(model, row, 7, 21), rtol=1e-4, atol=1e-5)


def pictures() -> dict[str, Any]:
    """Two rows of 24 tokens, 16 of them an image's, at other places in each."""
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, IMAGE, (2, 24)))
    for at, found in enumerate(PLACES):
        ids[at, found] = IMAGE
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "pixel_values": pixels}


PLACES = [list(range(5, 21)), [*range(1, 9), *range(10, 18)]]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_images(recipe: Recipe) -> None:
    """The whole model: image tokens are found by their id."""
    model, given = llava(), pictures()
    program, result = pruned(whole(), f"{recipe},image_token={IMAGE},count=16")
    assert result.fired == len(recipe.layers)
    got = run(program, {name: value.numpy() for name, value in given.items()})
    with torch.no_grad():
        features = model.model.get_image_features(given["pixel_values"], vision_feature_layer=-1)
    for at, found in enumerate(PLACES):
        embeds = model.model.language_model.embed_tokens(given["input_ids"][at : at + 1]).detach()
        embeds[0, found] = features.pooler_output[at]
        row = prefill(model, embeds, found, recipe)
        np.testing.assert_allclose(got["logits"][at], head(model, row.hidden)[0], rtol=1e-4, atol=2e-5)
        lengths = [v.shape[2] for k, v in got.items() if k.startswith("past_key_values_")]
        assert sorted(lengths) == sorted(2 * [layer.keys.shape[2] for layer in row.cache.layers])


def test_text_after_an_image() -> None:
    """Caches that the whole model gives of an image and a prompt, each of its own length, are what decode reads."""
    model, given, recipe = llava(), pictures(), RECIPES[0]
    seen, _ = pruned(whole(), f"{recipe},image_token={IMAGE},count=16")
    first = run(seen, {name: value.numpy() for name, value in given.items()})
    program, _ = pruned(decoder(), f"{recipe},span=(2, 16)")
    caches = [value for name, value in first.items() if name.startswith("past_key_values_")]
    names = [spec.name for spec in program.inputs(DECODE) if spec.name.startswith("past_")]
    if "key_cache" in " ".join(first):  # all keys, then all values
        caches = [caches[at // 2 + at % 2 * 4] for at in range(8)]
    feeds = {n: np.pad(c, ((0, 0), (0, 0), (0, 2), (0, 0))) for n, c in zip(names, caches, strict=True)}
    got = run(program, {IDS: np.array([[7], [8]]), LENGTHS: np.array([24, 24]), **feeds}, DECODE)[LOGITS]
    with torch.no_grad():
        features = model.model.get_image_features(given["pixel_values"], vision_feature_layer=-1)
    for at, found in enumerate(PLACES):
        embeds = model.model.language_model.embed_tokens(given["input_ids"][at : at + 1]).detach()
        embeds[0, found] = features.pooler_output[at]
        row = prefill(model, embeds, found, recipe)
        np.testing.assert_allclose(got[at], step(model, row, 7 + at, 24), rtol=1e-4, atol=2e-5)


def test_rows_of_any_length() -> None:
    """With a symbolic length there is a mask, which is cut along queries and keys."""
    model, recipe = llava(), RECIPES[0]
    given = {name: value[:1] for name, value in pictures().items()}
    shapes = {"input_ids": {1: "sequence"}, "pixel_values": None}
    program = fused(capture(model, given, shapes).program)
    assert any(node.inputs[3:] for node in program.nodes() if node.op_type == "Attention")
    program, result = pruned(program, f"{recipe},image_token={IMAGE},count=16")
    assert result.fired == 2
    with torch.no_grad():
        features = model.model.get_image_features(given["pixel_values"], vision_feature_layer=-1).pooler_output[0]
    for tokens, start in ((24, 5), (31, 9), (17, 0)):
        ids = torch.from_numpy(np.random.default_rng(tokens).integers(0, IMAGE, (1, tokens)))
        ids[0, start : start + 16] = IMAGE
        got = run(program, {"input_ids": ids.numpy(), "pixel_values": given["pixel_values"].numpy()})["logits"]
        embeds = model.model.language_model.embed_tokens(ids).detach()
        embeds[0, start : start + 16] = features
        row = prefill(model, embeds, list(range(start, start + 16)), recipe)
        np.testing.assert_allclose(got, head(model, row.hidden), rtol=1e-4, atol=2e-5)


def test_what_is_written() -> None:
    """Nodes that a stage needs, and one product more than the model has."""
    after, result = pruned(whole(), f"layers=[2],keep=[0.25],stride=2,image_token={IMAGE},count=16")
    kinds = ("Attention", "RotaryEmbedding", "SwiGLU", "MatMul", "TopK", "PruneTokens")
    counts = [{op: sum(n.op_type == op for n in p.nodes()) for op in kinds} for p in (whole(), after)]
    assert counts[0] | {"MatMul": counts[0]["MatMul"] + 1, "TopK": 1, "PruneTokens": 1} == counts[1]
    assert result.notes == ["model.language_model.layers: of 16 image tokens 8 before layer 2 are left (feather)"]
    logits = next(v for v in after.main.graph.outputs if v.name == "logits")
    assert dims_of(logits) == (2, 24, 100)


# --- patches of a vision transformer ---------------------------------------------------------------------------------


@functools.cache
def patches() -> Program:
    """An encoder of 16 patches behind a class token, fused."""
    return fused(capture(finder(), {"x": torch.randn(2, 17, 32)}, {"x": {0: "batch"}}).program)


@pytest.mark.parametrize("options", ["method='random',layers=[0],keep=[5]", "method='uniform',layers=[1],keep=[0.4]"])
def test_blind_baselines(options: str) -> None:
    """What stays is told by nothing but the place: the rest is as if it had never been."""
    model = finder()
    program, result = pruned(patches(), f"{options},span=(1, 16)")
    assert result.fired == 1
    x = torch.randn(3, 17, 32)
    got = next(iter(run(program, {"x": x.numpy()}).values()))
    start = 0 if "random" in options else 1
    if start:
        kept = ((np.arange(6) + 0.5) * 16 / 6).astype(int)
    else:
        kept = np.sort(np.random.default_rng((0, 0)).random((1, 16), np.float32)[0].argsort()[-5:])
    with torch.no_grad():
        want = model.some(x, start, [0, *(kept + 1)])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_class_token_that_attends() -> None:
    model = finder()
    program, _ = pruned(patches(), "method='feather',layers=[2],keep=[3],stride=0,span=(1, 16),query=0")
    x = torch.randn(2, 17, 32)
    got = next(iter(run(program, {"x": x.numpy()}).values()))
    with torch.no_grad():
        for at in range(2):
            scores = model.seen(x[at : at + 1], 1)
            kept = sorted(scores.argsort(descending=True)[:3].tolist())
            want = model.some(x[at : at + 1], 2, [0, *(p + 1 for p in kept)])
            np.testing.assert_allclose(got[at], want[0], rtol=1e-4, atol=1e-5)


# --- what is declined ------------------------------------------------------------------------------------------------


def reasons(program: Program, options: str) -> str:
    copy, result = pruned(program, options)
    assert not result.fired and not result.modified
    assert copy.node_count() == program.node_count()
    return " | ".join(d.reason for d in result.declined)


def test_declines() -> None:
    span = "method='fastv',layers=[1],keep=[0.5],span=(2, 16)"
    assert "all of 16 image tokens stay before layer 1" in reasons(
        decoder(), "layers=[1],keep=[0.5],span=(2, 16),stride=1"
    )
    assert "reads tokens, in a way that is not known; prune-tokens comes behind the fusions" in reasons(raw(), span)
    lowered = decoder().clone()
    apply_pass("lower-feed-forward,lower-causal-attention", lowered)
    assert "prune-tokens comes behind the fusions and before the lowerings" in reasons(lowered, span)
    shorter = decoder().clone()
    apply_pass("skip-layers{layers=[2]}", shorter)
    assert "prune-tokens comes before skip-layers" in reasons(shorter, span.replace("[1]", "[3]"))


def test_a_window_over_the_cache_is_declined() -> None:
    windowed = decoder().clone()
    for node in windowed.entry(DECODE).graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 8)
    assert "attends in a window, and no longer knows positions" in reasons(windowed, "layers=[1],keep=[3],span=(2, 16)")


def test_options_that_do_not_fit() -> None:
    stack = "'model.language_model.layers'"
    for options, message in {
        "span=(2, 16),layers=[1, 4],keep=[0.5, 0.5]": f"layers names layer 4; {stack} has the layers 0 to 3",
        "span=(2, 30),layers=[1],keep=[0.5]": rf"span=\(2, 30\) ends at 32; rows of {stack} have 24 tokens",
        "span=(2, 15),layers=[1],keep=[0.5]": "15 image tokens are no square; give rows=",
        "span=(2, 16),layers=[1],keep=[0.01],stride=0": "keep=0.01 of 16 image tokens leaves none",
        "image_token=99,layers=[1],keep=[0.5]": "image_token= needs count=",
        "span=(2, 16),layers=[1],keep=[0.5],stack='text'": "unknown stack 'text'",
        "span=(2, 16),layers=[1],keep=[3],method='efficientvla'": "key is 4; 3 tokens are kept",
    }.items():
        with pytest.raises(planish.PlanishError, match=message):
            pruned(whole(), options)


def test_options_that_contradict() -> None:
    for options, message in {
        "": "give span=",
        "span=(2, 16),image_token=99": "both is given",
        "span=(2, 0)": "count of at least 1",
        "span=(2, 16),method='father'": "Did you mean 'feather'",
        "span=(2, 16),layers=[0],keep=[0.5]": "the first to prune before is 1; the layer before says what matters",
        "span=(2, 16),layers=[3, 2]": "ascending",
        "span=(2, 16),layers=[1, 2, 3]": "are 3 stages",
        "span=(2, 16),keep=[0.5, 1.5]": "keep has 1.5",
        "span=(2, 16),query=4": "query is 4; it is the place of a token that is not of the image",
        "image_token=99,query=0": "give span=",
        "span=(2, 16),count=3": "goes with image_token=",
    }.items():
        with pytest.raises(InputError, match=message):
            parse_pipeline(f"prune-tokens{{{options}}}")


def test_with_layers_left_out() -> None:
    """skip-layers behind it takes layers out of `decode`; those that stay keep the lengths of their caches."""
    program, _ = pruned(decoder(), f"{RECIPES[0]},span=(2, 16)")
    assert apply_pass("skip-layers{layers=[2]}", program).fired == 1
    names = [spec.name for spec in program.inputs(DECODE)]
    assert "past_2_key" not in names and "past_3_key" in names
    shapes = {spec.name: spec.shape for spec in program.inputs(DECODE)}
    capacities = [(shapes[f"past_{layer}_key"] or ())[2] for layer in (0, 1, 3)]
    assert capacities == ["capacity", "capacity_pruned_0", "capacity_pruned_1"]
    ids = np.random.default_rng(1).integers(0, IMAGE, (1, 21))
    first = run(program, {IDS: ids, LENGTHS: np.array([21])}, PREFILL)
    feeds = {IDS: np.array([[7]]), LENGTHS: np.array([21])}
    feeds |= {f"past_{n}": np.pad(first[f"present_{n}"], ((0, 0), (0, 0), (0, 2), (0, 0))) for n in CACHES}
    assert np.isfinite(run(program, feeds, DECODE)[LOGITS]).all()


CACHES = [f"{layer}_{part}" for layer in (0, 1, 3) for part in ("key", "value")]
