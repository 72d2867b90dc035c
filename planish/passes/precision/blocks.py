"""Weights in a few bits: blocks of numbers along the summed axis, each with a scale; rounding that corrects itself.

The layout is that of com.microsoft.MatMulNBits: weight (n, k) → codes (n, blocks, block · bits / 8) uint8, two codes of
4 bits in a byte with the earlier one in the low half, and scales (n, blocks); number = (code − 2^(bits − 1)) · scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BITS = (4, 8)
#: Sizes of blocks that ONNX Runtime has kernels for.
BLOCKS = (16, 32, 64, 128, 256)
#: Parts of a block's range that the scale may be set by: a clipped extreme can cost less than coarser steps.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
_COLUMNS = 128

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Blocks:
    """A weight (n, k) in `bits`, as MatMulNBits has it."""

    codes: npt.NDArray[np.uint8]
    scales: Floats
    bits: int
    block: int
    depth: int

    def weight(self) -> Floats:
        """(n, k): what the codes stand for."""
        codes = self.codes
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], self.block)
        numbers = (codes.astype(np.float32) - np.float32(1 << (self.bits - 1))) * self.scales[..., None]
        return numbers.reshape(len(codes), -1)[:, : self.depth]


def choose_block(weight: Floats, alpha: float) -> int:
    """The size of blocks for a weight (n, k): FineQuant's adaptive granularity (arXiv:2308.09723).

    From coarse to fine: blocks are halved as long as that shrinks the mean range of a block by more than `alpha`, which
    is where outliers set the scale of many.
    """
    size = next((b for b in reversed(BLOCKS) if b <= weight.shape[1]), BLOCKS[0])
    size = min(size, 128)  # what kernels are fastest with
    ranges = np.abs(_in_blocks(weight, size)).max(axis=2)
    while size > BLOCKS[0]:
        halved = np.abs(_in_blocks(weight, size // 2)).max(axis=2)
        if ranges.mean() - halved.mean() <= alpha * ranges.mean():
            break
        size, ranges = size // 2, halved
    return size


def round_to_nearest(weight: Floats, bits: int, block: int, *, half: bool = False) -> Blocks:
    """Each number to the nearest multiple of its block's scale; of some scales the one with the least squared error.

    Args:
        half: scales are numbers of float16.
    """
    parts = _in_blocks(weight, block)
    scales = _scales(parts, bits, half)
    return _pack(_codes(parts, scales[..., None], bits), scales, bits, block, weight.shape[1])


def corrected(
    weight: Floats,
    moments: npt.NDArray[np.float64],
    bits: int,
    block: int,
    damp: float = 0.01,
    *,
    half: bool = False,
) -> Blocks:
    """Rounding column by column, where the columns still to come make up for the error so far (GPTQ, arXiv:2210.17323).

    Args:
        weight: (n, k).
        moments: (k, k): xᵀx of what the weight is multiplied by.
        damp: share of the mean of the diagonal that is added to it.
        half: scales are numbers of float16.
    """
    n, depth = weight.shape
    moments = moments.copy()
    dead = np.diag(moments) <= 0
    moments[dead, dead] = 1
    moments[np.diag_indices(depth)] += damp * np.diag(moments).mean()
    # Rows of the upper Cholesky factor of the inverse say how an error in a column is made up for by later ones.
    factor = np.linalg.cholesky(np.linalg.inv(moments)).T.astype(np.float32)
    left = np.ascontiguousarray(weight.T, np.float32)  # (k, n): a column of the weight lies in one piece
    blocks, middle = -(-depth // block), 1 << (bits - 1)
    codes = np.full((blocks * block, n), middle, np.uint8)
    scales = np.ones((blocks, n), np.float32)
    for start in range(0, depth, _COLUMNS):
        end = min(start + _COLUMNS, depth)
        errors = np.zeros((end - start, n), np.float32)
        for column in range(start, end):
            at = column // block
            if column % block == 0:
                scales[at] = _scales(_in_blocks(left[column : column + block].T, block), bits, half)[:, 0]
            codes[column] = _codes(left[column], scales[at], bits)
            rounded = (codes[column].astype(np.float32) - np.float32(middle)) * scales[at]
            errors[column - start] = (left[column] - rounded) / factor[column, column]
            left[column + 1 : end] -= factor[column, column + 1 : end, None] * errors[column - start]
        left[end:] -= factor[start:end, end:].T @ errors
    return _pack(codes.T.reshape(n, blocks, block), np.ascontiguousarray(scales.T), bits, block, depth)


def _in_blocks(weight: Floats, block: int) -> Floats:
    """(n, k) → (n, blocks, block), zeros behind the end."""
    n, depth = weight.shape
    blocks = -(-depth // block)
    if blocks * block != depth:
        weight = np.pad(weight, ((0, 0), (0, blocks * block - depth)))
    return weight.reshape(n, blocks, block)


def _scales(parts: Floats, bits: int, half: bool) -> Floats:
    """(n, blocks). The extreme of a block gets the lowest code, of which there is one more than of the highest."""
    at = np.abs(parts).argmax(axis=2)[..., None]
    whole = -np.take_along_axis(parts, at, axis=2)[..., 0] / np.float32(1 << (bits - 1))
    whole = np.where(whole == 0, np.float32(1), whole).astype(np.float32)
    if bits == 8:
        return _halved(whole) if half else whole
    best, least = whole, np.full(whole.shape, np.inf, np.float32)
    for share in _SHRINK:
        scale = _halved(whole * np.float32(share)) if half else whole * np.float32(share)
        codes = _codes(parts, scale[..., None], bits).astype(np.float32) - np.float32(1 << (bits - 1))
        error = np.square(codes * scale[..., None] - parts).sum(axis=2)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best.astype(np.float32)


def _halved(scales: Floats) -> Floats:
    """To the nearest numbers of float16 but zero, which no code could make up for."""
    least, most = np.float32(2.0**-24), np.float32(np.finfo(np.float16).max)
    rounded = np.clip(scales, -most, most).astype(np.float16).astype(np.float32)
    return np.where(rounded == 0, np.copysign(least, scales), rounded).astype(np.float32)


def _codes(numbers: Floats, scale: Floats, bits: int) -> npt.NDArray[np.uint8]:
    middle = 1 << (bits - 1)
    codes: npt.NDArray[np.uint8] = (np.clip(np.rint(numbers / scale), -middle, middle - 1) + middle).astype(np.uint8)
    return codes


def _pack(codes: npt.NDArray[np.uint8], scales: Floats, bits: int, block: int, depth: int) -> Blocks:
    if bits == 4:
        codes = np.bitwise_or(codes[..., 0::2], codes[..., 1::2] << np.uint8(4), dtype=np.uint8)
    return Blocks(np.ascontiguousarray(codes), np.ascontiguousarray(scales), bits, block, depth)
