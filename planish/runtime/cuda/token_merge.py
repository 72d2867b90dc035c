"""planish::MergeTokens and its relatives on the GPU, as one launch; called from torch, or by whoever has pointers.

For callers without torch: :func:`launch_plan` says everything of a launch that does not depend on addresses (source,
macros, threads, shared memory, cluster, scratch), and :class:`Parameters` is the kernel's only argument, in
C as at the top of ``source/merge.cuh``. Outputs are compact. ``scratch`` may hold anything before, and is free
again when the kernel has run. The grid is (cluster, batch, 1); with a cluster of more than 1 it is launched by
cuLaunchKernelEx with that cluster dimension. An empty output (batch, tokens or width 0) needs no launch.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from planish.ir.errors import InputError, UnsupportedError
from planish.ir.ops.merge_reference import merged_count
from planish.runtime.cuda import driver
from planish.runtime.cuda.cache import module

if TYPE_CHECKING:
    import torch

#: Who is more similar than whom is found out by comparing all pairs of them, in shared memory.
MOST_TOKENS, MOST_BY_ENERGY = 2720, 1744
THREADS = 512  # as in merge.cuh
DTYPES = ("float16", "bfloat16", "float32")


class Parameters(ctypes.Structure):
    """The kernel's argument. Strides are in elements, `scratch_batch` in bytes; null pointers as the source says."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("x", "keys", "sizes", "y", "merged", "logs", "index", "scratch")),
        *((n, ctypes.c_longlong) for n in ("x_batch", "x_row", "keys_batch", "keys_row", "keys_head", "scratch_batch")),
        *((n, ctypes.c_int) for n in ("tokens", "width", "heads", "size", "count", "protect", "max_norm", "wide")),
        ("margin", ctypes.c_float),
        ("alpha", ctypes.c_float),
        *((n, ctypes.c_void_p) for n in ("added", "gain", "shift", "normed")),
        ("epsilon", ctypes.c_float),
        *((n, ctypes.c_void_p) for n in ("added_shift", "key_shift")),
    ]


@dataclass(frozen=True)
class LaunchPlan:
    """What a launch needs besides addresses.

    Attributes:
        source: file of the kernel in ``source/``; `defines`: its macros; the function is ``merge_tokens``.
        shared: bytes of dynamic shared memory, less than 48 KB.
        cluster: blocks that work on one image, the first axis of the grid.
        scratch_batch: bytes of scratch for each image, a multiple of 16.
        count: tokens that go.
        left: tokens of the output.
    """

    source: str
    defines: dict[str, int]
    threads: int
    shared: int
    cluster: int
    scratch_batch: int
    count: int
    left: int


