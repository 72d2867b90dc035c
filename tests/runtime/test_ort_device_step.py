"""Generation on a device: with the CPU provider on the memory of the host, and on a GPU where there is one."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime as ort
import pytest
import torch

import planish
from planish.ir.causal_lm import DECODE, PREFILL
from planish.ir.errors import InputError, UnsupportedError
from planish.ir.spec import TensorSpec
from planish.ir.target import Target
from planish.runtime.executable import Executable
from planish.runtime.ort import open_session
from planish.runtime.ort_device import DeviceRunner
from planish.runtime.ort_device_step import bucket
from tests.causal_models import causal_model, greedy, prompts

CUDA = "CUDAExecutionProvider"
OFF = planish.Budget(gates=False)
here = CUDA in ort.get_available_providers() and torch.cuda.is_available()
gpu = pytest.mark.skipif(not here, reason="no GPU, or an ONNX Runtime without CUDA")
NEW = 12


@functools.cache
def made(name: str, options: str = "") -> Executable:
    """The program that a GPU gets."""
    return planish.optimize(causal_model(name), f"ort-cuda:sm_121{options}", task="causal-lm", budget=OFF)


@functools.cache
def on_host(name: str, options: str = "", capture: bool = True) -> Executable:
    """That program on the memory of the host; `capture`: as if a step were a graph."""
    exe, runners = made(name, options), {}
    assert exe.program is not None
    for entry, model in exe.program.entries.items():
        session, kept, _ = open_session(model, Target(), ["CPUExecutionProvider"])
        inputs = [TensorSpec.of(v) for v in model.graph.inputs if v.name not in model.graph.initializers]
        outputs = [TensorSpec.of(v) for v in model.graph.outputs]
        runners[entry] = DeviceRunner(session, inputs, outputs, device="cpu", capture=capture, keep_alive=kept)
    return Executable(exe.program, runners, provenance=exe.provenance, target=exe.target)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_tokens_are_those_of_transformers(name, capture):
    exe = on_host(name, capture=capture)
    for count, longest, seed in ((3, 9, 3), (1, 1, 4), (3, 7, 5)):  # the last one finds the memory of the first
        ids, mask = prompts(count, longest, seed)
        want = greedy(causal_model(name), ids, mask, NEW)
        np.testing.assert_array_equal(exe.generate(ids, NEW, attention_mask=mask), want)
        assert len(exe.runners[DECODE].kept) == int(capture)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BLOOM", "Gemma 2"])
def test_biases_by_position_windows_and_capped_scores(name):
    ids, mask = prompts(3, 9)
    got = on_host(name).generate(ids, NEW, attention_mask=mask)
    np.testing.assert_array_equal(got, greedy(causal_model(name), ids, mask, NEW))


def test_caches_are_written_in_place():
    exe = on_host("Llama", ",dtype=float16")
    ids, mask = prompts(2, 5)
    exe.generate(ids, 6, attention_mask=mask)
    (step,) = exe.runners[DECODE].kept.values()
    assert step.key == (2, 64) and {v.data_type() for v in step.caches.values()} == {"tensor(float16)"}
    for name, cache in step.caches.items():  # 5 of the prompt, and all new tokens but the last
        rows = cache.numpy()
        assert rows.shape == (2, 2, 64, 8) and not rows[:, :, 10:].any(), name
        assert rows[0, :, :10].any(-1).all() and rows[1, :, : mask[1].sum() + 5].any(-1).all()


def test_what_the_host_reads_is_bound_for_each_step(monkeypatch):
    """As for steps whose form on the GPU was taken back."""
    exe, bound = on_host("Llama", capture=False), []
    decode = exe.runners[DECODE]
    monkeypatch.setattr(decode, "host", {"lengths", "past_0_key"})
    session = decode.session

    class Session:
        run_with_iobinding = session.run_with_iobinding

        def io_binding(self):
            binding = session.io_binding()
            for name in ("bind_input", "bind_ortvalue_input"):
                made = getattr(binding, name)
                setattr(binding, name, lambda *a, made=made, **k: bound.append(a[0]) or made(*a, **k))
            return binding

    monkeypatch.setattr(decode, "session", Session())
    ids, mask = prompts(3, 9)
    want = greedy(causal_model("Llama"), ids, mask, NEW)
    np.testing.assert_array_equal(exe.generate(ids, NEW, attention_mask=mask), want)
    assert [bound.count(name) for name in ("lengths", "past_0_key", "input_ids", "past_1_key")] == [NEW, NEW, 1, 1]


def test_half_precision_follows_its_own_program():
    """Tokens of float16 are those of a run of the same entries that copies the caches."""
    exe = on_host("Llama", ",dtype=float16")
    ids, mask = prompts(3, 9)
    got = exe.generate(ids, NEW, attention_mask=mask)
    rows, lengths = np.array([np.roll(r, n) for r, n in zip(ids, mask.sum(1), strict=True)]), mask.sum(1)
    first = exe.run({"input_ids": rows, "lengths": lengths}, PREFILL)
    room = [(0, 0), (0, 0), (0, NEW), (0, 0)]
    caches = {k.replace("present", "past"): np.pad(v, room) for k, v in first.items() if k != "logits"}
    logits, tokens = first["logits"], []
    for at in range(NEW):
        tokens.append(logits.argmax(-1))
        feeds = {"input_ids": tokens[-1][:, None], "lengths": lengths + at, **caches}
        given = exe.run(feeds, DECODE)
        logits = given.pop("logits")
        caches = {k.replace("present", "past"): v for k, v in given.items()}
    np.testing.assert_array_equal(got[:, ids.shape[1] :], np.array(tokens).T)


def test_sampling_streams_and_ends():
    exe, ids = on_host("GPT-2"), prompts(2, 4)[0]
    options = {"do_sample": True, "temperature": 0.8, "top_k": 9, "seed": 7}
    np.testing.assert_array_equal(exe.generate(ids, 6, **options), exe.generate(ids, 6, **options))
    seen = []
    got = exe.generate(torch.from_numpy(ids), 6, stream=seen.append)
    np.testing.assert_array_equal(got[:, 4:].numpy(), np.array(seen).T)
    end = int(got[0, 5])
    ended = exe.generate(ids[:1], 6, eos_token_id=end, pad_token_id=0)
    assert ended.shape[1] <= 6 and ended[0, -1] == end
    with pytest.raises(InputError, match="64 positions"):
        exe.generate(ids, 61)


def test_a_generation_within_another_has_its_own_memory():
    exe, ids = on_host("Llama"), prompts(1, 6)[0]
    want = exe.generate(ids, 8)
    inner = []
    outer = exe.generate(ids, 8, stream=lambda _: inner.append(exe.generate(ids, 8)))
    np.testing.assert_array_equal(outer, want)
    assert all((found == want).all() for found in inner) and len(exe.runners[DECODE].kept) == 1


def test_capacities_come_in_few_sizes():
    for tokens in (*range(1, 3000), 4096, 100_000):
        assert tokens <= bucket(tokens) <= max(tokens + 255, tokens * 1.25 + 1)
        assert tokens <= bucket(tokens, 1000) <= max(1000, tokens)
    assert len({bucket(tokens) for tokens in range(1, 1 << 15)}) < 30


def test_caches_that_do_not_fit(monkeypatch):
    exe, ids = on_host("Llama"), prompts(2, 6)[0]
    exe.generate(ids[:1], 3)

    def full(*arguments):
        raise RuntimeError("Failed to allocate memory\nfor requested buffer")

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", staticmethod(full))
    with pytest.raises(UnsupportedError, match="caches for 2 rows of 64 tokens do not fit.*fewer rows") as caught:
        exe.generate(ids, 5)
    assert "\n" not in str(caught.value) and not exe.runners[DECODE].kept


def test_made_for_another_machine():
    with pytest.raises(UnsupportedError, match="which this machine has not: export it"):
        made("Llama").generate(prompts(1, 3)[0], 4)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("options", ["", "graphs=0"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BLOOM", "Gemma 2", "Mistral"])
def test_on_a_gpu(name, options, tmp_path):
    model = causal_model(name)
    exe = planish.optimize(model, f"ort-cuda:{options}".rstrip(":"), task="causal-lm", budget=OFF)
    assert exe.runners[DECODE].host == set() and exe.runners[DECODE].capture == (options == "")
    exe.export(tmp_path / "lm")
    for found in (exe, planish.load(tmp_path / "lm")):
        for count, longest, seed in ((3, 9, 3), (1, 1, 4), (3, 7, 5)):
            ids, mask = prompts(count, longest, seed)
            want = greedy(model, ids, mask, NEW)
            np.testing.assert_array_equal(found.generate(ids, NEW, attention_mask=mask), want)


@gpu
def test_steps_that_read_caches_on_the_host():
    """Without its lowering a step in float32 runs on the host, and its caches are copied there and back."""
    model = causal_model("Llama")
    exe = planish.optimize(model, "ort-cuda", task="causal-lm", budget=OFF, passes="eliminate-dead-code")
    assert "past_0_key" in exe.runners[DECODE].host and not exe.runners[DECODE].capture
    ids, mask = prompts(3, 9)
    np.testing.assert_array_equal(exe.generate(ids, NEW, attention_mask=mask), greedy(model, ids, mask, NEW))


@gpu
@pytest.mark.parametrize("name, options", [("Llama", ""), ("GPT-2", ",graphs=0")])
def test_in_half_precision_on_a_gpu(name, options):
    exe = planish.optimize(causal_model(name), f"ort-cuda:dtype=float16{options}", task="causal-lm", budget=OFF)
    assert exe.runners[DECODE].host == set() and exe.runners[DECODE].capture == (options == "")
    ids, mask = prompts(3, 9)
    got = exe.generate(ids, NEW, attention_mask=mask)
    assert (got == on_host(name, ",dtype=float16").generate(ids, NEW, attention_mask=mask)).mean() > 0.9
