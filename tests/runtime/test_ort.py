from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.errors import InputError, UnsupportedError
from planish.ir.program import Program
from planish.ir.target import Target
from planish.runtime import flush
from planish.runtime.ort import compile_ort
from planish.runtime.ort_options import APART, session_options
from tests.runtime.models import ONE_THREAD, identity, model, two_layers

TARGET = Target.parse(ONE_THREAD)


def inputs(**changed: Any) -> dict[str, Any]:
    good = {"x": np.ones((3, 16), np.float32), "ids": np.zeros((3, 5), np.int64)}
    return {name: value for name, value in (good | changed).items() if value is not None}


def test_runs_like_numpy() -> None:
    program = two_layers()
    weights = {name: tensor.numpy() for name, tensor in program.weights.items()}
    assert program.calibration is not None
    batch = program.calibration.batches[0]
    for optimize in (True, False):
        got = compile_ort(program.main, TARGET, optimize=optimize).run(batch)
        assert list(got) == ["y", "e"]
        np.testing.assert_allclose(got["y"], np.maximum(batch["x"] @ weights["w1"], 0) @ weights["w2"], rtol=1e-4)
        np.testing.assert_array_equal(got["e"], weights["table"][batch["ids"]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"idz": np.zeros(1)}, "no input is named 'idz'. Did you mean 'ids'?"),
        ({"ids": None}, "input 'ids' is missing. Inputs: x: float[b, 16]; ids: int64[b, s]"),
        ({"ids": np.zeros((3, 5), np.int32)}, "input 'ids' is int32, expected ids: int64[b, s]; convert it"),
        ({"x": np.ones((3, 16))}, "input 'x' is float64, expected x: float[b, 16]; convert it"),
        ({"x": np.ones((3, 4, 4), "f")}, "input 'x' has 3 dimensions [3, 4, 4], expected x: float[b, 16]"),
        ({"x": np.ones((3, 15), "f")}, "input 'x' has size 15 in dimension 1, expected 16"),
        ({"x": np.ones((2, 16), "f")}, "input 'ids' has b=3 in dimension 0, but 'x' has b=2"),
        ({"x": [[1.0] * 16] * 3}, "input 'x' is of type list, expected x: float[b, 16]; give a numpy array"),
        ({"ids": np.full((3, 5), 100)}, "node '' (Gather) failed on these inputs"),
    ],
)
def test_wrong_inputs_are_one_clear_line(changed: dict[str, Any], message: str) -> None:
    runner = compile_ort(two_layers().main, TARGET)
    runner.run(inputs())
    with pytest.raises(InputError) as caught:
        runner.run(inputs(**changed))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    runner.run(inputs())


def test_inputs_and_outputs_are_not_copied() -> None:
    """A megabyte passes through in a fraction of what two copies of it would leave behind."""
    runner = identity("float")
    x = np.ones(1 << 18, np.float32)
    y = runner.run({"x": x})["y"]
    assert not y.flags.owndata  # memory of ONNX Runtime, kept alive by the array
    del runner
    gc.collect()
    assert y.sum() == x.size


