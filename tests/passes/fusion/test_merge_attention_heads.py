from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import check_declines, check_numerics, check_rewrite, check_untouched

HEAD = '<ir_version: 10, opset_import: ["" : 23]>'


def split(
    *,
    q: str = "x",
    back: str = "[0, 0, 16]",
    extra: str = "",
    inputs: str = "qh, kh, vh",
    output: str = "B, S, 16",
    perm: str = "[0, 2, 1, 3]",
    kv: str = "[0, 0, 2, 8]",
) -> str:
    return f"""
    {HEAD}
    attention (float[B, S, 16] x, float[B, L, 16] c{extra}) => (float[{output}] y)
    <int64[4] heads = {{0, 0, 2, 8}}, int64[4] kv = {{{kv.strip("[]")}}}, int64[3] joined = {{{back.strip("[]")}}}>
    {{
        qr = Reshape({q}, heads)
        qh = Transpose<perm = {perm}>(qr)
        kr = Reshape(c, kv)
        kh = Transpose<perm = [0, 2, 1, 3]>(kr)
        vr = Reshape(c, kv)
        vh = Transpose<perm = [0, 2, 1, 3]>(vr)
        h = Attention<scale = 0.25>({inputs})
        t = Transpose<perm = [0, 2, 1, 3]>(h)
        y = Reshape(t, joined)
    }}
    """


SIZES = [(1, 1, 1), (1, 5, 7), (3, 4, 4), (3, 7, 2)]


def feeds(batch: int, queries: int, keys: int, **more: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((batch, queries, 16), dtype=np.float32),
        "c": rng.standard_normal((batch, keys, 16), dtype=np.float32),
        **more,
    }


def test_reshapes_and_transposes_go() -> None:
    after = f"""
    {HEAD}
    attention (float[B, S, 16] x, float[B, L, 16] c) => (float[B, S, 16] y)
    {{ y = Attention<q_num_heads = 2, kv_num_heads = 2, scale = 0.25>(x, c, c) }}
    """
    check_rewrite("merge-attention-heads,eliminate-dead-code", split(), after)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("back", "output"), [("[0, 0, 16]", "B, S, 16"), ("[0, -1, 16]", "B, S, 16"), ("[-1, 1, 16]", "N, 1, 16")]
)
def test_numbers(back: str, output: str, size: tuple[int, int, int]) -> None:
    program = check_numerics("merge-attention-heads,eliminate-dead-code", split(back=back, output=output), feeds(*size))
    assert "Transpose" not in {n.op_type for n in program.main.graph}


@pytest.mark.parametrize("size", SIZES)
def test_mask_stays(size: tuple[int, int, int]) -> None:
    text = split(extra=", bool[B, 1, S, L] mask", inputs="qh, kh, vh, mask")
    mask = np.random.default_rng(1).random((size[0], 1, *size[1:])) > 0.4
    check_numerics("merge-attention-heads", text, feeds(*size, mask=mask))


def test_a_split_that_is_not_proved_keeps_its_reshape() -> None:
    # Batch and length may trade places in the reshape: then the heads are joined again by another one.
    text = (
        split()
        .replace("int64[4] heads = {0, 0, 2, 8}", "int64[4] heads = {5, 3, 2, 8}")
        .replace("B, S, 16] x", "P, Q, 16] x")
        .replace("B, L, 16", "5, L, 16")
        .replace("[B, S, 16] y", "[5, 3, 16] y")
    )
    rng = np.random.default_rng(2)
    x, c = rng.standard_normal((3, 5, 16), dtype=np.float32), rng.standard_normal((5, 4, 16), dtype=np.float32)
    program = check_numerics("merge-attention-heads,eliminate-dead-code", text, {"x": x, "c": c})
    assert [n.op_type for n in program.main.graph] == ["Reshape", "Reshape", "Attention"]


def test_grouped_heads() -> None:
    text = split(kv="[0, 0, 1, 8]").replace("[B, L, 16] c", "[B, L, 8] c")
    rng = np.random.default_rng(3)
    inputs = {
        "x": rng.standard_normal((3, 5, 16), dtype=np.float32),
        "c": rng.standard_normal((3, 6, 8), dtype=np.float32),
    }
    program = check_numerics("merge-attention-heads", text, inputs)
    node = next(n for n in program.main.graph if n.op_type == "Attention")
    assert (node.attributes.get_int("q_num_heads"), node.attributes.get_int("kv_num_heads")) == (2, 1)


