from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.ir.errors import InputError
from planish.ir.program import Program
from planish.runtime.executable import Executable
from planish.runtime.ort import compile_ort
from tests.runtime.models import ONE_THREAD, executable, limited, model, two_layers

X, IDS = np.ones((2, 16), np.float32), np.zeros((2, 3), np.int64)


def doubling(name: str, factor: float) -> Program:
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g (float[n] {name}) => (float[n] y) <float f = {{{factor}}}> {{ y = Mul({name}, f) }}"""
    return Program.single(model(text), ONE_THREAD)


def test_inputs_in_order_by_name_or_both() -> None:
    exe = executable()
    want = exe.run({"x": X, "ids": IDS})
    assert list(want) == ["y", "e"]
    for got in (exe(X, IDS), exe(x=X, ids=IDS), exe(X, ids=IDS), exe(ids=IDS, x=X)):
        assert isinstance(got, tuple)
        for value, expected in zip(got, want.values(), strict=True):
            np.testing.assert_array_equal(value, expected)


def test_one_output_is_an_array() -> None:
    exe = executable(doubling("x", 2.0))
    np.testing.assert_array_equal(exe(np.ones(3, np.float32)), np.full(3, 2, np.float32))


def test_torch_in_torch_out() -> None:
    torch = pytest.importorskip("torch")
    got = executable()(torch.from_numpy(X), ids=torch.from_numpy(IDS))
    assert all(isinstance(value, torch.Tensor) for value in got)


@pytest.mark.parametrize(
    ("args", "named", "message"),
    [
        ((X, IDS, IDS), {}, "3 inputs were given, but there are 2: x: float[b, 16]; ids: int64[b, s]."),
        ((X,), {"x": X}, "input 'x' was given twice: at position 0 and by name."),
        ((X,), {}, "input 'ids' is missing."),
        ((X,), {"idx": IDS}, "no input is named 'idx'. Did you mean 'ids'?"),
        ((IDS, X), {}, "input 'x' is int64, expected x: float[b, 16]"),
    ],
)
def test_wrong_calls(args: tuple[Any, ...], named: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        executable()(*args, **named)
    assert message in str(caught.value)


def test_sizes_outside_the_captured_range() -> None:
    exe = executable(limited())
    assert exe.inputs[0].ranges == (None, (1, 16))
    for _ in range(2):  # what was refused once is not taken for known
        assert exe(np.ones((2, 16), np.float32)).shape == (2, 16)
        with pytest.raises(InputError, match="input 'x' has seq=17 in dimension 1; the captured model takes 1 to 16"):
            exe(np.ones((2, 17), np.float32))


def test_ranges_of_a_captured_module_outlive_the_passes() -> None:
    torch = pytest.importorskip("torch")
    from planish import Budget, optimize

    class Positions(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.ones(16, 4))

        def forward(self, x: Any) -> Any:
            return x + self.table[: x.shape[1]]

    x = torch.zeros(2, 8, 4)
    names = ({0: "batch", 1: "seq"},)
    exe = optimize(Positions().eval(), example_inputs=(x,), dynamic_shapes=names, budget=Budget(gates=False))
    assert exe(torch.zeros(1, 16, 4)).shape == (1, 16, 4)
    with pytest.raises(InputError, match="input 'x' has seq=17 in dimension 1; the captured model takes 1 to 16 there"):
        exe(torch.zeros(1, 17, 4))


def test_several_entries() -> None:
    programs = {"prefill": doubling("x", 2.0), "decode": doubling("t", 3.0)}
    program = Program({name: p.main for name, p in programs.items()}, programs["decode"].target)
    exe = Executable(program, {name: compile_ort(m, program.target) for name, m in program.entries.items()})
    assert exe.entries == ["prefill", "decode"]
    assert exe.run({"t": np.ones(1, np.float32)}, entry="decode")["y"] == 3
    with pytest.raises(InputError, match="unknown entry 'prefil'. Did you mean 'prefill'?"):
        exe.run({}, entry="prefil")
    with pytest.raises(InputError, match="the entries prefill, decode"):
        exe(np.ones(1, np.float32))


def test_what_it_says_about_itself() -> None:
    exe = executable()
    assert [str(s) for s in exe.inputs] == ["x: float[b, 16]", "ids: int64[b, s]"]
    assert [s.name for s in exe.outputs] == ["y", "e"]
    assert str(exe.target) == ONE_THREAD
    assert exe.pipeline == "fuse-gelu"
    assert exe.provenance == {"source": "test"}
    assert exe.report is None
    assert "x: float[b, 16]" in repr(exe)
    read: list[int] = []
    lazy = Executable(two_layers(), exe.runners, report=lambda: read.append(1))
    assert lazy.report is None
    assert lazy.report is None
    assert read == [1]


def test_run_wants_a_dict() -> None:
    with pytest.raises(InputError, match="run takes a dict of arrays by input name, not ndarray"):
        executable().run(X)  # type: ignore[arg-type]


def test_nothing_to_run_or_export(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one entry"):
        Executable(None, {})
    with pytest.raises(InputError, match="no program to export"):
        Executable(None, executable().runners).export(tmp_path / "a")
    assert not list(tmp_path.iterdir())
