"""Which opsets the passes know, and how a rule says that a model's is too old for it."""

from __future__ import annotations

#: The opset that passes write, and that raise-opset raises a model to.
NEWEST = 23
#: The oldest opset that it is worth raising a model to.
OLDEST = 13


def needs_opset(wanted: int, present: int) -> str:
    """Why a rule does not act on a model of an older opset than it is for."""
    hint = " (raise-opset comes first)" if wanted <= NEWEST else ""
    return f"needs opset {wanted}, the model has {present}{hint}"
