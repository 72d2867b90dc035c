"""planish: a graph optimizer whose every pass is gated by a measured error and a measured gain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planish.version import __version__

if TYPE_CHECKING:
    from planish.driver import optimize
    from planish.ir.budget import Budget
    from planish.ir.causal_lm import CausalLM
    from planish.ir.errors import PlanishError
    from planish.ir.target import Target
    from planish.runtime.artifact import load
    from planish.runtime.executable import Executable

__all__ = ["Budget", "CausalLM", "Executable", "PlanishError", "Target", "__version__", "load", "optimize"]

_HOMES = {
    "Budget": "planish.ir.budget",
    "CausalLM": "planish.ir.causal_lm",
    "Executable": "planish.runtime.executable",
    "PlanishError": "planish.ir.errors",
    "Target": "planish.ir.target",
    "load": "planish.runtime.artifact",
    "optimize": "planish.driver",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `planish.load` imports neither the passes nor torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'planish' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
