"""Attention kernels on a GPU: S2's pattern and dense, against torch's flash and cuDNN kernels and FlexAttention.

    python benchmarks/cuda_attention.py [--json FILE] [--quick]

CUDA events, medians, peers interleaved in one process; decode is timed by graphs of 16 steps and more, as a decoder has
them in its layers, whose caches rotate past the L2 cache.
Every output is compared with float64 (sampled rows of four heads) before it is timed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from planish.ir.block_sparsity import S2
from planish.ir.block_sparsity.pattern import Heads
from planish.runtime.cuda.attention import BlockLists, Workspace, attention, decode

HEADS, SIZE, LOCAL, STRIDE = 32, 128, 16, 8


def lists_of(length: int, block: int) -> tuple[BlockLists, np.ndarray]:
    """S2's lists on the GPU, and the share of causal pairs of tokens that each head sees."""
    layout = S2(block=block, local=LOCAL, stride=STRIDE).layout(length, Heads(HEADS, HEADS))
    tensors = (
        torch.tensor(x, dtype=torch.int32, device="cuda") for x in (layout.indptr, layout.indices, layout.head_layout)
    )
    pairs = layout.counts.sum(1) * block * block - layout.rows * block * (block - 1) // 2
    return BlockLists(*tensors, block), pairs[layout.head_layout] / (length * (length + 1) / 2)


