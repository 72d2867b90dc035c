"""Products of a few rows with weights in 4 or 8 bits on the GPU, for decoding; called from torch, or with pointers.

For callers without torch: :func:`launch_plan` says everything of a launch that does not depend on addresses, and
:class:`Parameters` is the kernel's only argument, in C as at the top of ``source/quantized_gemv.cu``. Inputs and
outputs are compact; x and codes are aligned to 16 bytes. There is no scratch. Without rows or channels nothing is
launched.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planish.ir.errors import InputError, UnsupportedError
from planish.runtime.cuda import driver
from planish.runtime.cuda.cache import module

if TYPE_CHECKING:
    import torch

MOST_ROWS = 8
_FEW_ROWS = 2
_CHANNELS = 16  # of a block, as in quantized_gemv.cu
#: Channels of a weight, at most → threads of a block. Few blocks have more of them to themselves; many are smaller, and
#: more evenly spread.
_THREADS = ((4224, 384), (8192, 256))
_LEAST_THREADS = 128


class Parameters(ctypes.Structure):
    """The kernel's argument; `stride` is of a channel's codes, in 16 bytes."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales", "zeros", "added", "y", "up_codes", "up_scales")),
        *((name, ctypes.c_int) for name in ("rows", "n", "k", "stride", "blocks", "block_shift", "is_signed")),
    ]


@dataclass(frozen=True)
class LaunchPlan:
    """What a launch needs besides addresses.

    Attributes:
        source: file of the kernel in ``source/``; `defines`: its macros; the function is ``quantized_gemv``.
        grid: blocks along the first axis.
        sizes: the numbers at the end of :class:`Parameters`, in order.
    """

    source: str
    defines: dict[str, int]
    grid: int
    threads: int
    sizes: tuple[int, ...]


def kernel_macros(
    bits: int, few: bool, *, zeros: bool = False, channel: bool = False, gated: bool = False
) -> dict[str, int]:
    """What a form of the kernel is compiled with.

    Args:
        few: for one or two rows, in blocks that do not end inside of 16 bytes; else for up to 8 rows.
        zeros: blocks have zeros of their own.
        channel: each channel has one scale, of float32.
        gated: silu of the product with one weight times that with another; blocks of the grid have half the channels.
    """
    return {"BITS": bits, "CHANNEL": int(channel), "FEW": int(few), "GATED": int(gated), "ZEROS": int(zeros)}