def test_heads_joined_some_other_way() -> None:
    text = split(back="[-1, 2, 4]", output="N, 2, 4")
    check_numerics("merge-attention-heads", text, feeds(3, 4, 5))


@pytest.mark.parametrize("attribute", ["", "<interleaved = 1>", "<rotary_embedding_dim = 4>"])
@pytest.mark.parametrize("size", SIZES)
def test_rotary_embeddings_turn_merged_heads(attribute: str, size: tuple[int, int, int]) -> None:
    half = 2 if "dim" in attribute else 4
    text = split(
        extra=f", float[B, S, {half}] cq, float[B, S, {half}] sq, float[B, L, {half}] ck, float[B, L, {half}] sk",
        inputs="qt, kt, vh",
    ).replace(
        "h = Attention",
        f"qt = RotaryEmbedding{attribute}(qh, cq, sq)\n kt = RotaryEmbedding{attribute}(kh, ck, sk)\n h = Attention",
    )
    rng = np.random.default_rng(4)
    batch, queries, keys = size
    angles = {"q": rng.random((batch, queries, half)), "k": rng.random((batch, keys, half))}
    waves = {
        f"{wave}{role}": function(angle).astype(np.float32)
        for role, angle in angles.items()
        for wave, function in (("c", np.cos), ("s", np.sin))
    }
    program = check_numerics("merge-attention-heads,eliminate-dead-code", text, feeds(*size, **waves))
    assert [n.op_type for n in program.main.graph] == ["RotaryEmbedding", "RotaryEmbedding", "Attention"]


def test_rotary_embedding_by_positions() -> None:
    text = split(extra=", float[9, 4] cos, float[9, 4] sin, int64[B, S] p, int64[B, L] r", inputs="qt, kt, vh").replace(
        "h = Attention",
        "qt = RotaryEmbedding(qh, cos, sin, p)\n kt = RotaryEmbedding(kh, cos, sin, r)\n h = Attention",
    )
    rng = np.random.default_rng(5)
    angle = rng.random((9, 4), dtype=np.float32)
    more = {
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "p": rng.integers(0, 9, (3, 5)),
        "r": rng.integers(0, 9, (3, 7)),
    }
    check_numerics("merge-attention-heads", text, feeds(3, 5, 7, **more))


def test_declines_what_is_not_split() -> None:
    text = split(inputs="qh, kh, vc", extra=", float[B, 2, L, 8] vc")
    check_declines("merge-attention-heads", text, "the values are not split into heads by a Transpose")


def test_declines_other_transposes() -> None:
    text = split(perm="[0, 2, 1, 3]").replace(
        "qh = Transpose<perm = [0, 2, 1, 3]>(qr)", "qs = Transpose<perm = [1, 2, 0, 3]>(qr)\n qh = Identity(qs)"
    )
    check_declines("merge-attention-heads", text, "the queries are not split into heads by a Transpose")


def test_declines_unknown_depth() -> None:
    text = f"""
    {HEAD}
    f (float[B, S, H, D] q, float[B, L, H, D] c) => (float[B, S, H, D] y)
    {{
        qh = Transpose<perm = [0, 2, 1, 3]>(q)
        kh = Transpose<perm = [0, 2, 1, 3]>(c)
        h = Attention(qh, kh, kh)
        y = Transpose<perm = [0, 2, 1, 3]>(h)
    }}
    """
    check_declines("merge-attention-heads", text, "the number or the depth of the heads of the queries is unknown")


def test_declines_a_cache() -> None:
    text = split(inputs="qh, kh, vh, , pk, pv", extra=", float[B, 2, P, 8] pk, float[B, 2, P, 8] pv").replace(
        "h = Attention", "h, ck, cv = Attention"
    )
    check_declines("merge-attention-heads", text, "reads or writes a cache")


def test_declines_heads_that_something_else_reads() -> None:
    text = split().replace("[B, S, 16] y)", "[B, S, 16] y, float[B, 2, S, 8] h)")
    check_declines("merge-attention-heads", text, "h")


def test_leaves_the_three_dimensional_form_alone() -> None:
    check_untouched(
        "merge-attention-heads",
        f"""{HEAD}
        f (float[B, S, 16] x) => (float[B, S, 16] y)
        {{ y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x) }}""",
    )