def test_inputs_that_are_not_contiguous() -> None:
    x = np.arange(48, dtype=np.float32).reshape(16, 3).T
    got = compile_ort(two_layers().main, TARGET).run(inputs(x=x))
    want = compile_ort(two_layers().main, TARGET).run(inputs(x=np.ascontiguousarray(x)))
    np.testing.assert_array_equal(got["y"], want["y"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes_that_numpy_lacks(dtype: str) -> None:
    kind = {"bfloat16": "bfloat16", "float8_e4m3fn": "float8e4m3fn", "float8_e5m2": "float8e5m2"}[dtype]
    runner = identity(kind)
    x = np.arange(6).astype(getattr(ml_dtypes, dtype))
    y = runner.run({"x": x})["y"]
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y.astype(np.float32), x.astype(np.float32))
    assert runner.run({"x": x[:0]})["y"].shape == (0,)


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
@pytest.mark.parametrize("count", [0, 1, 6, 7])
def test_elements_below_one_byte(dtype: str, count: int) -> None:
    text = f"""<ir_version: 11, opset_import: ["" : 23]>
    g ({dtype}[n] x) => (float[n] f, {dtype}[n] y) {{
      f = Cast <to = 1> (x)
      y = Cast <to = {22 if dtype == "int4" else 21}> (f)
    }}"""
    x = (np.arange(count) % 15 - (7 if dtype == "int4" else 0)).astype(getattr(ml_dtypes, dtype))
    got = compile_ort(model(text), TARGET).run({"x": x})
    assert got["y"].dtype == x.dtype
    np.testing.assert_array_equal(got["f"], x.astype(np.float32))
    np.testing.assert_array_equal(got["y"].astype(np.float32), x.astype(np.float32))


def test_text_and_scalars() -> None:
    x = np.array(["a", "bc"], dtype=object)
    assert list(identity("string").run({"x": x})["y"]) == ["a", "bc"]
    assert identity("int64", "").run({"x": np.array(3)})["y"] == 3


def test_torch_in_torch_out_shares_memory() -> None:
    torch = pytest.importorskip("torch")
    runner = compile_ort(two_layers().main, TARGET)
    tensors = {name: torch.from_numpy(value) for name, value in inputs().items()}
    got = runner.run(tensors)
    assert all(isinstance(value, torch.Tensor) for value in got.values())
    np.testing.assert_array_equal(got["y"].numpy(), runner.run(inputs())["y"])
    assert isinstance(runner.run(tensors | {"ids": inputs()["ids"]})["y"], torch.Tensor)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        kind = "bfloat16" if dtype == torch.bfloat16 else "float8e4m3fn"
        x = torch.arange(5).to(dtype)
        y = identity(kind).run({"x": x})["y"]
        assert y.dtype == dtype
        assert torch.equal(y.float(), x.float())
    with pytest.raises(InputError, match="input 'ids' is int32, expected ids: int64"):
        runner.run(tensors | {"ids": tensors["ids"].int()})
    with pytest.raises(InputError, match="on device 'meta'.*call .cpu"):
        runner.run(tensors | {"x": torch.ones(3, 16, device="meta")})


def test_unsupported_node_is_named_with_its_dtypes() -> None:
    text = '<ir_version: 11, opset_import: ["" : 23]> g (bfloat16[n, n] x) => (bfloat16[n, n] y) { y = MatMul(x, x) }'
    broken = model(text)
    broken.graph[0].name = "layer/matmul"
    with pytest.raises(UnsupportedError) as caught:
        compile_ort(broken, TARGET)
    text = str(caught.value)
    assert "no CPU kernel for MatMul (opset 13) at node 'layer/matmul' with inputs bfloat16, bfloat16" in text


def test_a_model_that_is_refused_is_one_line() -> None:
    text = '<ir_version: 11, opset_import: ["" : 23]> g (float[2] x, float[3] z) => (float[2] y) { y = Add(x, z) }'
    with pytest.raises(UnsupportedError, match="does not take the model") as caught:
        compile_ort(model(text), TARGET)
    assert "\n" not in str(caught.value)


def test_options_reach_the_session() -> None:
    program = two_layers()
    target = Target.parse("ort-cpu:threads=2,session.intra_op.allow_spinning=0,session.graph_optimization_level=basic")
    options = compile_ort(program.main, target).session.get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"
    assert "BASIC" in str(options.graph_optimization_level)
    options = compile_ort(program.main, target, options={"session.enable_cpu_mem_arena": "0"}).session
    assert not options.get_session_options().enable_cpu_mem_arena


def test_weights_on_a_gpu_are_not_in_an_arena_that_doubles():
    def apart(target):
        try:
            return session_options(Target.parse(target), None, True).get_session_config_entry(APART) == "1"
        except RuntimeError:  # it was not set
            return False

    assert apart("ort-cuda") and apart("ort-cuda:dtype=float16,kernels") and not apart("ort-cpu")
    assert not apart("ort-cuda:memory=1GiB") and not apart("ort-cuda:cuda.gpu_mem_limit=1000000000")
    assert not apart("ort-cuda:session.use_device_allocator_for_initializers=0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"session.intra_op.allow_spining": "0"}, "Did you mean 'session.intra_op.allow_spinning'?"),
        ({"session.graph_optimization_level": "fast"}, "must be one of disable, basic, extended, all"),
        ({"session.intra_op_num_threads": "-1"}, "must be a number from 0 to 9999"),
    ],
)
def test_options_that_are_wrong(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match="session option") as caught:
        compile_ort(two_layers().main, TARGET, options=options)
    assert message in str(caught.value)


