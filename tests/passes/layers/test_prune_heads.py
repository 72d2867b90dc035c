"""prune-heads against torch: outputs are those of the module whose output projections are zero for these heads."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import planish  # noqa: E402
from planish.driver import optimize  # noqa: E402
from planish.ir.compare import compare_outputs  # noqa: E402
from planish.ir.errors import InputError  # noqa: E402
from planish.ir.program import Program  # noqa: E402
from planish.passes.base import PassContext, PassResult  # noqa: E402
from planish.passes.defaults import default_pipeline  # noqa: E402
from planish.passes.layers.prune_heads import PruneHeads  # noqa: E402
from planish.passes.manager import PassError, run_pass  # noqa: E402
from planish.passes.pipeline import format_pipeline, parse_pipeline  # noqa: E402
from planish.passes.testing import apply_pass, check_declines, run_reference  # noqa: E402
from tests.causal_models import causal_model, greedy, prompts  # noqa: E402
from tests.layer_models import MODELS  # noqa: E402

#: The output projection of a layer; whether its weight is stored (in, out).
PROJECTIONS = {
    "BERT": ("encoder.layer.{}.attention.output.dense", False),
    "GPT-2": ("transformer.h.{}.attn.c_proj", True),
    "Llama": ("model.layers.{}.self_attn.o_proj", False),
    "ViT": ("layers.{}.attention.o_proj", False),
    "OPT": ("model.decoder.layers.{}.self_attn.out_proj", False),
    "Qwen2": ("model.layers.{}.self_attn.o_proj", False),
    "BLOOM": ("h.{}.self_attention.dense", False),
    "T5 encoder": ("encoder.block.{}.layer.0.SelfAttention.o", False),
    "Mistral": ("layers.{}.self_attn.o_proj", False),
    "Phi": ("layers.{}.self_attn.dense", False),
}
LOWERINGS = "lower-feed-forward"
DEPTH = 8


def pipelines(target: str = "ort-cpu") -> tuple[str, str]:
    """What comes before the lowerings, and the rest."""
    before, after = default_pipeline(target).split(f",{LOWERINGS},")
    return before, f"{LOWERINGS},{after}"


@functools.cache
def _fused(name: str) -> Program:
    program = MODELS[name].program()
    run_pass(parse_pipeline(pipelines()[0]), program)
    return program


def fused(name: str) -> Program:
    return _fused(name).clone()


def zeroed(module: Any, path: str, rows: bool, heads: dict[int, Any], depth: int = DEPTH) -> Any:
    module = copy.deepcopy(module)
    with torch.no_grad():
        for layer, named in heads.items():
            weight = module.get_submodule(path.format(layer)).weight
            for head in named:
                place = slice(head * depth, (head + 1) * depth)
                weight[(place, slice(None)) if rows else (slice(None), place)] = 0
    return module


def expected(name: str, heads: dict[int, Any], feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    module = zeroed(MODELS[name].module(), *PROJECTIONS[name], heads)
    with torch.no_grad():
        found = module(**feeds)
    return {k: v.numpy() for k, v in found.items() if isinstance(v, torch.Tensor)}


def check_equal(name: str, program: Program, heads: dict[int, Any], batch: int = 2, length: int = 9) -> None:
    feeds = MODELS[name].example(batch, length)
    want = expected(name, heads, feeds)
    got = run_reference(program, {k: v.numpy() for k, v in feeds.items()})
    mask = feeds.get("attention_mask")
    for key, array in want.items():
        if mask is not None and array.ndim == 3:  # what stands at padding is of no use to anybody
            array, got[key] = array[mask.numpy() == 1], got[key][mask.numpy() == 1]
        assert compare_outputs({key: array}, got).relative_l2 < 1e-5


def matrix_bytes(program: Program) -> int:
    return sum(v.const_value.nbytes for v in program.main.graph.initializers.values() if len(v.shape) > 1)


CASES: list[tuple[str, dict[int, Any], int]] = [
    ("BERT", {0: (1,), 2: (0, 3)}, 3 * 4),
    ("GPT-2", {0: (1,), 2: (0, 3)}, 3 * 4),
    ("ViT", {0: (1,), 2: (0, 3)}, 3 * 4),
    ("OPT", {1: (3,), 3: (0, 1, 2)}, 4 * 4),
    ("Llama", {0: (0, 1), 3: (2, 3)}, 2 * (2 + 1 + 1 + 2)),  # with their keys and values
    ("Llama", {1: (1, 2)}, 2 * 2),  # one of each group: keys and values stay
    ("Qwen2", {0: (2, 3)}, 2 + 1 + 1 + 2),
    ("Mistral", {0: (2, 3)}, 2 + 1 + 1 + 2),
    ("Phi", {1: (0, 2)}, 2 * 4),
]


@pytest.mark.parametrize(("name", "heads", "slices"), CASES)
def test_outputs_are_those_of_zero_rows_and_weights_shrink(name: str, heads: dict[int, Any], slices: int) -> None:
    program = fused(name)
    before, matrices = program.weight_bytes(), matrix_bytes(program)
    result = apply_pass(PruneHeads(heads=heads), program)
    assert result.fired == sum(map(len, heads.values())) and not result.declined
    assert matrices - matrix_bytes(program) == slices * DEPTH * 32 * 4
    assert program.weight_bytes() < before and f"weights {before} to {program.weight_bytes()} bytes" in result.notes[0]
    check_equal(name, program, heads)
    run_pass(parse_pipeline(pipelines()[1]), program)  # and so the lowerings see it
    for batch, length in ((1, 1), (3, 13)):
        check_equal(name, program, heads, batch, length)
