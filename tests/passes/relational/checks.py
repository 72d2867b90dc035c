"""How passes on relational programs are tested: before and after as text, and the same numbers on hard graphs."""

from __future__ import annotations

import textwrap

import numpy as np

from planish.ir.relational.inter import Program
from planish.ir.relational.interpret import interpret
from planish.ir.relational.statistics import Statistics
from planish.ir.relational.text import format_program, parse_program
from planish.ir.relational.verify import verify
from planish.passes.relational.pipeline import Optimized, run_passes
from tests.ir.relational.graphs import graphs, random_values

#: Many edges for each pair, many nodes for each type.
ROWS = Statistics(nodes=1_000, edges=40_000, src_pairs=8_000, dst_pairs=10_000, edge_types=20, node_types=3)
GRAPHS = graphs()


def program(text: str) -> Program:
    found = parse_program(textwrap.dedent(text))
    verify(found)
    return found


def check(passes: str, before: str, after: str, edits: int, rows: Statistics = ROWS) -> Optimized:
    """The program becomes that one, in so many edits, a second run changes nothing, and numbers stay."""
    old = program(before)
    done = run_passes(old, rows, passes)
    assert format_program(done.program) == format_program(program(after))
    assert sum(step.edits for step in done.steps) == edits
    again = run_passes(done.program, rows, passes)
    assert again.program == done.program and not any(step.fired for step in again.steps)
    check_numbers(old, done.program)
    return done


def check_declines(passes: str, text: str, *reasons: str, rows: Statistics = ROWS) -> None:
    """Nothing changes, for these reasons (each is a part of one)."""
    old = program(text)
    done = run_passes(old, rows, passes)
    assert done.program == old and not any(step.fired for step in done.steps)
    found = [declined.reason for step in done.steps for declined in step.declined]
    assert len(found) == len(reasons), found
    for reason, given in zip(reasons, found, strict=True):
        assert reason in given, found


def check_numbers(old: Program, new: Program) -> None:
    """Both give the same on every graph that the interpreter takes."""
    for name, graph in GRAPHS.items():
        if name == "any types":
            continue  # not canonical
        values = random_values(old, graph)
        wanted, got = interpret(old, graph, values), interpret(new, graph, values)
        for output, array in wanted.items():
            np.testing.assert_allclose(got[output], array, rtol=1e-9, atol=1e-9, err_msg=f"{output} on {name}")
