"""split-packed-heads: packed queries, keys and values are split before the heads are."""

from __future__ import annotations

import numpy as np
import pytest

from planish.passes.testing import check_declines, check_numerics, check_rewrite, check_untouched

NAME = "split-packed-heads"
OUT = "float[B, 4, S, 2] q, float[B, 4, S, 2] k, float[B, 4, S, 2] v"
CONSTANTS = """int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, int64[5] apart = {0, 0, 3, 4, 2},
    int64[5] wide = {0, 0, 3, 2, 4}, int64[1] zero = {0}, int64[4] heads = {0, 0, 4, 2}"""
PACKED = "r = Reshape(x, apart)  t = Transpose<perm = [2, 0, 3, 1, 4]>(r)"
GATHERED = f"{PACKED}  q = Gather<axis = 0>(t, i0)  k = Gather<axis = 0>(t, i1)  v = Gather<axis = 0>(t, i2)"
UNBOUND = f"""{PACKED}  a, b, c = Split<axis = 0, num_outputs = 3>(t)
    q = Squeeze(a, zero)  k = Squeeze(b, zero)  v = Squeeze(c, zero)"""


def model(body: str, outputs: str = OUT, x: str = "[B, S, 24]") -> str:
    return f'<ir_version: 10, opset_import: ["" : 23]> g (float{x} x) => ({outputs}) <{CONSTANTS}> {{ {body} }}'


@pytest.mark.parametrize("body", [GATHERED, UNBOUND])
def test_parts_have_their_heads_for_themselves(body: str) -> None:
    after = "a, b, c = Split<axis = -1, num_outputs = 3>(x)" + "".join(
        f"  {part}h = Reshape({part}, heads)  {name} = Transpose<perm = [0, 2, 1, 3]>({part}h)"
        for part, name in zip("abc", "qkv", strict=True)
    )
    check_rewrite(NAME, model(body), model(after), edits=1)
    rng = np.random.default_rng(0)
    check_numerics(NAME, model(body), {"x": rng.standard_normal((2, 5, 24), np.float32)})


def test_what_is_declined() -> None:
    check_declines(NAME, model(GATHERED, x="[B, S, N]"), "the number or the size of the heads is unknown", count=1)


def test_other_permutations_and_parts_are_left_alone() -> None:
    check_untouched(NAME, model(GATHERED.replace("[2, 0, 3, 1, 4]", "[2, 0, 1, 3, 4]"), OUT.replace("4, S", "S, 4")))
    check_untouched(NAME, model(GATHERED.replace("(t, i2)", "(t, i1)")))
