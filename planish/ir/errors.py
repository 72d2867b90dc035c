"""Errors of planish, and the suggestion that goes with an unknown name.

Every error that a user can cause is an :class:`InputError`: one line that says what was wrong, where,
and what to do next. The command line prints that line and exits with ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PlanishError(Exception):
    """Base of every error that planish raises on purpose."""

    exit_code = 1


class InputError(PlanishError):
    """What the caller gave is wrong: a file, an argument, a name, a shape."""

    exit_code = 2


class UnsafeModelError(InputError):
    """A model or an artifact asks for something that a safe loader refuses (a path outside its folder, a link)."""


class UnsupportedError(InputError):
    """The model is valid, but holds something that planish or the target can not take."""


class ArtifactError(InputError):
    """An artifact folder is damaged, incomplete, or of a schema that this version does not read."""


class VerifyError(PlanishError):
    """A program breaks a rule of the IR; the message names the node and the value."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the closest of `options`, or ``""`` if none is close."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(kind: str, name: str, options: Iterable[str]) -> InputError:
    """The error for a name that is not among `options`; the caller raises it."""
    known = sorted(options)
    hint = did_you_mean(name, known)
    shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return InputError(f"unknown {kind} '{name}'.{hint} Known: {shown or 'none'}.")
