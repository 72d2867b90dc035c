"""The manager: order, contracts, properties, rounds, and what a failure says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.errors import InputError, PlanishError, VerifyError
from planish.ir.program import Program
from planish.ir.properties import find_property, holds, implies
from planish.passes.base import ApproximatePass, ExactPass, Pass, PassContext, PassResult
from planish.passes.instruments import Verify
from planish.passes.manager import PassError, PassManager, run_pass, split_levels
from planish.passes.repeat import Repeat
from planish.passes.testing import program_of

TEXT = (
    '<ir_version: 10, opset_import: ["" : 20]> g (float[n,3] x) => (float[n,3] y) { a = Relu(x) b = Neg(a) y = Abs(b) }'
)


def make(pass_name: str, do: Callable[[Program], Any] = lambda program: PassResult(False), **fields: Any) -> Any:
    """An instance of a new pass class."""

    def apply(self: Any, program: Program, ctx: PassContext) -> PassResult:
        result = do(program)
        return result if result is not None else PassResult(True, 1)

    base = fields.pop("base", ExactPass)
    return type("Made", (base,), {"name": pass_name, "apply": apply, **fields})()


def replace_op(old: str, new: str) -> Callable[[Program], None]:
    def do(program: Program) -> None:
        for node in program.nodes():
            if node.op_type == old:
                node.op_type = new

    return do


def program() -> Program:
    return program_of(TEXT)


def test_passes_run_in_order_and_results_add_up() -> None:
    seen: list[str] = []
    passes = [make(f"p{i}", lambda p, i=i: seen.append(f"p{i}") or PassResult(False, 0)) for i in range(3)]
    passes.append(make("last", replace_op("Neg", "Exp")))
    result = run_pass(passes, program())
    assert seen == ["p0", "p1", "p2"]
    assert result.modified and result.fired == 1


def test_a_manager_is_a_pass() -> None:
    inner = PassManager([make("one", replace_op("Neg", "Exp"))])
    outer = PassManager([inner, make("two", replace_op("Exp", "Tanh"))])
    target = program()
    assert outer.apply(target, PassContext()).fired == 2
    assert [n.op_type for n in target.nodes()] == ["Relu", "Tanh", "Abs"]
    assert str(outer) == "one,two"
    assert outer.kind == "exact"
    assert PassManager([make("rough", base=ApproximatePass, gives_up="x")]).kind == "approximate"


def test_modified_can_not_lie() -> None:
    def hide(program: Program) -> PassResult:
        replace_op("Neg", "Exp")(program)
        return PassResult(False)

    with pytest.raises(PassError, match="pass 'liar' failed: it changed the program and says that it did not"):
        run_pass(make("liar", hide), program())
    with pytest.raises(PassError, match="fired 3 times and says that it changed nothing"):
        run_pass(make("liar", lambda p: PassResult(False, 3)), program())


def test_a_changed_weight_is_a_change() -> None:
    text = TEXT.replace("{ a = Relu(x)", "<float[3] w = {1,2,3}> { a = Mul(x, w)")

    def hide(program: Program) -> PassResult:
        program.main.graph.initializers["w"].const_value = ir.tensor(np.float32([1, 2, 4]))
        return PassResult(False)

    with pytest.raises(PassError, match="liar"):
        run_pass(make("liar", hide), program_of(text))
    PassManager([make("trusted", hide)], checked=False).apply(program_of(text), PassContext())


@pytest.mark.no_verify
def test_a_pass_that_leaves_an_invalid_program_is_named() -> None:
    def corrupt(program: Program) -> None:
        graph = program.main.graph
        graph.remove(graph[1])

    with pytest.raises(PassError, match=r"pass 'corrupt' failed: it left an invalid program: .*\(after: fine\)"):
        run_pass([make("fine"), make("corrupt", corrupt)], program(), instruments=[Verify()])
    broken = program()
    corrupt(broken)
    with pytest.raises(VerifyError, match="the program is invalid before pass 'fine'"):
        run_pass(make("fine"), broken, instruments=[Verify()])


def test_the_fixture_verifies_passes_that_are_called_directly() -> None:
    def corrupt(program: Program) -> None:
        graph = program.main.graph
        graph.remove(graph[1])

    with pytest.raises(VerifyError, match="pass 'corrupt' leaves an invalid program"):
        make("corrupt", corrupt).apply(program(), PassContext())
    broken = program()
    corrupt(broken)
    with pytest.raises(VerifyError, match="the test gives pass 'fine' an invalid program"):
        make("fine").apply(broken, PassContext())


def test_what_a_pass_raises_names_it_and_those_before() -> None:
    def explode(program: Program) -> None:
        raise ZeroDivisionError("planted")

    passes = [make("one"), make("two"), make("three", explode), make("four")]
    with pytest.raises(PassError) as error:
        run_pass(passes, program())
    assert str(error.value) == "pass 'three' failed: ZeroDivisionError: planted (after: one, two)"
    assert error.value.pass_name == "three" and error.value.done == ("one", "two")
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert error.value.exit_code == 1


def test_a_users_mistake_stays_one() -> None:
    def refuse(program: Program) -> None:
        raise InputError("there is no layer 12")

    with pytest.raises(PassError) as error:
        run_pass(make("skip", refuse), program())
    assert error.value.exit_code == 2


def test_an_inner_failure_names_the_inner_pass_once() -> None:
    def explode(program: Program) -> None:
        raise ZeroDivisionError("planted")

    with pytest.raises(PassError, match="^pass 'bad' failed: ZeroDivisionError: planted$"):
        PassManager([PassManager([make("bad", explode)])]).apply(program(), PassContext())


def test_a_pass_must_return_a_result() -> None:
    with pytest.raises(PassError, match="returned bool, not a PassResult"):
        run_pass(make("bad", lambda p: True), program())


@pytest.mark.no_verify
def test_levels_must_chain() -> None:
    fx, onnx = make("graph", level="fx"), make("fuse")
    assert split_levels([fx, onnx]) == ([fx], [onnx])
    with pytest.raises(InputError, match="pass 'graph' works on the FX graph and stands behind 'fuse'"):
        split_levels([onnx, fx])
    with pytest.raises(InputError, match="stands behind"):
        PassManager([onnx, fx]).check(program())
    with pytest.raises(InputError, match="the torch frontend runs it"):
        run_pass(fx, program())
    with pytest.raises(InputError, match="of level 'tir'"):
        split_levels([make("low", level="tir")])


def test_a_required_property_is_checked_before_anything_runs() -> None:
    seen: list[int] = []
    passes = [make("first", lambda p: seen.append(1) or PassResult(False)), make("new", requires=("opset>=23",))]
    with pytest.raises(InputError, match=r"pass 'new' requires 'opset>=23', and entry 'main' imports opset 20\."):
        run_pass(passes, program())
    assert not seen


def test_an_ensured_property_holds_for_the_passes_behind() -> None:
    def raise_opset(program: Program) -> None:
        program.main.graph.opset_imports[""] = 23

    passes = [make("convert", raise_opset, ensures=("opset>=23",)), make("new", requires=("opset>=21",))]
    assert run_pass(passes, program()).modified
    with pytest.raises(InputError, match="requires"):
        PassManager(list(reversed(passes))).check(program())


def test_shapes_are_inferred_for_the_pass_that_requires_them() -> None:
    source = program()
    for node in source.nodes():
        if node.op_type != "Abs":
            node.outputs[0].shape = node.outputs[0].type = None
    seen: list[str] = []

    def look(program: Program) -> PassResult:
        seen.extend(str(n.outputs[0].shape) for n in program.nodes())
        return PassResult(False)

    assert not holds("shapes", source)
    run_pass(make("shapely", look, requires=("shapes",)), source)
    assert seen == ["[n,3]"] * 3


def test_properties() -> None:
    assert holds("single-entry", program()) and holds("opset>=20", program()) and not holds("opset>=21", program())
    assert not holds("single-entry", Program({"a": program().main, "b": program().main}))
    called = program_of(
        """<ir_version: 10, opset_import: ["" : 20, "my" : 1]> g (float[2] x) => (float[2] y) { y = my.F(x) }
        <domain: "my", opset_import: ["" : 20]> F (x) => (y) { y = Neg(x) }"""
    )
    assert find_property("functions-inlined").problem(called) == "F 'F_0' calls a function of the model"
    assert holds("functions-inlined", program())
    assert implies("opset>=23", "opset>=20") and not implies("opset>=20", "opset>=23")
    with pytest.raises(PlanishError, match="unknown property 'shape'. Did you mean 'shapes'"):
        run_pass(make("typo", requires=("shape",)), program())


class Shrink(ExactPass):
    """Replaces one op per run."""

    name: ClassVar[str] = "shrink"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        for node in program.nodes():
            if node.op_type in ("Neg", "Abs"):
                node.op_type = "Tanh"
                return PassResult(True, 1)
        return PassResult(False)


def test_rounds_end_when_nothing_changes() -> None:
    result = PassManager([Shrink()], rounds=5).apply(program(), PassContext())
    assert result.fired == 2


def test_rounds_that_do_not_settle_name_the_passes() -> None:
    flip = [make("flip", replace_op("Neg", "Exp")), make("flop", replace_op("Exp", "Neg")), make("quiet")]
    quiet = make("quiet")
    with pytest.raises(PlanishError, match="still changes the program after 4 rounds; by: flip, flop"):
        PassManager([*flip[:2], quiet], rounds=4).apply(program(), PassContext())


def test_repeat_is_a_pass_with_a_string() -> None:
    p = Repeat("eliminate-dead-code,remove-no-ops", rounds=3)
    assert str(p) == "repeat{passes='eliminate-dead-code,remove-no-ops',rounds=3}"
    assert not run_pass(p, program()).modified
    with pytest.raises(InputError, match="rounds is 0"):
        Repeat("eliminate-dead-code", rounds=0)


def test_analyses_are_invalidated_and_preserved() -> None:
    ctx = PassContext()
    target = program()
    compute = lambda p: [n.op_type for n in p.nodes()]  # noqa: E731
    ctx.analyses.get("ops", target, compute)
    ctx.analyses.get("count", target, lambda p: p.node_count())
    run_pass(make("change", replace_op("Neg", "Exp"), preserves=("count",)), target, ctx)
    fail = lambda p: pytest.fail("'count' was preserved")  # noqa: E731
    assert ctx.analyses.get("count", target, fail) == 3
    assert ctx.analyses.get("ops", target, compute) == ["Relu", "Exp", "Abs"]


def test_every_pass_class_has_what_the_contract_asks() -> None:
    def all_of(cls: type[Pass]) -> list[type[Pass]]:
        return [cls, *(s for sub in cls.__subclasses__() for s in all_of(sub))]

    for cls in all_of(Pass):
        if cls.__module__.startswith("planish.") and "name" in cls.__dict__:
            assert cls.level in ("fx", "onnx")
            for name in (*cls.requires, *cls.ensures):
                find_property(name)
