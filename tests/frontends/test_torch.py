"""Capture of torch modules: names, shapes, the check against eager, and every refusal as one line."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.export import Dim  # noqa: E402

from planish.frontends.torch import capture  # noqa: E402
from planish.ir.errors import InputError, PlanishError, UnsupportedError  # noqa: E402
from planish.ir.program import Program  # noqa: E402
from planish.ir.target import Target  # noqa: E402
from planish.ir.verify import verify  # noqa: E402
from planish.runtime.ort import compile_ort  # noqa: E402

X = torch.arange(12, dtype=torch.float32).reshape(4, 3)


def run(program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return compile_ort(program.main, program.target, optimize=False).run(inputs)


def shapes(specs: list[Any]) -> list[str]:
    return [str(spec) for spec in specs]


class Function(nn.Module):
    """A module from a function of its inputs."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


class Table(nn.Module):
    """Adds the first positions of a table of 16: a sequence of at most 16."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 3))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = ids + self.table[: ids.shape[1]]
        return x if mask is None else x * mask[:, :, None]


class Broken(nn.Module):
    """Reads the size of its example as a plain number, which torch.export can not see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, float] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            return x * 4.0
        return x * float(x.shape[0])


# --- what a capture gives


def test_the_program_equals_the_module_and_verifies() -> None:
    captured = capture(nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.LayerNorm(5)), X, {0: "batch"}, "ort-cpu:threads=1")
    assert shapes(captured.program.inputs()) == ["input: float[batch, 3]"]
    assert shapes(captured.program.outputs()) == ["output_0: float[batch, 5]"]
    assert captured.program.target == Target.parse("ort-cpu:threads=1")
    assert captured.program.provenance["frontend"] == "torch"
    assert list(captured.example) == ["input"]
    verify(captured.program, full=True)
    assert captured.check(run).relative_l2 < 1e-6


def test_without_dynamic_shapes_everything_is_static_and_says_so() -> None:
    captured = capture(nn.Linear(3, 2), X)
    assert shapes(captured.program.inputs()) == ["input: float[4, 3]"]
    assert "every size is the example's" in captured.program.provenance["dynamic_shapes"]


def test_module_scopes_and_source_lines_are_kept_without_this_machines_paths() -> None:
    captured = capture(nn.Sequential(nn.Linear(3, 2)), X)
    node = next(n for n in captured.program.nodes() if n.op_type == "Gemm")
    assert "'0'" in node.metadata_props["pkg.torch.onnx.name_scopes"]
    assert not any("/" in v and v.startswith("/") for n in captured.program.nodes() for v in n.metadata_props.values())


