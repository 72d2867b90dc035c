"""Flash attention on CUDA tensors of torch: prefill over tiles, decode with the keys split; dense, or by block lists.

Tensors are (batch, tokens, heads, size) with any strides but a last one of 1, so that a view of (batch, heads, tokens,
size) serves as well; sizes 64 and 128, float16 or bfloat16. Nothing is copied and nothing synchronizes.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planish.ir.block_sparsity.overlap import worth_together
from planish.ir.errors import InputError, UnsupportedError
from planish.runtime.cuda import driver
from planish.runtime.cuda.cache import module

if TYPE_CHECKING:
    import torch

TILE = 64
#: Queries from which the kernel for Hopper is the faster one, by the size of heads; launch_attention.h has them too.
APART_FROM = {64: 1536, 128: 128}
_DECODE_WARPS = 8  # as in attention_decode.cu
SIZES = (64, 128)
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class BlockLists:
    """Which blocks of keys a block of queries sees: CSR as planish::BlockSparseAttention has it, on the GPU.

    The tensors are not written after this is made: kernels read them before what is in front of them is over.

    Attributes:
        indptr: (layouts, rows + 1) int32.
        indices: (entries,) int32, ascending within a row.
        head_layout: (heads,) int32.
        block: tokens of a block, a multiple of 64.
        shared: how many neighbouring query heads have one layout (a divisor of q_heads / kv_heads); 1 is always right.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    head_layout: torch.Tensor
    block: int
    shared: int = 1

    def __post_init__(self) -> None:
        if self.block < TILE or self.block % TILE:
            raise UnsupportedError(f"blocks of {self.block} tokens; CUDA kernels take multiples of {TILE}.")
        if self.indptr.is_cuda:
            # It reads the lists on the host, which a call, perhaps while a graph is captured, must not.
            _ = self.together

    @functools.cached_property
    def together(self) -> bool:
        """Whether two tiles of queries are worth walking together: they are if they name nearly the same keys."""
        even = self.block % (2 * TILE) == 0
        return even or worth_together(self.indptr.cpu().numpy(), self.indices.cpu().numpy())


def _structure(*names: tuple[str, Any]) -> type[ctypes.Structure]:
    return type("Parameters", (ctypes.Structure,), {"_fields_": list(names)})


