from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import planish
from planish.ir.errors import InputError, PlanishError
from planish.ir.names import ensure_names
from planish.ir.program import Calibration, Program
from planish.passes.base import ApproximatePass
from planish.passes.precision.quantize import Quantize
from planish.passes.precision.quantize_entries import QuantizeEntries
from planish.passes.precision.quantize_weights import QuantizeWeights
from planish.passes.testing import apply_pass
from planish.runtime.ort import compile_ort
from tests.causal_models import causal_model

K, N = 96, 64


def two_entries(target: str = "ort-cpu") -> Program:
    """Two entries that multiply with one weight."""
    random = np.random.default_rng(1)
    text = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        g (float[B, S, {K}] x) => (float[B, S, {N}] y) {{ y = MatMul(x, w) }}"""
    one = ir.from_onnx_text(text, initializers=[ir.tensor(random.normal(size=(K, N)).astype("f4"), name="w")])
    ensure_names(one)
    return Program({"prefill": one, "decode": one.clone()}, planish.Target.parse(target))


def ops(program: Program, entry: str) -> set[str]:
    return {node.op_type for node in program.entry(entry).graph}


def gains(**found: dict[str, float]):
    """A stand-in for measuring: entry → form → speed-up."""

    def gain(variant: ApproximatePass, asked: float) -> float:
        assert isinstance(variant, QuantizeEntries) and asked == 1.0
        ((name, form),) = (item.split("=") for item in variant.forms or ())
        assert variant.entry_names(two_entries()) == [name]
        return found[name][form]

    return gain


USUAL = gains(
    prefill={"int8": 2.5, "weights8": 0.9, "weights4": 1.1}, decode={"int8": 1.4, "weights8": 2.0, "weights4": 3.0}
)


def size(program: Program, *passes: ApproximatePass) -> int:
    apply_pass(list(passes), program)
    return program.weight_bytes()


def test_each_entry_gets_its_form():
    program = two_entries()
    result = apply_pass(QuantizeEntries(forms=["prefill=int8", "decode=weights4"]), program)
    assert result.fired == 2
    assert "MatMulInteger" in ops(program, "prefill") and ops(program, "decode") == {"MatMulNBits"}
    assert [note.split(":")[0] for note in result.notes] == ["decode in weights4"]
    x = np.random.default_rng(0).normal(size=(2, 3, K)).astype("f4")
    want = x @ two_entries().entry("decode").graph.initializers["w"].const_value.numpy()
    for entry, limit in (("prefill", 0.02), ("decode", 0.15)):
        got = compile_ort(program.entry(entry), program.target).run({"x": x})["y"]
        assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < limit


def test_entries_of_one_form_share_their_weights():
    program = two_entries()
    apply_pass(QuantizeEntries(forms=["prefill=weights8", "decode=weights8"]), program)
    stores = [{id(v.const_value) for v in program.entry(e).graph.initializers.values()} for e in program.entries]
    assert stores[0] == stores[1]
    assert program.weight_bytes() < K * N * 4 / 2.5


def test_an_entry_that_is_not_named_stays():
    program = two_entries()
    apply_pass(QuantizeEntries(forms=["decode=weights8"]), program)
    assert ops(program, "prefill") == {"MatMul"} and ops(program, "decode") == {"MatMulNBits"}


def test_without_measuring_prompts_multiply_and_steps_read():
    program = two_entries()
    apply_pass(QuantizeEntries(), program)
    assert "MatMulInteger" in ops(program, "prefill") and ops(program, "decode") == {"MatMulNBits"}


def test_the_fastest_of_each_entry_is_chosen():
    variant, note = QuantizeEntries().tune(two_entries(), USUAL)
    assert str(variant) == "quantize-entries{forms=('prefill=int8', 'decode=weights4')}"
    assert note == (
        "quantize-entries: int8 for prefill, weights4 for decode (prefill: float32 1.00x, int8 2.50x, weights8 0.90x, "
        "weights4 1.10x; decode: float32 1.00x, int8 1.40x, weights8 2.00x, weights4 3.00x)"
    )


def test_under_a_memory_budget_weights_are_shared():
    both = size(two_entries(), Quantize(entries=("prefill",)), QuantizeWeights(4, entries=("decode",)))
    one = size(two_entries(), QuantizeWeights(4))
    assert one < both
    variant, note = QuantizeEntries(memory=both).tune(two_entries(), USUAL)
    assert variant.forms == ("prefill=int8", "decode=weights4")
    # int8 for both would be faster (3.5 against 3.3), and is too large.
    variant, note = QuantizeEntries().tune(two_entries(f"ort-cpu:memory={one}"), USUAL)
    assert variant.forms == ("prefill=weights4", "decode=weights4")
    assert note.endswith(f"; weights of {one} bytes of the {one} allowed")


def test_what_does_not_fit_is_said():
    one = size(two_entries(), QuantizeWeights(4))
    variant, note = QuantizeEntries(memory=one - 1).tune(two_entries(), USUAL)
    assert variant.forms == ("prefill=weights4", "decode=weights4")
    assert f"no choice fits the memory budget: the smallest weights take {one} bytes, 1 over the {one - 1}" in note


def test_nothing_faster_changes_nothing():
    slow = dict.fromkeys(("int8", "weights8", "weights4"), 0.9) | {"weights4": 0.0}
    variant, note = QuantizeEntries().tune(two_entries(), gains(prefill=slow, decode=slow))
    assert not apply_pass(variant, two_entries()).modified
    assert "nothing is faster within the error budget" in note and "weights4 exceeds the error budget" in note


def test_forms_that_are_given_are_not_measured():
    given = QuantizeEntries(forms=("decode=weights4",))
    assert given.tune(two_entries(), lambda *_: pytest.fail("measured")) == (given, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forms": ["prefill=int9"]}, "Did you mean 'int8'"),
        ({"candidates": ["weight4"]}, "Did you mean 'weights4'"),
        ({"forms": ["prefill"]}, "forms has 'prefill'; it names each entry once, such as 'prefill=int8'"),
        ({"forms": ["prefill=int8", "prefill=weights4"]}, "names each entry once"),
        ({"memory": 0}, "memory is 0; it is a number of bytes"),
    ],
)  # fmt: skip
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        QuantizeEntries(**options)


def test_an_entry_that_there_is_not():
    with pytest.raises(PlanishError, match="Did you mean 'decode'"):
        apply_pass(QuantizeEntries(forms=["decod=int8"]), two_entries())


def test_a_causal_model_through_the_gates():
    exe = planish.optimize(
        causal_model("GPT-2"), "ort-cpu:threads=1", task="causal-lm", approximate="quantize-entries",
        budget=planish.Budget(error=0.05, seconds=4),
    )  # fmt: skip
    notes = [note for note in exe.report.ledger.notes if note.startswith("quantize-entries")]
    assert (
        len(notes) == 1
        and "prefill: float32 1.00x, int8" in notes[0]
        and "weights4 exceeds the error budget" in notes[0]
    )
    gated = exe.report.ledger["quantize-entries"]
    assert gated.name.startswith("quantize-entries{forms=") and "weights4" not in gated.name
    made = {node.op_type for node in exe.program.nodes()} & {"MatMulInteger", "MatMulNBits"}
    # What was fastest a moment ago may be no faster when it is gated, on a busy machine.
    assert bool(made) == (gated.kept and gated.fired > 0)
    if made:
        assert gated.error_original is not None and 1e-5 < gated.error_original.relative_l2 <= 0.05


def test_only_entries_with_inputs_are_measured():
    program = two_entries()
    program.calibration = Calibration([], True, entry="decode")
    variant, _ = QuantizeEntries().tune(program, USUAL)
    assert variant.forms == ("decode=weights4",)
