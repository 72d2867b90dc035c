"""planish::Linear and relatives inside ONNX Runtime: kernel, function body and float64 reference against each other."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from planish.ir.errors import UnsupportedError
from planish.ir.ops import DIALECT
from planish.ir.ops.linear import COMPUTE_TYPES, LINEAR
from planish.ir.printer import parse_model
from planish.ir.target import Target
from planish.runtime.kernels.cpu import detect
from planish.runtime.kernels.library import Library, library_for
from planish.runtime.ort import compile_ort, kernel_library, with_bodies

pytest.importorskip("tvm")
NAMES = sorted(LINEAR)
#: Compiling all of them takes half a minute, so the tests that are about the glue have one or two.
MOST = [pytest.param(name, marks=pytest.mark.slow) if name != "Linear" else name for name in NAMES]
WEIGHTS = ("weight", "gate_weight", "up_weight")


def arrays(name: str, rows: tuple[int, ...], k: int, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"x": (*rows, k), "residual": (*rows, n), "bias": (n,), **dict.fromkeys(WEIGHTS, (k, n))}
    found = {o.name: rng.standard_normal(shapes[o.name]).astype(np.float32) for o in LINEAR[name].schema.inputs}
    found["x"] /= np.float32(max(k, 1) ** 0.5)  # numbers of size 1 before the activation, whatever K
    return found


def model_of(name: str, ranks: dict[str, int], constants: dict[str, np.ndarray], compute_type: int = 1) -> ir.Model:
    """One node over inputs of unknown sizes; `constants` are weights of the model instead."""
    operands = [o.name for o in LINEAR[name].schema.inputs]
    inputs = [f"float[{', '.join('?' * ranks[item])}] {item}" for item in operands if item not in constants]
    rank = ranks.get("x", 2)
    proto = onnx.parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
        g ({", ".join(inputs)}) => (float[{", ".join("?" * rank)}] y)
        {{ [node] y = planish.{name} <compute_type = {compute_type}> ({", ".join(operands)}) }}
        """
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, item) for item, array in constants.items())
    return ir.from_proto(proto)


def ranks_of(inputs: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: array.ndim for name, array in inputs.items()}


@cache
def library(*names: str, compute_type: int = 1) -> Library:
    ranks = dict.fromkeys(("x", "residual", *WEIGHTS), 2) | {"bias": 1}
    try:
        found = library_for([model_of(name, ranks, {}, compute_type) for name in names])
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert found is not None and [kernel.op for kernel in found.kernels] == sorted(names)
    return found