_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int
_Prefill = _structure(
    *((name, _POINTER) for name in ("q", "k", "v", "out", "lse")),
    *((f"{name}_{axis}", _LONG) for name in ("q", "k", "v", "out") for axis in ("batch", "row", "head")),
    *((name, _POINTER) for name in ("indptr", "indices", "head_layout", "lengths")),
    *((name, _INT) for name in ("queries", "keys", "q_heads", "kv_heads", "causal", "rows", "block")),
    ("scale", ctypes.c_float),
    ("bias", _POINTER),
    ("bias_batch", _LONG),
)
_Decode = _structure(
    *((name, _POINTER) for name in ("q", "k", "v", "out", "parts", "done")),
    *((name, _LONG) for name in ("q_batch", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head")),
    *((name, _LONG) for name in ("out_batch", "out_head")),
    *((name, _POINTER) for name in ("indptr", "indices", "head_layout", "lengths")),
    *((name, _INT) for name in ("keys", "q_heads", "kv_heads", "rows", "block", "splits")),
    ("scale", ctypes.c_float),
    ("fixed", _INT),
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    lists: BlockLists | None = None,
    lengths: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v by heads, of what the mask and the lists let a query see.

    Args:
        q: (batch, queries, q_heads, size); k, v: (batch, keys, kv_heads, size).
        causal: the queries are at the last positions of the keys, and see no later key.
        scale: 1 / sqrt(size) if it is None.
        lengths: (batch,) int32: how many of the keys of each row are there; not with `causal` and one query less than
            all of them, whose position it would not be.
        bias: (batch, keys) float32: is added to the scaled scores of a key, in all heads; not with lists.
        out: as q, to be written; made if it is None.
        lse: (batch, q_heads, queries) float32, to be written with the log-sum-exp of the scaled scores.

    Raises:
        InputError: shapes, dtypes or devices that do not fit each other.
        UnsupportedError: a size or dtype without a kernel, or no nvcc to compile it.
    """
    _check(q, k, v, lists, lengths)
    if bias is not None:
        _check_bias(bias, k, lists)
    if out is None:
        out = q.new_empty(q.shape)
    batch, queries, heads, size = q.shape
    if 0 in q.shape:
        return out
    index = q.device.index or 0
    arch, offset = driver.device(index).arch, k.shape[1] - queries if causal else 0
    # Where there may be lists, tiles of queries and of keys have common borders.
    tiles = (offset + queries + TILE - 1) // TILE - offset // TILE if lists is not None else -(-queries // TILE)
    apart = arch == 90 and lengths is None and queries >= APART_FROM[size] and (lists is None or lists.together)
    if apart:  # whoever copies keys is apart from those who compute
        groups = 3 if size == TILE and lists is None else 2
        kernel = _hopper(index, size, _is_bf16(q), int(bias is not None), int(lists is not None))
    else:
        # Two tiles of queries share the keys that they load; their lists would have to be alike, and blocks be idle if
        # not. Of three tiles, the second of two blocks would be half empty.
        three = 2 * TILE < queries <= 3 * TILE
        groups = 2 if queries > TILE and not three and lists is None and arch >= 80 else 1
        kernel = _prefill(index, size, groups, _is_bf16(q), int(bias is not None), _ahead(size, lists))
        tiles = (offset + queries + TILE - 1) // TILE - offset // TILE
    parameters = _Prefill(
        *(item.data_ptr() for item in (q, k, v, out)),
        lse.data_ptr() if lse is not None else None,
        *(item.stride(axis) for item in (q, k, v, out) for axis in range(3)),
        *_lists(lists, lengths),
        queries, k.shape[1], heads, k.shape[2], int(causal), *_rows(lists),
        (scale if scale is not None else size**-0.5) * _LOG2_E,
        *((bias.data_ptr(), bias.stride(0)) if bias is not None else (None, 0)),
    )  # fmt: skip
    grid = ((tiles + groups - 1) // groups, heads, batch)
    kernel.launch(grid, (groups + apart) * 128, _stream(q), parameters, _map(k), _map(v))
    return out


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    workspace: Workspace,
    *,
    scale: float | None = None,
    lists: BlockLists | None = None,
    lengths: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query at the last position, (batch, 1, q_heads, size); otherwise as :func:`attention`.

    With `lengths` the query of a row is at the last position of its own keys.
    """
    _check(q, k, v, lists, lengths)
    batch, queries, heads, size = q.shape
    if queries != 1:
        raise InputError(f"decode takes one query, not {queries}; use attention.")
    if out is None:
        out = q.new_empty(q.shape)
    per_head = heads // k.shape[2]
    shared = next(n for n in (8, 4, 2, 1) if per_head % n == 0 and (lists is None or lists.shared % n == 0))
    index = q.device.index or 0
    kernel = _decode(index, size, shared, _is_bf16(q))
    splits = workspace.prepare(q, shared, k.shape[1])
    parameters = _Decode(
        *(item.data_ptr() for item in (q, k, v, out, workspace.parts, workspace.done)),
        q.stride(0), q.stride(2),
        *(item.stride(axis) for item in (k, v) for axis in range(3)),
        out.stride(0), out.stride(2),
        *_lists(lists, lengths),
        k.shape[1], heads, k.shape[2], *_rows(lists), splits,
        (scale if scale is not None else size**-0.5) * _LOG2_E,
        int(lists is not None),
    )  # fmt: skip
    early = driver.device(index).arch == 90  # whose code waits; that which later GPUs translate does not
    kernel.launch((splits, heads // shared, batch), 32 * _DECODE_WARPS, _stream(q), parameters, early=early)
    return out


class Workspace:
    """Buffers for the parts of :func:`decode`, kept between calls; one for each stream that decodes."""

    parts: torch.Tensor
    done: torch.Tensor

    def __init__(self) -> None:
        self._made: tuple[Any, ...] | None = None

    def prepare(self, q: torch.Tensor, shared: int, keys: int) -> int:
        """Makes the buffers if need be, and gives the number of parts."""
        import torch

        batch, _, heads, size = q.shape
        blocks = batch * heads // shared
        device = driver.device(q.device.index or 0)
        tiles = (keys + TILE - 1) // TILE
        splits = max(1, min(_splits(blocks, tiles, size, device.arch, device.processors), tiles, 64))
        wanted = (q.device, batch, heads, size, splits, shared)
        if self._made != wanted:
            self.parts = torch.empty(batch * heads * splits * (size + 2), dtype=torch.float32, device=q.device)
            self.done = torch.zeros(batch * heads, dtype=torch.int32, device=q.device)
            self._made = wanted
        return int(splits)


def _splits(blocks: int, tiles: int, size: int, arch: int, processors: int) -> int:
    """Parts of the keys, as launch_attention.h has it."""
    splits = processors // blocks
    twice = 4 * splits > tiles if arch >= 90 else arch >= 80 or size == TILE
    return 2 * processors // blocks if twice else splits


def _lists(lists: BlockLists | None, lengths: torch.Tensor | None) -> tuple[int | None, ...]:
    tensors = (lists.indptr, lists.indices, lists.head_layout) if lists is not None else (None,) * 3
    return tuple(t.data_ptr() if t is not None else None for t in (*tensors, lengths))


def _map(item: torch.Tensor) -> driver.TensorMap:
    """For Hopper's copies of tiles; others do not read it."""
    batch, tokens, heads, size = item.shape
    if driver.device(item.device.index or 0).arch != 90 or 0 in item.shape:
        return driver.TensorMap()
    strides = tuple(2 * item.stride(axis) for axis in (1, 2, 0))
    return driver.tensor_map(item.data_ptr(), (size, tokens, heads, batch), strides, (64, TILE, 1, 1))


def _rows(lists: BlockLists | None) -> tuple[int, int]:
    return (lists.indptr.shape[1] - 1, lists.block) if lists is not None else (0, TILE)


def _stream(q: torch.Tensor) -> int:
    import torch

    return int(torch.cuda.current_stream(q.device).cuda_stream)


def _is_bf16(q: torch.Tensor) -> int:
    return int(str(q.dtype) == "torch.bfloat16")


def _ahead(size: int, lists: BlockLists | None) -> int:
    """Tiles that are on their way on Hopper: two where a multiprocessor has room for them in each of its blocks."""
    return 2 if size == TILE and lists is None else 1


@functools.cache
def _prefill(index: int, size: int, groups: int, bf16: int, bias: int, ahead: int) -> driver.Function:
    arch = driver.device(index).arch
    # As in attention.cu: the queries' tiles, the keys' and values' of each stage, barriers, biases.
    stages = ahead + 2 if arch == 90 else 2 if arch >= 80 else 1
    shared = (groups + 2 * stages) * TILE * size * 2 + 64 + bias * stages * TILE * 4
    loaded = module(
        "attention.cu",
        index,
        HEAD=size,
        GROUPS=groups,
        ELEMENT_BF16=bf16,
        BIAS=bias,
        **({"AHEAD": ahead} if ahead > 1 else {}),
    )
    return loaded.function("attention", shared)


@functools.cache
def _hopper(index: int, size: int, bf16: int, bias: int, lists: int) -> driver.Function:
    loaded = module("attention_hopper.cu", index, HEAD=size, ELEMENT_BF16=bf16, BIAS=bias, LISTS=lists)
    # Tiles of queries, two stages of 128 keys and values, barriers, biases or what the stages hold.
    groups = 3 if size == TILE and not lists else 2
    return loaded.function("attention", (groups + 8) * TILE * size * 2 + 128 + bias * 1024)


@functools.cache
def _decode(index: int, size: int, shared: int, bf16: int) -> driver.Function:
    loaded = module("attention_decode.cu", index, HEAD=size, SHARED=shared, ELEMENT_BF16=bf16)
    stages = 2 if driver.device(index).arch >= 80 else 1
    return loaded.function("attention_decode", stages * 2 * TILE * size * 2)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: BlockLists | None, lengths: Any) -> None:
    for name, item in (("q", q), ("k", k), ("v", v)):
        if item.dim() != 4:
            raise InputError(f"{name} has rank {item.dim()}; it must be (batch, tokens, heads, size).")
        if item.stride(3) != 1 or any(item.stride(axis) % 8 for axis in range(3)) or item.data_ptr() % 16:
            raise InputError(f"{name} must have a last stride of 1, other strides in multiples of 8, and be aligned.")
        if item.dtype != q.dtype or item.device != q.device:
            raise InputError(f"{name} is {item.dtype} on {item.device}, and q {q.dtype} on {q.device}.")
    if q.device.type != "cuda":
        raise InputError(f"q is on {q.device}; CUDA kernels take CUDA tensors.")
    if str(q.dtype) not in ("torch.float16", "torch.bfloat16"):
        raise UnsupportedError(f"attention kernels take float16 and bfloat16, not {q.dtype}.")
    if q.shape[3] not in SIZES:
        raise UnsupportedError(f"heads of size {q.shape[3]}; attention kernels have {SIZES[0]} and {SIZES[1]}.")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise InputError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other.")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise InputError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads.")
    if lengths is not None and (tuple(lengths.shape) != (q.shape[0],) or str(lengths.dtype) != "torch.int32"):
        raise InputError(f"lengths is {lengths.dtype} {tuple(lengths.shape)}; it must be int32 ({q.shape[0]},).")
    if lists is not None and tuple(lists.head_layout.shape) != (q.shape[2],):
        raise InputError(f"head_layout is for {lists.head_layout.shape[0]} heads, and q has {q.shape[2]}.")


def _check_bias(bias: torch.Tensor, k: torch.Tensor, lists: BlockLists | None) -> None:
    if lists is not None:
        raise UnsupportedError("attention over lists of blocks has no kernel with a bias.")
    if bias.shape != k.shape[:2] or str(bias.dtype) != "torch.float32" or bias.device != k.device:
        raise InputError(f"bias is {bias.dtype} {tuple(bias.shape)}; it must be float32 {tuple(k.shape[:2])}.")
    if bias.stride(1) != 1:
        raise InputError("bias must have a last stride of 1.")
