"""Steps over caches on tvm-cuda, which are updated in place: compiled and exported here, run where there is a GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import planish
from planish.ir.errors import UnsupportedError
from planish.ir.program import Program
from planish.ir.target import Target
from planish.runtime.cuda import driver, toolchain
from planish.runtime.executable import Executable
from planish.runtime.relax.needed import needed
from planish.runtime.tvm_cuda import TvmCudaRunner, compile_tvm_cuda
from tests.runtime.models import model

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(toolchain.nvcc() is None, reason="no nvcc")
TARGET = Target.parse("tvm-cuda:sm_80")
gpu = pytest.mark.skipif(not driver.available(), reason="no GPU")
HEADS, GROUPS = 4, 2


def here() -> Target:
    """The GPU at hand, which is quicker to compile for than all."""
    return Target.parse(f"tvm-cuda:sm_{driver.device().arch}")


def step(dtype: str, size: int, options: str = "") -> ir.Model:
    """One GroupQueryAttention over caches, with the length of the longest row as the operator wants it."""
    width, narrow = HEADS * size, GROUPS * size
    caches = ", ".join(f"{dtype}[batch,{GROUPS},capacity,{size}] {{}}_0_{part}" for part in ("key", "value"))
    return model(f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g ({dtype}[batch,1,{width}] q, {dtype}[batch,1,{narrow}] k, {dtype}[batch,1,{narrow}] v,
           {caches.format("past", "past")}, int32[batch] held)
          => ({dtype}[batch,1,{width}] y, {caches.format("present", "present")})
        <int64[1] axes = {{0}}, int32 one = {{1}}> {{
            longest = ReduceMax(held, axes)
            total = Add(longest, one)
            y, present_0_key, present_0_value = com.microsoft.GroupQueryAttention
              <num_heads={HEADS}, kv_num_heads={GROUPS}{options}>(q, k, v, past_0_key, past_0_value, held, total)
        }}""")


def test_what_only_the_operator_of_onnx_runtime_reads_is_left_out() -> None:
    assert [node.op_type for node in needed(step("float", 16).graph)] == ["GroupQueryAttention"]


@pytest.mark.parametrize(
    ("dtype", "size", "has", "has_not"),
    [("float16", 64, "planish_cache_decode", "planish_linear"), ("float", 24, "planish_cache_step", "planish_linear")],
)
def test_a_step_is_compiled_and_exported(tmp_path: Path, dtype: str, size: int, has: str, has_not: str) -> None:
    made = step(dtype, size)
    runner = compile_tvm_cuda(made, TARGET)
    Executable(Program({"main": made}, TARGET), {"main": runner}, pipeline="").export(tmp_path / "artifact")
    library = tmp_path / "artifact" / "kernels" / "main.so"
    exported = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    assert f"__tvm_ffi_{has}" in exported and f"__tvm_ffi_{has_not}" not in exported


def test_what_a_step_can_not_do_is_named() -> None:
    with pytest.raises(UnsupportedError, match="GroupQueryAttention .*a rotation, a bias or scales"):
        compile_tvm_cuda(step("float", 24, ", do_rotary=1"), TARGET)
    read_twice = step("float", 24)
    cache = next(v for v in read_twice.graph.inputs if v.name == "past_0_key")
    read_twice.graph.append(ir.node("Identity", [cache], outputs=[ir.Value(name="again")]))
    read_twice.graph.outputs.append(read_twice.graph[-1].outputs[0])
    with pytest.raises(UnsupportedError, match="'past_0_key' is no input that it alone reads"):
        compile_tvm_cuda(read_twice, TARGET)
    with pytest.raises(UnsupportedError, match="caches that are updated in place are for GPUs"):
        from planish.runtime.tvm import compile_tvm

        compile_tvm(step("float", 24), Target.parse("tvm-cpu"))