def times(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds, medians of interleaved rounds."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            found[name].append(start.elapsed_time(end))
    return {name: median(values) for name, values in found.items()}


def rounded(copies: int) -> int:
    """Runs of a graph that goes through copies of its inputs: 16 or more, so that its start and end do not count."""
    return copies * -(-16 // copies)


def graph(call: Callable[[int], Any], copies: int) -> Callable[[], Any]:
    """One replay runs `call` on each copy of its inputs."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(copies):
            call(i)
    torch.cuda.synchronize()
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made, stream=stream):
        for i in range(copies):
            call(i)
    return made.replay


def error(got: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: BlockLists | None) -> float:
    """Relative L2 on sampled queries of four heads."""
    length, queries = k.shape[1], q.shape[1]
    rows = torch.unique(torch.cat([torch.randint(0, queries, (24,)), torch.tensor([0, queries - 1])])).cuda()
    wrong = right = 0.0
    for head in (0, 5, HEADS - 6, HEADS - 1):
        scores = q[0, rows, head].double() @ k[0, :, head].double().T / math.sqrt(SIZE)
        position = rows + length - queries
        sees = torch.arange(length, device="cuda") <= position[:, None]
        if lists is not None:
            layout = int(lists.head_layout[head])
            for i, at in enumerate((position // lists.block).tolist()):
                ends = lists.indptr[layout, at : at + 2].tolist()
                blocks = torch.zeros(-(-length // lists.block), dtype=torch.bool, device="cuda")
                blocks[lists.indices[ends[0] : ends[1]].long()] = True
                sees[i] &= blocks.repeat_interleave(lists.block)[:length]
        want = torch.softmax(scores.masked_fill(~sees, -math.inf), -1) @ v[0, :, head].double()
        wrong += (got[0, rows, head].double() - want).square().sum().item()
        right += want.square().sum().item()
    return math.sqrt(wrong / right)


def flex_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: BlockLists) -> Callable[[], Any]:
    """FlexAttention over the same blocks: the diagonal ones are partial, the others full."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    length, block = k.shape[1], lists.block
    rows = -(-length // block)
    layouts, indptr, indices = (x.cpu().numpy() for x in (lists.head_layout, lists.indptr, lists.indices))
    counts = np.diff(indptr[layouts], axis=1) - 1  # the last one of a row is the diagonal's
    full = np.zeros((HEADS, rows, rows), np.int32)
    for head, layout in enumerate(layouts):
        for row, (start, n) in enumerate(zip(indptr[layout], counts[head], strict=False)):
            full[head, row, :n] = indices[start : start + n]
    diagonal = torch.zeros(1, HEADS, rows, rows, dtype=torch.int32, device="cuda")
    diagonal[..., 0] = torch.arange(rows, device="cuda", dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(
        torch.ones(1, HEADS, rows, dtype=torch.int32, device="cuda"), diagonal,
        torch.from_numpy(counts[None].astype(np.int32)).cuda(), torch.from_numpy(full[None]).cuda(),
        BLOCK_SIZE=(block, block), mask_mod=lambda b, h, i, j: i >= j, compute_q_blocks=False,
    )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {"BLOCK_M": 64, "BLOCK_N": 64} if block == 64 else None
    parts = tuple(x.transpose(1, 2) for x in (q, k, v))
    return lambda: compiled(*parts, block_mask=mask, kernel_options=options)


def sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Any:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)


def prefill_row(length: int, block: int, flex: bool) -> dict[str, Any]:
    """Milliseconds of each peer, TFLOP/s over the pairs of tokens that are seen, and errors."""
    q, k, v = (torch.randn(1, length, HEADS, SIZE, device="cuda", dtype=torch.float16) for _ in range(3))
    lists, density = lists_of(length, block)
    calls: dict[str, Callable[[], Any]] = {
        "flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, True),
        "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, True),
        "dense": lambda: attention(q, k, v),
        "s2": lambda: attention(q, k, v, lists=lists),
    }
    row: dict[str, Any] = {"kind": "prefill", "length": length, "block": block, "density": float(density.mean())}
    row["error"] = error(calls["s2"](), q, k, v, lists)
    row["error_dense"] = error(calls["dense"](), q, k, v, None)
    if flex:
        calls["flex"] = flex_call(q, k, v, lists)
        row["error_flex"] = error(calls["flex"]().transpose(1, 2), q, k, v, lists)
    row |= times(calls, 7 if length > 40000 else 15)
    flops = 4 * HEADS * SIZE * length * (length + 1) / 2
    row["tflops"] = flops * row["density"] / row["s2"] / 1e9
    row["tflops_dense"] = flops / row["dense"] / 1e9
    return row


def decode_row(length: int, block: int) -> dict[str, Any]:
    """Microseconds of each peer, and GB/s of the keys and values that the lists name."""
    copies = max(2, math.ceil((200 << 20) / (length * HEADS * SIZE * 4)) + 1)
    steps = rounded(copies)
    q = torch.randn(1, 1, HEADS, SIZE, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(copies, length, HEADS, SIZE, device="cuda", dtype=torch.float16) for _ in range(2))
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))  # by heads, as caches are
    lists, _ = lists_of(length, block)
    ends = lists.indptr[:, -2:]
    tokens = float((ends[:, 1] - ends[:, 0])[lists.head_layout.long()].float().mean()) * block
    sparse, dense = Workspace(), Workspace()
    parts = [(k[i : i + 1], v[i : i + 1]) for i in range(copies)]
    row: dict[str, Any] = {"kind": "decode", "length": length, "block": block, "tokens": tokens}
    row["error"] = error(decode(q, *parts[0], sparse, lists=lists), q, *parts[0], lists)
    row["error_dense"] = error(decode(q, *parts[0], dense), q, *parts[0], None)
    calls = {
        "flash": graph(lambda i: sdpa(SDPBackend.FLASH_ATTENTION, q, *parts[i % copies], False), steps),
        "cudnn": graph(lambda i: sdpa(SDPBackend.CUDNN_ATTENTION, q, *parts[i % copies], False), steps),
        "dense": graph(lambda i: decode(q, *parts[i % copies], dense), steps),
        "s2": graph(lambda i: decode(q, *parts[i % copies], sparse, lists=lists), steps),
    }
    row |= {name: ms / steps * 1000 for name, ms in times(calls, 21).items()}
    row["gb_s"] = tokens * HEADS * SIZE * 4 / row["s2"] / 1000
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for kind, unit in (("decode", "µs"), ("prefill", "ms")):
        names = ("flash", "cudnn", "dense", "s2", *(("flex",) if kind == "prefill" else ()))
        lines += [f"{kind}, {unit}", "| length | block | " + " | ".join(names) + " | of the best dense | error |"]
        lines.append("|" + "---|" * (len(names) + 4))
        for row in (row for row in rows if row["kind"] == kind):
            best = min(row["flash"], row["cudnn"]) / row["s2"]
            cells = [f"{row[n]:.3g}" if n in row else "–" for n in names]
            lines.append(
                f"| {row['length']} | {row['block']} | {' | '.join(cells)} | {best:.2f} | {row['error']:.1e} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two lengths, no FlexAttention")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    lengths = (8192, 32768) if arguments.quick else (8192, 32768, 65536, 131072)
    rows = []
    for length in lengths:
        for block in (64, 128):
            rows.append(decode_row(length, block))
            rows.append(prefill_row(length, block, not arguments.quick))
    print(table(rows))
    if arguments.json:
        from cuda_gemv import bandwidth

        about = {"gpu": torch.cuda.get_device_name(), "copy_bytes_s": bandwidth()}
        arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
