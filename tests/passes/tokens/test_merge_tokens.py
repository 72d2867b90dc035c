"""merge-tokens: whole nets against token merging written down in torch, what is declined, and options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import planish
from planish.passes.defaults import default_pipeline
from tests.passes.tokens.tome_torch import install
from tests.passes.tokens.vision_models import VISION, Vision

FAST = planish.Budget(gates=False)


def pipeline(merge: str, target: str = "ort-cpu") -> str:
    """The exact pipeline with merging between recognition and lowering."""
    cut = ",lower-linear," if "kernels" in target else ",lower-feed-forward,"
    before, after = default_pipeline(target).split(cut)
    return f"{before},{merge}{cut}{after}"


def optimized(model: Vision, merge: str, target: str = "ort-cpu", passes: str | None = None) -> Any:
    x = torch.randn(model.shape)
    chosen = pipeline(merge, target) if passes is None else passes
    return planish.optimize(
        model.module(), target, example_inputs=(x,), dynamic_shapes=({0: "batch"},), passes=chosen, budget=FAST
    )


def values(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    items = output.values() if hasattr(output, "values") else output
    return [v for v in items if isinstance(v, torch.Tensor)]


def reference(model: Vision, r: list[int], log: bool = True) -> torch.nn.Module:
    module = model.module()
    install(model.layers(module), model.take, r, model.protected, log=log)
    return module


def compare(model: Vision, exe: Any, r: list[int], batch: int = 2, log: bool = True) -> None:
    x = torch.randn(batch, *model.shape[1:], generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        want, got = values(reference(model, r, log)(x)), values(exe(x))
    assert len(want) == len(got)
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def entry(exe: Any) -> Any:
    return next(e for e in exe.report.ledger.entries if e.name.startswith("merge-tokens"))


@pytest.mark.parametrize("name", sorted(VISION))
def test_whole_net_equals_torch(name: str) -> None:
    model = VISION[name]
    exe = optimized(model, "merge-tokens{r=5}")
    assert entry(exe).fired == 3, entry(exe).verdict
    assert f"{model.protected} protected" in entry(exe).notes[0]
    for batch in (2, 1, 3):
        compare(model, exe, [5, 5, 5], batch)