def launch_plan(
    batch: int, tokens: int, size: int, dtype: str, device: driver.Device,
    *, r: int = 0, ratio: float = 0.0, protected: int = 0, energy: bool = False, fused: bool = False,
) -> LaunchPlan:  # fmt: skip
    """How a merge is launched.

    Args:
        size: of a head of the keys.
        dtype: of tokens and keys: float16, bfloat16 or float32.
        r, ratio, protected: as the operator has them.
        energy: of planish::MergeTokensEnergy or MergeTokensEnergyMaxNorm.
        fused: with a sum before and a layer norm behind, for which a warp has a row in registers (:func:`widest`).

    Raises:
        InputError: a number that is negative.
        UnsupportedError: more tokens than the kernel takes, or another dtype.
    """
    if min(r, ratio, protected) < 0:
        raise InputError(f"r is {r}, ratio {ratio} and protected {protected}; none may be negative.")
    most = MOST_BY_ENERGY if energy else MOST_TOKENS
    if tokens > most:
        raise UnsupportedError(f"merging {tokens} tokens; the CUDA kernel takes at most {most}.")
    if dtype not in DTYPES:
        raise UnsupportedError(f"merging tokens in {dtype}; the CUDA kernel takes {', '.join(DTYPES)}.")
    count = merged_count(tokens, r, ratio, protected)
    left, free, half = tokens - count, max(tokens - protected, 0), (tokens + 1) // 2
    # A block for each multiprocessor, as far as batch and clusters go.
    wanted = device.processors // max(batch, 1) if device.arch == 90 else 1
    cluster = next((n for n in (8, 4, 2) if n <= wanted), 1)
    # As the kernels lay them out: keys to be ranked, and numbers of tokens; directions, and keys.
    shared = 8 * free + 4 * (2 * left + 4 * count + tokens) if energy else 8 * half + 4 * (left + half + 3 * count)
    shared += 4 * tokens  # sizes
    scratch = tokens * (-(-size // 32) * 32) * 4 + 8 * (free + count if energy else half) if count else 0
    source = "merge_energy.cu" if energy else "merge_tokens.cu"
    defines = {"VALUE": DTYPES.index(dtype), "FUSED": int(fused)}
    return LaunchPlan(source, defines, THREADS, shared, cluster, -(-scratch // 16) * 16, count, left)


def widest(dtype: str, wide: bool) -> int:
    """The widest tokens for a launch with a layer norm; `wide`: everything can be read 16 bytes at a time."""
    return 128 * (1 if not wide else 4 if dtype == "float32" else 8)


@dataclass(frozen=True)
class Norm:
    """A layer norm of what is merged: weights (width) of the tokens' dtype, compact."""

    gain: torch.Tensor
    shift: torch.Tensor | None = None
    epsilon: float = 1e-5


class Merged(NamedTuple):
    """What merging gives, compact.

    Attributes:
        tokens: (batch, left, width).
        sizes: (batch, left) float32.
        where: (batch, tokens) int64, the index of where each token went; None if it was not wanted, as those behind it.
        logs: (batch, left) float32, logarithms of the sizes, which are the bias of later attention.
        normed: (batch, left, width), the layer norm of `tokens`.
    """

    tokens: torch.Tensor
    sizes: torch.Tensor
    where: torch.Tensor | None
    logs: torch.Tensor | None
    normed: torch.Tensor | None


def merge_tokens(
    x: torch.Tensor,
    keys: torch.Tensor,
    sizes: torch.Tensor | None = None,
    *,
    r: int = 0,
    ratio: float = 0.0,
    protected: int = 0,
    max_norm: bool = False,
    margin: float | None = None,
    alpha: float = 1.0,
    index: bool = True,
    logs: bool = False,
    added: torch.Tensor | None = None,
    added_shift: torch.Tensor | None = None,
    key_shift: torch.Tensor | None = None,
    norm: Norm | None = None,
) -> Merged:
    """Merges r + floor(ratio · tokens) tokens of each image into similar ones (planish::MergeTokens).

    Args:
        x: (batch, tokens, width) float16, bfloat16 or float32; rows of any strides but a last one of 1.
        keys: (batch, tokens, heads, size), of the same dtype; any strides but a last one of 1, so that a slice of a
            fused product of queries, keys and values serves.
        sizes: (batch, tokens) float32, compact; None: ones.
        max_norm: scale a merged token to the norm of its longest member (planish::MergeTokensMaxNorm).
        margin, alpha: if `margin` is given, merge by energy (planish::MergeTokensEnergy and MergeTokensEnergyMaxNorm).
        index, logs: give these too.
        added: (batch, tokens, width), compact: tokens are x + added, as behind a residual branch; with `norm`.
        added_shift: (width,), added to all tokens too; with `norm`.
        key_shift: (size,) float32, added to the mean over heads of a token's keys, as that of their bias.
        norm: give the layer norm of the merged tokens too; not with `max_norm`.

    Raises:
        InputError: shapes, dtypes or devices that do not fit each other.
        UnsupportedError: more tokens than the kernel takes, another dtype, or no nvcc to compile it.
    """
    _check(x, keys, sizes)
    settings = {"r": r, "ratio": ratio, "protected": protected}
    shifts = (added_shift, key_shift)
    return _launch(x, keys, sizes, (max_norm, margin, alpha), (index, True, logs), added, norm, settings, shifts)


def add_norm(
    x: torch.Tensor, added: torch.Tensor, norm: Norm, added_shift: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + added + added_shift, and its layer norm, (batch, tokens, width) each: the same kernel, merging nothing."""
    keys = x[:, :, None]
    _check(x, keys, None)
    settings = {"protected": x.shape[1]}
    made = _launch(x, keys, None, (False, None, 1.0), (False, False, False), added, norm, settings, (added_shift, None))
    assert made.normed is not None
    return made.tokens, made.normed


def _launch(
    x: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor | None, how: tuple[bool, float | None, float],
    wanted: tuple[bool, bool, bool], added: torch.Tensor | None, norm: Norm | None, settings: dict[str, Any],
    shifts: tuple[torch.Tensor | None, torch.Tensor | None],
) -> Merged:  # fmt: skip
    import torch

    batch, tokens, width = x.shape
    number, dtype = x.device.index or 0, str(x.dtype)[6:]
    max_norm, margin, alpha = how
    plan = launch_plan(
        batch, tokens, keys.shape[3], dtype, driver.device(number),
        energy=margin is not None, fused=norm is not None, **settings,
    )  # fmt: skip
    shape = (batch, plan.left)
    kinds = (((batch, tokens), torch.int64), (shape, torch.float32), (shape, torch.float32))
    where, merged, logs = (
        torch.empty(size, dtype=kind, device=x.device) if want else None
        for want, (size, kind) in zip(wanted, kinds, strict=True)
    )
    y = x.new_empty((*shape, width))
    normed = x.new_empty(y.shape) if norm is not None else None
    strides = (x.stride(0), x.stride(1), keys.stride(0), keys.stride(1), keys.stride(2))
    each = 16 // x.element_size()
    weights = (added, norm.gain, norm.shift) if norm is not None else (None,) * 3
    aligned = all(item is None or item.data_ptr() % 16 == 0 for item in (x, keys, *weights, shifts[0]))
    wide = aligned and not any(n % each for n in (*strides, width, keys.shape[3]))
    _check_norm(x, added, norm, max_norm, wide)
    _check_shifts(x, keys, norm, shifts)
    if y.numel():
        scratch = torch.empty(batch * plan.scratch_batch, dtype=torch.uint8, device=x.device)
        parameters = Parameters(
            *_pointers(x, keys, sizes, y, merged, logs, where, scratch),
            *strides, plan.scratch_batch, tokens, width, keys.shape[2], keys.shape[3], plan.count,
            settings["protected"], int(max_norm), int(wide), margin or 0.0, alpha,
            *_pointers(*weights, normed), norm.epsilon if norm is not None else 0.0,
            *_pointers(*shifts),
        )  # fmt: skip
        kernel = _kernel(plan.source, number, plan.shared, **plan.defines)
        stream = int(torch.cuda.current_stream(x.device).cuda_stream)
        kernel.launch((plan.cluster, batch, 1), plan.threads, stream, parameters, cluster=plan.cluster)
    return Merged(y, merged, where, logs, normed)  # type: ignore[arg-type]


def _pointers(*items: torch.Tensor | None) -> tuple[int | None, ...]:
    return tuple(item.data_ptr() if item is not None else None for item in items)


@functools.cache
def _kernel(source: str, index: int, shared: int, **defines: int) -> driver.Function:
    return module(source, index, **defines).function("merge_tokens", shared)


def _check(x: torch.Tensor, keys: torch.Tensor, sizes: Any) -> None:
    if x.dim() != 3 or keys.dim() != 4:
        raise InputError(f"x has rank {x.dim()} and keys {keys.dim()}; they must be 3 and 4.")
    if x.device.type != "cuda":
        raise InputError(f"x is on {x.device}; CUDA kernels take CUDA tensors.")
    if keys.dtype != x.dtype or keys.device != x.device:
        raise InputError(f"keys are {keys.dtype} on {keys.device}, and x {x.dtype} on {x.device}.")
    if keys.shape[:2] != x.shape[:2] or 0 in keys.shape[2:]:
        raise InputError(f"x {tuple(x.shape)} and keys {tuple(keys.shape)} do not fit each other.")
    if x.numel() and (x.stride(2) != 1 or keys.stride(3) != 1):
        raise InputError("x and keys must have a last stride of 1.")
    if sizes is None:
        return
    if sizes.shape != x.shape[:2] or str(sizes.dtype) != "torch.float32" or sizes.device != x.device:
        raise InputError(f"sizes are {sizes.dtype} {tuple(sizes.shape)}; they must be float32 {tuple(x.shape[:2])}.")
    if not sizes.is_contiguous():
        raise InputError("sizes must be compact.")


def _check_norm(x: torch.Tensor, added: torch.Tensor | None, norm: Norm | None, max_norm: bool, wide: bool) -> None:
    if norm is None:
        if added is not None:
            raise InputError("`added` is given without `norm`.")
        return
    if max_norm:
        raise UnsupportedError("a layer norm of tokens that are scaled to the norm of the longest.")
    width, most = x.shape[2], widest(str(x.dtype)[6:], wide)
    if width > most:
        raise UnsupportedError(f"merging tokens of width {width} with a layer norm; the CUDA kernel takes {most}.")
    for name, item, shape in (
        ("added", added, x.shape),
        ("gain", norm.gain, (width,)),
        ("shift", norm.shift, (width,)),
    ):
        if item is not None and (item.shape != shape or item.dtype != x.dtype or not item.is_contiguous()):
            raise InputError(
                f"{name} is {item.dtype} {tuple(item.shape)}; it must be {x.dtype} {tuple(shape)}, compact."
            )


def _check_shifts(
    x: torch.Tensor, keys: torch.Tensor, norm: Norm | None, shifts: tuple[torch.Tensor | None, torch.Tensor | None]
) -> None:
    if shifts[0] is not None and norm is None:
        raise InputError("`added_shift` is given without `norm`.")
    wanted = (("added_shift", x.dtype, x.shape[2]), ("key_shift", "torch.float32", keys.shape[3]))
    for item, (name, dtype, size) in zip(shifts, wanted, strict=True):
        if item is not None and (item.shape != (size,) or str(item.dtype) != str(dtype) or not item.is_contiguous()):
            raise InputError(f"{name} is {item.dtype} {tuple(item.shape)}; it must be {dtype} ({size},), compact.")
