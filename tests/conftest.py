"""The one verification fixture: in every test, every pass gets a valid program and must leave a valid one.

It wraps ``apply`` of every pass class, those that a test defines included, so it does not matter whether a
manager, a gate or the test itself runs the pass.
"""

from __future__ import annotations

import functools
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

_enabled = False
_valid = ""  # the structure that was verified last; what a pass left is what the next one is given

Apply = Callable[[Any, Program, PassContext], PassResult]


@pytest.fixture(autouse=True)
def verify_around_passes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that hand passes invalid programs, or let them leave such, opt out with ``@pytest.mark.no_verify``."""
    global _enabled, _valid
    _valid = ""
    _enabled = request.node.get_closest_marker("no_verify") is None
    yield
    _enabled = False


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
