"""shard-attention on single attentions: before and after, numbers against masked dense attention, what it declines."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.block_sparsity import S2, BigBird, BlockMask, Heads, Longformer, SinkWindow, SlidingWindow, Strided
from planish.ir.errors import InputError
from planish.ir.ops import import_functions
from planish.ir.ops.block_sparse_attention import layout_mask
from planish.ir.ops.flash_attention import attention, causal
from planish.ir.printer import parse_model
from planish.ir.program import Calibration, Program
from planish.passes.base import PassContext
from planish.passes.manager import PassError
from planish.passes.pipeline import format_pipeline, parse_pipeline
from planish.passes.sparsity.shard_attention import ShardAttention
from planish.passes.testing import (
    apply_pass,
    check_declines,
    check_rewrite,
    check_untouched,
    program_of,
    run_reference,
)

OPSET = '<ir_version: 10, opset_import: ["" : 23, "planish" : 1]> g '
PLAIN = "ort-cuda"  # its attention is not lowered any further
SETTINGS = "q_num_heads = 4, kv_num_heads = 2, scale = 0.5, is_causal = {}"


def one(length: object = "s", causal: int = 1, extra: str = "", inputs: str = "") -> str:
    """A model with one attention of 4 heads on 2 of size 8."""
    wide = f"float[b, {length}, 32] q, float[b, {length}, 16] k, float[b, {length}, 16] v{inputs}"
    call = f"Attention<{SETTINGS.format(causal)}>(q, k, v{extra})"
    return OPSET + f"({wide}) => (float[b, {length}, 32] y) {{ y = {call} }}"


def feeds(length: int, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    widths = {"q": 32, "k": 16, "v": 16}
    return {name: random.normal(size=(batch, length, w)).astype(np.float32) for name, w in widths.items()}


def expected(pattern, given: dict[str, np.ndarray], is_causal: bool, keys: np.ndarray | None = None) -> np.ndarray:
    """Masked dense attention in float64."""
    n = given["q"].shape[1]
    layout = pattern.layout(n, Heads(4, 2))
    seen = layout_mask(layout.indptr, layout.indices, layout.block, n, n)[layout.head_layout]
    seen = seen & causal(n, n, 0) if is_causal else seen
    seen = seen[None] if keys is None else seen[None] & keys[:, None, None]
    return attention((given["q"], given["k"], given["v"]), (4, 2), 0.5, seen)


def close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def with_bodies(text: str) -> ir.Model:
    model = parse_model(text)
    import_functions(model)
    return model


# --- before and after -------------------------------------------------------------------------------------------


def test_a_known_length_has_no_branch() -> None:
    after = OPSET + (
        "(float[b, 8, 32] q, float[b, 8, 16] k, float[b, 8, 16] v) => (float[b, 8, 32] y) "
        "<int32[2, 5] p = {0, 1, 3, 5, 8, 8, 9, 11, 14, 17}, int32[17] i = {0, 0, 1, 1, 2, 1, 2, 3, 0, 0, 1, 0, 1, 2, "
        "0, 2, 3}, int32[4] h = {0, 0, 1, 1}> "
        "{ y = planish.BlockSparseAttention<q_num_heads = 4, kv_num_heads = 2, scale = 0.5, is_causal = 1, block_size "
        "= 2>(q, k, v, p, i, h) }"
    )
    check_rewrite(
        "shard-attention{block=2,local=2,stride=3,offset=2}", program_of(one(8), PLAIN), with_bodies(after), edits=1
    )


def test_a_dynamic_length_chooses_when_it_runs() -> None:
    a, d = "shard_attention_BlockSparseAttention_out", "shard_attention_Attention_out"
    after = OPSET + (
        "(float[b, s, 32] q, float[b, s, 16] k, float[b, s, 16] v) => (float[b, s, 32] y) "
        "<int64[1] least = {4}, int64[1] most = {6}, int32[1, 4] p = {0, 1, 3, 5}, int32[5] i = {0, 0, 1, 1, 2}, "
        "int32[4] h = {0, 0, 0, 0}> {"
        " n = Shape<start = 1, end = 2>(q)  more = Greater(n, least)  fits = LessOrEqual(n, most)  c = And(more, fits)"
        " y = If (c) <"
        f"then_branch = then () => (float[b, s, 32] {a}) {{ {a} = planish.BlockSparseAttention<q_num_heads = 4, "
        "kv_num_heads = 2, scale = 0.5, is_causal = 1, block_size = 2>(q, k, v, p, i, h) }, "
        f"else_branch = otherwise () => (float[b, s, 32] {d}) "
        f"{{ {d} = Attention<{SETTINGS.format(1)}>(q, k, v) }}> }}"
    )
    options = "pattern='sliding-window',block=2,local=2,max_length=6"
    check_rewrite(f"shard-attention{{{options}}}", program_of(one(), PLAIN), with_bodies(after), edits=1)


def test_kernels_serve_the_short_lengths_too_and_ask_for_blocks_of_16() -> None:
    program = program_of(one(), "ort-cpu:kernels")
    apply_pass("shard-attention{block=16,local=1,max_length=64}", program)
    kinds = {node.op_type for node in program.nodes() if "Attention" in node.op_type}
    assert kinds == {"BlockSparseAttention", "FlashAttention"}
    for length in (16, 17, 64):
        given = feeds(length)
        close(run_reference(program, given)["y"], expected(S2(block=16, local=1), given, True))
    reason = "block is 24; generated kernels take multiples of 16"
    check_declines("shard-attention{block=24,local=1}", program_of(one(), "ort-cpu:kernels"), reason, count=1)
    reason = "target 'tvm-cpu' has no form of block-sparse attention"
    check_declines("shard-attention", program_of(one(), "tvm-cpu"), reason, count=1)


def test_nothing_to_do() -> None:
    check_untouched("shard-attention", OPSET + "(float[n] x) => (float[n] y) { y = Softmax(x) }")


# --- numbers ----------------------------------------------------------------------------------------------------

PATTERNS = {
    "block=4,local=2,stride=3": S2(block=4, local=2, stride=3),
    "block=4,local=1,stride=3,share_kv=False,offset=1": S2(block=4, local=1, stride=3, share_kv=False, offset=1),
    "block=5,local=1,stride=9": S2(block=5, local=1, stride=9),  # rows of their own block only
    "block=4,local=1,stride=4,dense_heads=1": S2(block=4, local=1, stride=4, dense_heads=1),
    "pattern='sliding-window',block=3,local=2": SlidingWindow(block=3, local=2),
    "pattern='sink-window',block=4,local=1,sinks=1": SinkWindow(block=4, local=1, sinks=1),
    "pattern='strided',block=4,local=1,stride=2": Strided(block=4, local=1, stride=2),
    "pattern='longformer',block=4,local=1,global_blocks=1": Longformer(block=4, local=1, global_blocks=1),
    "pattern='bigbird',block=4,local=1,random=1": BigBird(block=4, local=1, random=1),
    "pattern='mask',block=8,mask=[['#','.#','#.#'],['#','##','.##']]": BlockMask.of(
        np.array([[[1, 0, 0], [0, 1, 0], [1, 0, 1]], [[1, 0, 0], [1, 1, 0], [0, 1, 1]]]), 8
    ),
}


@pytest.mark.parametrize("target", ["ort-cpu", PLAIN])  # standard operators where they have a form, and bodies
@pytest.mark.parametrize("causal", [1, 0])
@pytest.mark.parametrize("options", PATTERNS)
def test_numbers_are_those_of_masked_dense_attention(options: str, causal: int, target: str) -> None:
    from dataclasses import replace

    pattern = replace(PATTERNS[options], causal=bool(causal))
    for length in (21, 24):
        program = program_of(one(length, causal), target)
        assert apply_pass(f"shard-attention{{{options}}}", program).fired == 1
        given = feeds(length, seed=length)
        close(run_reference(program, given)["y"], expected(pattern, given, bool(causal)))


def test_each_length_of_a_dynamic_one() -> None:
    program = program_of(one())
    apply_pass("shard-attention{block=4,local=2,stride=3,max_length=24}", program)
    pattern = S2(block=4, local=2, stride=3)
    for length in (1, 7, 8, 9, 13, 23, 24):
        given = feeds(length, seed=length)
        close(run_reference(program, given)["y"], expected(pattern, given, True))
    given = feeds(25)  # the lists end before
    close(run_reference(program, given)["y"], expected(SlidingWindow(block=25, local=1), given, True))


def test_dense_up_to_a_length_that_is_asked_for() -> None:
    program = program_of(one())
    apply_pass("shard-attention{block=4,local=1,stride=3,max_length=64,min_length=16}", program)
    for length, pattern in ((16, SlidingWindow(block=16, local=1)), (17, S2(block=4, local=1, stride=3))):
        given = feeds(length)
        close(run_reference(program, given)["y"], expected(pattern, given, True))


def test_padding_stays_hidden() -> None:
    mask = ", bool[b, 1, 1, s] m"
    program = program_of(one(causal=0, extra=", m", inputs=mask).replace("is_causal = 0", "is_causal = 0"))
    assert apply_pass("shard-attention{block=4,local=1,stride=3,max_length=64}", program).fired == 1
    given = feeds(22, batch=3)
    real = np.arange(22) < np.array([22, 13, 1])[:, None]
    got = run_reference(program, given | {"m": real[:, None, None]})["y"]
    want = expected(S2(block=4, local=1, stride=3, causal=False), given, False, real)
    for row, n in enumerate((22, 13, 1)):
        close(got[row, :n], want[row, :n])


def test_heads_as_an_axis_of_their_own() -> None:
    shapes = "float[b, 4, s, 8] q, float[b, 2, s, 8] k, float[b, 2, s, 8] v"
    text = OPSET + f"({shapes}) => (float[b, 4, s, 8] y) {{ y = Attention<scale = 0.5, is_causal = 1>(q, k, v) }}"
    program = program_of(text)
    assert apply_pass("shard-attention{block=4,local=1,stride=3,max_length=64}", program).fired == 1
    given = feeds(19)
    split = {n: x.reshape(2, 19, -1, 8).transpose(0, 2, 1, 3) for n, x in given.items()}
    got = run_reference(program, split)["y"].transpose(0, 2, 1, 3).reshape(2, 19, 32)
    close(got, expected(S2(block=4, local=1, stride=3), given, True))


PAST = (
    OPSET + "(float[b, {s}, 32] q, float[b, {s}, 16] k, float[b, {s}, 16] v, float[b, 2, p, 8] pk, float[b, 2, p, 8] pv"
    "{inputs}) => (float[b, {s}, 32] y, float[b, 2, t, 8] ck, float[b, 2, t, 8] cv) "
    "{{ y, ck, cv = Attention<q_num_heads = 4, kv_num_heads = 2, scale = 0.5>(q, k, v, {mask}, pk, pv) }}"
)


@pytest.mark.parametrize("form", ["none", "bool", "float"])
def test_steps_over_a_cache_see_the_pattern_from_their_position(form: str) -> None:
    inputs = "" if form == "none" else f", {form}[b, 1, 1, t] m"
    program = program_of(PAST.format(s=1, inputs=inputs, mask="" if form == "none" else "m"))
    assert apply_pass("shard-attention{block=4,local=1,stride=3,max_length=40}", program).fired == 1
    pattern = S2(block=4, local=1, stride=3)
    for length in (1, 5, 18, 40):
        given = feeds(length)
        real = np.ones((2, length), bool)
        if form != "none" and length > 5:
            real[1, :2] = False
        past = {f"p{n}": given[n][:, :-1].reshape(2, -1, 2, 8).transpose(0, 2, 1, 3) for n in "kv"}
        mask = real[:, None, None]
        masks = {"bool": {"m": mask}, "float": {"m": np.where(mask, 0, -1e30).astype(np.float32)}}.get(form, {})
        got = run_reference(program, {n: x[:, -1:] for n, x in given.items()} | past | masks)
        close(got["y"], expected(pattern, given, True, real)[:, -1:])
        assert got["ck"].shape == (2, 2, length, 8)
    given = feeds(41)  # beyond the lists: all of the cache
    past = {f"p{n}": given[n][:, :-1].reshape(2, -1, 2, 8).transpose(0, 2, 1, 3) for n in "kv"}
    masks = {"bool": {"m": np.ones((2, 1, 1, 41), bool)}, "float": {"m": np.zeros((2, 1, 1, 41), "f4")}}.get(form, {})
    got = run_reference(program, {n: x[:, -1:] for n, x in given.items()} | past | masks)["y"]
    close(got, expected(SlidingWindow(block=64, local=1), given, True)[:, -1:])


def test_layers_by_number_and_by_the_pattern() -> None:
    body = "".join(
        f" a{i} = Attention<{SETTINGS.format(1)}>({'q' if i == 0 else f'a{i - 1}'}, k, v)".replace("a3 =", "y =")
        for i in range(4)
    )
    text = OPSET + f"(float[b, 16, 32] q, float[b, 16, 16] k, float[b, 16, 16] v) => (float[b, 16, 32] y) {{{body} }}"
    for options, dense in (("layers=[1,3]", [0, 2]), ("dense_every=2", [1, 3]), ("", [])):
        program = program_of(text, PLAIN)
        result = apply_pass(f"shard-attention{{block=2,local=2,{options}}}", program)
        kinds = [node.op_type for node in program.main.graph if "Attention" in node.op_type]
        assert [i for i, kind in enumerate(kinds) if kind == "Attention"] == dense
        assert result.fired == 4 - len(dense) and not result.declined
        assert any("density" in note for note in result.notes)
        if "every" in options:
            assert "attentions 1, 3: dense in the pattern (dense_every)" in result.notes
    assert "attentions 0 to 3: s2: 8 blocks of 2, 2 layouts" in result.notes[0]
    with pytest.raises((InputError, PassError), match="names attention 4; the model has attentions 0 to 3"):
        apply_pass("shard-attention{layers=[4]}", program_of(text))


def test_notes_say_that_short_calibration_inputs_tell_nothing() -> None:
    program = program_of(one())
    program.calibration = Calibration([feeds(8)])
    result = apply_pass("shard-attention{block=4,local=2,max_length=64}", program)
    assert any("inputs have 8 tokens, where it is dense" in note for note in result.notes)
    program = program_of(one())
    program.calibration = Calibration([feeds(24)])
    assert len(apply_pass("shard-attention{block=4,local=2,max_length=64}", program).notes) == 1


# --- declines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (one(8), "it has at most 8 tokens, and at that length the pattern is dense"),
        (one(16), "it has at most 16 tokens, and at that length the pattern is dense"),
        (one(80), "it has 80 tokens, and the lists cover 64"),
        (one().replace("float[", "float16["), "it is not float32"),
        (
            one(causal=0, extra=", m", inputs=", bool[s, s] m"),
            "a part of its mask, 'm', is neither causal nor the same",
        ),
        (one(causal=1, extra=", m", inputs=", bool[s, s] m"), "it is causal and has a mask too"),
        (one().replace("scale = 0.5", "softcap = 30.0"), "its scores are capped"),
        (one().replace("float[b, s, 16]", "float[b, t, 16]"), "it attends to another sequence"),
        (
            one().replace("float[b, s, 16] v", "float[b, s, 24] v").replace("32] y", "48] y"),
            "its heads of keys and of values differ",
        ),
        (one().replace("float[b, s, 32] q", "float[b, s, w] q"), "the number or the size of its heads is unknown"),
        (
            PAST.format(s="s", inputs="", mask=""),
            "it reads several tokens over its cache, and nothing says that none sees a later one",
        ),
    ],
)
def test_declines(source: str, reason: str) -> None:
    check_declines("shard-attention{block=8,local=2,max_length=64}", source, reason, count=1)


def test_declines_a_length_that_stays_dense_as_asked() -> None:
    options = "block=8,local=1,stride=3,min_length=64,max_length=64"
    check_declines(f"shard-attention{{{options}}}", one(), "it has at most 64 tokens, and up to 64 it stays dense")


def test_eviction_needs_prefill_and_decode() -> None:
    check_declines("shard-attention{evict=True}", one(), "evict=True is for programs of task='causal-lm'")


def test_keep_mass_needs_something_to_run_with() -> None:
    check_declines("shard-attention{keep_mass=0.9}", one(), "there is nothing to run them with")


# --- by head ----------------------------------------------------------------------------------------------------


def _runner(program: Program, entry: str) -> list[dict[str, np.ndarray]]:
    single = Program({"main": program.entry(entry)}, program.target)
    return [run_reference(single, batch) for batch in CALIBRATION]


def _planted(length: int, batch: int = 2) -> dict[str, np.ndarray]:
    """Head 0 attends to its own position, 1 to the first one, 2 to one far back, 3 to all alike."""
    random = np.random.default_rng(0)
    at = np.eye(8)[np.arange(length) % 8] if length <= 8 else random.choice([-1.0, 1.0], (length, 8))
    q, k = np.zeros((batch, length, 4, 8)), np.zeros((batch, length, 2, 8))
    k[:, :, 0], k[:, :, 1] = at, at
    q[:, :, 0], q[:, :, 1] = at * 20, at[0] * 20
    q[:, :, 2] = at[np.maximum(np.arange(length) - length // 2, 0)] * 20
    v = random.normal(size=(batch, length, 16))
    parts = {"q": q.reshape(batch, length, 32), "k": k.reshape(batch, length, 16), "v": v}
    return {name: x.astype(np.float32) for name, x in parts.items()}


CALIBRATION = [_planted(48)]


def test_each_head_gets_the_cheapest_pattern_that_keeps_its_attention() -> None:
    program = program_of(one())
    ctx = PassContext(program.target, run=_runner)
    options = "block=4,local=4,stride=4,keep_mass=0.9,max_length=64"
    result = apply_pass(f"shard-attention{{{options}}}", program, ctx)
    assert result.fired == 1
    words = next(n for n in result.notes if "by head" in n).split("kept: ")[1].split(", ")
    assert words[0].startswith("sink-window(1)") and words[1].startswith("sink-window(1)")
    assert words[2:] == ["dense", "dense"]
    assert all(float(word.split()[1]) >= 0.9 for word in words[:2])
    layouts = [v for name, v in program.main.graph.initializers.items() if v.dtype == ir.DataType.INT32]
    heads = next(v.const_value.numpy() for v in layouts if v.shape == (4,))
    assert heads.tolist() == [0, 0, 1, 1]
    given = CALIBRATION[0]
    got, want = (run_reference(p, given)["y"] for p in (program, program_of(one())))
    close(got[..., 16:], want[..., 16:])  # dense heads
    assert np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)
    again = program_of(one())
    apply_pass(f"shard-attention{{{options.replace('0.9', '0.2')}}}", again, ctx)
    assert not np.allclose(run_reference(again, given)["y"][..., 24:], want[..., 24:], atol=1e-2)


def test_mass_is_what_brute_force_gives() -> None:
    from planish.passes.sparsity.calibration import by_blocks

    random = np.random.default_rng(1)
    q, k = random.normal(size=(2, 4, 13, 8)), random.normal(size=(2, 2, 13, 8))
    real = np.arange(13) < np.array([13, 6])[:, None]
    mass = by_blocks(q, k, real, 0.5, 4, causal=True)
    assert mass.queries.tolist() == [8, 6, 4, 1] and mass.weights.shape == (4, 4, 4)
    assert np.allclose(mass.weights.sum(2), mass.queries)
    scores = np.exp(0.5 * np.einsum("hid,hjd->hij", q[0], k[0].repeat(2, 0)))
    scores *= np.tril(np.ones((13, 13)))
    shares = scores / scores.sum(-1, keepdims=True)
    one_row = by_blocks(q[:1], k[:1], real[:1], 0.5, 4, causal=True)
    assert np.allclose(one_row.weights[:, 3, 1], shares[:, 12, 4:8].sum(-1))
    kept = one_row.kept(SlidingWindow(block=4, local=1), Heads(4, 2))
    own = sum(shares[:, i, i // 4 * 4 : i + 1].sum(-1) for i in range(4, 13))
    assert np.allclose(kept, own / 9)


def test_too_short_calibration_inputs_choose_nothing() -> None:
    ctx = PassContext(run=lambda program, entry: [run_reference(Program({"main": program.entry(entry)}), feeds(3))])
    program = program_of(one())
    result = apply_pass("shard-attention{block=4,local=1,keep_mass=0.5}", program, ctx)
    assert not result.fired and "at most 4 tokens, at which every candidate is dense" in result.declined[0].reason


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("pattern='s3'", "unknown pattern 's3'"),
        ("pattern='mixed'", "give keep_mass="),
        ("pattern='sliding-window',stride=3", "'stride'"),
        ("block=0", "block is 0; it must be an integer of at least 1"),
        ("local=0", "local is 0"),
        ("decode='sparse'", "'sparse'"),
        ("max_length=0", "max_length is 0; it is a number of tokens, 1 or more"),
        ("keep_mass=1.5", "keep_mass is 1.5"),
        ("keep_mass=0.5,evict=True", "evict=True frees what the pattern does not see, and keep_mass= may ask for it"),
        ("decode='dense',evict=True", "decode='dense' may ask for it later"),
        ("min_length=9,evict=True", "min_length= may ask for it later"),
        ("pattern='mask',mask=[['#','#.']],keep_mass=0.5", "a mask has none"),
        ("pattern='mask'", "give one or more layouts"),
    ],
)
def test_options_that_are_refused(options: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_pipeline(f"shard-attention{{{options}}}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("pattern='mask',block=4,mask=[['#','.']]", "row 1 of head 0 .* see no block of keys; every row must see one"),
        ("pattern='mask',block=4,mask=[['#','#'],['#','#'],['#','##']]", "4 heads do not divide among 3 layouts"),
        ("block=4,local=1,dense_heads=3", "dense_heads is 3, and there are 2 heads of keys"),
    ],
)
def test_patterns_that_do_not_fit_the_model(options: str, message: str) -> None:
    with pytest.raises((InputError, PassError), match=message):
        apply_pass(f"shard-attention{{{options}}}", program_of(one(8)))


def test_options_print_and_parse() -> None:
    text = "shard-attention{pattern='mask',block=4,mask=(('#', '##'),),layers=(0,)}"
    (found,) = parse_pipeline(text)
    assert found == ShardAttention(pattern="mask", block=4, mask=(("#", "##"),), layers=(0,))
    assert parse_pipeline(format_pipeline([found])) == [found]


# --- whole models and gates -------------------------------------------------------------------------------------


def test_an_encoder_with_padding_is_the_eager_one_with_the_pattern_as_its_mask() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from planish.passes.defaults import RECOGNIZE
    from planish.passes.manager import run_pass
    from tests.layer_models import MODELS

    model = MODELS["BERT"]
    program = model.program()
    run_pass(parse_pipeline(",".join(RECOGNIZE)), program)
    options = "pattern='longformer',block=4,local=1,global_blocks=1,max_length=64"
    assert apply_pass(f"shard-attention{{{options}}}", program).fired == 4
    given = model.example(2, 19)
    real = torch.arange(19) < torch.tensor([[19], [11]])
    given["attention_mask"] = real.to(given["attention_mask"].dtype)
    pattern = Longformer(block=4, local=1, global_blocks=1).layout(19, Heads(1, 1))
    seen = torch.from_numpy(layout_mask(pattern.indptr, pattern.indices, 4, 19, 19))
    mask = torch.where((seen & real[:, None])[:, None], 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        want = model.module()(**{**given, "attention_mask": mask})
    got = run_reference(program, {k: v.numpy() for k, v in given.items()})
    for name, array in got.items():
        if array.ndim == 3:
            close(array[real.numpy()], want[name].numpy()[real.numpy()])


def test_what_costs_more_than_the_budget_is_rolled_back() -> None:
    import planish

    for error, kept in ((1e-3, False), (10.0, True)):
        exe = planish.optimize(
            program_of(one()).main,
            "ort-cpu:threads=1",
            passes="shard-attention{block=16,local=1,stride=8,max_length=512}",
            calibration=feeds(400, batch=1),
            budget=planish.Budget(error=error, seconds=2),
        )
        entry = exe.report.ledger["shard-attention"]
        over = entry.verdict.startswith("rolled back: error")
        assert over is not kept, entry.verdict  # whether it is faster here is not the point
