"""Weights in 4 and 8 bits for decoding: our kernel against cuBLAS in float16, and against the bytes of the weights.

    python benchmarks/cuda_gemv.py [--json FILE]

Times are of CUDA graphs of 16 products and more, whose weights rotate past the L2 cache, medians, interleaved; the
floor is the bytes of weights and scales over the bandwidth of a copy on the same card (read and written bytes). "After
another kernel": each reads nothing before the one in front of it is over; else its weights, which that does not write.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cuda_attention import graph, rounded, times

from planish.runtime.cuda.quantized_gemv import quantized_gemv

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096))  # n, k
#: Name → bits, block, whether weights are read early.
KINDS = {
    "int4, blocks of 32": (4, 32, True),
    "the same after another kernel": (4, 32, False),
    "int4, blocks of 128": (4, 128, True),
    "int8, blocks of 32": (8, 32, True),
    "int8": (8, None, True),
}


def bandwidth() -> float:
    """Bytes a second of a large copy."""
    one = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    two = torch.empty_like(one)
    return 2 * one.numel() / times({"copy": lambda: two.copy_(one)}, 15)["copy"] * 1000


def weights(n: int, k: int, bits: int, block: int | None, copies: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (copies, n, k * bits // 8) if block is None else (copies, n, k // block, block * bits // 8)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    scales = torch.rand(copies, n, *(() if block is None else (k // block,)), device="cuda") * 0.01
    return codes, scales if block is None else scales.half()


def dense(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, k) float64."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return ((codes.double() - (1 << (bits - 1))) * scales.double()[..., None]).flatten(1)


def row(n: int, k: int, rows: int, rate: float) -> dict[str, Any]:
    """Microseconds, ratios to cuBLAS and to the floor, errors."""
    x = torch.randn(rows, k, device="cuda").half()
    copies = max(2, (160 << 20) // (n * k * 2) + 1)
    plain = torch.randn(copies, n, k, device="cuda", dtype=torch.float16) * 0.02
    calls: dict[str, Callable[[], Any]] = {}
    calls["float16"] = graph(lambda i: F.linear(x, plain[i % copies]), rounded(copies))
    counts, floors, errors = {"float16": rounded(copies)}, {"float16": n * k * 2 / rate * 1e6}, {}
    kept = []  # graphs do not keep what they read
    for name, (bits, block, early) in KINDS.items():
        number = max(2, (160 << 20) // (n * k * bits // 8) + 1)
        codes, scales = weights(n, k, bits, block, number)
        kept.append((codes, scales))
        want = x.double() @ dense(codes[0], scales[0], bits).T
        got = quantized_gemv(x, codes[0], scales[0], bits=bits).double()
        errors[name] = float((got - want).norm() / want.norm())
        floors[name] = (codes[0].numel() + scales[0].numel() * scales.element_size()) / rate * 1e6
        counts[name] = rounded(number)
        calls[name] = graph(
            lambda i, c=codes, s=scales, bits=bits, early=early: quantized_gemv(
                x, c[i % len(c)], s[i % len(c)], bits=bits, constant=early
            ),
            rounded(number),
        )
    found = {name: ms / counts[name] * 1000 for name, ms in times(calls, 15).items()}
    return {"n": n, "k": k, "rows": rows, "us": found, "floor_us": floors, "error": errors}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| n × k | rows | float16, µs | " + " | ".join(KINDS) + " | largest error |",
        "|" + "---|" * (len(KINDS) + 4),
    ]
    for item in rows:
        us, floor = item["us"], item["floor_us"]
        cells = [f"{us[n]:.1f}: {us['float16'] / us[n]:.2f}x, {floor[n] / us[n]:.0%}" for n in KINDS]
        plain = f"{us['float16']:.1f} ({floor['float16'] / us['float16']:.0%})"
        cells = [f"{item['n']} × {item['k']}", str(item["rows"]), plain, *cells, f"{max(item['error'].values()):.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rate = bandwidth()
    rows = [row(n, k, count, rate) for n, k in SHAPES for count in (1, 4, 8)]
    print(f"copy: {rate / 1e12:.2f} TB/s\n{table(rows)}")
    if arguments.json:
        made = {"gpu": torch.cuda.get_device_name(), "copy_bytes_s": rate, "rows": rows}
        arguments.json.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
