"""merge-tokens on small graphs: what it writes, what is behind the layers, options, declines, and tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.errors import InputError
from planish.ir.graphs import dims_of
from planish.ir.program import Program
from planish.passes.base import PassContext, PassResult
from planish.passes.manager import PassManager
from planish.passes.pipeline import parse_pipeline
from planish.passes.testing import program_of
from planish.passes.tokens.merge_tokens import MergeTokens
from planish.passes.tokens.merge_tuning import tuned
from planish.passes.tokens.schedule import counts
from tests.passes.tokens.encoders import WIDTH, encoder


def merged(text: str, options: str = "r=3") -> tuple[Program, PassResult]:
    program = program_of(text)
    return program, PassManager(parse_pipeline(f"merge-tokens{{{options}}}")).apply(
        program, PassContext(program.target)
    )


def nodes(program: Program, kind: str) -> list[Any]:
    return [node for node in program.entry("main").graph if node.op_type == kind]


def reasons(text: str, options: str = "r=3") -> str:
    program, result = merged(text, options)
    assert not result.fired and not nodes(program, "MergeTokens")
    return "; ".join(declined.reason for declined in result.declined)


def run(program: Program, front: int = 1, tokens: int = 12) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    feed = {"x": (2, tokens, WIDTH), "c": (2, front, WIDTH)}
    session = ort.InferenceSession(
        ir.to_proto(program.entry("main")).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = {value.name for value in session.get_inputs()}
    given = {name: rng.standard_normal(shape, np.float32) for name, shape in feed.items() if name in names}
    return [np.asarray(v) for v in session.run(None, given)]


def test_what_is_written() -> None:
    program, result = merged(encoder(front=2), "r=4")
    merges = nodes(program, "MergeTokens")
    assert result.fired == len(merges) == 3
    given = [{name: a.value for name, a in node.attributes.items()} for node in merges]
    assert given == [{"r": 4, "ratio": 0.0, "protected": 2, "heads": 2}] * 3
    assert [dims_of(node.outputs[0]) for node in merges] == [("B", 10, 8), ("B", 6, 8), ("B", 4, 8)]
    attentions = nodes(program, "Attention")
    assert [len(node.inputs) for node in attentions] == [3, 4, 4]
    assert dims_of(attentions[2].inputs[3]) == ("B", 1, 6, 6)
    assert result.notes == [
        "stack 1: 14 tokens become 4 in 3 of 3 layers; 2 protected; tokens are given back behind the layers"
    ]
    assert program.entry("main").graph.outputs[0].name == "y" and run(program, 2)[0].shape == (2, 14, 8)


def test_few_tokens_and_layers_that_merge_none() -> None:
    program, result = merged(encoder(), "r=[100, 0, 100]")
    assert result.fired == 2
    assert [dims_of(node.outputs[0])[1] for node in nodes(program, "MergeTokens")] == [7, 4]
    assert not merged(encoder(), "r=0")[1].modified
    assert run(program)[0].shape == (2, 13, 8)


def test_ratio_and_inflection() -> None:
    program, _ = merged(encoder(tokens=40), "ratio=0.25")
    assert [dims_of(node.outputs[0])[1] for node in nodes(program, "MergeTokens")] == [31, 24, 18]
    program, _ = merged(encoder(tokens=40), "r=4,inflection=-1")
    assert [dims_of(node.outputs[0])[1] for node in nodes(program, "MergeTokens")] == [33, 29]
    assert counts(16, 12, -1.0) == [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    assert counts(8, 3, 1.0) == [0, 8, 16] and counts(7, 1) == [7] and counts([1, 2], 2) == [1, 2]


def test_symbolic_tokens() -> None:
    program, _ = merged(encoder(tokens="T"), "r=4")
    dims = [dims_of(node.outputs[0]) for node in nodes(program, "MergeTokens")]
    assert len({d[1] for d in dims}) == 3 and all(isinstance(d[1], str) for d in dims)
    for tokens in (1, 2, 5, 12, 40):
        assert run(program, tokens=tokens)[0].shape == (2, tokens + 1, 8)


MEAN, WHOLE = "float[B, 8] y", "float[B, 13, 8] y"


def normed(x: np.ndarray) -> np.ndarray:
    away = x - x.mean(-1, keepdims=True)
    return np.asarray(away / np.sqrt(np.square(away).mean(-1, keepdims=True) + 1e-5))


TAILS: list[tuple[str, str, int, Callable[[np.ndarray], np.ndarray]]] = [
    ("y = Gather<axis = 1>(last, i0)", MEAN, 0, lambda a: a[:, 0]),
    ("y = LayerNormalization<axis = -1>(last, ones)", WHOLE, 1, normed),
    ("n = LayerNormalization<axis = -1>(last, ones)  y = Gather<axis = 1>(n, i0)", MEAN, 0, lambda a: normed(a)[:, 0]),
    ("y = ReduceMean<keepdims = 0>(last, one)", MEAN, 0, lambda a: a.mean(1)),
    (
        "n = Relu(last)  y = ReduceMean(n, one)",
        "float[B, 1, 8] y",
        0,
        lambda a: np.maximum(a, 0).mean(1, keepdims=True),
    ),
    ("p = Slice(last, one, end, one)  y = ReduceMean<keepdims = 0>(p, one)", MEAN, 0, lambda a: a[:, 1:].mean(1)),
    ("y = ReduceMax<keepdims = 0>(last, one)", MEAN, 1, lambda a: a.max(1)),
    ("p = Slice(last, one, end, one)  y = ReduceMax<keepdims = 0>(p, one)", MEAN, 1, lambda a: a[:, 1:].max(1)),
    ("y = Add(last, table)", WHOLE, 1, lambda a: a + np.arange(13)[:, None]),
]


@pytest.mark.parametrize("tail, outputs, unmerged, expected", TAILS)
def test_what_is_behind_finds_each_token_in_its_place(
    tail: str, outputs: str, unmerged: int, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    program, _ = merged(encoder(tail=tail, outputs=outputs))
    assert len(nodes(program, "UnmergeTokens")) == unmerged
    whole, _ = merged(encoder())
    np.testing.assert_allclose(run(program)[0], expected(run(whole)[0]), rtol=1e-5, atol=1e-5)


def test_tokens_that_are_read_by_their_places_do_not_merge() -> None:
    program, _ = merged(encoder(front=0, tail="y = Gather<axis = 1>(last, i3)", outputs=MEAN))
    assert nodes(program, "MergeTokens")[0].attributes.get_int("protected") == 4
    program, _ = merged(encoder(), "r=3,protected=3")
    assert nodes(program, "MergeTokens")[0].attributes.get_int("protected") == 3


def test_energy_and_norms() -> None:
    program, _ = merged(encoder(), 'r=2,match="energy",combine="max-norm"')
    found = nodes(program, "MergeTokensEnergyMaxNorm")
    margins = [node.attributes.get_float("margin") for node in found]
    np.testing.assert_allclose(margins, [0.9, 0.6, 0.3], rtol=1e-6)
    assert run(program)[0].shape == (2, 13, 8)


def test_attention_is_recognized_first() -> None:
    program, result = merged(encoder(raw=True), "r=3")
    assert result.fired == 3 and len(nodes(program, "Attention")) == 3 and not nodes(program, "Softmax")
    fused, _ = merged(encoder(), "r=3")
    np.testing.assert_allclose(run(program)[0], run(fused)[0], rtol=1e-5, atol=1e-6)
    program, result = merged(encoder(raw=True, behind=2), "r=3")
    assert not result.modified and len(nodes(program, "Softmax")) == 3
    assert "2 tokens stand behind" in result.declined[0].reason


def test_other_runtimes_are_declined() -> None:
    program = program_of(encoder(), "tvm-cpu")
    result = PassManager(parse_pipeline("merge-tokens{r=3}")).apply(program, PassContext(program.target))
    assert not result.modified and "target 'tvm-cpu" in result.declined[0].reason


def test_what_is_declined() -> None:
    assert "is causal" in reasons(encoder(attributes="is_causal = 1"))
    assert "depends on the inputs: tokens that it hides would merge" in reasons(
        encoder(mask="mask", inputs="bool[B, 1, 13, 13] mask")
    )
    assert "2 tokens stand behind those of the input" in reasons(encoder(behind=2))
    assert "run side by side: nothing is in between" in reasons(encoder(parallel=True))
    assert "is over 4 of 16 tokens: windows" in reasons(encoder(front=4, windows=True))
    assert "it is not float32" in reasons(encoder().replace("float[", "double[").replace("float half", "double half"))
    assert "no repeated layers" in reasons(encoder(1))


def test_wrong_options() -> None:
    for options, message in (
        ({}, "give one of r=, ratio= and speedup=; none is given"),
        ({"r": 3, "ratio": 0.1}, "r and ratio is given"),
        ({"r": -1}, "r is -1"),
        ({"ratio": 0.7}, "ratio is 0.7; it goes from 0 to 0.5"),
        ({"r": 3, "inflection": 2.0}, "inflection is 2"),
        ({"speedup": 0.5}, "speedup is 0.5"),
        ({"r": 3, "match": "none"}, "match"),
        ({"r": 3, "combine": "men"}, "mean"),
    ):
        with pytest.raises(InputError, match=message):
            MergeTokens(**options)
    with pytest.raises(Exception, match="r lists 2 numbers for a stack of 3 layers"):
        merged(encoder(), "r=[1, 2]")
    with pytest.raises(Exception, match="unknown stack"):
        merged(encoder(), "r=1,stack='nothing'")


def test_tuning_takes_the_smallest_r_that_is_fast_enough() -> None:
    program, asked = program_of(encoder(tokens=40)), []

    def gain(variant: Any, threshold: float) -> float:
        asked.append(variant.r)
        return 1 + variant.r / 10

    found, note = tuned(MergeTokens(speedup=1.65), program, gain)
    assert found.r == 7 and "r=7" in note and "1.7x measured for the asked 1.65x" in note and len(asked) < 8
    found, note = tuned(MergeTokens(speedup=9.0), program, gain)
    assert found.r == 20 and "can not be measured here: at most r=20" in note
    program, _ = merged(encoder(tokens=40), "speedup=1.2")  # nothing is measured: by operations
    assert nodes(program, "MergeTokens")


def test_where_merging_does_not_pay_the_report_says_from_where_on_it_would() -> None:
    program = program_of(encoder(tokens=40))
    same, note = tuned(MergeTokens(r=4), program, lambda *_: 0.8)
    assert same == MergeTokens(r=4)
    assert "merge-tokens does not pay at 41 tokens" in note and "break-even is at about" in note
    assert int(note.split("about ")[1].split()[0]) > 41
    assert tuned(MergeTokens(r=4), program, lambda *_: 1.2)[1] == ""