def test_weights_of_every_form_arrive() -> None:
    """Transposed views, large and small, shared, of four bits; with and without ONNX Runtime's optimizer."""
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((32, 40)).astype(np.float32)
    packed = rng.integers(-8, 8, (8, 300)).astype(ml_dtypes.int4)
    text = """<ir_version: 11, opset_import: ["" : 21]>
    g (float[n, 40] x) => (float[n, 32] y, float[n, 32] z, float[8, 300] q) {
      y = MatMul(x, w)
      z = MatMul(x, v)
      q = Cast <to = 1> (p)
    }"""
    built = model(text, {"w": stored.T, "v": stored.T})
    view = ir.Tensor(stored.T, name="w")
    for name in ("w", "v"):
        built.graph.initializers[name].const_value = view
    value = ir.Value(name="p", const_value=ir.Tensor(packed, dtype=ir.DataType.INT4, name="p"))
    built.graph.initializers["p"] = value
    built.graph[2].replace_input_with(0, value)
    x = rng.standard_normal((2, 40)).astype(np.float32)
    before = len(built.graph)
    for optimize in (True, False):
        got = compile_ort(built, TARGET, optimize=optimize).run({"x": x})
        np.testing.assert_allclose(got["y"], x @ stored.T, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(got["y"], got["z"])
        np.testing.assert_array_equal(got["q"], packed.astype(np.float32))
    assert len(built.graph) == before
    assert built.graph.initializers["w"].const_value is view


def test_dialect_ops_get_their_bodies() -> None:
    text = """<ir_version: 11, opset_import: ["" : 23, "planish" : 1]>
    g (float[n, 8] gate, float[n, 8] up) => (float[n, 8] y) { y = planish.SwiGLU(gate, up) }"""
    built = model(text)
    gate, up = (np.random.default_rng(0).standard_normal((2, 4, 8))).astype(np.float32)
    got = compile_ort(built, TARGET).run({"gate": gate, "up": up})["y"]
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=1e-5)
    assert not built.functions


def test_denormals_are_zero_in_runs_and_nowhere_else() -> None:
    if not flush.SUPPORTED:
        pytest.skip("no access to the floating-point environment here")
    text = '<ir_version: 11, opset_import: ["" : 23]> g (float[n] x, float[n] z) => (float[n] y) { y = Mul(x, z) }'
    on = compile_ort(model(text), TARGET)
    off = compile_ort(model(text), TARGET, options={"session.set_denormal_as_zero": "0"})
    feeds = {"x": np.full(8, 1e-39, np.float32), "z": np.ones(8, np.float32)}
    assert not flush.is_flushing()

    def zeros(runner: Any) -> int:
        return int((runner.run(feeds)["y"] == 0).sum())

    found = [(zeros(on), zeros(off))]
    thread = threading.Thread(target=lambda: found.append((zeros(on), zeros(off))))
    thread.start()
    thread.join()
    assert found == [(8, 0), (8, 0)]
    with pytest.raises(InputError):
        on.run({"x": feeds["x"]})
    assert not flush.is_flushing()


