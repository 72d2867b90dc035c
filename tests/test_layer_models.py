"""Layers of real architectures, small: both routes find the same, and what is left equals the module without them.

Captures are made once a process; the slow ones are architectures whose form another one here has too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from planish.ir.analyses.layers import LayerAnalysis, find_layers  # noqa: E402
from planish.ir.program import Program  # noqa: E402
from planish.passes.layers.skip_layers import SkipLayers  # noqa: E402
from planish.passes.testing import apply_pass, run_reference  # noqa: E402
from tests.layer_models import MODELS  # noqa: E402

FAST = ("BERT", "GPT-2", "ViT")
#: Kinds of the parts of a layer; attention and a feed-forward network where nothing is said.
PARTS = {
    "T5 decoder": ["attention", "cross-attention", "ffn"],
    "Mixtral": ["attention", "moe"],
    "ConvNeXt": ["conv"],
    "ResNet": ["conv"],
}
#: Layers of the stacks; one of four where nothing is said.
SIZES = {"MiniLM": [6], "T5": [4, 4], "Swin": [2, 4], "ConvNeXt": [2, 3], "ResNet": [3, 3]}
NORMED = {"BERT", "DistilBERT", "RoBERTa", "MiniLM", "ALBERT", "ResNet"}
PARALLEL = {"Phi", "GPT-J", "GPT-NeoX"}
LIMIT = 1e-5


def _marked(names: Iterable[str]) -> list[object]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def facts(analysis: LayerAnalysis) -> list[list[object]]:
    return [[(one.hidden_in, one.hidden_out, one.nodes) for one in stack.layers] for stack in analysis.stacks]


@pytest.mark.parametrize("name", _marked(MODELS))
@pytest.mark.parametrize("optimized", [False, True], ids=["captured", "optimized"])
def test_both_routes_find_the_same_layers(name: str, optimized: bool) -> None:
    model = MODELS[name].program(optimized=optimized).main
    scopes, structure = (find_layers(model, route=route) for route in ("scopes", "structure"))  # type: ignore[arg-type]
    assert [len(stack) for stack in structure.stacks] == SIZES.get(name, [4])
    assert [stack.tied for stack in structure.stacks] == [name == "ALBERT"] * len(structure.stacks)
    if name == "ALBERT":  # one module, run four times: there is nothing to number
        assert not scopes.stacks and facts(find_layers(model)) == facts(structure)
    else:
        assert facts(scopes) == facts(structure)
    for number, stack in enumerate(structure.stacks):
        kinds = PARTS.get("T5 decoder" if (name, number) == ("T5", 1) else name, ["attention", "ffn"])
        for layer in stack.layers:
            assert [part.kind for part in layer.parts] == kinds
            assert [part.parallel for part in layer.parts] == [name in PARALLEL] * len(kinds)
            assert layer.form == ("normed" if name in NORMED else "residual")
            assert not layer.cache_inputs and not layer.cache_outputs and not layer.other_outputs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Swin", "ConvNeXt", "ResNet"])
def test_stages_are_stacks_and_the_list_of_stages_is_declined(name: str) -> None:
    (reason, *_) = find_layers(MODELS[name].program().main).declined
    assert "changes the shape of the hidden state, ['batch', " in reason


def _cases() -> Iterator[object]:
    for name, model in MODELS.items():
        for number in range(len(model.stacks)):
            yield pytest.param(name, number, marks=[] if name in FAST else pytest.mark.slow, id=f"{name}-{number}")


def _without(program: Program, number: int, removed: tuple[int, ...]) -> Program:
    names = [stack.name for stack in find_layers(program.main).stacks]
    result = apply_pass(SkipLayers(layers=removed, stack=names[number]), program)
    assert result.fired == len(removed)
    return program


@pytest.mark.parametrize(("name", "number"), list(_cases()))
def test_what_is_left_equals_the_module_without_the_layers(name: str, number: int) -> None:
    model = MODELS[name]
    feeds = {key: value.numpy() for key, value in model.example(3, 7).items()}
    for removed in ((1, 2), (0,), (3,)):
        with torch.no_grad():
            outputs = model.without({model.stacks[number]: removed})(**model.example(3, 7))
        leaves = [t.numpy() for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
        for optimized in (False, True):
            program = model.program(optimized=optimized)
            bare = program.clone()
            for node in bare.nodes():
                node.metadata_props.clear()
            before = program.node_count(), program.weight_bytes()
            got = run_reference(_without(program, number, removed), feeds)
            for have, want in zip(got.values(), leaves, strict=True):
                assert np.linalg.norm(have - want) <= LIMIT * np.linalg.norm(want)
            by_structure = run_reference(_without(bare, number, removed), feeds)
            assert all(np.array_equal(got[key], by_structure[key]) for key in got)
            assert program.node_count() < before[0] and program.weight_bytes() < before[1]


#: (model, the product that ends the branch, part, stack).
BRANCHES = [
    ("BERT", "encoder.layer.{}.attention.output.dense", "attention", 0),
    ("ViT", "layers.{}.mlp.fc2", "ffn", 0),
    ("Llama", "model.layers.{}.self_attn.o_proj", "attention", 0),
    ("Phi", "layers.{}.self_attn.dense", "attention", 0),
    ("GPT-J", "h.{}.mlp.fc_out", "ffn", 0),
    ("T5", "decoder.block.{}.layer.0.SelfAttention.o", "attention", 1),
]


@pytest.mark.parametrize(
    ("name", "product", "part", "number"),
    [pytest.param(*case, marks=[] if case[0] in FAST else pytest.mark.slow, id=case[0]) for case in BRANCHES],
)
def test_without_a_part_equals_the_module_with_that_branch_zero(
    name: str, product: str, part: str, number: int
) -> None:
    model = MODELS[name]
    module = copy.deepcopy(model.module())
    for i in (1, 2):
        for parameter in module.get_submodule(product.format(i)).parameters():
            parameter.data.zero_()
    with torch.no_grad():
        outputs = module(**model.example())
    want = next(t.numpy() for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor))
    for optimized in (False, True):
        program = model.program(optimized=optimized)
        names = [stack.name for stack in find_layers(program.main).stacks]
        result = apply_pass(SkipLayers(layers=(1, 2), part=part, stack=names[number]), program)
        assert result.fired == 2, result.declined
        got = run_reference(program, {key: value.numpy() for key, value in model.example().items()})
        have = next(iter(got.values()))
        assert np.linalg.norm(have - want) <= LIMIT * np.linalg.norm(want)


@pytest.mark.slow
def test_albert_is_declined() -> None:
    result = apply_pass(SkipLayers(speedup=2), MODELS["ALBERT"].program())
    assert not result.modified and "share their weights" in result.declined[0].reason
