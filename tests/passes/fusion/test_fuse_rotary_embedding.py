from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planish.passes.testing import check_declines, check_numerics, check_rewrite, check_untouched

NAME = "fuse-rotary-embedding"
TIDY = f"infer-shapes,{NAME},eliminate-common-subexpressions,eliminate-dead-code"
HALVES = {
    "slices": "a = Slice(x, zero, half, last)\n b = Slice(x, half, end, last)",
    "split": "a, b = Split<axis = -1, num_outputs = 2>(x)",
}
TURN = "n = Neg(b)\n t = Concat<axis = -1>(n, a)"
PAIRS = """a = Slice(x, zero, end, last, two)
    b = Slice(x, one, end, last, two)
    n = Neg(b)
    nu = Unsqueeze(n, minus)
    au = Unsqueeze(a, minus)
    st = Concat<axis = -1>(nu, au)
    t = Reshape(st, back)"""
SUM = "c = Mul(x, cos)\n s = Mul(t, sin)\n y = Add(c, s)"
TABLES = (
    "ff = Concat<axis = -1>(f, f)\n cf = Cos(ff)\n sf = Sin(ff)\n cos = Unsqueeze(cf, one)\n sin = Unsqueeze(sf, one)"
)
TWICE = """fu = Unsqueeze(f, minus)
    fe = Expand(fu, pair)
    ff = Reshape(fe, joined)
    cf = Cos(ff)
    sf = Sin(ff)
    cos = Unsqueeze(cf, one)
    sin = Unsqueeze(sf, one)"""
CONSTANTS = """int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] half = {3}, int64[1] end = {99},
    int64[1] last = {3}, int64[1] minus = {-1}, int64[4] pair = {1, 1, 1, 2}"""


def model(
    *body: str,
    x: str = "[B, 2, S, 6]",
    f: str = "[1, S, 3]",
    dtype: str = "float",
    opset: int = 23,
    back: str = "0, 0, 0, 6",
    more: str = "",
) -> str:
    return f"""
    <ir_version: 10, opset_import: ["" : {opset}]>
    rotary ({dtype}{x} x, {dtype}{f} f{more}) => ({dtype}{x} y)
    <{CONSTANTS}, int64[4] back = {{{back}}}, int64[3] joined = {{0, 0, 6}}>
    {{ {chr(10).join(body)} }}
    """


def feed(x: tuple[int, ...], f: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal(x, dtype=np.float32), "f": rng.standard_normal(f, dtype=np.float32)}


SIZES = [(1, 1), (1, 5), (3, 1), (3, 7), (0, 4)]


@pytest.mark.parametrize("cut", HALVES)
def test_swapped_halves(cut: str) -> None:
    after = model(
        """cf = Cos(f)
           n = Shape<start = 0, end = 1>(x)
           sizes = Concat<axis = 0>(n, ones)
           cos = Expand(cf, sizes)
           sf = Sin(f)
           sin = Expand(sf, sizes)
           y = RotaryEmbedding(x, cos, sin)"""
    ).replace("int64[3] joined", "int64[2] ones = {1, 1}, int64[3] joined")
    check_rewrite(TIDY.removeprefix("infer-shapes,"), model(HALVES[cut], TURN, TABLES, SUM), after)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cut", HALVES)
def test_numbers(cut: str, size: tuple[int, int]) -> None:
    batch, length = size
    for own in {1, batch}:
        text = model(HALVES[cut], TURN, TABLES, SUM, f="[1, S, 3]" if own == 1 else "[B, S, 3]")
        program = check_numerics(TIDY, text, feed((batch, 2, length, 6), (own, length, 3)))
        counts = [n.op_type for n in program.main.graph]
        assert counts.count("RotaryEmbedding") == 1 and not {"Neg", "Mul", "Add"} & set(counts)


