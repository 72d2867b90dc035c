"""What works row by row on CUDA tensors of torch, in one pass over memory: the residual and the norm behind it, SwiGLU.

float16 or bfloat16; nothing is copied and nothing synchronizes.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

from planish.ir.errors import InputError, UnsupportedError
from planish.runtime.cuda import driver
from planish.runtime.cuda.cache import module

if TYPE_CHECKING:
    import torch

_THREADS = 256  # as in the sources
_EIGHT = 8
#: The widest row that a block keeps in its registers.
WIDEST = 4 * _EIGHT * _THREADS


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "a", "b", "weight", "y", "total")),
        *((f"{name}_row", ctypes.c_longlong) for name in ("x", "a", "b", "y", "total")),
        ("width", ctypes.c_int),
        ("epsilon", ctypes.c_float),
    )


class _Gate(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in ("gate", "up", "y")), ("count", ctypes.c_longlong))


def fits(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take tensors: one 16-bit dtype on one GPU, whole vectors of eight in rows of one stride."""
    first = tensors[0]
    return bool(
        first.device.type == "cuda"
        and str(first.dtype) in ("torch.float16", "torch.bfloat16")
        and first.shape[-1] % _EIGHT == 0
        and first.shape[-1] <= WIDEST
        and all(item.dtype == first.dtype and item.device == first.device and _plain(item) for item in tensors)
    )


def _plain(item: torch.Tensor) -> bool:
    return bool(item.is_contiguous() and item.data_ptr() % 16 == 0)


def add_rms_norm(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float = 1e-5,
    total: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(RMS norm of t over the last axis, t) for t = x + (a + b), added in float32.

    Args:
        x, a, b: of one shape (..., width) and contiguous; `b` may be absent.
        weight: (width,).
        total: whether t is written too; None is given in its place if not.

    Raises:
        InputError: shapes, dtypes or devices that the kernel does not take.
        UnsupportedError: there is no nvcc to compile it.
    """
    if not fits(x, weight) or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise InputError(f"rows of {tuple(x.shape)}, {x.dtype}, and a weight of {tuple(weight.shape)} have no kernel.")
    y = x.new_empty(x.shape)
    return y, _rows(x, a, b, weight, y, x.new_empty(x.shape) if total else None, epsilon)


def add(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x + (a + b), added in float32; operands, and `out` if it is given, as those of :func:`add_rms_norm`.

    Raises:
        InputError: shapes, dtypes or devices that the kernel does not take.
        UnsupportedError: there is no nvcc to compile it.
    """
    made = _rows(x, a, b, None, None, x.new_empty(x.shape) if out is None else out, 0.0)
    assert made is not None
    return made


def _rows(
    x: torch.Tensor, a: torch.Tensor, b: Any, weight: Any, y: Any, total: torch.Tensor | None, epsilon: float
) -> torch.Tensor | None:
    alike = [item for item in (x, a, b, total) if item is not None]
    if not fits(*alike) or any(item.shape != x.shape for item in alike):
        raise InputError(f"operands of shapes {[tuple(item.shape) for item in alike]}, {x.dtype}, have no kernel.")
    width = x.shape[-1]
    if rows := x.numel() // width if width else 0:
        pointers = (item.data_ptr() if item is not None else None for item in (x, a, b, weight, y, total))
        parameters = _Norm(*pointers, *(width,) * 5, width, epsilon)
        chunks = next(n for n in (1, 2, 4) if width <= n * _EIGHT * _THREADS)
        _norm(x.device.index or 0, chunks, _is_bf16(x)).launch((rows, 1, 1), _THREADS, _stream(x), parameters)
    return total


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate · sigmoid(gate) · up of contiguous tensors of one shape, in float32 inside.

    Raises:
        InputError: shapes, dtypes or devices that the kernel does not take.
        UnsupportedError: there is no nvcc to compile it.
    """
    if gate.shape != up.shape or gate.device.type != "cuda" or gate.dtype != up.dtype or gate.device != up.device:
        raise InputError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} do not fit each other.")
    if not (_plain(gate) and _plain(up)) or str(gate.dtype) not in ("torch.float16", "torch.bfloat16"):
        raise InputError(f"gate and up must be contiguous and aligned, float16 or bfloat16, not {gate.dtype}.")
    y = gate.new_empty(gate.shape)
    if count := gate.numel():
        blocks = -(-count // (_EIGHT * _THREADS))
        parameters = _Gate(gate.data_ptr(), up.data_ptr(), y.data_ptr(), count)
        _gate(gate.device.index or 0, _is_bf16(gate)).launch((blocks, 1, 1), _THREADS, _stream(gate), parameters)
    return y


@functools.cache
def available() -> bool:
    """Whether the kernels are there, or an nvcc that makes them."""
    try:
        _norm(0, 2, 0)
    except UnsupportedError:
        return False
    return True


@functools.cache
def _norm(index: int, chunks: int, bf16: int) -> driver.Function:
    return _within(index, lambda: module("add_rms_norm.cu", index, CHUNKS=chunks, ELEMENT_BF16=bf16)).function(
        "add_rms_norm"
    )


@functools.cache
def _gate(index: int, bf16: int) -> driver.Function:
    return _within(index, lambda: module("swiglu.cu", index, ELEMENT_BF16=bf16)).function("swiglu")


def _within(index: int, make: Any) -> driver.Module:
    """Loads a module in the context of a GPU, whichever is current."""
    import torch

    with torch.cuda.device(index):
        torch.cuda.current_stream()  # makes the context
        made: driver.Module = make()
    return made


def _stream(item: torch.Tensor) -> int:
    import torch

    return int(torch.cuda.current_stream(item.device).cuda_stream)


def _is_bf16(item: torch.Tensor) -> int:
    return int(str(item.dtype) == "torch.bfloat16")
