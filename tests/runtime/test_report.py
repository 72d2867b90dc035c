"""The report: round trip through JSON, the terminal's table, the page and what a hostile name can do to it."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import onnx_ir as ir
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from planish.ir.blocks import Block, BlockNode
from planish.ir.errors import InputError
from planish.ir.ledger import Declined, ErrorStats, Ledger, LedgerEntry
from planish.ir.program import TensorSpec
from planish.runtime.report import Report, Stats
from planish.runtime.report_graph import graph_view
from planish.runtime.report_html import render_html
from planish.runtime.report_text import op_rows
from planish.runtime.units import number, percent_change, printable, ratio_text, size
from tests.runtime.sample_report import chain, large_blocks, ratio, sample_ledger, sample_report


def _text(report: Report, width: int = 160) -> str:
    out = StringIO()
    report.print(Console(file=out, width=width, highlight=False))
    return out.getvalue()


def _bare(**changes: object) -> Report:
    stats = Stats(3, {"Add": 3}, 1024)
    return replace(Report("m.onnx", "ort-cpu", "", stats, stats, Ledger()), **changes)  # type: ignore[arg-type]


def _through_json(report: Report) -> Report:
    return Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))


def test_a_report_survives_json_exactly() -> None:
    report = sample_report()
    assert _through_json(report) == report


def test_infinite_errors_survive_strict_json() -> None:
    error = ErrorStats(math.inf, math.inf, -1.0, None, "inf")
    report = _bare(error=error, ledger=Ledger([LedgerEntry("p", "exact", error_original=error)]))
    again = _through_json(report)
    assert again == report
    assert again.error is not None and again.error.output == "inf"


def test_inputs_of_every_kind_survive_json() -> None:
    specs = [
        TensorSpec("a", ir.DataType.FLOAT, ("batch", None, 3)),
        TensorSpec("b", ir.DataType.BFLOAT16, None),
        TensorSpec("c", None, None),
    ]
    assert _through_json(_bare(inputs=specs)).inputs == specs


def test_build_takes_latency_from_the_speedup() -> None:
    report = sample_report()
    assert report.speedup is not None
    assert report.before.latency_ms == report.speedup.baseline_ms
    assert report.after.latency_ms == report.speedup.candidate_ms
    assert report.before.ops["MatMul"] == 96 and report.after.ops["Attention"] == 12
    assert sum(block.count for block in report.graph_before) == report.before.nodes


def test_the_verdict_is_one_sentence_that_says_gain_error_nodes_and_passes() -> None:
    report = sample_report()
    assert report.verdict == "1.23× [1.20, 1.26] faster, error 3.9e-3, 492 → 180 nodes, kept 7 of 9 passes."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "Neither speed nor error was measured, 3 nodes, no pass had anything to do."),
        ({"speedup": ratio(1.004)}, "No measurable change in speed (1.004× [0.984, 1.024])"),
        ({"speedup": ratio(0.9)}, "Slower than before: 0.90× [0.88, 0.92]"),
        ({"error": ErrorStats(0.0, 0.0, 1.0)}, "error 0,"),
        ({"error": ErrorStats(1e-3, 0.0, 1.0, 0.25)}, "metric 0.25,"),
    ],
)
def test_the_verdict_does_not_claim_what_was_not_measured(change: dict[str, object], words: str) -> None:
    assert words in _bare(**change).summary()


def test_exact_and_approximate_are_kept_apart() -> None:
    exact, loose = sample_report().budget_lines()
    assert exact == "6 exact passes: none of the error budget spent (rounding only, held to 1e-4)"
    assert loose == "1 approximate pass: spent 3.9e-3 of 0.01 (39% of the error budget)"


def test_remarks_say_synthetic_noisy_and_not_measured() -> None:
    report = sample_report()
    assert "synthetic" in report.remarks()[0]
    assert report.remarks()[-1] == report.ledger.notes[0]
    assert any("was measured" in line for line in _bare().remarks())
    assert any("noisy" in line for line in _bare(speedup=replace(ratio(1.0), noisy=True)).remarks())


def test_the_terminal_shows_the_table_the_ledger_and_ends_with_the_verdict() -> None:
    text = _text(sample_report())
    for words in (
        "IN: x",
        "float[batch, 64]",
        "MatMul",
        "Model size",
        "Latency",
        "1.23× [1.20, 1.26]",
        "fuse-attention",
    ):
        assert words in text
    assert "Nothing to do for 4 passes: fuse-rms-norm" in text
    assert text.rstrip().splitlines()[-1] == sample_report().verdict


def test_the_terminal_marks_lower_counts_green() -> None:
    out = StringIO()
    sample_report().print(Console(file=out, width=160, force_terminal=True, color_system="standard", highlight=False))
    row = next(line for line in out.getvalue().splitlines() if "MatMul" in line)
    assert "\x1b[32m" in row


def test_the_terminal_survives_an_empty_and_a_hostile_report() -> None:
    assert _bare().summary() in _text(_bare(verdict=_bare().summary()))
    text = _text(_bare(model="[red]\x1b[31mevil\x07", after=Stats(1, {"[bold]Op\x1b]0;x\x07": 1}, 0)))
    assert "\x1b" not in text and "\x07" not in text and "[red]" in text


def test_the_page_is_one_file_without_network() -> None:
    page = render_html(sample_report())
    assert not re.search(r"(src|href)\s*=", page)
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", page)
    assert "default-src 'none'" in page
    for words in ("1.23×", "all-MiniLM-L6-v2.onnx", "fuse-attention", "rolled back", "encoder.layer.0 … 11", "39% of"):
        assert words in page


def test_hostile_names_stay_text() -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}"
    block = Block(evil, [BlockNode(evil, evil, evil, (evil,))])
    entry = LedgerEntry(evil, "exact", 2, 1, 1, [Declined(evil, evil, evil)], verdict=evil, reproducer=evil)
    error = ErrorStats(1.0, 1.0, 1.0, None, evil)
    report = _bare(
        model=evil,
        target=evil,
        pipeline=evil,
        verdict=evil,
        error=error,
        before=Stats(1, {evil: 2}, 1),
        ledger=Ledger([entry], notes=[evil]),
        inputs=[TensorSpec(evil, ir.DataType.FLOAT, (evil,))],
        graph_before=[block],
        graph_after=[block],
    )
    page = render_html(report)
    assert page.count("<script") == 2 and page.count("</script>") == 2  # the page's own: data and code
    assert "<img" not in page and "49" not in re.sub(r"<style>.*?</style>|sha256-\S+", "", page, flags=re.S)
    assert _through_json(report) == report


def test_the_script_is_the_one_that_the_policy_allows() -> None:
    import base64
    import hashlib

    page = render_html(sample_report(2))
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_ten_thousand_nodes_make_a_page_of_a_few_megabytes_at_most() -> None:
    report = _bare(graph_before=large_blocks(10_000), graph_after=large_blocks(10_000, seed=1))
    page = render_html(report)
    assert len(page) < 3_000_000
    assert page.count("<details data-block") == 200  # collapsed: none has the attribute open
    assert "details open" not in page


def test_more_blocks_than_fit_are_counted() -> None:
    blocks = [Block(f"part {'abcdefghij'[i % 10]}{i}", [BlockNode("n", f"Op{i % 7}")]) for i in range(1500)]
    view = graph_view(_bare(graph_before=blocks, graph_after=blocks), {})
    assert len(view["rows"]) + view["hidden"] + sum(r["alike"] - 1 for r in view["rows"]) == 1500


def test_alike_layers_are_folded_and_replaced_nodes_take_the_colour_of_their_pass() -> None:
    view = graph_view(sample_report(4), {"fuse-gelu": 28})
    assert [(row["title"], row["alike"], row["before"], row["after"]) for row in view["rows"]] == [
        ("encoder.layer.0 … 3", 4, 41, 15)
    ]
    report = _bare(
        graph_before=[Block("b", [BlockNode("old", "Erf"), BlockNode("same", "Add"), BlockNode("dead", "Mul")])],
        graph_after=[Block("b", [BlockNode("new", "Gelu", "fuse-gelu", ("old",)), BlockNode("same", "Add")])],
    )
    data = graph_view(report, {})["data"]
    assert [node[2] for node in data["blocks"][0][0]] == [0, -1, -2]
    assert [node[2] for node in data["blocks"][0][1]] == [0, -1]


def test_blocks_of_both_sides_are_aligned_in_order() -> None:
    node = [BlockNode("n", "Add")]
    before = [Block(n, list(node)) for n in ("a", "b", "c")]
    after = [Block(n, list(node)) for n in ("a", "new", "c")]
    rows = graph_view(_bare(graph_before=before, graph_after=after), {})["rows"]
    assert [(r["title"], r["before"], r["after"]) for r in rows] == [
        ("a", 1, 1),
        ("new", 0, 1),
        ("b", 1, 0),
        ("c", 1, 1),
    ]


def test_a_page_without_measurements_has_no_charts_of_them() -> None:
    page = render_html(_bare(ledger=Ledger([LedgerEntry("p", "exact", 3, 2, 1)], measured=False)))
    assert "not measured" in page and "Speed-up</b>" not in page


def test_a_perfect_error_and_an_infinite_one_draw() -> None:
    entries = [
        LedgerEntry("a", "exact", 3, 2, 1, [], error_original=ErrorStats(0.0, 0.0, 1.0), speedup=ratio(1.0)),
        LedgerEntry("b", "exact", 2, 2, 0, [], error_original=ErrorStats(math.inf, math.inf, -1.0), kept=False),
        LedgerEntry("c", "exact", 2, 2, 0, [], error_original=ErrorStats(math.nan, math.nan, 0.0), kept=False),
    ]
    assert "infinite" in render_html(_bare(ledger=Ledger(entries, tolerance=1e-4)))


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    sample_report(2).to_html(path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    with pytest.raises(InputError, match=r"can not write"):
        sample_report(2).to_html(tmp_path / "missing" / "r.html")


def test_long_lists_of_operators_are_summed_up() -> None:
    rows = op_rows({f"Op{i:02}": 1 for i in range(40)}, {}, 10)
    assert len(rows) == 11 and rows[-1] == ("30 other operators", 30, 0)
    assert len(op_rows({f"Op{i}": 1 for i in range(11)}, {}, 10)) == 11
    assert ("Gelu", 0, 1) in op_rows({f"Op{i:02}": 2 for i in range(40)}, {"Gelu": 1}, 10)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (size(None), "–"),
        (size(512), "512 B"),
        (size(94_371_840), "90.0 MiB"),
        (number(3.14e-7), "3.1e-7"),
        (number(0.0), "0"),
        (number(0.031), "0.031"),
        (percent_change(540, 262), "−51%"),
        (percent_change(0, 3), ""),
        (ratio_text(ratio(1.18, 0.03)), "1.18× [1.15, 1.21]"),
        (ratio_text(ratio(1.004, 0.012)), "1.004× [0.992, 1.016]"),
        (printable("a\x1b[0m\nb"), "a�[0m�b"),
        (len(printable("x" * 999)), 200),
    ],
)
def test_numbers_read_well(got: object, want: object) -> None:
    assert got == want


def test_the_sample_is_a_valid_program() -> None:
    assert chain(2, ["a/Relu"]).node_count() == 2
    assert sample_ledger()["fuse-gelu"].fired == 16