def test_denormals_when_another_library_made_the_first_session() -> None:
    """In a fresh process: a session without the option first, then ours with it, and the other way round."""
    if not flush.SUPPORTED:
        pytest.skip("no access to the floating-point environment here")
    code = """
import sys, numpy as np, onnxruntime as ort
from planish.ir.target import Target
from planish.runtime import flush
from planish.runtime.ort import compile_ort
from tests.runtime.models import model
m = model('<ir_version: 11, opset_import: ["" : 23]> g (float[n] x) => (float[n] y) { y = Mul(x, x) }')
from planish.ir.serialize import to_proto_without_weights
raw = to_proto_without_weights(m)[0].SerializeToString()
if sys.argv[1] == 'theirs':
    other = ort.InferenceSession(raw, providers=['CPUExecutionProvider'])
ours = compile_ort(m, Target.parse('ort-cpu:threads=1'))
assert not flush.is_flushing()
x = np.full(4, 1e-20, np.float32)
assert (ours.run({'x': x})['y'] == 0).all()
assert not flush.is_flushing()
"""
    for first in ("ours", "theirs"):
        subprocess.run([sys.executable, "-c", code, first], check=True, cwd=Path(__file__).parents[2])


def test_an_attention_kernel_refuses_an_empty_batch_in_plain_words() -> None:
    """The limit that docs/targets.md states; when this fails, the kernel takes empty batches, and the page is wrong."""
    text = """<ir_version: 11, opset_import: ["" : 23]>
    g (float[b, h, s, 8] q) => (float[b, h, s, 8] y, int64[4] n) { y = Attention(q, q, q)  n = Shape(y) }"""
    runner = compile_ort(model(text), Target.parse(ONE_THREAD))
    assert runner.run({"q": np.ones((1, 2, 3, 8), np.float32)})["y"].shape == (1, 2, 3, 8)
    with pytest.raises(InputError) as caught:
        runner.run({"q": np.ones((0, 2, 3, 8), np.float32)})
    assert str(caught.value).endswith("parameters.batch_size > 0 was false. Batch size must be greater than 0")
    assert len(str(caught.value)) < 160


def test_flushing_is_turned_off_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) <float f = {1}> { y = Mul(x, f) }'
    runner = compile_ort(model(text), Target.parse("ort-cpu:session.set_denormal_as_zero=0"))
    assert (runner.run({"x": np.full(4, 1e-39, np.float32)})["y"] > 0).all()
    assert capfd.readouterr() == ("", "")


def test_checked_shapes_do_not_grow_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.runtime.checks._REMEMBERED", 3)
    runner = identity("float")
    for size in range(1, 8):
        assert runner.run({"x": np.zeros(size, np.float32)})["y"].shape == (size,)
    assert len(runner._checks._checked) == 3


def test_prepared_runs_without_arguments() -> None:
    program = two_layers()
    runner = compile_ort(program.main, TARGET)
    np.testing.assert_array_equal(runner.prepared(inputs())()["y"], runner.run(inputs())["y"])
    with pytest.raises(InputError):
        runner.prepared(inputs(ids=None))


def test_other_targets_are_refused() -> None:
    program = Program.single(model('<ir_version: 9, opset_import: ["" : 20]> g (float x) => (float y) { y = Abs(x) }'))
    with pytest.raises(UnsupportedError, match="use 'ort-cpu'"):
        compile_ort(program.main, Target.parse("ort-cuda"))


def test_a_model_that_the_runtimes_own_fusions_break_runs_and_says_so() -> None:
    # Two Gelus, exact and approximate, that share the product with one half.
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[B, 4] x) => (float[B, 4] y)
    <float half = {0.5}, float one = {1}, float root = {1.4142135}, float three = {3}, float c = {0.044715},
     float rate = {0.7978845}>
    {
      h = Mul(x, half)
      d = Div(x, root) e = Erf(d) e1 = Add(e, one) a = Mul(h, e1)
      p = Pow(x, three) q = Mul(p, c) s = Add(x, q) r = Mul(s, rate) t = Tanh(r) t1 = Add(t, one) b = Mul(h, t1)
      y = Add(a, b)
    }"""
    runner = compile_ort(model(text), TARGET)
    plain = compile_ort(model(text), TARGET, optimize=False)
    x = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_allclose(runner.run({"x": x})["y"], plain.run({"x": x})["y"], rtol=1e-5, atol=1e-6)
    assert runner.notes == ["ONNX Runtime's own fusions break this model; it runs with its basic optimizations only."]
    assert not plain.notes
