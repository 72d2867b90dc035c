"""Small models of every kind on target tvm-cpu: one artifact for all batches and lengths, against the eager module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import planish
from tests.architectures import ARCHITECTURES

pytest.importorskip("tvm")
pytest.importorskip("transformers")

NAMES = ("BERT", "ViT", "GPT-2", "Llama", "ResNet", "ConvNeXt", "T5 encoder", "Whisper encoder")
SIZES = ((1, 1), (1, 2), (2, 17), (3, 33), (5, 16))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_artifact_takes_every_size(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    module = architecture.build(True)
    exe = planish.optimize(
        module,
        "tvm-cpu:threads=1",
        example_inputs=architecture.example(module),
        dynamic_shapes=architecture.dynamic_shapes,
        budget=planish.Budget(gates=False),
    )
    loaded = planish.load(exe.export(tmp_path / "artifact"), allow_native=True)
    for batch, length in SIZES:
        inputs = architecture.inputs(module, batch, length)
        with torch.no_grad():
            want = module(**inputs)
        got = loaded.run(inputs)
        for expected, found in zip((v for v in want.values() if v is not None), got.values(), strict=True):
            error = np.linalg.norm((found - expected).double().numpy()) / np.linalg.norm(expected.double().numpy())
            assert error < 3e-6, f"{batch} x {length}: {error:.1e}"
