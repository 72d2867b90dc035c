from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.ir.infer import infer_shapes
from planish.ir.ops import import_functions
from planish.ir.ops.window_attention import WINDOW_ATTENTION
from planish.ir.printer import op_counts
from planish.ir.program import Program
from planish.passes.defaults import default_pipeline
from planish.passes.testing import apply_pass, check_declines, program_of, run_reference

PASS = "lower-window-attention"
HEADS = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3}
LOWEST, LOW = float(np.finfo(np.float32).min), -3.3e38
WINDOWS: list[dict[str, int]] = [
    {"left": 20, "is_causal": 1},
    {"left": 9, "right": 30},
    {"left": 0, "right": 0},
    {"left": 500, "right": 4},
    {"left": 0, "right": 70},
]


def program(window: dict[str, Any], *, keys: bool = False, length: str = "S", target: str = "ort-cpu") -> Program:
    given = ", ".join(f"{key} = {value!r}" for key, value in (HEADS | window).items())
    mask = f", bool[B, 1, 1, {length}] pad" if keys else ""
    text = f"""
    <ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
    f (float[B, {length}, 32] q, float[B, {length}, 16] k, float[B, {length}, 16] v{mask}) => (float[B, {length}, 32] y)
    {{ y = planish.WindowAttention{"KeyMask" * keys}<{given}>(q, k, v{", pad" * keys}) }}
    """
    made = program_of(text, target)
    import_functions(made.main)
    infer_shapes(made.main)
    return made


def feed(batch: int, length: int, keys: bool = False, side: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch * 31 + length)
    widths = {"q": 32, "k": 16, "v": 16}
    found = {n: rng.standard_normal((batch, length, w)).astype(np.float32) for n, w in widths.items()}
    if keys:
        hidden = np.linspace(0, length, batch).astype(int)[:, None]
        found["pad"] = (np.arange(length)[::side] >= hidden)[:, None, None, :]
    return found


def check(lowered: Program, window: dict[str, Any], inputs: dict[str, np.ndarray]) -> None:
    name = "WindowAttentionKeyMask" if "pad" in inputs else "WindowAttention"
    (want,) = WINDOW_ATTENTION[name].reference(*inputs.values(), **HEADS, **window)
    (got,) = run_reference(lowered, inputs).values()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", WINDOWS)
def test_blocks_of_any_length(window: dict[str, int]) -> None:
    lowered = program(window)
    assert apply_pass(f"{PASS}{{from_length=60}},eliminate-dead-code", lowered).modified
    assert not any(node.domain == "planish" for node in lowered.nodes())
    for batch, length in ((1, 1), (2, 59), (1, 64), (1, 193), (2, 300)):
        check(lowered, window, feed(batch, length))


@pytest.mark.parametrize("hidden", [LOWEST, LOW])
@pytest.mark.parametrize("window", WINDOWS[::2])
def test_padding(window: dict[str, Any], hidden: float) -> None:
    """On both sides, up to all keys: with queries that see none, and give the mean of all values, or zeros."""
    given = window | {"hidden_score": hidden}
    lowered = program(given, keys=True)
    apply_pass(f"{PASS}{{from_length=60,block=16}},eliminate-dead-code", lowered)
    for batch, length in ((3, 50), (1, 100), (3, 100)):
        for side in (1, -1):
            check(lowered, given, feed(batch, length, True, side))


@pytest.mark.parametrize("length", [40, 200, 256])
def test_a_known_length_has_one_form(length: int) -> None:
    lowered = program(WINDOWS[0], length=str(length))
    apply_pass(f"{PASS},eliminate-dead-code", lowered)
    counts = op_counts(lowered)
    assert counts["Attention"] == 1 and "If" not in counts and counts.get("Scan", 0) == (length >= 193)
    check(lowered, WINDOWS[0], feed(2, length))


@pytest.mark.parametrize(("left", "block"), [(20, 64), (1023, 128), (4095, 256)])
def test_the_block_is_by_the_window(left: int, block: int) -> None:
    lowered = program({"left": left, "is_causal": 1})
    apply_pass(PASS, lowered)
    (attention,) = (n for n in lowered.nodes() if n.op_type == "Attention" and n.outputs[0].shape[1] == block)  # type: ignore[index]
    assert attention.graph is not lowered.main.graph


def test_layers_share_masks() -> None:
    made = program(WINDOWS[0], keys=True)
    graph = made.main.graph
    first = graph[0]
    again = ir.node("WindowAttentionKeyMask", list(first.inputs), dict(first.attributes), domain="planish")
    again.outputs[0].type, again.outputs[0].shape = first.outputs[0].type, first.outputs[0].shape
    again.outputs[0].name, again.name = "z", "again"
    graph.append(again)
    graph.outputs.append(again.outputs[0])
    apply_pass(f"{PASS},eliminate-common-subexpressions,eliminate-dead-code", made)
    assert sum(node.op_type == "If" for node in made.main.graph) <= 3


@pytest.mark.parametrize(
    ("window", "target", "reason"),
    [
        (WINDOWS[0], "ort-cpu:kernels", "target 'ort-cpu:kernels' has a kernel for it"),
        ({"left": 3, "right": 3, "global_queries": 2}, "ort-cpu", "it has positions that all others see"),
        ({"left": 3, "global_keys": 2, "is_causal": 1}, "ort-cpu", "it has positions that all others see"),
        ({"right": 3}, "ort-cpu", "its window is open on one side"),
    ],
)
def test_declined(window: dict[str, int], target: str, reason: str) -> None:
    check_declines(PASS, program(window, target=target), reason)


def test_other_lengths_are_declined() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23, "planish" : 1]>
    f (float[B, S, 32] q, float[B, T, 16] k, float[B, T, 16] v) => (float[B, S, 32] y)
    { y = planish.WindowAttention<q_num_heads = 4, kv_num_heads = 2, scale = 0.3, left = 3, right = 0>(q, k, v) }"""
    made = program_of(text)
    import_functions(made.main)
    check_declines(PASS, made, "its queries and keys are not known to be as many")
    assert PASS in default_pipeline("ort-cpu")