def launch_plan(
    rows: int, n: int, k: int, bits: int, block: int | None, *, signed: bool = False, zeros: bool = False
) -> LaunchPlan:
    """How a product (rows, k) · (n, k)ᵀ is launched.

    Args:
        bits: of a code, 4 or 8.
        block: codes that share a scale of float16, which are padded to whole blocks; None: each channel has one scale,
            of float32.
        signed: codes are int8 rather than uint8 with 128 for zero.
        zeros: blocks have zeros of their own.

    Raises:
        UnsupportedError: more than 8 rows, or sizes that the kernel can not read 16 bytes at a time.
    """
    if not 0 < rows <= MOST_ROWS:
        raise UnsupportedError(f"{rows} rows; the kernel for quantized weights takes 1 to {MOST_ROWS}.")
    if bits not in (4, 8) or (bits == 4 and signed):
        raise UnsupportedError(f"{'signed ' * signed}codes of {bits} bits; there are 4 bits, unsigned, and 8.")
    if block is not None and (block < 16 or block & (block - 1)):
        raise UnsupportedError(f"blocks of {block} codes; they must be a power of two from 16 on.")
    blocks = -(-k // block) if block is not None else 1
    codes = blocks * block if block is not None else k
    if k % 8 or codes * bits % 128:
        raise UnsupportedError(f"{k} columns, {codes} codes of {bits} bits: x and codes must be multiples of 16 bytes.")
    shift = block.bit_length() - 1 if block is not None else 30
    few = rows <= _FEW_ROWS and (bits == 8 or block != 16)
    defines = kernel_macros(bits, few, zeros=zeros, channel=block is None)
    sizes = (rows, n, k, codes * bits // 128, blocks, shift, int(signed))
    threads = next((count for channels, count in _THREADS if n <= channels), _LEAST_THREADS)
    return LaunchPlan("quantized_gemv.cu", defines, -(-n // _CHANNELS), threads, sizes)


def quantized_gemv(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    bits: int,
    zeros: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    constant: bool = False,
) -> torch.Tensor:
    """X (rows, k) · wᵀ of 1 to 8 rows in float16, where w (n, k) = (code - zero) · scale; sums are float32.

    Args:
        x: (rows, k) float16, compact, k a multiple of 8.
        codes: by block, (n, blocks, block · bits / 8) uint8, as com.microsoft.MatMulNBits has them; by channel, (n, k)
            uint8 or int8 (whose zero is 0) of 8 bits, or (n, k / 2) uint8 of 4. Compact; 16 bytes divide a channel.
        scales: by block, (n, blocks) float16; by channel, (n,) float32.
        zeros: (n, blocks) of as many bits as codes have, rows in whole bytes, uint8; of 4 bits the earlier one is in
            the low half of a byte. None: 2^(bits - 1) for all.
        added: (n,) float16 that are added to each row.
        out: (rows, n) float16, to be written; made if it is None.
        constant: the kernel in front of this one on the stream does not write codes, scales or zeros, so that (on
            Hopper) they are read before it is over.

    Raises:
        InputError: shapes, dtypes or devices that do not fit each other.
        UnsupportedError: sizes without a kernel, or no nvcc to compile it.
    """
    import torch

    channel = scales.dim() == 1
    _check(x, codes, scales, zeros, bits)
    rows, k = x.shape
    n = codes.shape[0]
    block = None if channel else codes.shape[2] * 8 // bits
    if out is None:
        out = x.new_empty((rows, n))
    for name, item, shape in (("added", added, (n,)), ("out", out, (rows, n))):
        if item is not None and (tuple(item.shape) != shape or item.dtype != x.dtype or not item.is_contiguous()):
            raise InputError(f"{name} is {item.dtype} {tuple(item.shape)}; it must be float16 {shape}, compact.")
    if rows == 0 or n == 0:
        return out
    plan = launch_plan(rows, n, k, bits, block, signed=codes.dtype == torch.int8, zeros=zeros is not None)
    given = (x, codes, scales, zeros, added, out, None, None)
    pointers = (item.data_ptr() if item is not None else None for item in given)
    kernel = _kernel(x.device.index or 0, **plan.defines)
    stream = int(torch.cuda.current_stream(x.device).cuda_stream)
    early = constant and driver.device(x.device.index or 0).arch == 90  # whose code waits, as no other does
    kernel.launch((plan.grid, 1, 1), plan.threads, stream, Parameters(*pointers, *plan.sizes), early=early)
    return out


@functools.cache
def _kernel(index: int, **defines: int) -> driver.Function:
    return module("quantized_gemv.cu", index, **defines).function("quantized_gemv")


def _check(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> None:
    channel = scales.dim() == 1
    if x.device.type != "cuda":
        raise InputError(f"x is on {x.device}; CUDA kernels take CUDA tensors.")
    if x.dim() != 2 or str(x.dtype) != "torch.float16":
        raise InputError(f"x is {x.dtype} of rank {x.dim()}; it must be float16 of rank 2.")
    for name, item in (("x", x), ("codes", codes), ("scales", scales)):
        if item.device != x.device or not item.is_contiguous() or item.data_ptr() % 16:
            raise InputError(f"{name} must be on {x.device}, compact and aligned to 16 bytes.")
    kinds = ("torch.uint8", "torch.int8") if channel and bits == 8 else ("torch.uint8",)
    if str(codes.dtype) not in kinds or str(scales.dtype) != ("torch.float32" if channel else "torch.float16"):
        raise InputError(f"codes are {codes.dtype} and scales {scales.dtype}; see the docstring of quantized_gemv.")
    if channel:
        fits = codes.dim() == 2 and scales.shape[0] == codes.shape[0] and codes.shape[1] * 8 == x.shape[1] * bits
    else:
        fits = codes.dim() == 3 and scales.shape == codes.shape[:2]
        fits = fits and 0 <= codes.shape[1] * codes.shape[2] * 8 // bits - x.shape[1] < codes.shape[2] * 8 // bits
    if not fits:
        shapes = tuple(x.shape), tuple(codes.shape), tuple(scales.shape)
        raise InputError("x {}, codes {} and scales {} do not fit each other.".format(*shapes))
    if zeros is not None:
        shape = (codes.shape[0], -(-codes.shape[1] * bits // 8))
        fits = not channel and zeros.shape == shape and str(zeros.dtype) == "torch.uint8" and zeros.device == x.device
        if not fits or not zeros.is_contiguous():
            raise InputError(f"zeros are {zeros.dtype} {tuple(zeros.shape)}; they must be uint8 {shape}, compact.")
