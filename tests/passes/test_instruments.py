"""Instruments, bisection and reproducers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from planish.ir.printer import parse_model
from planish.ir.program import Program
from planish.passes.base import ExactPass, PassContext, PassResult
from planish.passes.bisect import bisect_passes, write_reproducer
from planish.passes.instruments import Dump, HashCheck, Instrument, Journal, Limit, Print, Time, Verify
from planish.passes.manager import PassError, PassManager, run_pass
from planish.passes.repeat import Repeat
from planish.passes.rewrite import RewritePass
from planish.passes.testing import program_of

TEXT = """<ir_version: 10, opset_import: ["" : 20]> g (float[2,3] x) => (float[2,3] y) {
  a = Neg(x) b = Relu(a) c = Neg(b) d = Relu(c) e = Neg(d) y = Relu(e)
}"""


class Rename(ExactPass):
    """Base of passes that put one op for another."""

    name = "rename"
    old = new = ""

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        found = [n for n in program.nodes() if n.op_type == self.old]
        for node in found:
            node.op_type = self.new
        return PassResult(bool(found), len(found))


def rename(old: str, new: str) -> Any:
    return type("R", (Rename,), {"name": f"{old.lower()}-{new.lower()}", "old": old, "new": new})()


class Raises(ExactPass):
    name = "raises"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        raise ValueError("planted")


class NegToExp(RewritePass):
    name = "neg-to-exp"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Neg(x)

    def rewrite(self, op: Any, x: Any) -> Any:
        return op.Exp(x)


def program() -> Program:
    return program_of(TEXT)


def test_time_and_print_and_limit() -> None:
    times, text, limit = Time(), io.StringIO(), Limit(2)
    passes = [rename("Neg", "Abs"), rename("Exp", "Abs"), rename("Relu", "Tanh")]
    target = program()
    run_pass(passes, target, instruments=[limit, times, Print(after=["neg-abs"], before=["exp-abs"], file=text)])
    assert [(name, changed) for name, _, changed in times.rows] == [("neg-abs", True), ("exp-abs", False)]
    assert "neg-abs" in str(times) and "exp-abs  (no change)" in str(times) and "in all" in str(times)
    assert text.getvalue().count("# after neg-abs") == 1 and text.getvalue().count("# before exp-abs") == 1
    assert "Abs" in text.getvalue()
    assert limit.skipped == ["relu-tanh"]
    assert {n.op_type for n in target.nodes()} == {"Abs", "Relu"}


def test_print_everything_that_changed() -> None:
    text = io.StringIO()
    run_pass([rename("Neg", "Abs"), rename("Exp", "Abs")], program(), instruments=[Print(after=["*"], file=text)])
    assert [line for line in text.getvalue().splitlines() if line.startswith("# after")] == ["# after neg-abs"]


def test_dump_numbers_its_files(tmp_path: Path) -> None:
    passes = [rename("Neg", "Abs"), rename("Exp", "Abs"), rename("Relu", "Tanh")]
    run_pass(passes, program(), instruments=[Dump(tmp_path / "dump")])
    names = sorted(f.name for f in (tmp_path / "dump").iterdir())
    assert names == ["000_input.txt", "001_neg-abs.txt", "003_relu-tanh.txt"]
    dumped = parse_model((tmp_path / "dump" / "003_relu-tanh.txt").read_text())
    assert {n.op_type for n in dumped.graph} == {"Abs", "Tanh"}


def test_dump_of_several_entries(tmp_path: Path) -> None:
    two = Program({"prefill": program().main, "decode": program().main})
    run_pass(rename("Neg", "Abs"), two, instruments=[Dump(tmp_path)])
    assert (tmp_path / "001_neg-abs.txt").read_text().count("# entry ") == 2


def test_journal_has_one_flushed_line_per_pass(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with pytest.raises(PassError):
        run_pass([rename("Neg", "Abs"), Raises()], program(), instruments=[Journal(path, clock=lambda: 7.0)])
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first.pop("seconds") >= 0
    assert first == {
        "pass": "neg-abs", "time": 7.0, "modified": True, "fired": 3, "declined": 0,
        "nodes_before": 6, "nodes_after": 6,
    }  # fmt: skip
    assert second == {"pass": "raises", "time": 7.0, "error": "ValueError: planted"}


def test_instruments_watch_managers_inside() -> None:
    times = Time()
    run_pass(Repeat("eliminate-dead-code,remove-no-ops"), program(), instruments=[times])
    assert [name for name, _, _ in times.rows] == [
        "eliminate-dead-code", "remove-no-ops", "repeat{passes='eliminate-dead-code,remove-no-ops'}",
    ]  # fmt: skip


def test_failed_is_told_and_the_next_run_is_clean() -> None:
    seen: list[str] = []

    class Watch(Instrument):
        def failed(self, p: Any, program: Program, error: Exception) -> None:
            seen.append(f"{p.name}: {error}")

    check = HashCheck()
    for _ in range(2):
        with pytest.raises(PassError):
            run_pass(Raises(), program(), instruments=[Watch(), check])
        run_pass(rename("Neg", "Abs"), program(), instruments=[check, Verify(full=True)])
    assert seen == ["raises: planted"] * 2


# --- bisection ---------------------------------------------------------------------------------------------------


def has(op: str) -> Any:
    return lambda program: all(n.op_type != op for n in program.nodes())


def test_bisect_finds_the_first_bad_pass() -> None:
    passes = [rename("Exp", "Log"), rename("Neg", "Abs"), rename("Abs", "Tanh"), rename("Tanh", "Sin")] * 4
    for bad, index in (("Abs", 1), ("Tanh", 2), ("Sin", 3)):
        seen = 0

        def check(program: Program, bad: str = bad) -> bool:
            nonlocal seen
            seen += 1
            order = ["Neg", "Abs", "Tanh", "Sin"]
            worst = max(order.index(n.op_type) for n in program.nodes() if n.op_type in order)
            return worst < order.index(bad)

        before = program()
        result = bisect_passes(before, passes, check)
        assert result.culprit is passes[index] and result.index == index
        assert result.runs == seen <= 8
        assert {n.op_type for n in before.nodes()} == {"Neg", "Relu"}, "the program was changed"
        assert result.before is not None and check(result.before)


def test_bisect_when_nothing_or_everything_is_bad() -> None:
    result = bisect_passes(program(), [rename("Neg", "Abs")], lambda p: True)
    assert result.culprit is None and not result.broken_before
    assert str(result) == "the check holds after all passes"
    result = bisect_passes(program(), [rename("Neg", "Abs")], lambda p: False)
    assert result.broken_before and str(result) == "the check fails before any pass runs"


def test_bisect_counts_a_raising_pass_as_bad() -> None:
    result = bisect_passes(program(), [rename("Exp", "Log"), Raises(), rename("Neg", "Abs")], lambda p: True)
    assert isinstance(result.culprit, Raises) and result.index == 1
    assert str(result) == "pass 2, 'raises', breaks it"


def test_bisect_finds_the_firing_within_a_pass(tmp_path: Path) -> None:
    # Good as long as the first Neg (the last one to be rewritten, sweeps go backwards) is still there.
    def check(program: Program) -> bool:
        return program.main.graph[0].op_type == "Neg"

    result = bisect_passes(program(), [rename("Exp", "Log"), NegToExp()], check)
    assert isinstance(result.culprit, NegToExp)
    assert (result.firing, result.rule) == (3, "neg-to-exp")
    assert result.nodes == (program().main.graph[0].name,)
    assert "in firing 3 of rule 'neg-to-exp' on Neg" in str(result)
    assert result.region is not None
    assert [n.op_type for n in result.region.graph] == ["Neg"]
    folder = write_reproducer(tmp_path / "bad", program(), "neg-to-exp", "wrong", result.region)
    onnx.checker.check_model(onnx.load(folder / "region.onnx"))


# --- reproducers --------------------------------------------------------------------------------------------------


def test_a_reproducer_has_what_is_needed(tmp_path: Path) -> None:
    folder = write_reproducer(tmp_path / "bad", program(), [rename("Neg", "Abs")], ValueError("planted"))
    assert folder == tmp_path / "bad"
    assert (folder / "pipeline.txt").read_text() == "neg-abs\n"
    error = (folder / "error.txt").read_text()
    assert error.startswith("ValueError: planted\n") and "planish bisect before.onnx -p neg-abs -t ort-cpu" in error
    model = onnx.load(folder / "before.onnx")
    onnx.checker.check_model(model)
    assert [n.op_type for n in model.graph.node] == ["Neg", "Relu"] * 3
    again = write_reproducer(tmp_path / "bad", program(), "neg-abs", "other")
    assert again == tmp_path / "bad-2" and sorted(p.name for p in tmp_path.iterdir()) == ["bad", "bad-2"]


def test_a_reproducer_of_two_entries(tmp_path: Path) -> None:
    two = Program({"prefill": program().main, "decode": program().main})
    folder = write_reproducer(tmp_path / "bad", two, "neg-abs", "wrong")
    assert sorted(p.name for p in folder.iterdir()) == [
        "before.decode.onnx", "before.prefill.onnx", "error.txt", "pipeline.txt",
    ]  # fmt: skip


def test_a_reproducer_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_reproducer(tmp_path / "bad", program(), "neg-abs", "wrong")
    assert list(tmp_path.iterdir()) == []


def test_the_manager_leaves_no_instruments_behind() -> None:
    times = Time()
    run_pass(rename("Neg", "Abs"), program(), instruments=[times])
    PassManager([rename("Neg", "Abs")]).apply(program(), PassContext())
    assert len(times.rows) == 1