def session(model: ir.Model, kernels: Library | None, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised as well
    if kernels is not None:
        options.register_custom_ops_library(str(kernels.path))
    proto = ir.to_proto(with_bodies(model))
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


SIZES = [((), 5, 7), ((1,), 64, 96), ((3, 0), 4, 9), ((2, 3), 65, 47), ((1, 2, 3), 1, 1), ((2, 1, 2, 3), 33, 101)]


def check(name: str, kernels: Library, compute_type: int = 1, limit: float = 3e-6) -> None:
    """Weights as constants and as inputs, on one thread and on two."""
    rng = np.random.default_rng()
    for rows, k, n in [*SIZES, ((130,), 300, 50), ((2,), 0, 3), ((2,), 3, 0)]:
        inputs = arrays(name, rows, k, n, rng)
        (want,) = DIALECT[name].reference(*inputs.values(), compute_type=compute_type)
        weights = {item: inputs[item] for item in inputs if item in (*WEIGHTS, "bias")}
        for constants in (weights, {}):
            model = model_of(name, ranks_of(inputs), constants, compute_type)
            feeds = {item: array for item, array in inputs.items() if item not in constants}
            (body,) = session(model, None).run(None, feeds)
            one, two = (session(model, kernels, threads).run(None, feeds)[0] for threads in (1, 2))
            assert one.shape == want.shape and one.dtype == np.float32
            np.testing.assert_allclose(one, want, rtol=limit, atol=limit)
            np.testing.assert_allclose(one, body, rtol=2 * limit, atol=2 * limit)
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", MOST)
def test_operator_body_and_reference_agree(name: str) -> None:
    check(name, library("Linear") if name == "Linear" else library(*NAMES))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_operands(name: str) -> None:
    if detect("amx") is None:
        pytest.skip("this processor has no AMX with bfloat16")
    pytest.importorskip("planish.runtime.kernels.amx_gemm")
    check(name, library(*NAMES, compute_type=COMPUTE_TYPES[1]), COMPUTE_TYPES[1], 1e-5)


def test_the_kernel_is_what_runs() -> None:
    """Rounding shows it: with a library that lacks the dtype, the session is refused instead of running the body."""
    inputs = arrays("Linear", (4,), 64, 32, np.random.default_rng())
    model = model_of("Linear", ranks_of(inputs), {}, COMPUTE_TYPES[1])
    session(model, None).run(None, inputs)
    with pytest.raises(Exception, match="Linear: this library has no kernel for compute_type 16"):
        session(model, library("Linear"))


@pytest.mark.parametrize("threads", [1, 2])
def test_two_callers_at_once(threads: int) -> None:
    rng = np.random.default_rng()
    first = arrays("Linear", (40,), 70, 130, rng)
    model = model_of("Linear", ranks_of(first), {item: first.pop(item) for item in ("weight", "bias")})
    runners = [session(model, library("Linear"), threads) for _ in range(2)]
    feeds = [{"x": rng.standard_normal((rows, 70)).astype(np.float32)} for rows in (1, 7, 40, 300)]
    want = [runners[0].run(None, item)[0] for item in feeds]

    def work(number: int) -> bool:
        item = number % len(feeds)
        return np.array_equal(runners[number // 2 % 2].run(None, feeds[item])[0], want[item])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(200)))


@pytest.mark.parametrize("offset", [1, 4, 12, 32])
def test_inputs_and_outputs_that_start_anywhere(offset: int) -> None:
    rng = np.random.default_rng()

    def moved(array: np.ndarray) -> np.ndarray:
        memory = np.zeros(array.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        view: np.ndarray = np.ndarray(array.shape, array.dtype, memory, start)
        view[...] = array
        return view

    inputs = arrays("Linear", (9,), 35, 21, rng)
    (want,) = DIALECT["Linear"].reference(*inputs.values())
    running = session(model_of("Linear", ranks_of(inputs), {}), library("Linear"))
    given, y = {name: moved(array) for name, array in inputs.items()}, moved(np.zeros((9, 21), np.float32))
    binding = running.io_binding()
    for name, array in given.items():
        assert array.ctypes.data % 64 == offset
        binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    running.run_with_iobinding(binding)
    np.testing.assert_allclose(y, want, rtol=3e-6, atol=3e-6)
    assert not y.base[: -y.base.ctypes.data % 64 + offset].any()  # type: ignore[union-attr]
    for name, array in inputs.items():
        np.testing.assert_array_equal(given[name], array)


WRONG = [
    ("Linear", {"x": (2, 9)}, "Linear: x has 9 columns and the weight 8 rows"),
    ("Linear", {"x": ()}, "Linear: x has rank 0"),
    ("Linear", {"x": (1,) * 8 + (8,)}, "a tensor has rank 9; at most 8"),
    ("Linear", {"weight": (8,)}, "the weight has rank 1; it must have 2"),
    ("Linear", {"weight": (8, 4, 1)}, "the weight has rank 3; it must have 2"),
    ("Linear", {"bias": (5,)}, r"Linear: the bias must have shape \(4\)"),
    ("Linear", {"bias": (1, 4)}, r"Linear: the bias must have shape \(4\)"),
    ("LinearAdd", {"residual": (1, 4)}, "LinearAdd: the residual must have the shape of the result"),
    ("LinearAdd", {"residual": (2, 4, 1)}, "LinearAdd: the residual must have the shape of the result"),
    ("LinearSwiGLU", {"up_weight": (8, 5)}, r"the weights have shapes \(8, 4\) and \(8, 5\)"),
    ("LinearSwiGLU", {"gate_weight": (7, 4)}, r"the weights have shapes \(7, 4\) and \(8, 4\)"),
]


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [pytest.param(*case, marks=pytest.mark.slow) if case[0] != "Linear" else case for case in WRONG],
)
def test_wrong_shapes_are_errors(name: str, changed: dict[str, tuple[int, ...]], message: str) -> None:
    kernels = library("Linear") if name == "Linear" else library(*NAMES)
    right = arrays(name, (2,), 8, 4, np.random.default_rng())
    wrong = right | {item: np.ones(shape, np.float32) for item, shape in changed.items()}
    constants: list[str]
    for constants in ([], [item for item in wrong if item in (*WEIGHTS, "bias")]):
        kept = {item: wrong[item] for item in constants}
        with pytest.raises(Exception, match=message):
            running = session(model_of(name, ranks_of(wrong), kept), kernels)
            running.run(None, {item: array for item, array in wrong.items() if item not in kept})
    # Ranks are checked by ONNX Runtime itself, so that the same session goes on only where sizes alone are wrong.
    if ranks_of(wrong) == ranks_of(right):
        running = session(model_of(name, ranks_of(wrong), {}), kernels)
        for _ in range(3):
            with pytest.raises(Exception, match=message):
                running.run(None, wrong)
        (want,) = DIALECT[name].reference(*right.values())
        np.testing.assert_allclose(running.run(None, right)[0], want, rtol=3e-6, atol=3e-6)


def test_one_session_outlives_another() -> None:
    inputs = arrays("Linear", (3,), 20, 30, np.random.default_rng())
    (want,) = DIALECT["Linear"].reference(*inputs.values())
    model = model_of("Linear", ranks_of(inputs), {})
    for _ in range(3):
        first, second = session(model, library("Linear"), 2), session(model, library("Linear"), 2)
        first.run(None, inputs)
        del first
        gc.collect()
        np.testing.assert_allclose(second.run(None, inputs)[0], want, rtol=3e-6, atol=3e-6)
        del second
        gc.collect()


def test_two_entries_have_one_library() -> None:
    rng = np.random.default_rng()
    inputs = arrays("Linear", (6, 1), 24, 40, rng)
    weights = {item: inputs.pop(item) for item in ("weight", "bias")}
    prefill = model_of("Linear", {"x": 3}, weights)
    decode = prefill.clone()
    target = Target.parse("ort-cpu:threads=1,kernels")
    found = kernel_library([prefill, decode], target)
    assert found is library("Linear")
    runners = [compile_ort(model, target, library=found) for model in (prefill, decode)]
    for runner, rows in zip(runners, ((2, 5), (2, 1)), strict=True):
        assert runner.library is found
        x = rng.standard_normal((*rows, 24)).astype(np.float32)
        (want,) = DIALECT["Linear"].reference(x, *weights.values())
        np.testing.assert_allclose(runner.run({"x": x})["y"], want, rtol=1e-5, atol=1e-5)


def test_libraries_are_for_what_is_there() -> None:
    plain = parse_model('<ir_version: 10, opset_import: ["" : 23]>\ng (float[2] x) => (float[2] y) { y = Relu (x) }')
    assert library_for([plain]) is None
    linear: Any = model_of("Linear", {"x": 2, "weight": 2, "bias": 1}, {})
    assert kernel_library([linear], Target.parse("ort-cpu")) is None
    assert library_for([plain, linear]) is library("Linear")
    linear.graph[0].attributes["compute_type"] = ir.AttrInt64("compute_type", 10)
    assert library_for([linear]) is None
