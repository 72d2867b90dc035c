"""Every way to call scaled_dot_product_attention, captured and compared with eager torch at other sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planish
from planish.ir.budget import Budget
from planish.ir.errors import InputError

Make = Callable[[int, int, int], tuple[torch.Tensor, ...]]
SHAPES = ({0: "b", 2: "s"}, {0: "b", 2: "t"})


class Sdpa(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, 2 * k, mask, **self.options)


def check(module: nn.Module, make: Make, shapes: Any, sizes: tuple[tuple[int, int, int], ...]) -> planish.Executable:
    torch.manual_seed(0)
    example = make(2, 5, 6)
    exe = planish.optimize(
        module.eval(),
        "ort-cpu:threads=1",
        example_inputs=example,
        dynamic_shapes=shapes,
        passes="",
        budget=Budget(gates=False),
    )
    for inputs in (example, *(make(*size) for size in sizes)):
        with torch.no_grad():
            torch.testing.assert_close(exe(*inputs), module(*inputs), rtol=1e-4, atol=1e-5)
    return exe


def _qk(b: int, s: int, t: int, heads: int = 4, shared: int = 4) -> tuple[torch.Tensor, ...]:
    return torch.randn(b, heads, s, 8), torch.randn(b, shared, t, 8)


MASKS: dict[str, tuple[Callable[[int, int, int], tuple[int, ...]], dict[int, str]]] = {
    "keys": (lambda b, s, t: (b, 1, 1, t), {0: "b", 3: "t"}),
    "queries": (lambda b, s, t: (s, 1), {0: "s"}),
    "heads": (lambda b, s, t: (4, 1, t), {2: "t"}),
    "full": (lambda b, s, t: (b, 4, s, t), {0: "b", 2: "s", 3: "t"}),
}


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_broadcast(name: str, kind: str) -> None:
    """ONNX Runtime's Attention refuses a mask with one row for all queries, which key_padding_mask is."""
    shape, dims = MASKS[name]

    def make(b: int, s: int, t: int) -> tuple[torch.Tensor, ...]:
        mask = torch.randn(shape(b, s, t))
        return (*_qk(b, s, t), mask > -1 if kind == "bool" else mask)

    check(Sdpa(), make, (*SHAPES, dims), ((3, 7, 9), (1, 1, 3)))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.5])
def test_scales(scale: float) -> None:
    """ONNX Runtime's Attention takes positive scales only."""
    check(Sdpa(scale=scale), _qk, SHAPES, ((3, 7, 9),))


@pytest.mark.parametrize(("heads", "shared", "options"), [(6, 2, True), (6, 1, True), (4, 4, True), (4, 1, False)])
def test_shared_heads(heads: int, shared: int, options: bool) -> None:
    check(Sdpa(enable_gqa=options), lambda b, s, t: _qk(b, s, t, heads, shared), SHAPES, ((3, 7, 9), (1, 1, 1)))


@pytest.mark.parametrize("rank", [2, 3, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_other_ranks(rank: int, masked: bool) -> None:
    """The exporter knows four dims only."""
    leading = {2: (), 3: (-1,), 5: (-1, 3, 4)}[rank]
    names: Any = {0: "b"} if rank > 2 else {}

    def make(b: int, s: int, t: int) -> tuple[torch.Tensor, ...]:
        lead = tuple(b if n == -1 else n for n in leading)
        mask = ((torch.randn(b, s, t) if rank == 3 else torch.randn(s, t)) > -1,)
        return (torch.randn(*lead, s, 8), torch.randn(*lead, t, 8), *(mask if masked else ()))

    mask_names = {**names, 1: "s", 2: "t"} if rank == 3 else {0: "s", 1: "t"}
    shapes = ({**names, rank - 2: "s"}, {**names, rank - 2: "t"}, *((mask_names,) if masked else ()))
    check(Sdpa(), make, shapes, ((3, 7, 9),))


def test_a_batch_of_one_for_the_keys() -> None:
    check(
        Sdpa(), lambda b, s, t: (torch.randn(b, 4, s, 8), torch.randn(1, 4, t, 8)), (SHAPES[0], {2: "t"}), ((3, 7, 9),)
    )


class Encoder(nn.Module):
    def __init__(self, *, nested: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.layers(x, src_key_padding_mask=padding)


def _padded(b: int, s: int, t: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(b, s, 16), torch.arange(s)[None] >= torch.full((b, 1), s - 1)


def test_a_padded_encoder_of_torch_expands_its_mask_once() -> None:
    exe = check(Encoder(nested=False), _padded, {0: "b", 1: "s"}, ((3, 7, 0), (1, 2, 0)))
    assert exe.program is not None
    attention = [node for node in exe.program.main.graph if node.op_type == "Attention"]
    assert len(attention) == 2 and len({node.inputs[3] for node in attention}) == 1


def test_an_encoder_with_nested_tensors_says_how_to_turn_them_off() -> None:
    """Torch's fast path gives zeros where a row is padded, its own slow path does not."""
    with pytest.raises(InputError, match="enable_nested_tensor=False"):
        check(Encoder(nested=True), _padded, {0: "b", 1: "s"}, ())
    assert torch.backends.mha.get_fastpath_enabled()
