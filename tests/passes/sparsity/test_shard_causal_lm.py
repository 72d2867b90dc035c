"""shard-attention on prefill and decode: generation against the eager model with the pattern as its mask."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import planish  # noqa: E402
from planish.driver import optimize  # noqa: E402
from planish.ir.block_sparsity import S2, Heads, Pattern, SinkWindow, SlidingWindow, slot_plan  # noqa: E402
from planish.ir.causal_lm import DECODE, IDS, LENGTHS, LOGITS, PREFILL, cache_layer  # noqa: E402
from planish.ir.errors import InputError  # noqa: E402
from planish.ir.ops.block_sparse_attention import layout_mask  # noqa: E402
from planish.ir.program import Program  # noqa: E402
from planish.passes.base import PassContext, PassResult  # noqa: E402
from planish.passes.defaults import RECOGNIZE  # noqa: E402
from planish.passes.manager import PassError  # noqa: E402
from planish.passes.sparsity.shard_attention import ShardAttention  # noqa: E402
from planish.passes.testing import apply_pass  # noqa: E402
from planish.runtime.bench import Bench  # noqa: E402
from planish.runtime.compile import compile_entry  # noqa: E402
from planish.runtime.executable import Executable  # noqa: E402
from tests.causal_models import causal_model, prompts  # noqa: E402

HEADS = Heads(4, 2)
LONGER = np.random.default_rng(7).integers(3, 90, (2, 37))


@functools.cache
def _recognized(name: str) -> Program:
    program = optimize(
        causal_model(name),
        "ort-cpu:threads=1",
        task="causal-lm",
        example_inputs={IDS: LONGER, "attention_mask": np.arange(37) >= np.array([[0], [9]])},
        passes=",".join(RECOGNIZE),
        budget=planish.Budget(gates=False),
    ).program
    assert program is not None
    return program


def sharded(options: str, name: str = "Llama") -> tuple[Executable, PassResult]:
    program = _recognized(name).clone()
    result = apply_pass(f"shard-attention{{{options}}}", program)
    runners = {entry: compile_entry(program, entry, program.target) for entry in program.entries}
    return Executable(program, runners), result


def eager(pattern: Pattern, row: np.ndarray, count: int, name: str = "Llama") -> np.ndarray:
    """Greedy tokens of the eager model, all of the context anew for each, with the pattern as its mask."""
    model, ids = causal_model(name), torch.tensor(row)[None]
    for _ in range(count):
        n = ids.shape[1]
        layout = pattern.layout(n, HEADS)
        seen = layout_mask(layout.indptr, layout.indices, layout.block, n, n)[layout.head_layout]
        seen &= np.tril(np.ones((n, n), bool))
        mask = torch.where(torch.from_numpy(seen)[None], 0.0, torch.finfo(torch.float32).min)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, -1]
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    result: np.ndarray = ids[0, -count:].numpy()
    return result


CASES: list[tuple[str, Pattern]] = [
    ("block=4,local=2,stride=3", S2(block=4, local=2, stride=3)),
    ("block=4,local=1,stride=4,share_kv=False,offset=1", S2(block=4, local=1, stride=4, share_kv=False, offset=1)),
    ("pattern='sink-window',block=3,local=2", SinkWindow(block=3, local=2)),
    ("pattern='sliding-window',block=5,local=1", SlidingWindow(block=5, local=1)),
]


@pytest.mark.parametrize(("options", "pattern"), CASES)
def test_generates_what_the_masked_model_does_with_and_without_eviction(options: str, pattern: Pattern) -> None:
    ids, mask = prompts(3, 27)
    rows = [eager(pattern, ids[i][mask[i] == 1], 12) for i in range(3)]
    for more in ("", ",evict=True"):
        exe, result = sharded(options + more)
        assert result.fired == 4 and not result.declined
        found = exe.generate(ids, attention_mask=mask, max_new_tokens=12)[:, -12:]
        assert found.tolist() == [row.tolist() for row in rows]


def test_decode_can_stay_dense() -> None:
    exe, result = sharded("block=4,local=2,stride=3,decode='dense'")
    assert result.fired == 2
    kinds = [node.inputs[-1] for node in exe.program.entry(DECODE).graph if node.op_type == "GroupQueryAttention"]
    assert len(kinds) == 2 and all(len(n.inputs) == 7 for n in exe.program.entry(DECODE).graph if "Group" in n.op_type)


def test_an_evicted_cache_is_smaller_and_says_so() -> None:
    options, pattern = "block=4,local=2,stride=4", S2(block=4, local=2, stride=4)
    exe, result = sharded(options + ",evict=True")
    plan = slot_plan(pattern, HEADS)
    assert f"caches of 64 tokens keep {plan.capacity(64)} (0.375 of the memory)" in " ".join(result.notes)
    assert plan.capacity(64) == 24
    whole, _ = sharded(options)
    ids = LONGER[:, :33]
    lengths = np.array([33, 20])
    given = exe.run({IDS: ids, LENGTHS: lengths}, entry=PREFILL)
    full = whole.run({IDS: ids, LENGTHS: lengths}, entry=PREFILL)
    sizes = {}
    for name in full:
        if cache_layer(name) is None:
            assert np.allclose(given[name], full[name], atol=1e-5)
            continue
        at = plan.positions(lengths, plan.capacity(33))
        want = plan.gather(np.asarray(full[name]), lengths)
        got = np.where(at[..., None] >= 0, np.asarray(given[name]), 0)
        assert np.allclose(got, want, atol=1e-6)
        sizes[name] = np.asarray(given[name]).nbytes, np.asarray(full[name]).nbytes
    assert all(small / big == plan.capacity(33) / 33 for small, big in sizes.values())
    dims = [str(spec.shape[2]) for spec in exe.runners[DECODE].inputs if cache_layer(spec.name) is not None]
    assert dims == ["slots"] * 4


def test_the_caches_that_generation_binds_are_the_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from planish.runtime import ort_bound

    bound: list[int] = []
    original = ort_bound.BoundRun

    def watch(runner: Any, inputs: Any, outputs: Any) -> Any:
        bound.append(sum(a.nbytes for name, a in inputs.items() if cache_layer(name) is not None))
        return original(runner, inputs, outputs)

    monkeypatch.setattr(ort_bound, "BoundRun", watch)
    for more in ("", ",evict=True"):
        exe, _ = sharded("pattern='sink-window',block=4,local=2" + more)
        exe.generate(LONGER[:1], max_new_tokens=20)
    assert bound[1] / bound[0] == 12 / 56


def test_layers_that_keep_their_caches_and_layers_that_do_not() -> None:
    exe, result = sharded("block=4,local=2,stride=4,dense_every=2,evict=True")
    assert result.fired == 2
    dims = [str(spec.shape[2]) for spec in exe.runners[DECODE].inputs if cache_layer(spec.name) is not None]
    assert dims == ["slots", "slots", "capacity", "capacity"]
    other, _ = sharded("block=4,local=2,stride=4,dense_every=2")
    ids, mask = prompts(2, 20)
    found = [e.generate(ids, attention_mask=mask, max_new_tokens=15).tolist() for e in (exe, other)]
    assert found[0] == found[1]


def test_gates_run_decode_on_the_slots_of_calibration_caches() -> None:
    exe, _ = sharded("block=4,local=2,stride=4,evict=True")
    whole, _ = sharded("block=4,local=2,stride=4")
    outputs = [Bench(e.program.target, e.program.calibration).run_entry(e.program, DECODE) for e in (exe, whole)]
    assert np.allclose(outputs[0][0][LOGITS], outputs[1][0][LOGITS], atol=1e-5)


def test_prompts_end_where_the_lists_do() -> None:
    exe, _ = sharded("block=4,local=2,stride=4,max_length=40,evict=True")
    with pytest.raises(InputError, match="the model has 40 positions"):
        exe.generate(LONGER, max_new_tokens=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("pattern='bigbird',block=4,local=1,evict=True", "'bigbird' can not be evicted: a block that goes out of use"),
        ("block=4,local=1,dense_heads=1,evict=True", "head 2 is dense and keeps every block"),
        ("pattern='mask',block=16,mask=[['#','##','#.#','#.##']],evict=True", "'mask' can not be evicted"),
    ],
)
def test_patterns_that_can_not_be_evicted(options: str, message: str) -> None:
    with pytest.raises((InputError, PassError), match=message):
        sharded(options)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda node: node.attributes.add(ir.AttrInt64("local_window_size", 6)), "decode: it has a window already"),
        (lambda node: node.attributes.add(ir.AttrFloat32("softcap", 30.0)), "decode: its scores are capped"),
        (lambda node: node.resize_inputs(8) or node.replace_input_with(7, node.inputs[0]), "decode: it has a bias"),
    ],
)
def test_steps_that_are_left_alone_and_their_prompts_with_them(change: Any, reason: str) -> None:
    program = _recognized("Llama").clone()
    change(next(node for node in program.entry(DECODE).graph if node.op_type == "GroupQueryAttention"))
    program.entries = {name: program.entries[name] for name in (PREFILL, DECODE)}
    result = ShardAttention(block=4, local=1).apply(program, PassContext(program.target))
    assert result.fired == 2 and [d.reason.startswith(reason) for d in result.declined] == [True]
    prompts = [node.op_type for node in program.entry(PREFILL).graph if node.op_type in ("Attention", "If")]
    assert prompts == ["Attention", "If"]


def test_heads_that_were_removed_and_slots_fit_calibration_caches() -> None:
    from planish.ir.causal_lm import KEPT_HEADS
    from planish.runtime.caches import fitting

    exe, _ = sharded("pattern='sink-window',block=2,local=2,evict=True")
    graph = exe.program.entry(DECODE).graph
    names = {spec.name for spec in exe.runners[DECODE].inputs}
    cache = np.random.default_rng(0).normal(size=(1, 3, 20, 8)).astype(np.float32)
    batch = {name: cache for name in names if cache_layer(name) is not None} | {LENGTHS: np.array([11])}
    for value in graph.inputs[2:]:
        value.metadata_props[KEPT_HEADS] = "0 2"
    found = fitting(graph, names, batch | {"past_9_key": cache})
    assert "past_9_key" not in found
    first = found[graph.inputs[2].name]
    assert first.shape == (1, 2, 6, 8)
    held = slot_plan(SinkWindow(block=2, local=2), Heads(2, 2)).positions(np.array([11]), 6)[0, 0]
    assert held.tolist() == [8, 9, 10, -1, 0, 1]
    assert np.array_equal(first[0, :, :3], cache[0][[0, 2]][:, 8:11])


SCRIPT = """
import sys
import numpy as np
import planish
exe = planish.load("artifact", allow_native=True)
print(exe.generate(np.array([[5, 6, 7] * 9]), max_new_tokens=12).tolist())
assert "torch" not in sys.modules and "planish.passes" not in sys.modules
"""


@pytest.mark.parametrize(
    "target", ["ort-cpu:threads=1", pytest.param("ort-cpu:kernels,threads=1", marks=pytest.mark.slow)]
)
def test_a_user_optimizes_exports_and_loads(target: str, tmp_path: Path) -> None:
    if "kernels" in target:
        pytest.importorskip("tvm")
    shard = "shard-attention{block=16,local=1,stride=4,evict=True}"
    exe = optimize(
        causal_model("Llama"),
        target,
        task="causal-lm",
        approximate=shard,
        budget=planish.Budget(gates=False),
    )
    assert exe.report.ledger["shard-attention"].fired == 4
    exe.export(tmp_path / "artifact")
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    row = np.array([5, 6, 7] * 9)
    want = eager(S2(block=16, local=1, stride=4), row, 12)
    assert done.stdout.strip() == str([[*row.tolist(), *want.tolist()]])
