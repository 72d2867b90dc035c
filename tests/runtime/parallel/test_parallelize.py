"""From a program to the fastest group of ranks."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from planish.ir.compare import compare_outputs  # noqa: E402
from planish.ir.errors import InputError, UnsupportedError  # noqa: E402
from planish.parallel import parallelize  # noqa: E402
from planish.passes.testing import run_reference  # noqa: E402
from tests.parallel_models import feeds, rank_program, transformer  # noqa: E402

CPU = ("cpu", "cpu")


def test_all_ways_are_right_and_one_is_taken() -> None:
    whole, given = transformer(length=150), feeds(length=150, batch=1)
    made = parallelize(whole, given, devices=CPU, chunks=(2, 3), least=8, seconds=0.5)
    assert set(made.choice.ratios) == {"copy, 2 chunks", "copy, 3 chunks"}
    assert made.choice.name in ("copy, all rows", *made.choice.ratios)
    assert all(name.startswith("nccl, ") for name in made.left_out) and len(made.left_out) == 3
    got = {name: item.numpy() for name, item in made.group.run(given).items()}
    assert compare_outputs(run_reference(whole, given), got).relative_l2 < 1e-6


def test_short_sequences_have_no_chunks() -> None:
    made = parallelize(transformer(length=150), feeds(length=150, batch=1), devices=CPU, seconds=0.2)
    assert made.choice.name == "copy, all rows" and not made.choice.ratios
    assert "150 rows, and 2 chunks of at least 1024 take more" in made.left_out["2 chunks"]


def test_what_can_not_be_made() -> None:
    given = feeds(length=150, batch=1)
    with pytest.raises(UnsupportedError, match="no way runs here: .*GPU"):
        parallelize(transformer(length=150), given, 4, devices=["cpu"] * 4)
    text = '<ir_version: 10, opset_import: ["" : 23]> g (float[2] x) => (float[2] y) { y = Neg(x) }'
    program = rank_program(text)
    program.provenance.clear()
    with pytest.raises(UnsupportedError, match="nothing of the program can be shared out"):
        parallelize(program, given, devices=CPU)
    with pytest.raises(InputError, match="takes at least 2"):
        parallelize(transformer(length=150), given, 1, devices=CPU)
