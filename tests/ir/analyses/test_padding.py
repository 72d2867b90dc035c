"""Padding: what is proved holds with junk in the padding, and what mixes rows or tokens is declined by its name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.ir.analyses.bucket_plan import plan_buckets
from planish.ir.analyses.padding import Proof, padding
from planish.ir.errors import InputError
from planish.passes.testing import program_of
from tests.ir.analyses.padding_cases import DECLINED, HOLDS, text


def prove(case) -> tuple[object, Proof]:
    signature, body, constants, dim = case[:4]
    program = program_of(text(signature, body, constants))
    return program, padding(program.main, dim)


def session(program) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(program.main).SerializeToString(), options)


def feeds_of(program, sizes: dict[str, int], random: np.random.Generator) -> dict[str, np.ndarray]:
    found = {}
    for spec in program.inputs():
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.name == "mask":  # each row sees its first key
            found[spec.name] = (random.random(shape) < 0.6).astype(np.int64)
            found[spec.name][:, 0] = 1
        elif spec.dtype.name == "INT64":
            found[spec.name] = random.integers(0, 4, shape)
        else:
            found[spec.name] = random.standard_normal(shape).astype(np.float32)
    return found


def padded(program, proof: Proof, feeds, more: int, random: np.random.Generator):
    """Feeds with `more` entries of the dimension, junk where anything may be."""
    found = {}
    for spec in program.inputs():
        array = feeds[spec.name]
        if proof.dim not in spec.shape:
            found[spec.name] = array
            continue
        axis, fill = spec.shape.index(proof.dim), proof.fills[spec.name]
        shape = list(array.shape)
        shape[axis] = more
        if fill is not None:
            rest = np.full(shape, fill, array.dtype)
        elif array.dtype == np.float32:
            rest = random.choice(np.array([np.nan, np.inf, -3e38, 1e30], np.float32), shape)
        else:
            rest = random.integers(-(10**9), 10**9, shape)
        found[spec.name] = np.concatenate([array, rest], axis)
    return found


@pytest.fixture(scope="module")
def proved():
    made = {}
    for name, case in HOLDS.items():
        program, proof = prove(case)
        made[name] = program, proof, session(program)
    return made


def test_what_holds_is_proved(proved):
    assert {name: proof.reason for name, (_, proof, _) in proved.items() if proof.reason} == {}
    assert proved["rows of products"][1].fills == {"x": None} and proved["images"][1].fills == {"x": None}
    assert proved["attention with a mask"][1].fills == {"x": 0.0, "mask": 0.0}
    assert proved["attention with a mask"][1].assumes == ("each query sees a key that is no padding",)
    assert proved["causal attention"][1].assumes == ()
    assert proved["ids that count what is no padding"][1].fills == {"ids": 3.0}
    assert proved["positions from a table"][1].limit == 4
    assert proved["a token in front"][1].outputs == {"y": ((1, 1),)}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(HOLDS)), st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32))
def test_padding_changes_nothing(proved, name, n, b, more, seed):
    program, proof, ran = proved[name]
    random = np.random.default_rng(seed)
    n = min(n, 4) if name == "ids that count what is no padding" else n
    sizes = {"n": n, "b": b}
    if proof.limit is not None:
        sizes[proof.dim] = min(sizes[proof.dim], proof.limit - 1)
        more = min(more, proof.limit - sizes[proof.dim])
    if name == "ids that count what is no padding":
        sizes["n"] = min(n, 3)  # its table has four rows
    feeds = feeds_of(program, sizes, random)
    names = [spec.name for spec in program.outputs()]
    want = dict(zip(names, ran.run(names, feeds), strict=True))
    got = dict(zip(names, ran.run(names, padded(program, proof, feeds, more, random)), strict=True))
    for output in names:
        cut = [slice(None)] * want[output].ndim
        for axis, plus in proof.outputs[output]:
            cut[axis] = slice(0, sizes[proof.dim] + plus)
        assert np.isfinite(want[output]).all()
        np.testing.assert_allclose(got[output][tuple(cut)], want[output], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(DECLINED))
def test_what_mixes_is_declined(name):
    case = DECLINED[name]
    reason = prove(case)[1].reason
    assert case[4] in reason, reason


def test_values_that_no_output_needs_do_not_count():
    program = program_of(
        text("(float[n, 4] x) => (float[n, 4] y)", "m = ReduceMean(x, z) y = Relu(x)", "int64[1] z = {0}")
    )
    assert not padding(program.main, "n").reason


def test_plan():
    signature, body, constants, _ = HOLDS["attention with a mask"]
    program = program_of(text(signature, body, constants))
    plan, notes = plan_buckets(program.main, (("b", (1, 2)), ("n", (4, 8))))
    assert plan.sizes == {"b": (1, 2), "n": (4, 8)} and plan.fills == {"x": 0.0, "mask": 0.0} and plan.count == 4
    assert plan.outputs == {"y": ((0, "b", 0), (1, "n", 0))}
    assert notes == [
        "inputs are padded, b to 1, 2; n to 4, 8, which takes that each query sees a key that is no padding."
    ]
    signature, body, constants, *_ = DECLINED["mean over tokens"]
    plan, notes = plan_buckets(program_of(text(signature, body, constants)).main, (("n", (4,)), ("b", (2,))))
    assert plan.sizes == {"b": (2,)}
    assert "sizes of n are not padded: ReduceMean 'ReduceMean_0': averages over n, padding included." in notes
    signature, body, constants, _ = HOLDS["positions from a table"]
    plan, notes = plan_buckets(program_of(text(signature, body, constants)).main, (("n", (2, 4, 8)),))
    assert plan.sizes == {"n": (2, 4)} and "not padded to 8: the model takes up to 4" in notes[1]
    with pytest.raises(InputError, match="no dimension|unknown dimension"):
        plan_buckets(program.main, (("m", (1,)),))
    assert plan_buckets(program.main, (("m", (1,)),), {"m"}) == (None, [])