def test_weights_share_memory_with_the_module_and_tied_ones_are_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5000, 16), nn.Linear(16, 5000, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    module = Tied()
    captured = capture(module, torch.zeros(2, 3, dtype=torch.int64), {0: "b"})
    large = [t for t in captured.program.weights.values() if t.nbytes == module.embed.weight.nbytes]
    assert len(large) == 1
    assert large[0].numpy().ctypes.data == module.embed.weight.data_ptr()
    assert captured.check(run).relative_l2 < 1e-6


def test_dict_results_give_their_keys_and_none_is_left_out() -> None:
    module = Function(lambda x: {"a": x + 1, "b": (x * 2, None, [x * 3, x.shape[0]]), "same": x})
    captured = capture(module, X, {0: "n"})
    assert [s.name for s in captured.program.outputs()] == ["a", "b_0", "b_2_0", "b_2_1", "same"]
    assert captured.check(run).relative_l2 == 0


def test_an_output_that_is_an_input_a_weight_or_another_output() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> Any:
            y = x + 1
            return x, y, y, self.w

    captured = capture(Same(), X, {0: "b"})
    assert [s.name for s in captured.program.outputs()] == [f"output_{i}" for i in range(4)]
    assert captured.check(run).relative_l2 == 0


def test_inputs_by_position_by_name_nested_and_as_arrays() -> None:
    class Many(nn.Module):
        def forward(self, d: Any, *xs: torch.Tensor, scale: float = 1.0, **more: torch.Tensor) -> torch.Tensor:
            return d["a"] + xs[0] * scale + more["bias"]

    given = ({"a": X.numpy()}, X)
    named = {"scale": 2.0, "bias": np.ones((4, 1), np.float32)}
    every = {"d": {"a": {0: "b"}}, "xs": [{0: "b"}], "bias": {0: "b"}}
    captured = capture(Many(), given, every, kwargs=named)
    assert shapes(captured.program.inputs()) == ["d_a: float[b, 3]", "xs_0: float[b, 3]", "bias: float[b, 1]"]
    assert captured.check(run).relative_l2 == 0


def test_keyword_order_does_not_matter() -> None:
    class Two(nn.Module):
        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return first - second

    captured = capture(Two(), {"second": X, "first": X + 1}, {0: "b"})
    assert [s.name for s in captured.program.inputs()] == ["first", "second"]
    assert captured.check(run).relative_l2 == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floating_types(dtype: torch.dtype) -> None:
    captured = capture(nn.Linear(3, 3).to(dtype), X.to(dtype), {0: "b"})
    assert captured.check(run).relative_l2 < 4e-3


def test_the_module_and_its_inputs_stay_as_they_were() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            return self.inner(x)

    module, x = Writes().train(), X.clone()
    module.inner.eval()
    captured = capture(module, x, {0: "b"})
    captured.check(run)
    assert torch.equal(x, X)
    assert module.training and not module.inner.training
    assert "forward" not in module.__dict__
    assert not hasattr(module, "_forward") and all(p.grad is None for p in module.parameters())


def test_nothing_is_printed_warned_or_logged(capfd: Any, recwarn: Any, caplog: Any) -> None:
    with caplog.at_level(logging.DEBUG, logger="torch.onnx"):
        capture(nn.Linear(3, 3), X, {0: "b"})
    out, err = capfd.readouterr()
    assert (out, err, len(recwarn)) == ("", "", 0)


def test_warning_and_logging_state_is_restored() -> None:
    logger, level = logging.getLogger("torch"), logging.getLogger("torch").level
    filters = list(warnings.filters)
    capture(nn.Linear(3, 3), X)
    assert logger.level == level and not logger.disabled and list(warnings.filters) == filters


def test_progress_names_the_stages() -> None:
    stages: list[str] = []
    capture(nn.Linear(3, 3), X, progress=stages.append)
    assert stages == ["torch.export", "onnx", "names"]


# --- dynamic shapes


def test_equal_names_are_one_symbol_and_ranges_are_found() -> None:
    names = {0: "batch", 1: "seq"}
    captured = capture(Table(), (torch.randn(2, 8, 3), torch.ones(2, 8)), {"ids": names, "mask": names})
    assert shapes(captured.program.inputs()) == ["ids: float[batch, seq, 3]", "mask: float[batch, seq]"]
    assert captured.program.provenance["dynamic_shapes"] == "batch=1.., seq=1..16"
    assert captured.program.main.graph.inputs[0].metadata_props["planish.range.1"] == "1..16"
    assert captured.check(run).relative_l2 < 1e-6


@pytest.mark.parametrize(
    "spec",
    [
        {"x": {0: Dim("batch")}},
        ({0: "batch"},),
        [{0: "batch"}],
        {0: "batch"},
        {"x": ["batch", None]},
        {"x": {-2: "batch"}},
        {"x": {0: "batch", 1: 3}},
        {"x": {0: "batch", 1: Dim.STATIC}},
    ],
)
def test_forms_of_dynamic_shapes(spec: Any) -> None:
    assert shapes(capture(Function(torch.relu), X, spec).program.inputs()) == ["x: float[batch, 3]"]


def test_unnamed_and_derived_dims() -> None:
    assert shapes(capture(Function(torch.relu), X, {0: Dim.DYNAMIC}).program.inputs()) == ["x: float[x_dim_0, 3]"]
    module = Function(lambda x: x.reshape(x.shape[0], -1, 8).sum(1))
    captured = capture(module, torch.randn(2, 16), {"x": {0: "a", 1: 8 * Dim("w", min=1, max=64)}})
    assert shapes(captured.program.inputs()) == ["x: float[a, 8*w]"]
    assert captured.program.inputs()[0].ranges == (None, (1, 512))
    assert captured.check(run).relative_l2 < 1e-6


def test_an_example_with_a_batch_of_one_stays_dynamic() -> None:
    captured = capture(Function(lambda x: x.reshape(x.shape[0], -1) * 2), torch.randn(1, 2, 3), {0: "batch"})
    assert shapes(captured.program.inputs()) == ["x: float[batch, 2, 3]"]
    assert captured.example["x"].shape == (1, 2, 3)
    assert captured.check(run).relative_l2 == 0


def test_the_second_shape_changes_every_symbol_within_its_range() -> None:
    seen: list[tuple[int, ...]] = []

    def watched(program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(inputs["ids"].shape)
        return run(program, inputs)

    span = {0: Dim("batch", min=2, max=64), 1: Dim("seq", min=8, max=16)}
    captured = capture(Table(), (torch.randn(2, 8, 3),), {"ids": span})
    captured.check(watched)
    assert seen[0] == (2, 8, 3)
    assert seen[1][0] != 2 and seen[1][1] != 8 and 8 <= seen[1][1] <= 16


def test_the_second_shape_keeps_a_left_padded_mask_from_hiding_a_row() -> None:
    class Softmax(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x.masked_fill(mask == 0, float("-inf")), dim=1)

    mask = torch.zeros(2, 9, dtype=torch.int64)
    mask[:, -2:] = 1
    assert capture(Softmax(), (torch.randn(2, 9), mask), {0: "b", 1: "s"}).check(run).relative_l2 < 1e-6


# --- the check


def test_a_constant_that_only_fails_at_the_second_shape_is_named_so() -> None:
    captured = capture(Broken(), X, {0: "batch"})
    with pytest.raises(
        InputError, match=r"at the second shape only .*'output_0'.* off by .* relative L2 \(limit 0.0001"
    ):
        captured.check(run)


def test_a_difference_at_the_example_inputs_names_output_number_limit_and_shape() -> None:
    captured = capture(nn.Linear(3, 3), X)
    with pytest.raises(
        InputError, match=r"input \[4, 3\]\): output 'output_0' .* off by 1 relative L2 \(limit 0.0001\)"
    ):
        captured.check(lambda program, inputs: {"output_0": np.zeros((4, 3), np.float32)})
    with pytest.raises(InputError, match="off by inf relative L2"):
        captured.check(lambda program, inputs: {})


def test_a_runtime_that_fails_is_an_input_error() -> None:
    def fails(program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise RuntimeError("no kernel\nand much more")

    with pytest.raises(InputError, match=r"fails at the example inputs \(input \[4, 3\]\): no kernel\.$"):
        capture(nn.Linear(3, 3), X).check(fails)


def test_a_random_module_is_named_as_not_deterministic() -> None:
    captured = capture(Function(lambda x: nn.functional.dropout(x, 0.5, training=True)), X)
    with pytest.raises(InputError, match="is not deterministic: two eager runs"):
        captured.check(run)


# --- refusals


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return x + 1


class Eigen(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigh(x)[0]


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x + self.count


class Opaque:
    pass


@pytest.mark.parametrize(
    ("module", "inputs", "spec", "message"),
    [
        (
            Branch(),
            X,
            None,
            r"Branch .*data-dependent control flow at .*test_torch.py:\d+, in forward: `if x.sum\(\) > 0:`",
        ),
        (
            nn.Sequential(Eigen()),
            torch.eye(3),
            None,
            r"operator 'aten\._linalg_eigh' in module '0' at .*test_torch.py:\d+",
        ),
        (Counter(), X, None, "Counter changes its buffer 'count' in forward"),
        (Function(lambda x: Opaque()), X, None, "forward returns a Opaque"),
        (Function(lambda x: 1), X, None, "returns no tensor"),
        (Function(lambda x: x.reshape(4, -1) @ torch.ones(3, 3)), X, {0: "b"}, r"'x' dim 0 .* constant \(4\)"),
        (Function(lambda x: x.reshape(4, -1)), X, {"x": {0: Dim("b")}}, r"constant \(4\); torch suggests: b = 4"),
        (Table(), torch.randn(2, 8, 3), {"ids": {1: Dim("s")}}, r"torch suggests: s = Dim\('s', max=16\)"),
        (nn.Linear(4, 3), X, None, "Linear.forward fails on the example inputs.*mat1 and mat2"),
        (
            Function(torch.relu),
            (X, X),
            None,
            r"example_inputs \(Tensor, Tensor\) do not fit Function.forward\(x\): too many",
        ),
        (Function(torch.relu), {"y": X}, None, r"example_inputs \(y\) do not fit .*missing a required argument: 'x'"),
        (Table(), {"ids": X, "msk": X}, None, "Did you mean 'mask'"),
        (Function(torch.relu), None, None, r"example_inputs \(none\) do not fit"),
        (Function(torch.relu), (1.0,), None, "hold no tensor"),
        (Function(torch.relu), object(), None, "holds a object"),
        (Function(torch.relu), torch.empty(2, 3, device="meta"), None, "is on device 'meta'"),
        (nn.Linear(3, 3, device="meta"), X, None, "'weight' is on device 'meta'.*load its weights first"),
        (nn.Linear, X, None, "Linear is a class; give an instance"),
        (3, X, None, "expected a torch.nn.Module, got builtins.int"),
        (Function(torch.relu), X, {"xx": {0: "b"}}, "unknown input in dynamic_shapes 'xx'. Did you mean 'x'"),
        (Function(torch.relu), X, {"x": {5: "b"}}, r"dim 5 does not exist; the input has 2 dims \[4, 3\]"),
        (Function(torch.relu), X, {"x": {0: "a-b"}}, "'a-b' is not a name"),
        (Function(torch.relu), X, {"x": {0: 7}}, "fixed to 7, but the example has 4"),
        (Function(torch.relu), X, {"x": {0: 1.5}}, "1.5 is neither a name"),
        (Function(torch.relu), X, {"x": "batch"}, "is a str; write a dict"),
        (Function(torch.relu), X, {"x": ["b"]}, "has 1 entries, but the input has 2 dims"),
        (Function(torch.relu), X, ({0: "b"}, {0: "b"}), "2 entries, but only 1 inputs"),
        (Function(torch.relu), X, 3, "dynamic_shapes is a int"),
        (Function(torch.relu), X, {"x": {0: Dim("b", min=8, max=9)}}, "has 4, outside of b's range 8 to 9"),
    ],
)
def test_what_can_not_be_captured_is_one_clear_line(module: Any, inputs: Any, spec: Any, message: str) -> None:
    with pytest.raises(PlanishError, match=message) as caught:
        capture(module, inputs, spec)
    assert isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_names_that_are_always_equal_must_be_one() -> None:
    class Add(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    with pytest.raises(InputError, match="'a' and 'b' are always the same size"):
        capture(Add(), (X, X), {"x": {0: "a"}, "y": {0: "b"}})


def test_a_dim_that_the_module_itself_does_not_take() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_exporting() and x.shape[0] != 4:
                raise ValueError("only four")
            return x + 1

    with pytest.raises(
        InputError, match=r"Fixed itself fails at every other size that was tried \(x dim 0 = \d+: only four"
    ):
        capture(Fixed(), X, {0: "b"}).check(run)


def test_a_failed_capture_leaves_the_module_as_it_was() -> None:
    module = Branch().train()
    with pytest.raises(UnsupportedError):
        capture(module, X)
    assert module.training and "forward" not in module.__dict__


def test_a_torchscript_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(nn.Linear(3, 3))
    with pytest.raises(InputError, match="TorchScript"):
        capture(script, X)


@pytest.mark.parametrize(
    ("prelude", "message"),
    [
        ("sys.modules['torch'] = None", "needs torch, which is not installed"),
        ("import torch; torch.__version__ = '2.3.1+cpu'", "torch 2.3.1+cpu is too old"),
    ],
)
def test_without_a_usable_torch_the_error_says_what_to_install(prelude: str, message: str) -> None:
    code = (
        f"import sys; {prelude}\n"
        "from planish.ir.errors import InputError\n"
        "try: import planish.frontends.torch\n"
        "except InputError as error: print(error)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert message in done.stdout and "pip install 'planish[torch]'" in done.stdout, done.stderr