@pytest.mark.parametrize(
    "body",
    [
        SUM.replace("Mul(x, cos)", "Mul(cos, x)").replace("Add(c, s)", "Add(s, c)"),
        SUM.replace("Mul(t, sin)", "Mul(sin, t)"),
    ],
)
def test_operands_in_any_order(body: str) -> None:
    check_numerics(NAME, model(HALVES["slices"], TURN, TABLES, body), feed((2, 2, 5, 6), (1, 5, 3)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("negative", ["Neg(b)", "Mul(b, less)"])
def test_swapped_neighbours(negative: str, size: tuple[int, int]) -> None:
    batch, length = size
    text = model(PAIRS.replace("Neg(b)", negative), TWICE, SUM).replace(
        "int64[3] joined", "float less = {-1}, int64[3] joined"
    )
    program = check_numerics(TIDY, text, feed((batch, 2, length, 6), (1, length, 3)))
    nodes = [n for n in program.main.graph if n.op_type == "RotaryEmbedding"]
    assert [n.attributes.get_int("interleaved") for n in nodes] == [1]


@pytest.mark.parametrize("size", SIZES)
def test_heads_after_positions(size: tuple[int, int]) -> None:
    # GPT-J's layout: the operator's three-dimensional form, on what the heads were split from.
    batch, length = size
    tables = TWICE.replace("(cf, one)", "(cf, two)").replace("(sf, one)", "(sf, two)")
    text = model(PAIRS, tables, SUM, x="[B, S, 2, 6]")
    program = check_numerics(TIDY, text, feed((batch, length, 2, 6), (1, length, 3)))
    nodes = [n for n in program.main.graph if n.op_type == "RotaryEmbedding"]
    assert [n.attributes.get_int("num_heads") for n in nodes] == [2]


FRONT = """front = Slice(x, zero, end0, last)
    rest = Slice(x, end0, end, last)
    a = Slice(front, zero, half, last)
    b = Slice(front, half, end, last)
    n = Neg(b)
    t = Concat<axis = -1>(n, a)
    c = Mul(front, cos)
    s = Mul(t, sin)
    turned = Add(c, s)
    y = Concat<axis = -1>(turned, rest)"""


def front_model(body: str = FRONT, width: int = 10) -> str:
    text = model(TABLES, body, x=f"[B, 2, S, {width}]")
    return text.replace("int64[3] joined", "int64[1] end0 = {6}, int64[3] joined")


@pytest.mark.parametrize("size", SIZES)
def test_only_the_front_of_a_head(size: tuple[int, int]) -> None:
    batch, length = size
    program = check_numerics(TIDY, front_model(), feed((batch, 2, length, 10), (1, length, 3)))
    nodes = [n for n in program.main.graph if n.op_type == "RotaryEmbedding"]
    assert [n.attributes.get_int("rotary_embedding_dim") for n in nodes] == [6]
    assert "Slice" not in {n.op_type for n in program.main.graph}


def test_a_front_joined_with_something_else_is_turned_alone() -> None:
    text = front_model(
        FRONT.replace("rest = Slice(x, end0, end, last)", "q = Exp(x)\n rest = Slice(q, end0, end, last)")
    )
    program = check_numerics(TIDY, text, feed((2, 2, 5, 10), (1, 5, 3)))
    nodes = [n for n in program.main.graph if n.op_type == "RotaryEmbedding"]
    assert len(nodes) == 1 and "rotary_embedding_dim" not in nodes[0].attributes


def test_a_constant_table() -> None:
    angles = np.arange(4)[:, None] / np.array([1.0, 10.0, 100.0])
    rows = np.concatenate([angles, angles], axis=1)
    shown = [", ".join(f"{v:.9g}" for v in g(rows).astype(np.float32).ravel()) for g in (np.cos, np.sin)]
    text = model(HALVES["slices"], TURN, SUM, x="[B, 2, 4, 6]").replace(
        "int64[3] joined", f"float[4, 6] cos = {{{shown[0]}}}, float[4, 6] sin = {{{shown[1]}}}, int64[3] joined"
    )
    program = check_numerics(TIDY, text, feed((3, 2, 4, 6), (1, 1, 3)))
    assert "RotaryEmbedding" in {n.op_type for n in program.main.graph}
    broken = text.replace(shown[0], "0.5, " + shown[0].split(", ", 1)[1])
    check_declines(NAME, broken, "'cos' is not proved to hold each angle twice")


def test_a_table_that_positions_are_looked_up_in() -> None:
    tables = """pc = Gather(big, ids)
        cos = Unsqueeze(pc, one)
        sin = Neg(cos)"""
    rows = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    shown = ", ".join(f"{v:.9g}" for v in np.concatenate([rows, rows], axis=1).ravel())
    text = model(HALVES["slices"], TURN, tables, SUM, more=", int64[B, S] ids").replace(
        "int64[3] joined", f"float[5, 6] big = {{{shown}}}, int64[3] joined"
    )
    inputs: dict[str, Any] = feed((3, 2, 4, 6), (1, 4, 3))
    inputs["ids"] = np.random.default_rng(1).integers(0, 5, (3, 4))
    program = check_numerics(TIDY, text, inputs)
    counts = [n.op_type for n in program.main.graph]
    assert "RotaryEmbedding" in counts and "Expand" not in counts


DECLINES = {
    "hold each angle twice": model(
        HALVES["slices"], TURN, TABLES.replace("(f, f)", "(f, g)"), SUM, more=", float[1, S, 3] g"
    ),
    "batch of what they turn": model(HALVES["slices"], TURN, TABLES, SUM, f="[M, S, 3]"),
    "one for each position": model(HALVES["slices"], TURN, TABLES, SUM, f="[1, 2, 3]", x="[2, 2, S, 6]"),
    "not float32": model(HALVES["slices"], TURN, TABLES, SUM, dtype="float16"),
    "needs opset 23": model(HALVES["slices"], TURN, TABLES, SUM, opset=22),
    "not from 'x'": model("x2 = Exp(x)", HALVES["slices"].replace("(x,", "(x2,"), TURN, TABLES, SUM),
    "number of heads is unknown": model(HALVES["slices"], TURN, TABLES, SUM, x="[B, H, S, 6]"),
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason: str) -> None:
    check_declines(NAME, DECLINES[reason], reason)


@pytest.mark.parametrize(
    "text",
    [
        # The halves are not swapped, or none of them is negated, or they are no halves.
        model(HALVES["slices"], TURN.replace("(n, a)", "(a, n)"), TABLES, SUM),
        model(HALVES["slices"], TURN.replace("Neg", "Exp"), TABLES, SUM),
        model(HALVES["slices"].replace("half", "two"), TURN, TABLES, SUM),
    ],
)
def test_similar_graphs_are_left_alone(text: str) -> None:
    check_untouched(NAME, text)


def test_values_that_something_else_reads_stay() -> None:
    text = model(HALVES["slices"], TURN, TABLES, SUM).replace("=> (", "=> (float[B, 2, S, 6] t, ")
    program = check_numerics(TIDY, text, feed((2, 2, 5, 6), (1, 5, 3)))
    counts = [n.op_type for n in program.main.graph]
    assert "RotaryEmbedding" in counts and "Neg" in counts
