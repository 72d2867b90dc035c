"""The command line: every command, its JSON, its exit codes, and what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import planish
from planish.cli import commands, invoke
from planish.ir.ledger import ErrorStats
from planish.runtime.report import Report
from tests.cli.command_line import GELU, as_json, names, save

# --- optimize --------------------------------------------------------------------------------------------------


def test_optimize_writes_an_artifact_and_ends_with_the_verdict(model: Path, call: Any) -> None:
    code, out, err = call("optimize", "model.onnx", "-o", "out", "--budget", "seconds=1", "--report", "r.html")
    assert code == 0 and err == ""
    assert out.rstrip().splitlines()[-1].endswith("passes.")
    assert "Artifact: out" in out and "fuse-gelu" in out
    assert names(model.parent) == {"model.onnx", "out", "r.html"}
    assert planish.load("out").run({"x": np.ones((2, 8), "f")})["y"].shape == (2, 8)


def test_optimize_in_json_is_the_report(model: Path, call: Any) -> None:
    code, out, err = call("optimize", "model.onnx", "--no-gates", "--json")
    assert code == 0 and err == ""
    found = as_json(out)
    assert found["artifact"] is None and found["failed"] == []
    assert found["after"]["ops"]["Gelu"] == 1
    assert Report.from_dict(found).ledger["fuse-gelu"].fired == 1


def test_optimize_without_output_says_that_nothing_was_written(model: Path, call: Any) -> None:
    code, out, _ = call("optimize", "model.onnx", "--no-gates")
    assert code == 0 and "Nothing was written" in out
    assert names(model.parent) == {"model.onnx"}


def test_optimize_takes_inputs_threads_and_a_pipeline(model: Path, call: Any) -> None:
    np.savez("one.npz", x=np.ones((3, 8), "f"))
    np.savez("two.npz", x=np.zeros((2, 8), "f"))
    args = ("--inputs", "one.npz", "--inputs", "two.npz", "--threads", 1, "-p", "remove-no-ops", "--json")
    code, out, _ = call("optimize", "model.onnx", "--budget", "seconds=1", *args)
    found = as_json(out)
    assert code == 0
    # The text has no types of inner values, so these are inferred first.
    assert found["target"] == "ort-cpu:threads=1" and found["pipeline"] == "infer-shapes,remove-no-ops"
    assert not found["synthetic_inputs"]


def test_approximate_passes_that_are_rolled_back_are_told_and_fail(model: Path, call: Any) -> None:
    weight = np.random.default_rng(0).standard_normal((128, 64)).astype("f")
    text = '<ir_version: 10, opset_import: ["" : 23]> g (float[b, 128] x) => (float[b, 64] y) <float[128, 64] w> '
    proto = onnx.parser.parse_model(text + "{ y = MatMul(x, w) }")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, "wide.onnx")
    given = ("optimize", "wide.onnx", "-a", "quantize-weights{bits=4}", "--json")
    code, out, _ = call(*given, "--budget", "error=1e-6,seconds=1")
    assert code == 1 and as_json(out)["failed"] == ["quantize-weights{bits=4}"]
    code, out, _ = call(*given, "--no-gates")
    assert code == 0 and as_json(out)["after"]["ops"] == {"com.microsoft::MatMulNBits": 1}
    code, _, err = call(*given, "-p", "fold-constants")
    assert code == 2 and "approximate= goes with the target's exact passes" in err
    code, _, err = call("optimize", "wide.onnx", "-a", "quantise")
    assert code == 2 and "Did you mean 'quantize'?" in err


def test_print_after_and_verify_watch_the_passes(model: Path, call: Any) -> None:
    args = ("--no-gates", "--print-after", "fuse-gelu", "--verify")
    _, out, _ = call("optimize", "model.onnx", *args)
    assert "# after fuse-gelu" in out
    _, out, err = call("optimize", "model.onnx", *args, "--json")
    as_json(out)
    assert "# after fuse-gelu" in err


def test_a_journal_is_kept_and_continued(model: Path, call: Any) -> None:
    args = ("optimize", "model.onnx", "--budget", "seconds=1", "--journal", "j.jsonl")
    assert call(*args)[0] == 0
    assert len(Path("j.jsonl").read_text().splitlines()) > 1
    assert call(*args, "--continue")[0] == 0
    code, _, err = call("optimize", "model.onnx", "--continue")
    assert code == 2 and "--journal" in err
    code, _, err = call("optimize", "model.onnx", "--continue", "--journal", "other.jsonl")
    assert code == 2 and "other.jsonl" in err
    assert call("optimize", "model.onnx", "--journal", "no/such/folder")[0] == 2
    Path("notes.txt").write_text("mine")
    code, _, err = call("optimize", "model.onnx", "--journal", "notes.txt")
    assert code == 2 and "no planish journal" in err and Path("notes.txt").read_text() == "mine"


def test_an_existing_output_is_refused_before_any_work(model: Path, call: Any) -> None:
    Path("out").mkdir()
    Path("out/notes.txt").touch()
    for more in ([], ["--overwrite"]):
        code, _, err = call("optimize", "missing-model.onnx", "-o", "out", *more)
        assert code == 2 and "'out' is there already" in err
    assert call("optimize", "model.onnx", "-o", "no/folder")[0] == 2


def test_overwrite_replaces_an_artifact(artifact: Path, call: Any) -> None:
    assert call("optimize", "model.onnx", "--no-gates", "-o", artifact, "--overwrite")[0] == 0
    assert names(artifact.parent) == {"model.onnx", "artifact"}


# --- run, verify, bench -----------------------------------------------------------------------------------------


def test_run_writes_outputs_that_numpy_reads(artifact: Path, call: Any) -> None:
    x = np.linspace(-1, 1, 16, dtype="f").reshape(2, 8)
    np.savez("x.npz", x=x)
    code, out, err = call("run", "artifact", "--inputs", "x.npz", "-o", "y.npz")
    assert code == 0 and err == "" and "float32[2, 8]" in out
    with np.load("y.npz", allow_pickle=False) as saved:
        expected = planish.load("artifact").run({"x": x})["y"]
        np.testing.assert_array_equal(saved["y"], expected)


def test_run_makes_inputs_up_and_says_so(artifact: Path, call: Any) -> None:
    code, out, _ = call("run", "artifact", "--dim", "batch=5", "--json")
    found = as_json(out)
    assert code == 0 and found["synthetic"] and found["outputs"]["y"]["shape"] == [5, 8]
    assert "synthetic" in call("run", "model.onnx")[1]


def test_run_reports_wrong_inputs(artifact: Path, call: Any) -> None:
    np.savez("x.npz", z=np.ones((2, 8), "f"))
    code, out, err = call("run", "artifact", "--inputs", "x.npz", "-o", "y.npz")
    assert code == 2 and out == "" and err.startswith("error: ")
    assert not Path("y.npz").exists()


def test_verify_holds_and_notices_damage(artifact: Path, call: Any) -> None:
    code, out, _ = call("verify", "artifact")
    assert code == 0 and out.rstrip().endswith("holds on this machine.")
    assert as_json(call("verify", "artifact", "--json")[1])["ok"] is True
    with (artifact / "main.onnx").open("r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    code, _, err = call("verify", "artifact")
    assert code == 2 and "main.onnx" in err


def test_verify_exits_with_one_when_numbers_differ(artifact: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import planish.ir.compare

    wrong = ErrorStats(0.5, 1.0, 0.9, None, "y")
    monkeypatch.setattr(planish.ir.compare, "compare_outputs", lambda expected, got: wrong)
    code, out, _ = call("verify", "artifact")
    assert code == 1 and "does NOT hold" in out


def test_bench_shows_percentiles_and_ratios(artifact: Path, call: Any) -> None:
    args = ("bench", "model.onnx", "artifact", "--seconds", "0.2", "--runs", "5")
    code, out, _ = call(*args)
    assert code == 0
    for word in ("Avg", "P50", "P90", "P99", "Min", "Std", "speed-up", "samples/s", "synthetic"):
        assert word in out
    rows = as_json(call(*args, "--json")[1])["rows"]
    assert [row["name"] for row in rows] == ["model.onnx", "artifact"]
    assert rows[0]["speedup"] is None and rows[1]["speedup"]["runs"] >= 3
    assert rows[1]["error"]["relative_l2"] < 1e-5


def test_bench_tells_equal_names_apart(model: Path, call: Any) -> None:
    Path("a").mkdir()
    save(Path("a/model.onnx"))
    args = ("--seconds", "0.1", "--runs", "3", "--json", "--clock", "process")
    rows = as_json(call("bench", "model.onnx", "a/model.onnx", "model.onnx", *args)[1])["rows"]
    assert len({row["name"] for row in rows}) == 3


def test_bench_refuses_a_contestant_with_other_inputs(model: Path, call: Any) -> None:
    other = save(Path("other.onnx"), GELU.replace(" x)", " z)").replace("Mul(x,", "Mul(z,"))
    code, _, err = call("bench", "model.onnx", other)
    assert code == 2 and "other.onnx" in err
    assert call("bench", "model.onnx", "--clock", "sundial")[0] == 2


# --- looking at things ---------------------------------------------------------------------------------------------


def test_inspect_shows_a_model_and_an_artifact(artifact: Path, call: Any) -> None:
    code, out, _ = call("inspect", "model.onnx")
    assert code == 0
    for words in ("x: float[batch, 8]", "Operators", "Blocks", "kernel", "FLOPs", "ai.onnx 23"):
        assert words in out
    found = as_json(call("inspect", "artifact", "--dim", "batch=3", "--json")[1])
    assert found["kind"] == "artifact" and found["made_by"] == {"fuse-gelu": 1}
    assert found["dims"] == {"batch": 3} and found["coverage"]["share"] == 1.0


def test_passes_lists_kind_doc_and_options(call: Any) -> None:
    code, out, _ = call("passes")
    assert code == 0 and "fuse-gelu" in out
    found = {item["name"]: item for item in as_json(call("passes", "--json")[1])["passes"]}
    assert found["fuse-gelu"]["kind"] == "exact" and "Gelu" in found["fuse-gelu"]["doc"]
    assert {o["name"] for o in found["fold-constants"]["options"]} >= {"max_bytes"}


def test_explain_without_a_pass_goes_through_the_pipeline(model: Path, call: Any) -> None:
    found = as_json(call("explain", "model.onnx", "--json")[1])
    gelu = next(item for item in found["passes"] if item["pass"] == "fuse-gelu")
    assert gelu["fired"] == 1 and gelu["near_misses"] == []
    assert found["pipeline"][gelu["position"]] == "fuse-gelu"
    near = save(Path("near.onnx"), GELU.replace("root = {1.4142135}", "root = {1.5}"))
    code, out, _ = call("explain", near)
    assert code == 0 and "fuse-gelu: fires 0 times, 1 near misses" in out and "expected 1.41" in out
    assert "Neither fire nor nearly do:" in out
    code, _, err = call("explain", "model.onnx", "--raw")
    assert code == 2 and "--raw is for one pass" in err


def test_explain_counts_firings_and_names_near_misses(model: Path, call: Any) -> None:
    found = as_json(call("explain", "model.onnx", "fuse-gelu", "--json")[1])
    assert found["fired"] == 1 and "remove-no-ops" in found["after"]
    near = save(Path("near.onnx"), GELU.replace("one = {1}", "one = {2}"))
    code, out, _ = call("explain", near, "fuse-gelu", "--raw")
    assert code == 0 and "Fires 0 times" in out and "reason" in out
    code, _, err = call("explain", "model.onnx", "fuse-gelu,fold-constants")
    assert code == 2 and "one pass" in err


def test_diff_of_a_model_and_its_artifact(artifact: Path, call: Any) -> None:
    code, out, _ = call("diff", "model.onnx", "artifact")
    assert code == 0 and "Erf" in out and "The models differ" in out
    found = as_json(call("diff", "model.onnx", "artifact", "--json", "--exit-code")[1])
    assert found["ops"]["Gelu"] == [0, 1] and not found["same"]
    assert call("diff", "model.onnx", "artifact", "--exit-code")[0] == 1
    code, out, _ = call("diff", "model.onnx", "model.onnx", "--exit-code")
    assert code == 0 and "equal" in out


# --- errors and exit codes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["inspect", "nope.onnx"], "nope.onnx"),
        (["inspct", "model.onnx"], "inspect"),
        (["optimize"], "MODEL"),
        (["optimize", "model.onnx", "--thread"], "--threads"),
        (["optimize", "model.onnx", "--threads", "-1"], "at least 0"),
        (["optimize", "model.onnx", "--print-after", "fuse-gellu"], "fuse-gelu"),
        (["optimize", "model.onnx", "--budget", "error"], "error=1e-3"),
        (["optimize", "model.onnx", "--budget", "error=1,error=2"], "twice"),
        (["optimize", "model.onnx", "--budget", "error=-1"], "at least 0"),
        (["inspect", "model.onnx", "--dim", "batch"], "name=size"),
        (["inspect", "model.onnx", "--dim", "bach=2"], "batch"),
        (["inspect", "model.onnx", "-t", "ort-cpuu"], "ort-cpu"),
        (["run", "model.onnx", "--inputs", "model.onnx"], ".npz"),
        (["run", "."], "manifest.json"),
        (["verify", "model.onnx"], "model.onnx"),
    ],
)
def test_user_mistakes_are_one_line_and_exit_code_two(model: Path, call: Any, args: list[str], words: str) -> None:
    code, out, err = call(*args)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert "Traceback" not in err
    code, out, again = call(*args, "--json")
    assert again == err and as_json(out)["exit_code"] == 2
    assert names(model.parent) == {"model.onnx"}


def test_a_bug_is_one_line_unless_asked_for_more(model: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("\x1b[31mboom")

    monkeypatch.setattr(commands, "inspect", broken)
    code, _, err = call("inspect", "model.onnx")
    assert code == 1 and "bug in planish" in err and "RuntimeError" in err and "\x1b" not in err
    monkeypatch.setenv("PLANISH_DEBUG", "1")
    with pytest.raises(RuntimeError, match="boom"):
        invoke(["inspect", "model.onnx"])


def test_control_c_is_exit_code_130(model: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "inspect", stop)
    code, out, err = call("inspect", "model.onnx")
    assert (code, out, err) == (130, "", "error: interrupted.\n")


def test_control_c_keeps_the_best_program_so_far(model: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from planish.passes.gates import Gates

    def stop(self: Gates) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Gates, "_composition", stop)
    code, _, err = call("optimize", "model.onnx", "-o", "out", "--budget", "seconds=1")
    assert code == 130 and "best program so far is in 'out'" in err
    assert call("verify", "out")[0] == 0
    assert names(model.parent) == {"model.onnx", "out"}


def test_version_and_help() -> None:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))

    def run(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "planish.cli", *args], capture_output=True, text=True, env=environment, check=True
        )
        return done.stdout

    assert run("--version") == f"planish {planish.__version__}\n"
    text = run("--help")
    for name in ("optimize", "run", "bench", "verify", "inspect", "passes", "explain", "bisect", "diff"):
        assert f"\n  {name}" in text


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from planish.cli import invoke\n"
        "try: invoke(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'torch', 'rich', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment)


def test_the_sample_model_is_valid(model: Path) -> None:
    onnx.checker.check_model(onnx.load(model))
