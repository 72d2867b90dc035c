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
from typing import TYPE_CHECKING, Any

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
    *, r: int = 0, ratio: float = 0.0, protected: int = 0, energy: bool = False,
) -> LaunchPlan:  # fmt: skip
    """How a merge is launched.

    Args:
        size: of a head of the keys.
        dtype: of tokens and keys: float16, bfloat16 or float32.
        r, ratio, protected: as the operator has them.
        energy: of planish::MergeTokensEnergy or MergeTokensEnergyMaxNorm.

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
    defines = {"VALUE": DTYPES.index(dtype)}
    return LaunchPlan(source, defines, THREADS, shared, cluster, -(-scratch // 16) * 16, count, left)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Merges r + floor(ratio · tokens) tokens of each image into similar ones (planish::MergeTokens).

    Args:
        x: (batch, tokens, width) float16, bfloat16 or float32; rows of any strides but a last one of 1.
        keys: (batch, tokens, heads, size), of the same dtype; any strides but a last one of 1, so that a slice of a
            fused product of queries, keys and values serves.
        sizes: (batch, tokens) float32, compact; None: ones.
        max_norm: scale a merged token to the norm of its longest member (planish::MergeTokensMaxNorm).
        margin, alpha: if `margin` is given, merge by energy (planish::MergeTokensEnergy and MergeTokensEnergyMaxNorm).
        index: give where each token went.
        logs: give the logarithms of the merged sizes, which are the bias of later attention.

    Returns:
        (tokens (batch, left, width), sizes (batch, left) float32, index (batch, tokens) int64 or None, logarithms
        (batch, left) float32 or None), compact.

    Raises:
        InputError: shapes, dtypes or devices that do not fit each other.
        UnsupportedError: more tokens than the kernel takes, another dtype, or no nvcc to compile it.
    """
    import torch

    _check(x, keys, sizes)
    batch, tokens, width = x.shape
    number = x.device.index or 0
    plan = launch_plan(
        batch, tokens, keys.shape[3], str(x.dtype)[6:], driver.device(number),
        r=r, ratio=ratio, protected=protected, energy=margin is not None,
    )  # fmt: skip
    y = x.new_empty((batch, plan.left, width))
    merged = torch.empty((batch, plan.left), dtype=torch.float32, device=x.device)
    where = torch.empty((batch, tokens), dtype=torch.int64, device=x.device) if index else None
    logarithms = torch.empty_like(merged) if logs else None
    if merged.numel() == 0:
        return y, merged, where, logarithms
    scratch = torch.empty(batch * plan.scratch_batch, dtype=torch.uint8, device=x.device)
    strides = (x.stride(0), x.stride(1), keys.stride(0), keys.stride(1), keys.stride(2))
    each = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == keys.data_ptr() % 16 == 0
    wide = aligned and not any(n % each for n in (*strides, width, keys.shape[3]))
    outputs = (item.data_ptr() if item is not None else None for item in (y, merged, logarithms, where, scratch))
    parameters = Parameters(
        x.data_ptr(), keys.data_ptr(), sizes.data_ptr() if sizes is not None else None, *outputs,
        *strides, plan.scratch_batch, tokens, width, keys.shape[2], keys.shape[3], plan.count, protected,
        int(max_norm), int(wide), margin or 0.0, alpha,
    )  # fmt: skip
    kernel = _kernel(plan.source, number, plan.shared, **plan.defines)
    stream = int(torch.cuda.current_stream(x.device).cuda_stream)
    kernel.launch((plan.cluster, batch, 1), plan.threads, stream, parameters, cluster=plan.cluster)
    return y, merged, where, logarithms


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
