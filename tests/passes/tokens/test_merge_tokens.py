"""merge-tokens: whole nets against token merging written down in torch, what is declined, and options."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import planish
from planish.ir.verify import verify
from planish.passes.defaults import default_pipeline
from tests.passes.tokens.tome_torch import install
from tests.passes.tokens.vision_models import VISION, Vision

FAST = planish.Budget(gates=False)


def pipeline(merge: str, target: str = "ort-cpu") -> str:
    """The exact pipeline with merging between recognition and lowering."""
    cut = ",lower-linear," if "kernels" in target else ",lower-feed-forward,"
    before, after = default_pipeline(target).split(cut)
    return f"{before},{merge}{cut}{after}"


@functools.cache
def captured(name: str) -> Any:
    """A model as ONNX: capturing it takes longer than anything that is done with it."""
    model = VISION[name]
    x = torch.randn(model.shape)
    exe = planish.optimize(
        model.module(), example_inputs=(x,), dynamic_shapes=({0: "batch"},), passes="fold-constants", budget=FAST
    )
    return exe.program.entry("main")


def optimized(name: str, merge: str, target: str = "ort-cpu", passes: str | None = None) -> Any:
    chosen = pipeline(merge, target) if passes is None else passes
    return planish.optimize(captured(name), target, passes=chosen, budget=FAST)


def values(output: Any) -> list[torch.Tensor]:
    if isinstance(output, np.ndarray | torch.Tensor):
        return [torch.as_tensor(output)]
    items = output.values() if hasattr(output, "values") else output
    return [torch.as_tensor(v) for v in items if v is not None]


def reference(model: Vision, r: list[int], log: bool = True) -> torch.nn.Module:
    module = model.module()
    install(model.layers(module), model.take, r, model.protected, log=log)
    return module


def compare(model: Vision, exe: Any, r: list[int], batch: int = 2, log: bool = True) -> None:
    x = torch.randn(batch, *model.shape[1:], generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        want = values(reference(model, r, log)(x))
    got = values(exe(x))
    assert len(want) == len(got)
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def entry(exe: Any) -> Any:
    return next(e for e in exe.report.ledger.entries if e.name.startswith("merge-tokens"))


# Verified once, at the end: around each of the exact passes it is most of the time, and they have tests of their own.
@pytest.mark.no_verify
@pytest.mark.parametrize("name", sorted(VISION))
def test_whole_net_equals_torch(name: str) -> None:
    model = VISION[name]
    layers = len(model.layers(model.module()))
    exe = optimized(name, "merge-tokens{r=5}")
    assert entry(exe).fired == layers, entry(exe).verdict
    assert f"{model.protected} protected" in entry(exe).notes[0]
    verify(exe.program, full=True)
    for batch in (2, 1, 3):
        compare(model, exe, [5] * layers, batch)


@pytest.mark.no_verify
def test_without_the_size_in_attention() -> None:
    model = VISION["ViT"]
    exe = optimized("ViT", "merge-tokens{r=[4, 9, 2],proportional=False}")
    assert "Log" not in exe.report.after.ops
    compare(model, exe, [4, 9, 2], log=False)


@pytest.mark.no_verify
def test_images_of_any_size() -> None:
    model = VISION["ViT"]

    class AnySize(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.inner(pixel_values=x, interpolate_pos_encoding=True)[0]
            return logits

    shapes = ({0: "batch", 2: "height", 3: "width"},)
    exe = planish.optimize(
        AnySize(model.module()), "ort-cpu", example_inputs=(torch.randn(2, 3, 48, 64),), dynamic_shapes=shapes,
        passes=pipeline("merge-tokens{r=5}"), budget=FAST,
    )  # fmt: skip
    assert entry(exe).fired == 3
    want = AnySize(reference(model, [5, 5, 5]))
    for shape in ((1, 3, 48, 64), (2, 3, 64, 32), (1, 3, 16, 16)):  # of 5 tokens 2 can merge, then 1
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(exe(x), want(x), rtol=1e-5, atol=1e-5)


@pytest.mark.no_verify
def test_what_fuses_without_merging_fuses_with_it() -> None:
    dense = optimized("ViT", "", passes=default_pipeline("ort-cpu")).report.after.ops
    merged = optimized("ViT", "merge-tokens{r=5}").report.after.ops
    for op in ("Attention", "LayerNormalization", "Gelu", "MatMul", "Conv"):
        assert merged[op] == dense[op], op
    assert merged["planish::MergeTokens"] == 3 and "Softmax" not in merged


@pytest.mark.no_verify
def test_with_kernels() -> None:
    pytest.importorskip("tvm")
    model = VISION["DeiT"]
    dense = optimized("DeiT", "", "ort-cpu:kernels", default_pipeline("ort-cpu:kernels")).report.after.ops
    exe = optimized("DeiT", "merge-tokens{r=5}", "ort-cpu:kernels")
    merged = exe.report.after.ops
    for op in dense:
        if op.startswith("planish::Linear"):
            assert merged[op] == dense[op], op
    compare(model, exe, [5, 5])


@pytest.mark.no_verify
def test_behind_skip_layers_under_one_budget() -> None:
    model = VISION["ViT"]
    exe = planish.optimize(captured("ViT"), budget=FAST, approximate="merge-tokens{r=5},skip-layers{layers=[1]}")
    assert entry(exe).fired == 2
    assert exe.report.after.ops["Attention"] == exe.report.after.ops["planish::MergeTokens"] == 2
    left = model.module()
    del model.layers(left)[1]
    install(model.layers(left), model.take, [5, 5], model.protected)
    x = torch.randn(model.shape)
    with torch.no_grad():
        torch.testing.assert_close(values(exe(x)), values(left(x)), rtol=1e-5, atol=1e-5)
