"""Weights that sessions share: on the memory of the host with the CPU provider, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import gc
import weakref

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import planish
from planish.ir.causal_lm import DECODE, PREFILL
from planish.ir.errors import UnsupportedError
from planish.ir.external import tensor_from_buffer
from planish.ir.program import Program
from planish.ir.spec import ElementType, TensorSpec
from planish.ir.target import Target
from planish.passes.testing import program_of
from planish.runtime import ort_artifact, ort_cuda, shared_weights
from planish.runtime.artifact import _checked
from planish.runtime.bench import Bench
from planish.runtime.cuda import driver
from planish.runtime.device_memory import Block
from planish.runtime.dlpack import TYPES, value_at
from planish.runtime.executable import Executable
from planish.runtime.ort import open_session
from planish.runtime.ort_device import DeviceRunner
from planish.runtime.shared_weights import SharedWeights, of_program, why_not
from planish.runtime.tensors import NUMPY
from tests.causal_models import causal_model, greedy, prompts
from tests.runtime.test_ort_device_step import NEW, OFF, gpu, made

AS_THEY_ARE = {"session.disable_prepacking": "1"}  # else kernels of the CPU keep a copy of their own
CPU = ["CPUExecutionProvider"]
KIB = 1024


def on_host(program: Program, shared: SharedWeights | None) -> Executable:
    """The entries on the memory of the host, over the shared weights."""
    runners = {}
    for entry, model in program.entries.items():
        held = None if shared is None else shared.of(entry)
        session, kept, _ = open_session(model, Target(), CPU, True, AS_THEY_ARE, shared=held)
        inputs = [TensorSpec.of(v) for v in model.graph.inputs if v.name not in model.graph.initializers]
        outputs = [TensorSpec.of(v) for v in model.graph.outputs]
        runners[entry] = DeviceRunner(session, inputs, outputs, device="cpu", capture=True, keep_alive=kept)
    return Executable(program, runners, target=program.target)


def program_on_host(name: str, options: str = "") -> tuple[Program, SharedWeights]:
    program = made(name, options).program
    assert program is not None
    return program, of_program(program, device="cpu", least=KIB)


def step_after(first: dict[str, np.ndarray], ids: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of a step behind a prompt of 5 tokens."""
    room = [(0, 0), (0, 0), (0, 3), (0, 0)]
    caches = {k.replace("present", "past"): np.pad(v, room) for k, v in first.items() if k != "logits"}
    return {"input_ids": ids[:, :1], "lengths": np.full(len(ids), 5), **caches}


def erase(shared: SharedWeights) -> None:
    ctypes.memset(shared._there[0].address, 0, shared.nbytes)


# --- which --------------------------------------------------------------------------------------------------------


def test_which_are_shared_and_why_the_others_are_not():
    text = """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1, "planish" : 1]>
    g (float[n, 64] x, int64[n] k, bool c, float[64, 64] given)
    => (float[n, 64] y, float[n, 64] z, float[n, 64] b, float[64, 64] out, float[n, 64] q, float[n, 64] r)
    <float[64, 64] w, float[64, 64] gemm, float[64, 64] table, float[64, 64] left, float[64, 64] added,
     float[64, 64] both, float[8, 8] little, float[64, 64] inner, float[64, 64] out, int8[64, 64] eights,
     uint8[64, 1, 32] codes, float[64, 32] scales, uint8[64, 2, 64] ours> {
      a = MatMul(x, w)  t = Gemm(a, gemm)  e = Gather(table, k)  l = MatMul(left, t)  y = Add(l, added)
      m = MatMul(e, both)  z = Mul(m, both)  s = MatMul(e, little)
      b = If (c) <then_branch = g1 () => (float[n, 64] b1) { b1 = MatMul(a, inner) },
                  else_branch = g2 () => (float[n, 64] b2) { b2 = MatMul(a, inner) }>
      u = Cast<to = 1>(eights)
      q = com.microsoft.MatMulNBits<K = 64, N = 64, bits = 4, block_size = 64>(x, codes, scales)
      r = planish.QuantizedLinear8<block_size = 64>(x, ours, scales)
    }"""
    model = onnx.parser.parse_model(text)
    for value in list(model.graph.value_info):
        kind, dims = value.type.tensor_type.elem_type, [d.dim_value for d in value.type.tensor_type.shape.dim]
        model.graph.initializer.add(name=value.name, data_type=kind, dims=dims)
    want = {
        "w": "", "gemm": "", "table": "", "codes": "",
        "scales": "it is input 2 of QuantizedLinear8 ''",  # which is a function without kernels
        "ours": "it is input 1 of QuantizedLinear8 ''",
        "left": "it is input 0 of MatMul ''",
        "added": "it is input 1 of Add ''",
        "both": "it is input 1 of Mul ''",
        "little": "it has less than 1024 bytes",
        "inner": "a subgraph reads it",
        "out": "it is an input or output of the entry",
        "eights": "elements of type 3 do not cross",
    }  # fmt: skip
    assert why_not(model, least=KIB) == want
    assert why_not(model, least=KIB, kernels=True) == want | {"scales": "", "ours": ""}
    assert set(why_not(model).values()) >= {f"it has less than {1 << 20} bytes"}
    assert why_not(model)["w"].startswith("it has less than")


