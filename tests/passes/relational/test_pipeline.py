"""Pipelines over random programs and over models: meaning stays, gradients too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.errors import InputError
from planish.ir.relational.autodiff import differentiate
from planish.ir.relational.interpret import interpret
from planish.ir.relational.models import hgt, rgat, rgcn
from planish.ir.relational.statistics import Statistics
from planish.ir.relational.text import parse_program
from planish.passes.relational.pipeline import DEFAULT, PASSES, parse, run_passes
from tests.ir.relational.graphs import graphs, random_values
from tests.ir.relational.programs import random_program

GRAPHS = graphs()
#: Such that what can fire fires.
EAGER = Statistics(nodes=100, edges=10_000, src_pairs=500, dst_pairs=400, edge_types=7)
PIPELINES = (
    "canonicalize",
    "hoist",
    "reorder{force=True}",
    "aggregate-first",
    "outer-by-pair",
    "compact{max_ratio=2.0}",
    "cse,dce",
    DEFAULT,
)
MODELS = {
    "rgcn": rgcn(6, 4),
    "rgat": rgat(5, 4, heads=2),
    "rgat1": rgat(5, 4),
    "hgt": hgt(6, 4, heads=2),
    "hgt1": hgt(8, 4),
}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(GRAPHS)),
    passes=st.sampled_from(PIPELINES),
    eager=st.booleans(),
)
def test_random_programs_keep_their_meaning(seed: int, name: str, passes: str, eager: bool) -> None:
    graph = GRAPHS[name]
    rows = Statistics.of(graph)
    program = random_program(seed, 4 + seed % 20, rows.canonical)
    assert parse_program(str(program)) == program
    if eager:
        rows = Statistics(**{**EAGER.__dict__, "canonical": rows.canonical})
    done = run_passes(program, rows, passes).program
    assert done.outputs == program.outputs and done.arguments == program.arguments
    values = random_values(program, graph, seed)
    wanted, got = interpret(program, graph, values), interpret(done, graph, values)
    for output, array in wanted.items():
        scale = max(1.0, float(np.abs(array).max(initial=0)))
        np.testing.assert_allclose(got[output], array, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("graph", ["typed", "many types", "isolated", "no edges", "one node"])
def test_forward_and_backward_after_all_passes(name: str, graph: str) -> None:
    """Gradients of the optimized layer, themselves optimized, are those of the layer as it was written."""
    program, on = MODELS[name], GRAPHS[graph]
    values = random_values(program, on)
    fast = run_passes(program, EAGER).program
    random = np.random.default_rng(2)
    found = []
    seeds: list[np.ndarray] = []
    for layer, passes in ((program, ""), (fast, DEFAULT)):
        both = differentiate(layer)
        forward = run_passes(both.forward, EAGER, passes).program
        backward = run_passes(both.backward, EAGER, passes).program
        out = interpret(forward, on, values)
        seeds = seeds or [random.normal(size=out[y].shape) for y in both.outputs]
        given = values | out | dict(zip(both.gradients, seeds, strict=True))
        found.append([*(out[y] for y in both.outputs), *interpret(backward, on, given).values()])
    for wanted, got in zip(*found, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(GRAPHS)))
def test_gradients_of_random_programs(seed: int, name: str) -> None:
    graph, program = GRAPHS[name], random_program(seed, 4 + seed % 10, canonical=name != "any types")
    rows = Statistics(**{**EAGER.__dict__, "canonical": name != "any types"})
    values = random_values(program, graph, seed)
    found = []
    seeds: dict[str, np.ndarray] = {}
    for passes in ("", DEFAULT):
        both = differentiate(run_passes(program, rows, passes).program)
        backward = run_passes(both.backward, rows, passes).program
        out = interpret(both.forward, graph, values)
        seeds = seeds or {
            name: np.cos(np.arange(out[y].size)).reshape(out[y].shape)
            for name, y in zip(both.gradients, both.outputs, strict=True)
        }
        found.append(interpret(backward, graph, values | out | seeds))
    for wanted, got in zip(*(each.values() for each in found), strict=True):
        scale = max(1.0, float(np.abs(wanted).max(initial=0)))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-8 * scale)


def test_models_gain_what_they_should() -> None:
    """RGAT: both logits are products with vectors by type, and messages are summed before they are multiplied."""
    done = run_passes(rgat(64, 64), EAGER)
    kinds = {(op.kind, str(op.over), op.result.shape) for op in done.program.ops if op.kind in ("linear", "dot", "sum")}
    assert kinds == {
        ("dot", "edge_type", (64, 1)),
        ("linear", "src_pair", (1,)),
        ("linear", "dst_pair", (1,)),
        ("sum", "edge", (64,)),
        ("linear", "dst_pair", (64,)),
        ("sum", "dst_pair", (1, 64)),
    }
    # With more pairs on that side, messages are made at the source, and are what its logit is made of.
    done = run_passes(rgat(64, 64), Statistics(100, 10_000, 500, 4000, 7))
    assert "400 on this side" not in str(done) and "'linear' is needed elsewhere" in str(done)
    assert ("linear", "src_pair") in {(op.kind, str(op.over)) for op in done.program.ops if op.result.shape == (64,)}


def test_strings() -> None:
    assert [str(p) for p in parse("canonicalize, compact{max_ratio=0.5},dce")] == [
        "canonicalize",
        "compact{max_ratio=0.5}",
        "dce",
    ]
    assert {str(cls()) for cls in PASSES.values()} == set(PASSES)
    with pytest.raises(InputError, match=r"unknown pass 'compct'. Did you mean 'compact'\?"):
        parse("compct")
    with pytest.raises(InputError, match="option 'max_ratio' of pass 'compact' takes a number"):
        parse("compact{max_ratio='a'}")
