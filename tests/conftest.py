"""The one verification fixture: in every test, every pass gets a valid program and must leave a valid one.

It wraps ``apply`` of every pass class, those that a test defines included, so it does not matter whether a
manager, a gate or the test itself runs the pass.

And what makes the suite faster without a word in any test: garbage is collected more rarely, torch's exporter reads its
table of operators once a process instead of once an export, and tests that are not about capturing share captures.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from planish.ir.errors import VerifyError
from planish.ir.hashing import structural_hash
from planish.ir.program import Program
from planish.ir.verify import verify
from planish.passes.base import Pass, PassContext, PassResult
from planish.passes.manager import PassManager
from planish.passes.rewrite import RewriteMixin
from tests import kept_captures

# With torch, transformers and TVM imported, each full collection walks a million objects, and captures cause many.
gc.set_threshold(50_000, 20, 20)

_ABOUT_CAPTURING = ("tests/frontends/", "tests/test_bad_input.py", "tests/test_zoo.py")

_enabled = False
_valid = ""  # the structure that was verified last; what a pass left is what the next one is given

Apply = Callable[[Any, Program, PassContext], PassResult]


@pytest.fixture(autouse=True)
def verify_around_passes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that hand passes invalid programs, or let them leave such, opt out with ``@pytest.mark.no_verify``."""
    global _enabled, _valid
    _valid = ""
    _enabled = request.node.get_closest_marker("no_verify") is None
    _keep_torchlib()
    kept_captures.use(not request.node.nodeid.startswith(_ABOUT_CAPTURING))
    yield
    _enabled = False


_EXPORTER = "torch.onnx._internal.exporter._registration"


def _keep_torchlib() -> None:
    """Once torch's exporter is imported: its table of operators, half a second of parsing, is copied from then on."""
    registry = getattr(sys.modules.get(_EXPORTER), "ONNXRegistry", None)
    if registry is None or getattr(registry.from_torchlib, "planish_kept", False):
        return
    original = registry.from_torchlib.__func__
    if not {"_opset_version", "functions"} <= set(vars(registry())):
        return  # another version of torch: as it is
    kept: dict[tuple[Any, ...], Any] = {}

    def from_torchlib(cls: Any, *version: Any, **named: Any) -> Any:
        key = (cls, *version, *named.items())
        if key not in kept:
            kept[key] = original(cls, *version, **named)
        found = cls()
        vars(found).update(vars(kept[key]))
        found.functions = {target: list(overloads) for target, overloads in kept[key].functions.items()}
        return found

    from_torchlib.planish_kept = True  # type: ignore[attr-defined]
    registry.from_torchlib = classmethod(from_torchlib)


def _verify_once(program: Program) -> None:
    """The cheap part always (it sees names); the full part for every structure that it has not just seen."""
    global _valid
    state = structural_hash(program, contents=False)
    if state != _valid:
        verify(program, full=True)
        _valid = state
    else:
        verify(program, full=False)


def _verified(apply: Apply) -> Apply:
    @functools.wraps(apply)
    def run(self: Any, program: Program, ctx: PassContext) -> PassResult:
        # A manager only runs other passes, and a pass on the FX graph has no Program.
        if not _enabled or isinstance(self, PassManager) or not isinstance(program, Program):
            return apply(self, program, ctx)
        try:
            _verify_once(program)
        except VerifyError as error:
            raise VerifyError(f"the test gives pass '{self}' an invalid program: {error}") from error
        result = apply(self, program, ctx)
        try:
            _verify_once(program)
        except VerifyError as error:
            raise VerifyError(f"pass '{self}' leaves an invalid program: {error}") from error
        return result

    return run


def _wrap(cls: type[Any]) -> None:
    if "apply" in cls.__dict__ and not getattr(cls.__dict__["apply"], "__isabstractmethod__", False):
        cls.apply = _verified(cls.__dict__["apply"])


def _wrap_all(cls: type[Any]) -> None:
    _wrap(cls)
    for subclass in cls.__subclasses__():
        _wrap_all(subclass)


def _wrap_later(cls: type[Any], **kwargs: Any) -> None:
    super(Pass, cls).__init_subclass__(**kwargs)
    _wrap(cls)


_wrap_all(Pass)
_wrap(RewriteMixin)
Pass.__init_subclass__ = classmethod(_wrap_later)  # type: ignore[assignment]