def test_what_one_entry_has_is_its_own():
    program, shared = program_on_host("Llama")
    for entry, model in program.entries.items():
        large = {v.name for v in model.graph.initializers.values() if v.const_value.nbytes > KIB and v.uses()}
        assert set(shared.entries[entry]) == large  # all of a decoder's weights are of products and tables
    assert sum(t.nbytes for t in program.weights.values() if t.nbytes > KIB) <= shared.nbytes
    alone = of_program(Program({DECODE: program.entries[DECODE]}), device="cpu", least=KIB)
    assert alone.of(DECODE) is None and alone.nbytes == 0
    clone = program.clone()
    value = next(v for v in clone.entries[DECODE].graph.initializers.values() if v.const_value.nbytes > KIB)
    value.const_value = tensor_from_buffer(
        np.zeros(value.const_value.nbytes, np.uint8), value.const_value.dtype, tuple(value.shape), value.name
    )
    less = of_program(clone, device="cpu", least=KIB)
    assert [set(shared.entries[e]) - set(less.entries[e]) for e in (PREFILL, DECODE)] == [{value.name}] * 2


def test_where_it_is_of_no_use():
    two = made("Llama").program
    one = program_of('<ir_version: 10, opset_import: ["" : 23]> g (float[4] x) => (float[4] y) { y = Exp(x) }')
    assert shared_weights.for_target(two, Target.parse("ort-cuda")) is not None
    limits = [(two, f"ort-cuda:{limit}") for limit in ("memory=4GiB", "cuda.gpu_mem_limit=4000000000")]
    for program, target in ((one, "ort-cuda"), (two, "ort-cpu"), (two, "tvm-cuda"), *limits):
        assert shared_weights.for_target(program, Target.parse(target)) is None
    assert all(runner.offline for runner in made("Llama").runners.values())  # nothing was put anywhere for these