def attended(given: dict[str, np.ndarray], size: int, window: int, softcap: float) -> tuple[np.ndarray, ...]:
    """The step in float64: outputs, and the caches behind it."""
    batch = len(given["held"])
    caches = [given[f"past_0_{part}"].astype(np.float64).copy() for part in ("key", "value")]
    q = given["q"].astype(np.float64).reshape(batch, HEADS, size)
    y = np.empty_like(q)
    for row, held in enumerate(given["held"]):
        for cache, new in zip(caches, ("k", "v"), strict=True):
            cache[row, :, held] = given[new][row, 0].reshape(GROUPS, size)
        first = max(0, held + 1 - window) if window > 0 else 0
        for head in range(HEADS):
            keys, values = (cache[row, head // (HEADS // GROUPS), first : held + 1] for cache in caches)
            scores = keys @ q[row, head] * size**-0.5
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            y[row, head] = weights / weights.sum() @ values
    return y.reshape(batch, 1, -1), *caches


@gpu
@pytest.mark.parametrize(
    ("dtype", "size", "options"),
    [
        ("float16", 64, ""),
        ("float16", 128, ""),
        ("float16", 80, ", softcap=3.0"),
        ("float16", 64, ", local_window_size=7"),
        ("float", 24, ""),
        ("float", 256, ", local_window_size=40, softcap=2.0"),
    ],
)
def test_a_step_on_the_gpu(dtype: str, size: int, options: str) -> None:
    kind = np.float16 if dtype == "float16" else np.float32
    window = int(options.split("local_window_size=")[1].split(",")[0]) if "window" in options else -1
    softcap = float(options.split("softcap=")[1]) if "softcap" in options else 0.0
    made = step(dtype, size, options)
    runner = compile_tvm_cuda(made, here())
    rng = np.random.default_rng()
    for held, capacity in (([0], 1), ([0, 5, 64], 65), ([1300, 1, 63, 64, 999], 1301)):
        batch, narrow = len(held), GROUPS * size
        shapes = {"q": (batch, 1, HEADS * size), "k": (batch, 1, narrow), "v": (batch, 1, narrow)}
        shapes |= dict.fromkeys(("past_0_key", "past_0_value"), (batch, GROUPS, capacity, size))
        given = {name: rng.standard_normal(shape).astype(kind) for name, shape in shapes.items()}
        given["held"] = np.array(held, np.int32)
        for row, count in enumerate(held):  # what is behind a row is never read
            for name in ("past_0_key", "past_0_value"):
                given[name][row, :, count:] = np.nan
        before = given["past_0_key"].copy()
        got = runner.run(given)
        np.testing.assert_array_equal(given["past_0_key"], before)  # what is given to run is not written into
        want = attended(given, size, window, softcap)
        tolerance = 4e-3 if kind is np.float16 else 2e-5
        np.testing.assert_allclose(got["y"], want[0], rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(got["present_0_key"], want[1].astype(kind))
        np.testing.assert_array_equal(got["present_0_value"], want[2].astype(kind))


@gpu
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_tokens_are_those_of_torch(kind: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        settings = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(**settings, intermediate_size=96, vocab_size=99, initializer_range=0.3)
        module = transformers.LlamaForCausalLM(config).eval()
    else:
        config = transformers.GPT2Config(
            n_embd=96, n_layer=2, n_head=4, vocab_size=99, bos_token_id=0, eos_token_id=0, initializer_range=0.3
        )
        module = transformers.GPT2LMHeadModel(config).eval()
    exe = planish.optimize(module, here(), task="causal-lm", budget=planish.Budget(gates=False))
    assert all(isinstance(runner, TvmCudaRunner) for runner in exe.runners.values())
    exe.export(tmp_path / "lm")
    ids = np.random.default_rng(0).integers(1, 99, (3, 21))
    mask = np.ones_like(ids)
    mask[0, :17] = mask[2, :6] = 0
    ids[mask == 0] = 0
    want = module.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=24, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    for made in (exe, planish.load(tmp_path / "lm", allow_native=True)):
        for _ in range(2):
            got = made.generate(ids, max_new_tokens=24, attention_mask=mask, eos_token_id=[])
            np.testing.assert_array_equal(got, want.numpy())
