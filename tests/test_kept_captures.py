"""What tests share: a capture is that of an equal module, and never of one that differs or was changed meanwhile."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from planish.runtime.ort import compile_ort
from tests import kept_captures

torch = pytest.importorskip("torch")

from planish.frontends.torch import Captured, capture  # noqa: E402


class Scaled(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, factor: float = 2.0, start: float = 0.0) -> None:
        super().__init__()
        self.factor = factor
        self.line = torch.nn.Linear(3, 3)
        with torch.no_grad():
            self.line.weight.copy_(torch.arange(9.0).reshape(3, 3) + start)
            self.line.bias.fill_(1.0)

    def forward(self, x: Any) -> Any:
        return self.line(x) * self.factor


X = torch.ones(2, 3)


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    kept_captures.use(True)
    assert sys.modules["planish.frontends.torch"].capture is kept_captures._capture
    found, original = [0], kept_captures._original

    def count(*args: Any, **kwargs: Any) -> Any:
        found[0] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(kept_captures, "_original", count)
    monkeypatch.setattr(kept_captures, "_kept", type(kept_captures._kept)())
    return found


def captured(module: Any, example: Any = X, shapes: Any = None) -> Captured:
    found = kept_captures._capture(module, example, shapes)
    program, inputs = found.program, found.example
    exe = compile_ort(program.main, program.target)
    with torch.no_grad():
        want = module(torch.from_numpy(next(iter(inputs.values()))))
    np.testing.assert_allclose(next(iter(exe.run(inputs).values())), want, rtol=1e-6)
    assert found.check(lambda p, given: compile_ort(p.main, p.target).run(given)).relative_l2 < 1e-6
    return found  # type: ignore[no-any-return]


def test_an_equal_module_is_captured_once(counted: list[int]) -> None:
    first, second = captured(Scaled()), captured(Scaled())
    assert counted == [1] and first.program is not second.program
    second.program.main.graph.outputs[0].name = "changed"
    assert captured(Scaled()).program.main.graph.outputs[0].name != "changed" and counted == [1]


def test_for_another_target(counted: list[int]) -> None:
    for target in ("ort-cpu", "tvm-cpu:threads=1"):
        assert str(kept_captures._capture(Scaled(), X, None, target).program.target) == target
    assert counted == [1]


def test_what_differs_is_captured_again(counted: list[int]) -> None:
    for number, (module, example, shapes) in enumerate(
        [
            (Scaled(), X, None),
            (Scaled(factor=3.0), X, None),
            (Scaled(start=1.0), X, None),
            (Scaled(), 2 * X, None),
            (Scaled(), X, {0: "batch"}),
        ]
    ):
        captured(module, example, shapes)
        assert counted == [number + 1]


def test_a_module_that_was_edited_after_its_capture(counted: list[int]) -> None:
    module = Scaled()
    captured(module)
    with torch.no_grad():
        module.line.weight.add_(1.0)
    captured(Scaled())
    captured(module)
    assert counted == [3]


def test_a_class_inside_of_a_function_is_captured_each_time(counted: list[int]) -> None:
    class Local(Scaled):
        def forward(self, x: Any) -> Any:
            return self.line(x) - self.factor

    captured(Local())
    captured(Local())
    assert counted == [2]


def test_an_attribute_of_the_class_under_a_new_name(counted: list[int]) -> None:
    for _ in range(2):
        captured(type("Renamed", (Scaled,), {})())
    assert counted == [1]
    captured(type("Renamed", (Scaled,), {"extra": 1})())
    assert counted == [2]


def test_the_tests_of_capturing_do_not_share(counted: list[int]) -> None:
    kept_captures.use(False)
    assert capture is kept_captures._capture or capture is kept_captures._original
    captured(Scaled())
    captured(Scaled())
    assert counted == [2]
