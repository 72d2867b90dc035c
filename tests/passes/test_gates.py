"""The gates' decisions, on a bench whose numbers and times are set by the test."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.budget import Budget
from planish.ir.errors import InputError, PlanishError
from planish.ir.ledger import Ledger, Ratio
from planish.ir.program import Calibration, Program
from planish.passes.base import ApproximatePass, ExactPass, Pass, PassContext, PassResult
from planish.passes.gates import Gates, Interrupted
from planish.passes.journal import DecisionJournal

pytestmark = pytest.mark.no_verify  # the passes below only mark a program; nothing runs it


def program() -> Program:
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    return Program.single(ir.from_onnx_text(text))


def mark(p: Program, key: str) -> PassResult:
    p.main.metadata_props[key] = "1"
    return PassResult(True, 1)


@dataclass(frozen=True)
class Exact(ExactPass):
    """Marks the program, so that the bench can see which passes ran."""

    name: ClassVar[str] = "exact"
    key: str = "a"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        if self.key == "raises":
            raise PlanishError("pass 'exact' raised ValueError: planted")
        if self.key == "nothing":
            return PassResult(False)
        return mark(program, self.key)


@dataclass(frozen=True)
class Approximate(ApproximatePass):
    name: ClassVar[str] = "approximate"
    gives_up: ClassVar[str] = "whatever the test says"
    key: str = "p"

    def apply(self, program: Program, ctx: PassContext) -> PassResult:
        return mark(program, self.key)


@dataclass
class FakeBench:
    """Every mark adds its error to the output 1.0 and multiplies the time by its factor."""

    errors: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    unrunnable: str = ""
    width: float = 0.01
    runs: int = 0
    interrupt_at: int = -1
    noise: Callable[[], float] = lambda: 0.0
    forgotten: int = 0
    milliseconds: float | None = None
    times_again: dict[str, float] = field(default_factory=dict)

    def run(self, program: Program) -> list[dict[str, Any]]:
        self.runs += 1
        if self.runs == self.interrupt_at:
            raise KeyboardInterrupt
        marks = program.main.metadata_props
        if self.unrunnable in marks:
            raise PlanishError("the runtime refuses it")
        value = 1.0 + sum(self.errors.get(m, 0.0) for m in marks)
        return [{"y": np.full(4, value, np.float32), "random": np.full(4, self.noise(), np.float32)}]

    def forget(self, program: Program) -> None:
        self.forgotten += 1

    def seconds(self, program: Program) -> float:
        if self.forgotten:
            return float(
                np.prod([self.times_again.get(m, self.times.get(m, 1.0)) for m in program.main.metadata_props])
            )
        return float(np.prod([self.times.get(m, 1.0) for m in program.main.metadata_props]))

    def speedup(self, baseline: Program, candidate: Program, *, seconds: float, threshold: float) -> Ratio:
        ratio = self.seconds(baseline) / self.seconds(candidate)
        times = {}
        if self.milliseconds is not None:
            times = {"baseline_ms": self.milliseconds, "candidate_ms": self.milliseconds / ratio}
        return Ratio(ratio, ratio - self.width, ratio + self.width, 9, **times)


def gated(
    passes: list[Pass], bench: FakeBench, budget: Budget | None = None, **more: Any
) -> tuple[list[str], dict[str, str], Any]:
    """Marks of the result, verdicts by pass, and the ledger."""
    gates = Gates(bench, budget or Budget(), lambda p, program: p.apply(program, PassContext()), **more)
    best, ledger = gates.optimize(program(), passes)
    verdicts = {e.name: e.verdict for e in ledger.entries}
    return sorted(best.main.metadata_props), verdicts, ledger


def exact(*keys: str) -> list[Pass]:
    return [Exact(key) for key in keys]


def test_a_good_group_is_kept_with_its_numbers() -> None:
    marks, verdicts, ledger = gated(exact("b", "nothing", "c"), FakeBench(times={"b": 0.5}))
    assert marks == ["b", "c"]
    assert verdicts == {
        "exact{key='b'}": "kept",
        "exact{key='nothing'}": "nothing to do",
        "exact{key='c'}": "kept",
        "exact passes": "kept",
    }
    assert ledger["exact passes"].speedup.median == pytest.approx(2.0)
    assert ledger["exact passes"].error_original.relative_l2 == 0.0
    assert ledger.tolerance == 2e-5


@pytest.mark.parametrize("guilty", range(5))
def test_bisection_finds_the_pass_that_changes_numbers(guilty: int) -> None:
    keys = [f"k{i}" for i in range(5)]
    marks, verdicts, ledger = gated(exact(*keys), FakeBench(errors={keys[guilty]: 0.25}))
    assert marks == [k for k in keys if k != keys[guilty]]
    assert verdicts[f"exact{{key='k{guilty}'}}"].startswith("rolled back: error 2.5e-01 > 2.0e-05 at output 'y'")
    assert ledger[f"exact{{key='k{guilty}'}}"].error_original.relative_l2 == pytest.approx(0.25)
    assert ledger["exact passes"].error_original.relative_l2 == 0.0


def test_two_guilty_passes_are_both_found() -> None:
    marks, verdicts, _ = gated(exact("b", "c", "d", "e"), FakeBench(errors={"b": 0.1, "d": 0.2}))
    assert marks == ["c", "e"]
    assert sum(v.startswith("rolled back: error") for v in verdicts.values()) == 2


def test_a_pass_that_raises_is_rolled_back_and_reproduced() -> None:
    seen: list[tuple[list[str], str, str]] = []

    def reproduce(before: Program, p: Pass, error: str) -> Path:
        seen.append((sorted(before.main.metadata_props), str(p), error))
        return Path("folder")

    marks, verdicts, ledger = gated(exact("b", "raises", "c"), FakeBench(), reproduce=reproduce)
    assert marks == ["b", "c"]
    assert verdicts["exact{key='raises'}"] == "rolled back: pass 'exact' raised ValueError: planted"
    assert ledger["exact{key='raises'}"].reproducer == "folder"
    assert seen == [(["b"], "exact{key='raises'}", "rolled back: pass 'exact' raised ValueError: planted")]


def test_a_program_that_does_not_run_is_rolled_back() -> None:
    marks, verdicts, _ = gated(exact("b", "c"), FakeBench(unrunnable="c"))
    assert marks == ["b"]
    assert verdicts["exact{key='c'}"] == "rolled back: does not run: the runtime refuses it"


def test_a_slower_pass_is_rolled_back() -> None:
    marks, verdicts, _ = gated(exact("b", "c", "d"), FakeBench(times={"c": 1.5}))
    assert marks == ["b", "d"]
    assert verdicts["exact{key='c'}"].startswith("rolled back: slower, 0.667x")


def test_a_program_is_slower_only_if_a_second_session_is_slower_too() -> None:
    bench = FakeBench(times={"c": 1.5}, times_again={"c": 1.0})
    marks, _, ledger = gated(exact("b", "c"), bench)
    assert marks == ["b", "c"]
    assert ledger["exact passes"].speedup.median == 1.0


def test_half_a_percent_is_not_slower() -> None:
    assert gated(exact("b"), FakeBench(times={"b": 1.005}, width=0.001))[0] == ["b"]


@pytest.mark.parametrize(("milliseconds", "kept"), [(0.010, ["b"]), (1.0, [])])
def test_a_microsecond_is_not_slower(milliseconds: float, kept: list[str]) -> None:
    bench = FakeBench(times={"b": 1.1}, milliseconds=milliseconds)
    assert gated(exact("b"), bench)[0] == kept


def test_an_exact_pass_without_gain_stays_unless_a_gain_was_asked_for() -> None:
    assert gated(exact("b"), FakeBench())[0] == ["b"]
    marks, verdicts, _ = gated(exact("b"), FakeBench(times={"b": 0.99}), Budget(min_gain=1.05))
    assert marks == []
    assert verdicts["exact{key='b'}"].startswith("rolled back: gain 1.010x")


def test_an_approximate_pass_must_be_measurably_faster() -> None:
    marks, verdicts, _ = gated([Approximate("b")], FakeBench(times={"b": 0.995}))
    assert marks == []
    assert verdicts["approximate{key='b'}"].startswith("rolled back: no measurable gain, 1.005x")
    assert gated([Approximate("b")], FakeBench(times={"b": 0.5}))[0] == ["b"]


@dataclass(frozen=True)
class Saving(Approximate):
    name: ClassVar[str] = "saving"
    saves: ClassVar[str] = "memory"


def test_what_saves_something_else_may_cost_what_the_budget_says() -> None:
    assert gated([Saving("b")], FakeBench())[0] == ["b"]
    slower = FakeBench(times={"b": 1.04})
    marks, verdicts, _ = gated([Saving("b")], slower)
    assert marks == []
    assert verdicts["saving{key='b'}"].startswith("rolled back: slower, 0.962x")
    assert verdicts["saving{key='b'}"].endswith("; a min_gain below 1 says what saving memory may cost")
    assert gated([Saving("b")], slower, Budget(min_gain=0.95))[0] == ["b"]
    assert gated([Saving("b")], slower, Budget(min_gain=0.97))[0] == []
    assert gated([Approximate("b")], slower, Budget(min_gain=0.95))[0] == []
    assert gated([Saving("b")], FakeBench(), Budget(min_gain=1.1))[0] == []
    assert gated(exact("b"), FakeBench(), Budget(min_gain=0.95))[0] == ["b"]  # which asks no more of others
    assert gated(exact("b"), slower, Budget(min_gain=0.95))[0] == []


def test_approximate_passes_share_one_budget() -> None:
    bench = FakeBench(errors={"b": 0.006, "c": 0.006}, times={"b": 0.5, "c": 0.5})
    marks, verdicts, ledger = gated([Approximate("b"), Approximate("c")], bench)
    assert marks == ["b"]
    assert "1.2e-02 > 1.0e-02" in verdicts["approximate{key='c'}"]
    assert ledger["all passes"].error_original.relative_l2 == pytest.approx(0.006, rel=1e-3)


def test_an_exact_pass_after_an_approximate_one_answers_to_the_program_before_it() -> None:
    bench = FakeBench(errors={"b": 0.005, "c": 0.001}, times={"b": 0.5})
    marks, verdicts, _ = gated([Approximate("b"), Exact("d"), Exact("c")], bench)
    assert marks == ["b", "d"]
    assert "error" in verdicts["exact{key='c'}"]


def test_the_users_metric_decides_approximate_passes_and_exact_ones_stay_exact() -> None:
    budget = Budget(error=0.5, metric=lambda expected, got: abs(float(got[0]["y"][0]) - 1.0) * 10)
    bench = FakeBench(errors={"b": 0.04, "c": 0.02, "d": 0.001}, times={"b": 0.5, "c": 0.5})
    marks, verdicts, ledger = gated([Approximate("b"), Approximate("c"), Exact("d")], bench, budget)
    assert marks == ["b"]
    assert "6.0e-01 > 5.0e-01" in verdicts["approximate{key='c'}"]
    assert "error 9.6e-04 > 2.0e-05" in verdicts["exact{key='d'}"]
    assert ledger["approximate{key='b'}"].error_original.metric == pytest.approx(0.4, rel=1e-3)


def test_a_metric_that_returns_nan_is_a_failure() -> None:
    budget = Budget(error=0.5, metric=lambda expected, got: float("nan"))
    assert gated([Approximate("b")], FakeBench(times={"b": 0.5}), budget)[0] == []


def test_random_outputs_are_named_and_left_out() -> None:
    noise = iter(np.random.default_rng(0).normal(size=99))
    _, verdicts, ledger = gated(exact("b"), FakeBench(noise=lambda: float(next(noise))))
    assert verdicts["exact{key='b'}"] == "kept"
    assert ledger.notes == ["error not measured for outputs that differ from run to run: random"]


def test_an_interruption_keeps_the_best_so_far() -> None:
    bench = FakeBench(times={"b": 0.5, "c": 0.5}, interrupt_at=4)
    with pytest.raises(Interrupted) as caught:
        gated([Approximate("b"), Approximate("c")], bench)
    assert sorted(caught.value.best.main.metadata_props) == ["b"]
    assert isinstance(caught.value, KeyboardInterrupt)


def test_a_journal_continues_without_measuring_again(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    passes = [*exact("b", "c", "d"), Approximate("p")]
    bench = FakeBench(errors={"c": 0.1}, times={"p": 0.5})
    first = gated(passes, bench, journal=DecisionJournal(path))
    bench.runs = 0
    again = gated(passes, bench, journal=DecisionJournal(path, resume=True))
    assert again[0] == first[0] == ["b", "d", "p"]
    assert again[1] == first[1]
    assert bench.runs == 5  # the original twice, and each kept state once to confirm its error here


def test_a_journal_cut_in_the_middle_of_a_line_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    gated(exact("b"), FakeBench(), journal=DecisionJournal(path))
    path.write_text(path.read_text()[:-7])
    assert gated(exact("b"), FakeBench(), journal=DecisionJournal(path, resume=True))[0] == ["b"]


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("hello\n")
    with pytest.raises(InputError, match="is not a planish journal of schema 1"):
        DecisionJournal(path, resume=True)
    assert path.read_text() == "hello\n"


@dataclass(frozen=True)
class Tuned(Approximate):
    """Is to make `decode` faster; notes what it is told of its gain."""

    def entry_names(self, program: Program) -> list[str]:
        return ["decode"]

    def tune(self, program: Program, gain: Callable[[ApproximatePass, float], float]) -> tuple[ApproximatePass, str]:
        return self, f"gain {gain(self, 1.5):g}"


def test_a_pass_is_tuned_by_the_entries_that_it_is_to_make_faster() -> None:
    class ByEntry:
        def speedup(self, baseline: Program, candidate: Program, *, entry: str, **options: Any) -> Ratio:
            median = {"prefill": 0.5, "decode": 2.0}[entry]
            return Ratio(median, median - 0.01, median + 0.01, 9)

        def forget(self, candidate: Program) -> None:
            pass

    two = Program({"main": program().main, "prefill": program().main, "decode": program().main})
    gates = Gates(ByEntry(), Budget(), apply=lambda p, candidate: p.apply(candidate, PassContext()))  # type: ignore
    gates.best, gates.ratios, gates.ledger = two, {}, Ledger()
    gates.parts = [Calibration([], True, entry=name) for name in ("prefill", "decode")]
    gates.deadline = time.monotonic() + 1
    gates._tuned(Tuned())
    assert gates.ledger.notes == ["gain 2"]
    slowest = gates._measure(two, two)
    assert gates._no_gain(slowest, "approximate").startswith("slower in prefill, 0.5")


@dataclass(frozen=True)
class TunedWithinError(Tuned):
    tuned_within_error = True


def test_a_variant_beyond_the_error_budget_has_no_gain() -> None:
    class Wrong:
        def run(self, candidate: Program) -> list[dict[str, Any]]:
            return [{"y": np.full(3, 1.5)}]

    gates = Gates(Wrong(), Budget(error=0.4), apply=lambda p, candidate: p.apply(candidate, PassContext()))  # type: ignore
    gates.best, gates.ratios, gates.ledger, gates.parts, gates.random = program(), {}, Ledger(), [], set()
    gates.original, gates.expected = gates.best, [{"y": np.ones(3)}]
    gates.best_outputs = gates.expected
    gates._tuned(TunedWithinError())
    assert gates.ledger.notes == ["gain 0"]


def test_exact_passes_in_16_bits_are_held_to_what_16_bits_round() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y)
    { a = Cast<to = 10>(x)  b = Relu(a)  y = Cast<to = 1>(b) }"""
    model = ir.from_onnx_text(text)
    for name in "ab":
        value = next(v for node in model.graph for v in node.outputs if v.name == name)
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    bench = FakeBench(errors={"b": 1e-3, "c": 1e-2})
    gates = Gates(bench, Budget(), lambda p, program: p.apply(program, PassContext()))
    best, ledger = gates.optimize(Program.single(model), exact("b", "c"))
    assert sorted(best.main.metadata_props) == ["b"]
    assert "> 4.0e-03 at output 'y'" in ledger["exact{key='c'}"].verdict


@dataclass(frozen=True)
class Selecting(Approximate):
    name: ClassVar[str] = "selecting"
    selects: ClassVar[bool] = True


@pytest.mark.parametrize(("first", "kept"), [(Selecting, ["b", "p"]), (Approximate, ["p"])])
def test_behind_what_selects_the_distance_to_the_original_counts(first: type[ApproximatePass], kept: list[str]) -> None:
    bench = FakeBench(errors={"p": 4e-3, "b": -1e-3, "c": 3e-3}, times={"p": 0.5})
    marks, verdicts, _ = gated([first(), *exact("b", "c")], bench, Budget(error=1e-2))
    assert marks == kept
    assert verdicts["exact{key='c'}"].startswith("rolled back: error ")
