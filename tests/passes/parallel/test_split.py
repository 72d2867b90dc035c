"""Sharing a program out: all ranks together give what the whole one gives, each with its part of the weights."""

from __future__ import annotations

import numpy as np
import pytest

from planish.ir.compare import compare_outputs
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.parallel import is_all_reduce, rank_of
from planish.ir.program import Program
from planish.ir.verify import verify
from planish.passes.parallel.split import tensor_parallel
from planish.passes.testing import canonical_text, run_reference
from planish.runtime.parallel.lockstep import LockStep
from tests.parallel_models import HIDDEN, WIDTH, feeds, transformer


def reduces(program: Program) -> int:
    return sum(map(is_all_reduce, program.main.graph))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("form", ["decoder", "encoder", "cached", "flat", "parallel"])
def test_all_ranks_together_give_what_the_whole_gives(form: str, ranks: int) -> None:
    whole = transformer(form)
    before = canonical_text(whole)
    made = tensor_parallel(whole, ranks)
    assert canonical_text(whole) == before and not made.declined
    assert (made.attentions, made.networks) == (2, 2) and [rank_of(p) for p in made.programs] == [
        (rank, ranks) for rank in range(ranks)
    ]
    for program in made.programs:
        verify(program, full=True)
        assert reduces(program) == 4
    given = feeds(form)
    want, got = run_reference(whole, given), LockStep(made.programs).run(given)
    assert want.keys() == got.keys() and compare_outputs(want, got).relative_l2 < 1e-6


def test_every_rank_holds_its_part_of_the_weights() -> None:
    whole = transformer()
    first, second = tensor_parallel(whole, 2).programs
    norms = 2 * 2 * WIDTH * 4
    assert first.weight_bytes() == second.weight_bytes() == (whole.weight_bytes() - norms) // 2 + norms
    w, a, b = (p.main.graph.initializers for p in (whole, first, second))
    for name, axis in (("wq0", 1), ("wo0", 0), ("wg1", 1), ("wd1", 0)):
        joined = np.concatenate([side[name].const_value.numpy() for side in (a, b)], axis)
        np.testing.assert_array_equal(joined, w[name].const_value.numpy())


def test_query_heads_go_with_the_keys_that_they_read() -> None:
    whole = transformer(kv_heads=2)
    made = tensor_parallel(whole, 2)
    attention = next(n for n in made.programs[1].main.graph if n.op_type == "Attention")
    assert attention.attributes["q_num_heads"].value == 2 and attention.attributes["kv_num_heads"].value == 1
    given = feeds()
    assert compare_outputs(run_reference(whole, given), LockStep(made.programs).run(given)).relative_l2 < 1e-6


def test_what_can_not_be_shared_evenly_stays_whole_on_all_ranks() -> None:
    whole = transformer(kv_heads=1, hidden=HIDDEN)
    made = tensor_parallel(whole, 2)
    assert (made.attentions, made.networks) == (0, 2)
    assert {d.reason for d in made.declined} == {"1 heads of keys and values are not shared evenly by 2 ranks"}
    given = feeds()
    assert compare_outputs(run_reference(whole, given), LockStep(made.programs).run(given)).relative_l2 < 1e-6
    odd = tensor_parallel(transformer(hidden=45), 2)
    assert odd.networks == 0 and "45 hidden units are not shared evenly by 2 ranks" in odd.declined[0].reason


def test_wrong_use_is_refused() -> None:
    whole = transformer()
    for ranks in (1, 0, True, 2.0):
        with pytest.raises(InputError, match="at least 2"):
            tensor_parallel(whole, ranks)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one of 2 already"):
        tensor_parallel(tensor_parallel(whole, 2).programs[0], 2)
    with pytest.raises(UnsupportedError, match="not shared evenly by 3 ranks"):
        tensor_parallel(transformer(hidden=40), 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT", "Llama", "ViT"])
def test_models_from_torch(name: str) -> None:
    pytest.importorskip("transformers")
    from planish.ir.inputs import synthesize
    from planish.passes.defaults import RECOGNIZE
    from planish.passes.manager import run_pass
    from planish.passes.parallel.tile_all_reduce import TileAllReduce
    from planish.passes.pipeline import parse_pipeline
    from planish.passes.testing import apply_pass
    from tests.layer_models import MODELS

    whole = MODELS[name].program()
    run_pass(parse_pipeline(",".join(RECOGNIZE)), whole)
    made = tensor_parallel(whole, 2)
    assert made.attentions == made.networks == 4
    given = synthesize(whole, seed=5)
    want = run_reference(whole, given)
    assert compare_outputs(want, LockStep(made.programs).run(given)).relative_l2 < 1e-6
    from planish.ir.program import Calibration

    for program in made.programs:
        program.calibration = Calibration([given])
        assert apply_pass(TileAllReduce(chunks=3, least=1), program).fired == 8
    assert compare_outputs(want, LockStep(made.programs).run(given)).relative_l2 < 1e-6