# --- numbers and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", [
    ("Llama", ""), ("GPT-2", ""), ("Llama", ",dtype=float16"), ("GPT-2", ",dtype=float16"),
])  # fmt: skip
def test_numbers_are_the_same(name, options):
    program, shared = program_on_host(name, options)
    assert shared.of(PREFILL) is not None and shared.of(DECODE) is not None
    ids, mask = prompts(3, 9)
    own, common = on_host(program, None), on_host(program, shared)
    got = common.generate(ids, NEW, attention_mask=mask)
    np.testing.assert_array_equal(got, own.generate(ids, NEW, attention_mask=mask))
    if not options:
        np.testing.assert_array_equal(got, greedy(causal_model(name), ids, mask, NEW))
    feeds = {"input_ids": ids, "lengths": np.full(3, 9)}
    for first, second in zip(common.run(feeds, PREFILL).values(), own.run(feeds, PREFILL).values(), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_sessions_read_the_same_memory(name):
    """Weights of Llama are transposed views here, which sessions are given with a Transpose."""
    program, shared = program_on_host(name)
    exe = on_host(program, shared)
    addresses = [{w.data_ptr() for w in shared.values(entry).values()} for entry in (PREFILL, DECODE)]
    assert addresses[0] == addresses[1] and all(a % 256 == 0 for a in addresses[0])
    ids, mask = prompts(2, 5)
    before = exe.generate(ids, 4, attention_mask=mask)
    first = exe.run({"input_ids": ids, "lengths": np.array([5, 5])}, PREFILL)
    step = step_after(first, ids)
    assert first["logits"].any() and exe.run(step, DECODE)["logits"].any()
    erase(shared)
    assert not exe.run({"input_ids": ids, "lengths": np.array([5, 5])}, PREFILL)["logits"].any()
    assert not exe.run(step, DECODE)["logits"].any()
    again = on_host(program, of_program(program, device="cpu", least=KIB))
    np.testing.assert_array_equal(again.generate(ids, 4, attention_mask=mask), before)


def test_weights_go_with_the_last_session():
    program, shared = program_on_host("Llama")
    exe = on_host(program, shared)
    block = weakref.ref(shared._there[0])
    runner = exe.runners[DECODE]
    ids, mask = prompts(2, 5)
    exe.generate(ids, 4, attention_mask=mask)
    del exe, shared
    gc.collect()
    assert block() is not None
    del runner
    gc.collect()
    assert block() is None


def test_a_weight_that_was_replaced_is_not_shared():
    program, shared = program_on_host("Llama")
    own, changed = on_host(program, None), program.clone()
    on_host(program, shared)
    values = changed.entries[DECODE].graph.initializers
    name = next(name for name, weight in shared.entries[DECODE].items() if "embed" in name)
    tensor = values[name].const_value
    values[name].const_value = ir.Tensor(tensor.numpy() * 0, name=name)
    feeds = {"input_ids": prompts(2, 5)[0], "lengths": np.array([5, 5])}
    step = step_after(own.run(feeds, PREFILL), feeds["input_ids"])
    want, got = (on_host(changed, given).run(step, DECODE)["logits"] for given in (None, shared))
    np.testing.assert_array_equal(got, want)
    assert (got != own.run(step, DECODE)["logits"]).any()


def test_memory_of_a_gpu_is_taken_and_given_back(monkeypatch):
    """What the driver is asked for, in which context."""
    calls = []

    class Driver:
        def cuMemAlloc_v2(self, address, size):
            address._obj.value = 4096
            calls.append(("alloc", size.value))
            return 0

        def cuMemFree_v2(self, address):
            calls.append(("free", address.value))
            return 0

        def cuMemcpyHtoD_v2(self, address, origin, size):
            calls.append(("copy", address.value, size.value))
            return 0

        def __getattr__(self, name):
            return lambda *_: calls.append(name) or 0

    monkeypatch.setattr(driver, "library", Driver)
    monkeypatch.setattr(driver, "_primary", lambda index: ctypes.c_void_p(index))
    monkeypatch.setattr(driver, "enter", lambda index: None)
    block = Block(1000, "cuda", 1, "a test")
    block.write(256, np.zeros(4, np.float32))
    del block
    gc.collect()
    within = lambda *inner: ["cuCtxPushCurrent_v2", *inner, "cuCtxPopCurrent_v2"]  # noqa: E731
    assert calls == [
        *within(("alloc", 1000)), *within(("copy", 4352, 16), "cuStreamSynchronize"), *within(("free", 4096)),
    ]  # fmt: skip


def test_nothing_is_copied_before_a_session_asks(monkeypatch):
    program, shared = program_on_host("Llama")
    assert shared._there is None

    def full(*arguments):
        raise UnsupportedError(
            "87040 bytes of weights that entries share on GPU 0: the CUDA driver says 'out of memory'."
        )

    monkeypatch.setattr(shared_weights, "Block", full)
    with pytest.raises(UnsupportedError, match="weights that entries share"):
        on_host(program, shared)
    monkeypatch.undo()
    assert on_host(program, shared).runners  # one that failed can be tried again


@pytest.mark.parametrize("element", TYPES)
def test_values_over_memory_of_ours(element):
    dtype = NUMPY[element]
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    block = Block(array.nbytes, "cpu", 0, "a test")
    block.write(0, array)
    value = value_at(block.address, element, (2, 3, 4), "cpu", 0)
    assert value.data_ptr() == block.address and value.shape() == [2, 3, 4] and value.element_type() == element
    if element != ElementType.BFLOAT16:
        np.testing.assert_array_equal(value.numpy(), array)
    with pytest.raises(ValueError, match="bytes at"):
        block.write(1, array)


# --- who gives them ---------------------------------------------------------------------------------------------------


def test_entries_of_one_program_are_compiled_with_the_same(monkeypatch):
    program = made("Llama").program  # which compiles entries too, if no test was before this one
    given = []
    compiled = ort_cuda.compile_ort_cuda

    def recorded(*arguments, shared, **options):
        given.append(shared)
        return compiled(*arguments, shared=shared, **options)

    monkeypatch.setattr(ort_cuda, "compile_ort_cuda", recorded)
    monkeypatch.setattr(shared_weights.of_program, "__kwdefaults__", {**of_program.__kwdefaults__, "least": KIB})
    bench = Bench(program.target, None)
    for entry in program.entries:
        bench.runner(program, entry)
    assert [held.entry for held in given] == list(program.entries) and given[0].shared is given[1].shared
    bench.forget(program)
    bench.runner(program, DECODE)
    assert given[2].shared is not given[0].shared


@pytest.mark.parametrize("options", ["", ",dtype=float16"])
def test_entries_of_an_artifact(options, tmp_path):
    exe = made("Llama", options)
    exe.export(tmp_path / "lm")
    folder, manifest, contents = _checked(tmp_path / "lm")
    models = {name: contents[entry.file] for name, entry in manifest.entries.items()}
    shared = ort_artifact.shared_weights(folder, manifest, models, device="cpu", least=KIB)
    want = program_on_host("Llama", options)[1]
    assert {e: set(w) for e, w in shared.entries.items()} == {e: set(w) for e, w in want.entries.items()}
    assert shared.nbytes == want.nbytes
    target = Target.parse("ort-cpu:session.disable_prepacking=1")
    runners = {
        name: ort_artifact.runner(folder, manifest, entry, models[name], target, {}, shared.of(name))
        for name, entry in manifest.entries.items()
    }
    ids = prompts(2, 5)[0]
    feeds = {"input_ids": ids, "lengths": np.array([5, 5])}
    loaded = runners[PREFILL].run(feeds)
    np.testing.assert_array_equal(loaded["logits"], on_host(exe.program, None).run(feeds, PREFILL)["logits"])
    step = step_after(loaded, ids)
    before = runners[DECODE].run(step)["logits"]
    erase(shared)
    assert not runners[PREFILL].run(feeds)["logits"].any()
    after = runners[DECODE].run(step)["logits"]
    # In float16 the table alone is read where it is: the CPU provider widens weights of products.
    assert not after.any() if not options else (after != before).any()


def test_loading_for_a_gpu_gives_each_entry_the_same(monkeypatch, tmp_path):
    made("Llama").export(tmp_path / "lm")
    folder, manifest, contents = _checked(tmp_path / "lm")
    given = []
    monkeypatch.setattr(ort_artifact, "runner", lambda *arguments: given.append(arguments[-1]))
    monkeypatch.setattr(shared_weights, "LEAST", KIB)
    for target, count in (("ort-cuda", 1), ("ort-cuda:memory=4GiB", 0), ("ort-cpu", 0)):
        given.clear()
        ort_artifact.runners(folder, manifest, contents, Target.parse(target), {})
        assert len({id(held.shared) for held in given if held is not None}) == count and len(given) == 2


def test_lengths_that_are_not_the_weights_are_left_to_onnx_runtime(tmp_path):
    made("Llama").export(tmp_path / "lm")
    folder, manifest, contents = _checked(tmp_path / "lm")
    models = {}
    for name, entry in manifest.entries.items():
        proto = onnx.ModelProto.FromString(contents[entry.file])
        tensor = next(t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
        next(item for item in tensor.external_data if item.key == "length").value = "64"
        models[name] = proto.SerializeToString()
    shared = ort_artifact.shared_weights(folder, manifest, models, device="cpu", least=KIB)
    assert tensor.name not in shared.entries[DECODE] and shared.entries[DECODE]


# --- on a GPU --------------------------------------------------------------------------------------------------------


def free() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def decoder():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=16000, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


@gpu
@pytest.mark.parametrize("options", ["", ":dtype=float16", ":dtype=float16,graphs=0", ":dtype=float16,kernels"])
def test_a_decoder_is_on_the_gpu_once(options, monkeypatch, tmp_path):
    """A session takes memory beside its weights: what is taken is compared with what is without sharing."""
    model, ids = decoder(), prompts(2, 9)[0]
    used, tokens = {}, {}
    for kind in ("warm", "own", "shared", "loaded"):
        wanted = shared_weights.wanted if kind in ("shared", "loaded") else lambda *_: False
        with monkeypatch.context() as patch:
            patch.setattr(shared_weights, "wanted", wanted)
            before = free()
            if kind == "loaded":
                exe = planish.load(tmp_path / "lm", allow_native=True)
            else:
                exe = planish.optimize(model, f"ort-cuda{options}", task="causal-lm", budget=OFF)
            used[kind] = before - free()
            tokens[kind] = exe.generate(ids, 8)
            if kind == "shared":
                weights = exe.program.weight_bytes()
                exe.export(tmp_path / "lm")
            held = free()
            del exe
            if kind in ("shared", "loaded"):
                assert free() - held > 0.9 * weights
    assert weights > 60 << 20
    for kind in ("shared", "loaded"):
        assert used[kind] < used["own"] - 0.75 * weights, used
        np.testing.assert_array_equal(tokens[kind], tokens["own"])


@gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_small_decoders_on_a_gpu(name, dtype, monkeypatch):
    """With everything shared that can be, tokens are those of sessions with weights of their own."""
    ids, mask = prompts(3, 9)
    options = "" if dtype == "float32" else f":dtype={dtype}"
    found = []
    for least in (KIB, 1 << 40):
        defaults = {**of_program.__kwdefaults__, "least": least}
        with monkeypatch.context() as patch:
            patch.setattr(of_program, "__kwdefaults__", defaults)
            exe = planish.optimize(causal_model(name), f"ort-cuda{options}", task="causal-lm", budget=OFF)
        found.append(exe.generate(ids, NEW, attention_mask=mask))
    np.testing.assert_array_equal(*found)


@gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_in_few_bits_on_a_gpu(bits, monkeypatch):
    ids = prompts(1, 9)[0]
    options = {"task": "causal-lm", "approximate": f"quantize-weights{{bits={bits}}}", "budget": OFF}
    found = []
    for wanted in (shared_weights.wanted, lambda *_: False):
        with monkeypatch.context() as patch:
            patch.setattr(shared_weights, "wanted", wanted)
            exe = planish.optimize(decoder(), "ort-cuda:dtype=float16,kernels", **options)
        found.append(exe.generate(ids, 8))
    np.testing.assert_array_equal(*found)


@gpu
def test_memory_comes_from_the_driver_and_goes_back():
    before = free()
    block = Block(64 << 20, "cuda", 0, "a test")
    block.write(1 << 20, np.arange(1 << 20, dtype=np.float32))
    value = value_at(block.address + (1 << 20), ElementType.FLOAT, (1024, 1024), "cuda", 0)
    assert value.device_name() == "cuda" and before - free() >= 64 << 20
    np.testing.assert_array_equal(value.numpy().reshape(-1), np.arange(1 << 20, dtype=np.float32))
    del value, block
    assert before - free() < 8 << 20
    with pytest.raises(UnsupportedError, match="bytes of a test on GPU 0.*out of memory") as caught:
        Block(1 << 50, "cuda", 0, "a test")
    assert "\n" not in str(caught.value)


@gpu
def test_a_node_on_the_host_takes_the_bytes():
    """A weight that is on another device than its node is not taken."""
    block = Block(256 * 256 * 4, "cuda", 0, "a test")
    weight = np.random.default_rng(0).random((256, 256), np.float32)
    block.write(0, weight)
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[n, 256] x) => (float[n, 256] y) { y = MatMul(x, w) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    settings = ort.SessionOptions()
    value = value_at(block.address, ElementType.FLOAT, (256, 256), "cuda", 0)
    settings.add_initializer("w", value)  # which keeps no reference
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=CPU)
    x = np.random.default_rng(1).random((3, 256), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight, rtol=1e-5)
