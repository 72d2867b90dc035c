from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.ir.causal_lm import DECODE, IDS, LENGTHS, LOGITS, PREFILL
from planish.ir.errors import InputError
from planish.runtime.artifact import load, verify_artifact
from planish.runtime.generate import _Step
from planish.runtime.ort_bound import BoundRun
from tests.causal_models import causal_executable, prompts
from tests.runtime.models import executable

ROOT = Path(__file__).parents[2]


def step(capacity: int, batch: int = 2, tokens: int = 5) -> tuple[Any, _Step]:
    exe = causal_executable("GPT-2")
    ids, lengths = np.full((batch, tokens), 7), np.full(batch, tokens)
    first = exe.runners[PREFILL].run({IDS: ids, LENGTHS: lengths})
    return exe, _Step(exe.runners[DECODE], first, lengths, capacity, first.pop(LOGITS))  # type: ignore[arg-type]


def test_a_step_writes_one_position_of_the_cache_and_leaves_its_place() -> None:
    _, decode = step(16)
    before = {name: (cache.copy(), cache.ctypes.data) for name, cache in decode.caches.items()}
    assert len(before) == 4
    decode(np.array([3, 4]))
    for name, cache in decode.caches.items():
        old, place = before[name]
        assert cache.ctypes.data == place
        changed = np.flatnonzero((cache != old).any(axis=(0, 1, 3)))
        assert changed.tolist() == [5]


def test_outputs_are_the_buffers_of_the_inputs() -> None:
    _, decode = step(16)
    outputs = decode._bound._binding.get_outputs()
    names = [spec.name for spec in decode._bound._runner.outputs]
    places = {name: value.data_ptr() for name, value in zip(names, outputs, strict=True)}
    for name, cache in decode.caches.items():
        assert places[name.replace("past_", "present_")] == cache.ctypes.data
    assert places[LOGITS] == decode.logits.ctypes.data


def test_time_does_not_grow_with_the_capacity() -> None:
    """A copy of the larger caches, 4 of 64 MiB, would take milliseconds; a step takes tenths of one."""
    times = {}
    for capacity in (64, 1 << 18):
        _, decode = step(capacity)
        tokens = np.array([3, 4])
        found = []
        for _ in range(30):
            started = time.process_time()
            decode(tokens)
            found.append(time.process_time() - started)
        times[capacity] = float(np.median(found))
    assert times[1 << 18] < 3 * times[64] + 1e-3


def test_rows_of_other_lengths_do_not_see_each_other() -> None:
    exe = causal_executable("Llama")
    ids, mask = prompts(6, 11)
    together = exe.generate(ids, 10, attention_mask=mask)[:, 11:]
    for row, alone in enumerate(together):
        own = ids[row, mask[row] == 1][None]
        np.testing.assert_array_equal(exe.generate(own, 10)[0, own.shape[1] :], alone)


def test_artifact_round_trip(tmp_path: Path) -> None:
    exe = causal_executable("Qwen2")
    exe.export(tmp_path / "a")
    assert (tmp_path / "a" / "prefill.onnx").exists() and (tmp_path / "a" / "decode.onnx").exists()
    stored = (tmp_path / "a" / "weights" / "weights.safetensors").stat().st_size
    assert exe.program is not None and stored < exe.program.weight_bytes() + 200_000  # pages between weights
    again = load(tmp_path / "a", threads=1)
    assert again.entries == [PREFILL, DECODE]
    ids, mask = prompts(4, 9)
    np.testing.assert_array_equal(
        again.generate(ids, 8, attention_mask=mask), exe.generate(ids, 8, attention_mask=mask)
    )
    found = verify_artifact(tmp_path / "a")
    assert found.ok and {entry for entry, _ in found.golden} == {PREFILL, DECODE}


def test_generates_in_a_process_without_torch(tmp_path: Path) -> None:
    exe = causal_executable("GPT-2")
    exe.export(tmp_path / "a")
    ids = np.array([[3, 4, 5]])
    code = f"""
        import sys, numpy as np, planish
        exe = planish.load({str(tmp_path / "a")!r})
        print(exe.generate(np.array([[3, 4, 5]]), 6).tolist())
        assert not {{"torch", "transformers", "onnxscript", "planish.passes"}} & set(sys.modules), sorted(sys.modules)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(exe.generate(ids, 6).tolist())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"input_ids": np.ones((1, 60), int), "max_new_tokens": 8},
            "the longest prompt has 60 tokens and max_new_tokens is 8, 68 together; the model has 64 positions: at "
            "most 4 more fit.",
        ),
        ({"input_ids": np.ones((1, 64), int)}, "has 64 positions: it leaves none for new ones."),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be an integer of at least 1."),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5; it must be an integer of at least 1."),
        (
            {"attention_mask": np.ones((1, 2), int)},
            r"attention_mask has the shape \[1, 2\]; it must be input_ids', \[1, 3\].",
        ),
        ({"attention_mask": np.array([[1, 0, 1]])}, "row 0 of attention_mask hides tokens between others"),
        ({"attention_mask": np.array([[0, 0, 0]])}, "row 0 of attention_mask hides every token."),
        ({"attention_mask": np.array([[0, 2, 1]])}, "holds values other than 0 and 1"),
        ({"input_ids": np.ones(3, int)}, r"input_ids has the shape \[3\]; give \(batch, sequence\)"),
        ({"input_ids": np.ones((1, 0), int)}, "both at least 1"),
        ({"input_ids": np.ones((1, 3))}, "input_ids is float64; give integers."),
        ({"input_ids": [[1, 2], [3]]}, "input_ids is no array .* pad the rows"),
        ({"input_ids": np.array([[1, 100]])}, "holds the token 100; the vocabulary has 100."),
        ({"input_ids": np.array([[1, -1]])}, "holds the token -1; the vocabulary has 100."),
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5; give an integer, a list of integers, or None."),
        ({"pad_token_id": "x"}, "pad_token_id is 'x'; give an integer."),
        ({"temperature": 0.0}, "temperature is 0.0; it must be a number above 0."),
        ({"top_k": -1}, "top_k is -1; it must be an integer of at least 0"),
        ({"top_p": 0}, "top_p is 0; it must be a number above 0 and at most 1."),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan; it must be a number above 0."),
    ],
)
def test_errors_are_one_line_with_the_limit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        causal_executable("GPT-2").generate(**{"input_ids": np.ones((1, 3), int), "max_new_tokens": 4, **given})
    assert "\n" not in str(caught.value)


def test_other_programs_do_not_generate() -> None:
    with pytest.raises(InputError, match="has the entries main; generate needs prefill and decode"):
        executable().generate(np.ones((1, 3), int))


def test_bound_runs_want_every_buffer() -> None:
    runner: Any = executable().runners["main"]
    given = {"x": np.ones((2, 16), np.float32), "ids": np.zeros((2, 3), np.int64)}
    with pytest.raises(InputError, match="output 'y' has no buffer."):
        BoundRun(runner, given, {})
    results = runner.run(given)
    buffers = {name: np.zeros_like(value) for name, value in results.items()}
    BoundRun(runner, given, buffers)()
    for name, value in results.items():
        np.testing.assert_array_equal(buffers[name], value)
    with pytest.raises(InputError, match="the buffer of 'y' is not contiguous."):
        BoundRun(runner, given, buffers | {"y": np.zeros((*results["y"].shape[:-1], 99), np.float32)[..., ::3]})
