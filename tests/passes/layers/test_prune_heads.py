"""prune-heads against torch: outputs are those of the module whose output projections are zero for these heads."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import planish  # noqa: E402
from planish.driver import optimize  # noqa: E402
from planish.ir.compare import compare_outputs  # noqa: E402
from planish.ir.errors import InputError  # noqa: E402
from planish.ir.program import Program  # noqa: E402
from planish.passes.base import PassContext, PassResult  # noqa: E402
from planish.passes.defaults import default_pipeline  # noqa: E402
from planish.passes.layers.prune_heads import PruneHeads  # noqa: E402
from planish.passes.manager import PassError, run_pass  # noqa: E402
from planish.passes.pipeline import format_pipeline, parse_pipeline  # noqa: E402
from planish.passes.testing import apply_pass, check_declines, run_reference  # noqa: E402
from tests.causal_models import causal_model, greedy, prompts  # noqa: E402
from tests.layer_models import MODELS  # noqa: E402

#: The output projection of a layer; whether its weight is stored (in, out).
PROJECTIONS = {
    "BERT": ("encoder.layer.{}.attention.output.dense", False),
    "GPT-2": ("transformer.h.{}.attn.c_proj", True),
    "Llama": ("model.layers.{}.self_attn.o_proj", False),
    "ViT": ("layers.{}.attention.o_proj", False),
    "OPT": ("model.decoder.layers.{}.self_attn.out_proj", False),
    "Qwen2": ("model.layers.{}.self_attn.o_proj", False),
    "BLOOM": ("h.{}.self_attention.dense", False),
    "T5 encoder": ("encoder.block.{}.layer.0.SelfAttention.o", False),
    "Mistral": ("layers.{}.self_attn.o_proj", False),
    "Phi": ("layers.{}.self_attn.dense", False),
}
LOWERINGS = "lower-feed-forward"
DEPTH = 8


def pipelines(target: str = "ort-cpu") -> tuple[str, str]:
    """What comes before the lowerings, and the rest."""
    before, after = default_pipeline(target).split(f",{LOWERINGS},")
    return before, f"{LOWERINGS},{after}"


@functools.cache
def _fused(name: str) -> Program:
    program = MODELS[name].program()
    run_pass(parse_pipeline(pipelines()[0]), program)
    return program


def fused(name: str) -> Program:
    return _fused(name).clone()


def zeroed(module: Any, path: str, rows: bool, heads: dict[int, Any], depth: int = DEPTH) -> Any:
    module = copy.deepcopy(module)
    with torch.no_grad():
        for layer, named in heads.items():
            weight = module.get_submodule(path.format(layer)).weight
            for head in named:
                place = slice(head * depth, (head + 1) * depth)
                weight[(place, slice(None)) if rows else (slice(None), place)] = 0
    return module


def expected(name: str, heads: dict[int, Any], feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    module = zeroed(MODELS[name].module(), *PROJECTIONS[name], heads)
    with torch.no_grad():
        found = module(**feeds)
    return {k: v.numpy() for k, v in found.items() if isinstance(v, torch.Tensor)}


def check_equal(name: str, program: Program, heads: dict[int, Any], batch: int = 2, length: int = 9) -> None:
    feeds = MODELS[name].example(batch, length)
    want = expected(name, heads, feeds)
    got = run_reference(program, {k: v.numpy() for k, v in feeds.items()})
    mask = feeds.get("attention_mask")
    for key, array in want.items():
        if mask is not None and array.ndim == 3:  # what stands at padding is of no use to anybody
            array, got[key] = array[mask.numpy() == 1], got[key][mask.numpy() == 1]
        assert compare_outputs({key: array}, got).relative_l2 < 1e-5


def matrix_bytes(program: Program) -> int:
    return sum(v.const_value.nbytes for v in program.main.graph.initializers.values() if len(v.shape) > 1)


CASES: list[tuple[str, dict[int, Any], int]] = [
    ("BERT", {0: (1,), 2: (0, 3)}, 3 * 4),
    ("GPT-2", {0: (1,), 2: (0, 3)}, 3 * 4),
    ("ViT", {0: (1,), 2: (0, 3)}, 3 * 4),
    ("OPT", {1: (3,), 3: (0, 1, 2)}, 4 * 4),
    ("Llama", {0: (0, 1), 3: (2, 3)}, 2 * (2 + 1 + 1 + 2)),  # with their keys and values
    ("Llama", {1: (1, 2)}, 2 * 2),  # one of each group: keys and values stay
    ("Qwen2", {0: (2, 3)}, 2 + 1 + 1 + 2),
    ("Mistral", {0: (2, 3)}, 2 + 1 + 1 + 2),
    ("Phi", {1: (0, 2)}, 2 * 4),
]


@pytest.mark.parametrize(("name", "heads", "slices"), CASES)
def test_outputs_are_those_of_zero_rows_and_weights_shrink(name: str, heads: dict[int, Any], slices: int) -> None:
    program = fused(name)
    before, matrices = program.weight_bytes(), matrix_bytes(program)
    result = apply_pass(PruneHeads(heads=heads), program)
    assert result.fired == sum(map(len, heads.values())) and not result.declined
    assert matrices - matrix_bytes(program) == slices * DEPTH * 32 * 4
    assert program.weight_bytes() < before and f"weights {before} to {program.weight_bytes()} bytes" in result.notes[0]
    check_equal(name, program, heads)
    run_pass(parse_pipeline(pipelines()[1]), program)  # and so the lowerings see it
    for batch, length in ((1, 1), (3, 13)):
        check_equal(name, program, heads, batch, length)


@pytest.mark.parametrize("name", ["BERT", "ViT", "Llama"])
def test_attention_with_heads_in_an_axis_of_their_own(name: str) -> None:
    program = MODELS[name].program()
    if name == "Llama":
        run_pass(parse_pipeline("infer-shapes,fold-constants,share-kv-heads"), program)
    result = apply_pass(PruneHeads(heads={1: (0, 1)}), program)
    assert result.fired == 2 and not result.declined
    check_equal(name, program, {1: (0, 1)})


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "ViT"])
def test_without_all_heads_the_attention_is_gone(name: str) -> None:
    program = fused(name)
    heads = {1: (0, 1, 2, 3), 2: (0, 1)}
    attentions = sum("Attention" in node.op_type for node in program.nodes())
    assert apply_pass(PruneHeads(heads=heads), program).fired == 6
    assert sum("Attention" in node.op_type for node in program.nodes()) == attentions - 1
    if name == "Llama":  # without a bias of the projection, no attention is what zero rows make of it
        check_equal(name, program, heads)


# --- importance --------------------------------------------------------------------------------------------


def context(name: str) -> PassContext:
    feeds = [{k: v.numpy() for k, v in MODELS[name].example(2, n).items()} for n in (5, 9)]
    return PassContext(run=lambda program, entry: [run_reference(program, batch) for batch in feeds])


def scale(program: Program, name: str, heads: dict[int, Any], factor: float) -> None:
    """Makes what these heads add small, in a program that has just been fused."""
    from planish.passes.layers.head_sites import find_sites

    ((stack,), _) = find_sites(program, None, False, "prune-heads")
    for layer, named in heads.items():
        value = stack.sites[layer].flows["main"].projections[0].node.inputs[1]
        array = value.const_value.numpy().copy()
        for head in named:
            array[head * DEPTH : (head + 1) * DEPTH] *= factor
        value.const_value = ir.tensor(array, name=value.name)


def gone(result: PassResult) -> str:
    return result.notes[0].split("(")[1].split(")")[0]


@pytest.mark.parametrize(
    ("name", "heads", "options"),
    [
        ("BERT", {0: (1,), 1: (3,), 2: (0,), 3: (2,)}, {"ratio": 0.25}),
        ("BERT", {0: (1,), 1: (3,), 2: (0,), 3: (2,)}, {"keep": 3}),
        ("ViT", {0: (1, 2), 1: (0, 3), 2: (0, 1), 3: (2, 3)}, {"ratio": 0.7}),
        ("Llama", {0: (0, 1), 1: (2, 3), 2: (0, 1), 3: (2, 3)}, {"ratio": 0.5}),
        ("Llama", {0: (0, 1), 1: (2, 3), 2: (0, 1), 3: (2, 3)}, {"keep": 2}),
        ("GPT-2", {0: (1, 2), 3: (0,)}, {"ratio": 0.2, "uniform": False}),
    ],
)
def test_importance_finds_the_heads_that_add_least(name: str, heads: dict[int, Any], options: dict[str, Any]) -> None:
    program = fused(name)
    scale(program, name, heads, 1e-3)
    result = apply_pass(PruneHeads(**options), program, context(name))
    assert gone(result) == "; ".join(f"{layer}: {', '.join(map(str, named))}" for layer, named in heads.items())


def test_importance_is_the_norm_of_what_a_head_adds_and_padding_does_not_count() -> None:
    from planish.passes.layers.head_sites import find_sites, importances

    program = fused("BERT")
    ((stack,), _) = find_sites(program, None, False, "prune-heads")
    feeds = MODELS["BERT"].example(2, 7)
    module, read = MODELS["BERT"].module(), {}
    dense = module.get_submodule("encoder.layer.1.attention.output.dense")
    hook = dense.register_forward_pre_hook(lambda _, args: read.update(x=args[0]))
    with torch.no_grad():
        module(**feeds)
    hook.remove()
    arrays = {k: v.numpy() for k, v in feeds.items()}
    got = importances(program, "main", stack.sites, lambda p, entry: [run_reference(p, arrays)])
    for head in range(4):
        place = slice(head * DEPTH, (head + 1) * DEPTH)
        added = read["x"][..., place] @ dense.weight[:, place].T
        want = added.norm(dim=-1)[feeds["attention_mask"] == 1].sum().item()
        assert got[1][head] == pytest.approx(want, rel=1e-4)


def test_nothing_to_remove() -> None:
    program = fused("Llama")
    assert not apply_pass(PruneHeads(ratio=0.4), program, context("Llama")).modified  # less than one group of two
    assert not apply_pass(PruneHeads(keep=4), program).modified
    assert not apply_pass(PruneHeads(heads={1: ()}), program).modified


# --- declined ----------------------------------------------------------------------------------------------


def test_declines() -> None:
    check_declines(PruneHeads(heads={0: (1,)}), MODELS["BLOOM"].program(), "run fuse-attention first", count=4)
    check_declines(PruneHeads(ratio=0.5), fused("BERT"), "there is nothing to run them with", count=1)


def test_tied_matrices_are_declined() -> None:
    program = fused("BERT")
    layers = [n for n in program.main.graph if n.op_type == "Attention"]
    query = [n.inputs[0].producer().inputs[0].producer() for n in layers]  # type: ignore[union-attr]
    query[1].replace_input_with(1, query[2].inputs[1])  # type: ignore[union-attr]
    result = apply_pass(PruneHeads(heads={1: (0,), 2: (0,), 3: (0,)}), program)
    assert result.fired == 1
    assert ["is also read by MatMul" in d.reason for d in result.declined] == [True, True]


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "none is given"),
        ({"keep": 2, "ratio": 0.5}, "keep and ratio is given"),
        ({"ratio": 1.0}, "ratio is 1; it is from 0"),
        ({"ratio": float("nan")}, "below 1"),
        ({"keep": 0}, "keep at least 1 head"),
        ({"keep": 2, "uniform": False}, "give ratio="),
        ({"heads": {1: [2, 2]}}, "names a head of layer 1 twice"),
        ({"keep": 2, "by": "importence"}, "Did you mean 'importance'"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PruneHeads(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": {4: (0,)}}, "heads names layer 4; 'model.layers' has the layers 0 to 3."),
        ({"heads": {0: (4,)}}, "heads names head 4 of layer 0, which has the heads 0 to 3."),
        ({"heads": {0: (-1,)}}, "heads names head -1 of layer 0, which has the heads 0 to 3."),
        ({"heads": {1: (2,)}}, "query heads 2 to 3 read key/value head 1, and 1 of them would be left"),
        ({"keep": 3}, "keep is 3; 'model.layers.0' has 4 heads: a multiple of 2 from 2 to that."),
        ({"keep": 6}, "keep is 6; 'model.layers.0' has 4 heads"),
        ({"keep": 2, "stack": "model.layer"}, "unknown stack 'model.layer'. Did you mean 'model.layers'"),
    ],
)
def test_options_that_do_not_fit_the_model(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError) as caught:
        apply_pass(PruneHeads(**options), fused("Llama"), context("Llama"))
    assert isinstance(caught.value.__cause__, InputError) and message in str(caught.value.__cause__)


def test_pipeline_string() -> None:
    (p,) = parse_pipeline("prune-heads{heads={0:[1],3:[0,2]}}")
    assert p == PruneHeads(heads={0: (1,), 3: (0, 2)})
    assert parse_pipeline(format_pipeline([p])) == [p]
    assert parse_pipeline("prune-heads{ratio=0.25,by='importance'}") == [PruneHeads(ratio=0.25)]


# --- causal language models --------------------------------------------------------------------------------

CAUSAL = {"Llama": "model.layers.{}.self_attn.o_proj", "GPT-2": "transformer.h.{}.attn.c_proj"}
CAUSAL |= {"OPT": "model.decoder.layers.{}.self_attn.out_proj", "Qwen3": "model.layers.{}.self_attn.o_proj"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_prefill_and_decode_lose_the_same_heads(name: str) -> None:
    before, after = pipelines()
    heads = {0: (0, 1), 1: (2, 3)}
    exe = optimize(
        causal_model(name),
        "ort-cpu:threads=1",
        task="causal-lm",
        passes=f"{before},prune-heads{{heads={heads}}},{after}",
        budget=planish.Budget(gates=False),
    )
    assert exe.report is not None and exe.report.ledger["prune-heads"].fired == 4
    kept = 1 if name in ("Llama", "Qwen3") else 2
    for entry in exe.program.entries:
        caches = [s.shape[1] for s in (*exe.program.inputs(entry), *exe.program.outputs(entry)) if len(s.shape) == 4]
        assert set(caches) == {kept}
    ids, mask = prompts(3, 7)
    module = zeroed(causal_model(name), CAUSAL[name], name == "GPT-2", heads, 16 if name == "Qwen3" else DEPTH)
    got = exe.generate(ids, max_new_tokens=6, attention_mask=mask)
    np.testing.assert_array_equal(got, greedy(module, ids, mask, 6))


@pytest.mark.slow
def test_with_gates_the_smaller_caches_are_no_error() -> None:
    before, after = pipelines()
    exe = optimize(
        causal_model("Llama"),
        "ort-cpu:threads=1",
        task="causal-lm",
        passes=f"{before},prune-heads{{heads={{0:[0,1]}}}},{after}",
        budget=planish.Budget(error=10.0, seconds=2),
    )
    assert exe.report is not None
    entry = exe.report.ledger["prune-heads"]
    assert "does not run" not in entry.verdict and "error inf" not in entry.verdict


@pytest.mark.parametrize("name", ["BLOOM", "T5 encoder"])
def test_masks_that_differ_between_heads(name: str) -> None:
    program = fused(name)
    result = apply_pass(PruneHeads(heads={1: (0, 2)}), program)
    assert result.fired == 2 and not result.declined
    check_equal(name, program, {1: (0, 2)})
