"""The reference executor: it takes all ranks or none, and says where they differ."""

from __future__ import annotations

import numpy as np
import pytest

from planish.ir.compare import compare_outputs
from planish.ir.errors import InputError
from planish.passes.parallel.split import tensor_parallel
from planish.passes.parallel.tile_all_reduce import TileAllReduce
from planish.passes.testing import apply_pass, run_reference
from planish.runtime.parallel.lockstep import LockStep, stages
from tests.parallel_models import feeds, rank_program, transformer

OPSETS = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'


def test_ranks_give_their_heads_of_a_cache() -> None:
    whole = transformer("cached", kv_heads=2)
    ranks = LockStep(tensor_parallel(whole, 2).programs)
    given = feeds("cached")
    want, got = run_reference(whole, given), ranks.run(given)
    assert got["present_0_key"].shape == want["present_0_key"].shape == (2, 2, 17, 8)
    assert compare_outputs(want, got).relative_l2 < 1e-6


def test_all_ranks_in_order_or_none() -> None:
    first, second = tensor_parallel(transformer(), 2).programs
    for wrong in ([first], [second, first], [first, first]):
        with pytest.raises(InputError, match="these are the ranks"):
            LockStep(wrong)


def test_the_same_passes_on_all() -> None:
    first, second = tensor_parallel(transformer(length=512), 2).programs
    apply_pass(TileAllReduce(least=256), first)
    with pytest.raises(InputError, match="run the same passes on all of them"):
        LockStep([first, second])


def test_a_part_that_was_not_summed_is_noticed() -> None:
    body = "z = MatMul(x, w) y = com.microsoft.AllReduce(z)"
    text = f"{OPSETS} g (float[2,3] x) => (float[2,4] y, float[2,4] z) {{ {body} }}"
    parts = [rank_program(text, rank, w=(3, 4)) for rank in range(2)]
    parts[1].main.graph.initializers["w"].const_value = parts[0].main.graph.initializers["w"].const_value
    x = np.ones((2, 3), np.float32)
    got = LockStep(parts).run({"x": x})
    np.testing.assert_allclose(got["y"], 2 * got["z"], rtol=1e-6)
    weight = parts[1].main.graph.initializers["w"]
    weight.const_value = type(weight.const_value)(3 * weight.const_value.numpy(), name="w")
    with pytest.raises(InputError, match="output 'z' differs between the ranks"):
        LockStep(parts).run({"x": x})
    with pytest.raises(InputError, match="input 'x' is not given"):
        LockStep(parts).run({})


def test_stages() -> None:
    program = tensor_parallel(transformer(), 2).programs[0]
    found = stages(program.main)
    assert [len(stage.sums) for stage in found] == [1, 1, 1, 1, 0]
    inside = rank_program(
        f"{OPSETS} g (bool c, float[2] x) => (float[2] y) {{ y = If(c) <then_branch = a () => (float[2] s) "
        "{ s = com.microsoft.AllReduce(x) }, else_branch = b () => (float[2] t) { t = Identity(x) }> }"
    )
    with pytest.raises(InputError, match="inside of a branch"):
        stages(inside.main)
