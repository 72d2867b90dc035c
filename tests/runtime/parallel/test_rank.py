"""One rank on a device of torch: numbers with two threads as two ranks, and the order in which sums are begun."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from planish.ir.compare import compare_outputs  # noqa: E402
from planish.ir.errors import InputError, UnsupportedError  # noqa: E402
from planish.ir.program import Calibration  # noqa: E402
from planish.passes.parallel.split import tensor_parallel  # noqa: E402
from planish.passes.parallel.tile_all_reduce import TileAllReduce  # noqa: E402
from planish.passes.testing import apply_pass, run_reference  # noqa: E402
from planish.runtime.parallel import nccl  # noqa: E402
from planish.runtime.parallel.rank import Rank  # noqa: E402
from tests.parallel_models import feeds, rank_program, transformer  # noqa: E402


class Meeting:
    """Sums over threads. Where a sum is waited for, not before, its numbers are put in place."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.ranks = threading.Barrier(ranks, timeout=60), ranks
        self.given: dict[int, list[Any]] = {}
        self.lock = threading.Lock()

    def reducer(self) -> Any:
        meeting, count = self, iter(range(1 << 30))

        class Reducer:
            def begin(self, tensor: Any) -> Callable[[], None]:
                number = next(count)
                with meeting.lock:
                    meeting.given.setdefault(number, []).append(tensor.clone())
                tensor.fill_(float("nan"))  # nobody may read it yet

                def wait() -> None:
                    meeting.barrier.wait()
                    assert len(meeting.given[number]) == meeting.ranks
                    tensor.copy_(sum(meeting.given[number]))
                    meeting.barrier.wait()

                return wait

        return Reducer()


def together(programs: list[Any], given: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    meeting = Meeting(len(programs))
    ranks = [Rank(program, meeting.reducer()) for program in programs]
    tensors = {name: torch.from_numpy(x) for name, x in given.items()}
    with ThreadPoolExecutor(len(ranks)) as pool:
        found = list(pool.map(lambda rank: rank.run(tensors), ranks))
    return [{name: x.numpy() for name, x in outputs.items()} for outputs in found]


@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize(
    ("form", "length", "batch"), [("decoder", "sequence", 2), ("encoder", "sequence", 2), ("decoder", 150, 1)]
)
def test_numbers(form: str, length: int | str, batch: int, tile: bool) -> None:
    whole = transformer(form, length=length)
    given = feeds(form, length if isinstance(length, int) else 21, batch)
    made = tensor_parallel(whole, 2)
    for program in made.programs if tile else ():
        program.calibration = Calibration([given])
        assert apply_pass(TileAllReduce(chunks=3, least=2), program).fired == 4
    want = run_reference(whole, given)
    for got in together(made.programs, given):
        assert compare_outputs(want, got).relative_l2 < 1e-6


def test_a_sum_is_waited_for_where_it_is_read_and_not_before() -> None:
    events: list[str] = []

    class Logging:
        def begin(self, tensor: Any) -> Callable[[], None]:
            number = sum(event.startswith("begin") for event in events)
            events.append(f"begin {number}")
            return lambda: events.append(f"wait {number}")

    def attend(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: Any) -> Any:
        events.append(f"attention over {k.shape[1]}")
        return torch.zeros_like(q)

    text = (
        '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> '
        "g (float[1,6,8] q, float[1,6,8] k, float[1,6,8] v) => (float[1,6,16] y) { "
        "a = Attention<is_causal = 1, q_num_heads = 2, kv_num_heads = 2>(q, k, v) p = MatMul(a, w) "
        "y = com.microsoft.AllReduce(p) }"
    )
    program = rank_program(text, w=(8, 16), a=(1, 6, 8), p=(1, 6, 16))
    apply_pass(TileAllReduce(chunks=2, least=1), program)
    given = {name: torch.zeros(1, 6, 8) for name in "qkv"}
    Rank(program, Logging(), attend=attend).run(given)
    assert events == ["attention over 3", "begin 0", "attention over 6", "begin 1", "wait 0", "wait 1"]


def test_a_sum_leaves_alone_what_others_read() -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> '
        "g (float[2,3] x) => (float[2,3] y, float[2,3] z) "
        "{ s = com.microsoft.AllReduce(x) y = Add(s, x) p = Mul(x, x) r = com.microsoft.AllReduce(p) z = Sub(r, p) }"
    )
    given = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    for got in together([rank_program(text, rank) for rank in range(2)], given):
        np.testing.assert_array_equal(got["y"], 3 * given["x"])
        np.testing.assert_array_equal(got["z"], given["x"] ** 2)


def test_what_it_does_not_run_is_named() -> None:
    text = '<ir_version: 10, opset_import: ["" : 23]> g (float[2] x) => (float[2] y) { y = Cos(x) }'
    with pytest.raises(UnsupportedError, match="Cos 'Cos_0' has no form"):
        Rank(rank_program(text), None)  # type: ignore[arg-type]


def test_nccl_says_what_is_missing() -> None:
    with pytest.raises(InputError, match="rank 2 of 2"):
        nccl.Communicator(b"\0" * 128, 2, 2)
    try:
        nccl.library()
    except UnsupportedError as error:
        assert "no NCCL" in str(error)
